"""Arithmetic with standard errors, against numpy."""

from __future__ import annotations

import math
import operator

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from paper_tables.quantity import Quantity, apply, combine, merge, spread

figures = st.floats(-50, 50, allow_nan=False).map(lambda x: round(x, 3))
seeds = st.lists(figures, min_size=2, max_size=6)
pairs = st.integers(2, 6).flatmap(lambda n: st.tuples(*[st.lists(figures, min_size=n, max_size=n)] * 2))


def of(values: list[float], own: float | None = None) -> Quantity:
    merged = merge({seed: (value, own) for seed, value in enumerate(values)})
    assert merged is not None
    return merged


@given(seeds)
def test_a_cell_is_the_mean_over_seeds_with_its_standard_error(values):
    cell = of(values)
    assert cell.value == pytest.approx(np.mean(values), abs=1e-9)
    assert cell.se == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)), abs=1e-9)


@given(pairs)
def test_the_error_of_a_difference_is_that_of_the_paired_differences(pair):
    a, b = pair
    assume(len(set(a)) > 1 or len(set(b)) > 1)
    difference = combine(operator.sub, of(a), of(b))
    oracle = np.array(a) - np.array(b)
    assert difference.value == pytest.approx(oracle.mean(), abs=1e-9)
    assert difference.se == pytest.approx(oracle.std(ddof=1) / math.sqrt(len(a)), abs=1e-9)


def test_seeds_that_move_both_figures_alike_leave_the_difference_exact():
    # the metric's own errors are no errors of the difference: they would make it look uncertain
    a, b = of([1.0, 2.0, 4.0], own=0.5), of([2.0, 3.0, 5.0], own=0.5)
    assert combine(operator.sub, a, b) == Quantity(-1.0, 0.0, {0: -1.0, 1: -1.0, 2: -1.0})


def test_pairing_is_by_seed_and_not_by_place():
    a, b = merge({7: (1.0, None), 3: (5.0, None)}), merge({3: (4.0, None), 7: (0.0, None)})
    assert combine(operator.sub, a, b).samples == {3: 1.0, 7: 1.0}


@pytest.mark.parametrize(
    ("a", "b"),
    [
        pytest.param(of([1.0, 2.0]), merge({5: (1.0, 0.1), 6: (3.0, 0.1)}), id="other seeds"),
        pytest.param(of([1.0, 2.0]), merge({0: (1.0, 0.1)}), id="one seed with an error"),
        pytest.param(Quantity(3.0, 0.4), Quantity(1.0, 0.3), id="errors without seeds"),
        pytest.param(of([3.0, 3.0], own=0.4), of([1.0, 1.0], own=0.3), id="seeds that all gave the same"),
    ],
)
def test_unpaired_errors_add_in_quadrature(a, b):
    assert combine(operator.sub, a, b).se == pytest.approx(math.hypot(a.se, b.se), rel=1e-6)


@pytest.mark.parametrize(
    ("by_seed", "value", "se"),
    [
        pytest.param({}, None, None, id="nothing"),
        pytest.param({0: (2.0, 0.3)}, 2.0, 0.3, id="one seed: the metric's own error"),
        pytest.param({0: (2.0, None)}, 2.0, 0.0, id="one seed, no error"),
        pytest.param({0: (2.0, 0.3), 1: (2.0, 0.5)}, 2.0, 0.4, id="equal values: the mean of their own errors"),
        pytest.param({0: (2.0, 0.3), 1: (2.0, None)}, 2.0, 0.3, id="an error that is not known is not zero"),
        pytest.param({0: (1.0, 0.3), 1: (3.0, 0.3)}, 2.0, 1.0, id="over seeds, where that is larger"),
        pytest.param({0: (1.0, 9.0), 1: (3.0, 7.0)}, 2.0, 8.0, id="the metric's own, where that is larger"),
    ],
)
def test_merging_seeds(by_seed, value, se):
    cell = merge(by_seed)
    assert (cell if cell is None else (cell.value, cell.se)) == (None if value is None else (value, pytest.approx(se)))


@pytest.mark.parametrize(
    ("function", "slope"),
    [(math.log, lambda x: 1 / x), (math.sqrt, lambda x: 0.5 / math.sqrt(x)), (math.exp, math.exp)],
    ids=["log", "sqrt", "exp"],
)
@pytest.mark.parametrize("at", [1e-7, 0.3, 40.0])
def test_errors_go_through_functions_by_their_slope(function, slope, at):
    a = Quantity(at, at / 100)
    assert apply(function, a).se == pytest.approx(slope(at) * a.se, rel=1e-3)


def test_errors_of_a_product_and_of_a_very_small_summand():
    product = combine(operator.mul, Quantity(3.0, 0.1), Quantity(5.0, 0.2))
    assert product.se == pytest.approx(math.hypot(5 * 0.1, 3 * 0.2), rel=1e-6)
    assert combine(operator.add, Quantity(1e-9, 1e-10), Quantity(1.0)).se == pytest.approx(1e-10, rel=1e-2)


def test_the_edge_of_a_function_has_a_one_sided_slope_and_beyond_it_is_an_error():
    assert apply(math.sqrt, Quantity(0.0, 0.01)).se > 0
    with pytest.raises(ValueError, match=r"math domain error|positive"):
        apply(math.log, Quantity(0.0, 0.01))


def test_equal_values_have_no_spread_at_all():
    assert spread([0.1] * 7) == 0.0
    assert spread([1.0]) == 0.0
