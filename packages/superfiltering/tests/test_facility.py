"""Facility location against a dense float64 greedy, the optimum of tiny sets, and its own other ways of searching."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from superfiltering.facility import coverage, facility_location
from superfiltering.kernels import Kernel, Sparse

from model_hooks import RequestError

KERNELS = ("exp-euclidean/d", "cosine", "rbf")


def similarities(x, kernel="exp-euclidean/d", gamma=1.0):
    """[n, n] in float64, each pair by itself."""
    x = np.asarray(x, np.float64)
    if kernel == "cosine":
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        return np.maximum(x @ x.T, 0)
    distance = np.sqrt(((x[:, None] - x[None]) ** 2).sum(2))
    return np.exp(-distance / x.shape[1]) if kernel != "rbf" else np.exp(-gamma * distance**2)


def value(s, chosen):
    return math.fsum(s[:, list(chosen)].max(1)) if len(chosen) else 0.0


def greedy(s, k, given=()):
    """The textbook: F of every extension, the first of the best."""
    chosen = list(given)
    for _ in range(k):
        rest = [j for j in range(len(s)) if j not in chosen]
        chosen.append(max(rest, key=lambda j: (value(s, [*chosen, j]), -j)))
    return chosen[len(given) :]


def points(n, d=8, seed=0):
    """Clustered unit vectors, as embeddings of texts are."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(max(2, n // 6), d))[draw.integers(0, max(2, n // 6), n)] + 0.5 * draw.normal(size=(n, d))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_choice_is_the_textbook_s(kernel):
    x = points(60)
    s = similarities(x, kernel, gamma=2.0)
    found = facility_location(x, 12, kernel=kernel, gamma=2.0)
    assert found.chosen.tolist() == greedy(s, 12)
    curve = [value(s, found.chosen[:k]) for k in range(13)]
    np.testing.assert_allclose(found.gains, np.diff(curve), rtol=1e-5, atol=1e-9)
    assert found.covered.objective == pytest.approx(curve[-1], rel=1e-12)
    assert found.covered.coverage == pytest.approx(curve[-1] / 60, rel=1e-12)


@given(st.integers(2, 300), st.integers(0, 10**6), st.sampled_from(KERNELS), st.data())
@settings(max_examples=100)
def test_lazy_is_naive(n, seed, kernel, data):
    x = points(n, seed=seed)
    k = data.draw(st.integers(1, min(n, 40)))
    lazy, naive = (facility_location(x, k, kernel=kernel, optimiser=how) for how in ("lazy", "naive"))
    assert lazy.chosen.tolist() == naive.chosen.tolist()
    np.testing.assert_array_equal(lazy.gains, naive.gains)
    assert lazy.evaluations <= naive.evaluations
    assert (np.diff(lazy.gains) <= 1e-9).all()  # the gain curve never rises
    assert (lazy.gains >= 0).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_blocks_choose_as_the_cached_matrix(kernel, monkeypatch):
    monkeypatch.setattr("superfiltering.kernels.BLOCK", 1500)  # five rows
    x = points(150, seed=3)
    cached, blocks = (facility_location(x, 30, kernel=kernel, cache_bytes=b) for b in (2**30, 0))
    assert cached.chosen.tolist() == blocks.chosen.tolist()
    np.testing.assert_allclose(cached.gains, blocks.gains, rtol=1e-6)
    assert cached.covered == blocks.covered


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("optimiser", ["lazy", "stochastic"])
def test_a_tiny_optimum(kernel, optimiser):
    """At least (1 - 1/e) of the optimum, found by trying all sets."""
    for seed in range(6):
        s = similarities(x := points(10, seed=seed), kernel)
        best = max(value(s, c) for c in itertools.combinations(range(10), 3))
        found = facility_location(x, 3, kernel=kernel, optimiser=optimiser, epsilon=0.01, seed=seed)
        assert value(s, found.chosen) >= (1 - 1 / math.e) * best
        assert value(s, found.chosen) <= best + 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_the_compat_kernel_loses_nothing_to_rounding(seed):
    """Of sum (1 - s), all that choices differ in: F itself is 0.99 n for any choice at d = 384."""
    x = points(240, d=384, seed=seed)
    s = similarities(x)
    found, dense = facility_location(x, 24), greedy(s, 24)
    assert found.covered.objective >= 0.9999 * value(s, dense)
    assert 240 - found.covered.objective <= 1.0001 * (240 - value(s, dense))
    random = [value(s, np.random.default_rng(r).choice(240, 24, replace=False)) for r in range(20)]
    assert found.covered.objective > max(random)


@pytest.mark.parametrize("seed", range(3))
def test_records_that_are_nearly_alike(seed):
    """Distances of 1e-3: similarities kept as float32 would differ by a few tens of steps, and choose others."""
    x = np.eye(384)[0] + 1e-3 * points(60, d=384, seed=seed).astype(np.float64)
    assert facility_location(x, 30).chosen.tolist() == greedy(similarities(x), 30)


def test_a_record_is_its_own_neighbour_among_many_copies():
    x = torch.from_numpy(np.repeat(points(5), 6, axis=0)).double()
    sparse = Sparse(x, Kernel(), 2)
    for record in range(30):
        assert record in sparse.of[sparse.starts[record] : sparse.starts[record + 1]]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("neighbours", [None, 30])
def test_duplicates_wait_for_the_distinct(kernel, neighbours):
    x = points(15, seed=5)[np.random.default_rng(0).permutation(np.repeat(np.arange(15), 4))]
    found = facility_location(x, 60, kernel=kernel, neighbours=neighbours)
    assert len({row.tobytes() for row in x[found.chosen[:15]]}) == 15
    assert (found.gains[:15] > 0).all()
    assert (found.gains[15:] == 0).all()  # nothing is left to gain; no stop before the budget
    assert sorted(found.chosen) == list(range(60))
    assert found.chosen[15:].tolist() == sorted(found.chosen[15:])  # ties: the lower position first
    assert found.covered.coverage == pytest.approx(1, abs=1e-12)
    assert found.covered.mean_distance == pytest.approx(0, abs=1e-9)


def test_budgets():
    x = points(20)
    none = facility_location(x, 0)
    assert (len(none.chosen), none.covered.objective, none.covered.mean_distance) == (0, 0.0, None)
    assert sorted(facility_location(x, 20).chosen) == list(range(20))
    one = facility_location(x, 1)
    assert one.chosen[0] == similarities(x).sum(0).argmax()  # the best single representative


@pytest.mark.parametrize("optimiser", ["lazy", "naive"])
def test_a_start_from_what_is_given(optimiser):
    x = points(80, seed=2)
    cold = facility_location(x, 20, optimiser=optimiser)
    warm = facility_location(x, 12, given=cold.chosen[:8], optimiser=optimiser)
    assert warm.chosen.tolist() == cold.chosen[8:].tolist()
    assert warm.covered.objective == pytest.approx(cold.covered.objective, rel=1e-12)
    other = [3, 50, 7]
    assert facility_location(x, 5, given=other).chosen.tolist() == greedy(similarities(x), 5, other)


def test_quotas_by_group():
    x = points(60, seed=4)
    groups = ["code" if k % 3 else "talk" for k in range(60)]
    s = similarities(x)
    found = facility_location(x, groups=groups, quotas={"code": 2, "talk": 4})
    assert [groups[k] for k in found.chosen].count("talk") == 4
    assert len(found.chosen) == 6
    chosen: list[int] = []
    left = {"code": 2, "talk": 4}
    for _ in range(6):  # the textbook with a choice of open groups
        open_ones = [j for j in range(60) if j not in chosen and left[groups[j]]]
        chosen.append(max(open_ones, key=lambda j: (value(s, [*chosen, j]), -j)))
        left[groups[chosen[-1]]] -= 1
    assert found.chosen.tolist() == chosen
    only = facility_location(x, groups=groups, quotas={"talk": 3})
    assert {groups[k] for k in only.chosen} == {"talk"}


def test_all_neighbours_are_the_dense_choice():
    x = points(90, seed=6)
    dense, sparse = facility_location(x, 15), facility_location(x, 15, neighbours=90)
    assert dense.chosen.tolist() == sparse.chosen.tolist()
    np.testing.assert_allclose(dense.gains[1:], sparse.gains[1:], rtol=1e-4)  # the first is counted from another zero
    assert dense.covered == sparse.covered


@pytest.mark.parametrize("kernel", KERNELS)
def test_few_neighbours_are_nearly_as_good(kernel):
    x = points(600, d=16, seed=7)
    dense, sparse = (facility_location(x, 60, kernel=kernel, neighbours=m) for m in (None, 50))
    lost = (600 - sparse.covered.objective) / (600 - dense.covered.objective)
    assert 0.98 < lost < 1.03
    assert (np.diff(sparse.gains) <= 1e-9).all()
    again = facility_location(x, 60, kernel=kernel, neighbours=50, optimiser="naive")
    assert again.chosen.tolist() == sparse.chosen.tolist()


def test_stochastic_is_cheap_repeatable_and_good():
    x = points(400, seed=8)
    first, again = (facility_location(x, 40, optimiser="stochastic", epsilon=0.05, seed=1) for _ in range(2))
    assert first.chosen.tolist() == again.chosen.tolist()
    assert first.evaluations == 40 * math.ceil(10 * math.log(20))
    best = facility_location(x, 40)
    assert 400 - first.covered.objective < 1.1 * (400 - best.covered.objective)
    assert first.chosen.tolist() != facility_location(x, 40, optimiser="stochastic", epsilon=0.05).chosen.tolist()


def test_coverage_of_any_choice():
    x = points(50, seed=9)
    chosen = [4, 30, 11]
    distance = np.sqrt(((x[:, None].astype(float) - x[chosen][None]) ** 2).sum(2)).min(1)
    found = coverage(x, chosen)
    assert found.objective == pytest.approx(value(similarities(x), chosen), rel=1e-12)
    assert found.mean_distance == pytest.approx(distance.mean(), rel=1e-6)


def test_far_from_the_origin_and_progress():
    x = points(60).astype(np.float64)
    steps: list[int] = []
    moved = facility_location(x + 100, 10, progress=steps.append)
    assert moved.chosen.tolist() == facility_location(x, 10).chosen.tolist()
    assert facility_location(x + 100, 10, neighbours=60).chosen.tolist() == moved.chosen.tolist()
    assert steps == list(range(1, 11))


BAD = points(5)
BAD[3, 1] = np.nan
ZERO = points(5)
ZERO[2] = 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 6}, "budget 6 of 5 records: 0 to 5"),
        ({"budget": -1}, "0 to 5"),
        ({"budget": 4, "given": [0, 1]}, "2 of them given: 0 to 3"),
        ({"budget": None}, "a budget, or groups"),
        ({"quotas": {"a": 1}}, "a budget, or groups"),
        ({"quotas": {"a": 1}, "groups": list("aaaaa")}, "a budget, or groups"),
        ({"budget": None, "quotas": {"a": 4}, "groups": list("aaabb")}, "quota 4 of group 'a': 0 to 3"),
        ({"budget": None, "quotas": {"a": 1}, "groups": list("aab")}, "3 groups for 5 records"),
        ({"kernel": "dot"}, "unknown kernel 'dot'; there are exp-euclidean/d, cosine, rbf"),
        ({"kernel": "rbf", "gamma": 0.0}, "above 0"),
        ({"optimiser": "eager"}, "lazy, naive, stochastic"),
        ({"epsilon": 1.0}, "between 0 and 1"),
        ({"neighbours": 6}, "1 to 5"),
        ({"given": [0, 0]}, "must differ"),
        ({"given": [5]}, "within 0 and 4"),
        ({"embeddings": BAD}, "record 3 is not finite"),
        ({"embeddings": ZERO, "kernel": "cosine"}, "record 2 is zero"),
        ({"embeddings": np.zeros(4)}, "shape"),
    ],
)
def test_requests_that_cannot_be_met(change, message):
    request = {"embeddings": points(5), "budget": 2, **change}
    with pytest.raises(RequestError, match=message):
        facility_location(**request)
