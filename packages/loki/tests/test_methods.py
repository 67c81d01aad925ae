"""Every method against a naive oracle, decoding against the masked form, and what is measured and budgeted."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loki import Basis, LokiConfig, Variance, layer_budgets, session, stats
from loki.beyond import captured_curves
from loki.config import tokens_read
from loki.method import NAMES, Step, attention_weights, find, keep_top
from loki.rows import read_mask
from loki.sessions import runtime_of
from lokimodels import FAMILIES, basis_of, build, decoded, tokens

from lean_kernels.ref.loki import selected
from model_hooks import RequestError

SPARSE: dict[str, Any] = {"k": 0.25, "d": 0.5, "sink": 1, "recent": 2, "min_k": 3, "min_length": 0}
B, HEADS, KV, D = 2, 4, 2, 8


def step(queries: int = 1, length: int = 40, seed: int = 0, pads: int = 0, d: int = 4, **settings: Any) -> Step:
    """Random float64 states; the first row has `pads` tokens of padding on the left."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(B, heads, n, D, generator=generator, dtype=torch.float64)
        for heads, n in ((HEADS, queries), (KV, length), (KV, length))
    )
    last = torch.arange(length - queries, length)[:, None]
    mask = (torch.arange(length) <= last).expand(B, 1, -1, -1).clone()
    mask[0, :, :, :pads] = False
    rows = read_mask(mask, B, queries, length, q.device)
    config = LokiConfig(**{"sink": 1, "recent": 2, "min_k": 3, "min_length": 0, **settings})
    return Step(q, k, v, rows, config.k_of(0), d, D**-0.5, None, config, queries == length, {})


def naive(s: Step, allowed: torch.Tensor) -> torch.Tensor:
    """Attention over what is visible and allowed, one query head at a time."""
    out = torch.zeros_like(s.q)
    for b, h, i in itertools.product(range(B), range(HEADS), range(s.queries)):
        kv = h // (HEADS // KV)
        chosen = allowed[b, kv if allowed.shape[1] == KV else h, i]
        seen = s.rows.visible.expand(B, -1, -1, -1)[b, 0, i] & chosen
        weights = (s.k[b, kv][seen] @ s.q[b, h, i] * s.scale).softmax(-1)
        out[b, h, i] = weights @ s.v[b, kv][seen]
    return out


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [name for name in NAMES if name != "snapkv"])
@torch.no_grad()
def test_the_masked_form_is_decoding_from_the_first_token_on(family: str, method: str) -> None:
    model, ids = build(family), tokens(2, 60, seed=2)
    settings = SPARSE | {"method": method}
    if family == "Qwen2" and "select" in find(method).uses:
        settings |= {"select": "head"}
    if family == "Qwen3":
        settings |= {"k": 9} | ({"group_reduce": "max"} if "group_reduce" in find(method).uses else {})
    with session(model, basis_of(family), **settings):
        expected = decoded(model, ids)
    with session(model, basis_of(family), prefill="masked", **settings):
        assert torch.allclose(model(input_ids=ids, use_cache=False).logits, expected, atol=1e-4)
        assert torch.allclose(model(input_ids=ids, use_cache=True).logits, expected, atol=1e-4)
    if method != "full":
        with session(model, method="full"):
            assert not torch.allclose(model(input_ids=ids).logits, expected, atol=1e-2)


@given(
    st.integers(0, 10**6), st.sampled_from(["group", "head"]), st.sampled_from(["softmax_mean", "max"]),
    st.sampled_from([1, 16]), st.integers(1, 6), st.integers(0, 9), st.sampled_from([0.1, 0.3, 12]),
)  # fmt: skip
def test_the_masked_form_picks_what_the_kernels_pick(
    seed: int, select: str, reduce: str, block: int, queries: int, pads: int, k: float
) -> None:
    s = step(queries, 40, seed, pads, select=select, group_reduce=reduce, block=block, k=k)
    allowed = find("loki").allowed(s) & s.rows.visible
    for i in range(queries):
        lens = s.rows.lens - (queries - 1 - i)
        found = selected(
            s.q[:, :, i : i + 1], s.k, lens, d=4, topk=s.read[:, 0, i].expand(B), scale=s.scale, select=select,
            reduce=reduce, sink=1, recent=2, block=block, start=s.rows.start,
        )  # fmt: skip
        expected = torch.zeros(*found.shape[:3], 41, dtype=torch.bool)
        expected.scatter_(-1, found.where(found >= 0, 40), True)
        assert torch.equal(expected[:, :, 0, :40], allowed[:, :, i])


@pytest.mark.parametrize("method", ["loki", "topk"])
@pytest.mark.parametrize("pads", [0, 7])
def test_decoding_attends_to_exactly_what_was_picked(method: str, pads: int) -> None:
    for queries in (1, 4):
        s = step(queries, 40, 3, pads)
        found = find(method)
        assert torch.allclose(found.decode(s), naive(s, found.allowed(s)), atol=1e-12)


def test_all_dimensions_pick_the_exact_best() -> None:
    s = step(1, 40, d=D, select="head", sink=0, recent=0, min_k=0)
    scores = s.q @ s.k.repeat_interleave(2, 1).transpose(-1, -2)
    best = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(10).indices, True)
    assert torch.equal(find("loki").allowed(s), best)
    assert torch.equal(find("topk").allowed(step(1, 40, d=2, select="head", sink=0, recent=0, min_k=0)), best)


def test_a_group_of_one_head_agrees_with_itself() -> None:
    for reduce in ("softmax_mean", "max"):
        sets = []
        for select in ("group", "head"):
            s = step(3, 40, select=select, group_reduce=reduce)
            s.k, s.v = s.k.repeat_interleave(2, 1), s.v.repeat_interleave(2, 1)
            sets.append(find("loki").allowed(s))
        assert torch.equal(*sets)


def test_projection_picks_the_same_tokens() -> None:
    turn = torch.linalg.qr(torch.randn(KV, D, D, dtype=torch.float64)).Q
    plain = step(2, 40)
    turned = step(2, 40)
    turned.q = (plain.q.unflatten(1, (KV, -1)) @ turn[:, None]).flatten(1, 2)
    turned.k = plain.k @ turn
    plain.projection = (turn[..., :4] @ turn[..., :4].transpose(-1, -2)).float()
    assert torch.equal(find("loki").allowed(plain), find("loki").allowed(turned))


def test_pca_attention_reads_all_with_truncated_scores() -> None:
    s = step(3, 30, pads=4)
    truncated = step(3, 30, pads=4)
    truncated.q, truncated.k = s.q[..., :4], s.k[..., :4]
    expected = torch.cat([w for _, w in attention_weights(truncated)], 3) @ s.values[:, :, None]
    assert torch.allclose(find("pca").attend(s), expected.flatten(1, 2), atol=1e-12)
    s.d = D
    assert torch.allclose(find("pca").attend(s), naive(s, s.rows.visible.expand(B, KV, -1, -1)), atol=1e-12)


def test_quest_reads_the_pages_with_the_highest_bounds() -> None:
    s = step(1, 90, pads=20, k=0.5, select="head", sink=0, recent=0, min_k=0)
    allowed = find("quest").allowed(s)
    for b, h in itertools.product(range(B), range(HEADS)):
        first = 20 if b == 0 else 0
        bounds: dict[int, float] = {}
        for page in range(first // 16, 6):
            keys = s.k[b, h // 2, max(first, page * 16) : min(90, page * 16 + 16)]
            q = s.q[b, h, 0]
            bounds[page] = float(torch.maximum(q * keys.amin(0), q * keys.amax(0)).sum())
            assert bounds[page] >= float((keys @ q).max()) - 1e-9
        bounds[5] = math.inf  # the page at work
        pages = math.ceil((90 - first) / 2) // 16
        best = sorted(bounds, key=lambda page: -bounds[page])[:pages]
        expected = {j for page in best for j in range(max(first, page * 16), min(90, page * 16 + 16))}
        assert set(allowed[b, h, 0].nonzero().flatten().tolist()) == expected


def naive_h2o(s: Step, b: int, h: int) -> list[set[int]]:
    """The sets that KV head h reads, query by query, written as the paper tells it."""
    heavy, kept, sets = [0.0] * s.tokens, [], []
    for i in range(s.tokens):
        kept.append(i)
        budget = tokens_read(s.k_amount, i + 1, s.config)
        recent = kept[-(budget - budget // 2) :]
        others = sorted((j for j in kept if j not in recent), key=lambda j: -heavy[j])[: budget // 2]
        kept = sorted([*others, *recent])
        sets.append(set(kept))
        for head in (2 * h, 2 * h + 1):
            weights = (s.k[b, h, kept] @ s.q[b, head, i] * s.scale).softmax(-1)
            for j, weight in zip(kept, weights.tolist(), strict=True):
                heavy[j] += weight / 2
    return sets


def test_h2o_keeps_heavy_hitters_and_recent_tokens() -> None:
    s = step(30, 30, k=0.3, sink=0, recent=0, min_k=2)
    allowed = find("h2o").allowed(s)
    for b, h in itertools.product(range(B), range(KV)):
        found = [set(row.nonzero().flatten().tolist()) for row in allowed[b, h]]
        assert found == naive_h2o(s, b, h)
    lost = (~allowed[:, :, :-1] & allowed[:, :, 1:]).nonzero()
    assert all(j == i + 1 for _, _, i, j in lost.tolist())  # what was lost never comes back


def test_h2o_counts_the_attention_of_the_prompt() -> None:
    s = step(20, 20, pads=3)
    assert find("h2o").prompt(s) is None
    whole = torch.cat([w for _, w in attention_weights(s)], 3)
    assert s.state is not None
    assert torch.allclose(s.state["heavy"].double(), whole.mean(2).sum(2), atol=1e-6)
    assert s.state["alive"].all()


def test_snapkv_keeps_what_the_last_queries_voted_for() -> None:
    s = step(60, 60, k=0.75, sink=0, recent=0, min_k=0)
    method = find("snapkv")
    assert method.prompt(s) is None
    assert s.state is not None
    weights = torch.cat([w for _, w in attention_weights(s)], 3)[:, :, :, 28:].mean(2).sum(2)  # [B, Hkv, S]
    for b, h in itertools.product(range(B), range(KV)):
        smooth = [float(weights[b, h, max(0, j - 2) : j + 3].sum() / 5) for j in range(60)]
        best = sorted(range(28), key=lambda j: -smooth[j])[: 45 - 32]
        assert set(s.state["alive"][b, h].nonzero().flatten().tolist()) == {*best, *range(28, 60)}
    later = step(1, 64)
    later.state = s.state
    allowed = method.allowed(later)
    assert torch.equal(allowed[:, :, 0, :60], s.state["alive"])
    assert allowed[..., 60:].all()


@torch.no_grad()
def test_methods_that_evict_attend_to_what_they_kept_in_a_second_turn() -> None:
    model, ids = build(), tokens(1, 80, seed=6)
    settings = SPARSE | {"sink": 0, "recent": 0, "min_k": 0}
    for method in ("h2o", "snapkv"):
        with session(model, method=method, **settings):
            cache = model(input_ids=ids[:, :50], use_cache=True).past_key_values
            model(input_ids=ids[:, 50:51], past_key_values=cache)
            alive = cache.layers[1].state["alive"]
            model(input_ids=ids[:, 51:], past_key_values=cache)
            now = cache.layers[1].state["alive"]
        assert not alive.all()
        assert not (now[..., : alive.shape[-1]] & ~alive).any()


@torch.no_grad()
def test_methods_that_evict_follow_beams() -> None:
    model, ids = build(), tokens(2, 40, seed=6)
    for method in ("h2o", "snapkv"):
        with session(model, method=method, **SPARSE):
            alone = [model.generate(row[None], num_beams=3, max_new_tokens=6, do_sample=False) for row in ids]
            both = model.generate(ids, num_beams=3, max_new_tokens=6, do_sample=False)
        assert torch.equal(torch.cat(alone), both)


@given(st.integers(0, 10**6), st.integers(0, 5), st.integers(0, 5), st.integers(1, 25))
def test_keep_top_keeps_the_count_the_ends_and_the_best(seed: int, sink: int, recent: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(1, 1, 1, 20, generator=generator)
    visible = torch.rand(1, 1, 1, 20, generator=generator) > 0.3
    kept = keep_top(scores, visible, torch.tensor([[[count]]]), sink, recent)[0, 0, 0]
    seen = visible[0, 0, 0].nonzero().flatten().tolist()
    ends = {*seen[:sink], *seen[max(0, len(seen) - recent) :]}
    chosen = set(kept.nonzero().flatten().tolist())
    assert len(chosen) == min(len(seen), max(count, len(ends), min(sink + recent, len(seen))))
    assert ends <= chosen <= set(seen)
    left = set(seen) - chosen
    if left and chosen - ends:
        values = scores[0, 0, 0]
        assert max(float(values[j]) for j in left) <= min(float(values[j]) for j in chosen - ends)


def test_mass_takes_the_fewest_tokens_that_hold_it() -> None:
    settings = {"sink": 0, "recent": 0, "min_k": 0, "k": 1.0, "select": "head"}
    s = step(2, 40, **settings, mass=0.6)
    allowed = find("loki").allowed(s)
    scores = s.q[..., :4] @ s.k[..., :4].repeat_interleave(2, 1).transpose(-1, -2)
    shares = (scores * s.scale).masked_fill(~s.rows.visible, -torch.inf).softmax(-1)
    held = (shares * allowed).sum(-1)
    least = (shares.masked_fill(~allowed, 2.0)).amin(-1)
    assert (held >= 0.6).all()
    assert (held - least < 0.6).all()
    capped = find("loki").allowed(step(2, 40, **{**settings, "k": 3}, mass=0.99))
    assert (capped.sum(-1) == 3).all()
    assert torch.allclose(find("loki").decode(s), naive(s, allowed), atol=1e-12)


@torch.no_grad()
def test_more_tokens_and_dimensions_capture_more_attention() -> None:
    model, ids = build(), tokens(4, 48, seed=9)

    def captured(**changes: Any) -> float:
        settings = {"sink": 0, "recent": 0, "min_k": 0, "stats": True, "stats_every": 1, "prefill": "masked"}
        with session(model, basis_of("Llama"), **settings, **changes):
            model(input_ids=ids, use_cache=False)
            return sum(means["captured"] for means in stats(model).values()) / 4

    by_k = [captured(k=k, d=0.5) for k in (0.1, 0.2, 0.4, 0.8)]
    by_d = [captured(k=0.25, d=d) for d in (1, 2, 4, 8)]
    assert by_k == sorted(by_k)
    assert by_d == sorted(by_d)
    assert by_d[-1] - by_d[0] > 0.05


def test_few_dimensions_of_a_decaying_spectrum_find_the_best_tokens() -> None:
    """Acceptance 8: Jaccard of at least 0.9 with exact top-k at d_f = 0.25."""
    generator = torch.Generator().manual_seed(0)
    s = step(1, 400, sink=0, recent=0, min_k=0, d=D // 4)
    s.k = torch.randn(B, KV, 400, D, generator=generator, dtype=torch.float64) * torch.logspace(0, -4, D)
    low, exact = find("loki").allowed(s), find("topk").allowed(s)
    assert float(((low & exact).sum(-1) / (low | exact).sum(-1)).mean()) >= 0.9


@torch.no_grad()
def test_stats_tell_what_was_read() -> None:
    model, ids = build(), tokens(2, 40)
    with session(model, basis_of("Llama"), stats=True, stats_every=2, **(SPARSE | {"select": "head"})):
        decoded(model, ids, prompt=30)
        means = stats(model)
        assert sorted(means) == [0, 1, 2, 3]
        for layer in means.values():
            assert layer["steps"] == 5
            assert layer["seconds"] > 0
            assert 0 < layer["jaccard"] <= layer["recall"] <= 1
            assert 0 < layer["captured"] <= 1
            assert layer["selected"] == pytest.approx(0.25, abs=0.03)
            assert layer["union"] > layer["selected"]
    with session(model, method="topk", stats=True, stats_every=1, **SPARSE):
        decoded(model, ids, prompt=30)
        assert all(layer["recall"] > 0.7 for layer in stats(model).values())
    with session(model, method="full"), pytest.raises(RequestError, match="stats=True"):
        stats(model)


@torch.no_grad()
def test_layer_budgets_go_where_attention_is_missed() -> None:
    shares = (0.25, 0.5, 0.75, 1.0)
    curves = torch.tensor([[0.9, 0.95, 0.99, 1.0], [0.4, 0.7, 0.9, 1.0]])
    assert layer_budgets(curves, 0.5, shares) == [0.25, 0.75]
    for mean in (0.25, 0.4, 0.6, 1.0):
        chosen = layer_budgets(curves, mean, shares)
        assert sum(chosen) / 2 <= mean + 1e-9
        held = sum(float(row[shares.index(c)]) for row, c in zip(curves, chosen, strict=True))
        best = max(
            sum(float(row[j]) for row, j in zip(curves, pair, strict=True))
            for pair in itertools.product(range(4), repeat=2)
            if sum(shares[j] for j in pair) / 2 <= mean + 1e-9
        )
        assert held == pytest.approx(best)
    for wrong in (0.1, 1.5, True):
        with pytest.raises(RequestError, match="mean"):
            layer_budgets(curves, wrong, shares)
    model = build()
    measured = captured_curves(model, basis_of("Llama"), tokens(2, 40), (0.1, 0.5, 1.0), d=0.5)
    assert (measured.diff(dim=-1) >= 0).all()
    assert (measured[:, -1] == 1).all()
    assert (measured[:, 0] < 1).all()
    budgets = layer_budgets(measured, 0.4, (0.1, 0.5, 1.0))
    with session(model, basis_of("Llama"), k=budgets):
        assert [handler.k for handler in runtime_of(model).layers.values()] == budgets


def test_lists_and_variance_set_each_layer() -> None:
    model, basis = build(), basis_of("Llama")
    with session(model, basis, k=[0.1, 20, 0.3, 1.0], d=[1, 0.5, Variance(0.5), 8], skip_layers=[1]):
        layers = runtime_of(model).layers
        assert {i: h.k for i, h in layers.items()} == {0: 0.1, 2: 0.3, 3: 1.0}
        assert {i: h.d for i, h in layers.items()} == {0: 1, 2: int(basis.rank(0.5)[2].max()), 3: 8}
    with session(model, basis, d=Variance(1.0)):
        assert {h.d for h in runtime_of(model).layers.values()} == {8}


def test_short_rows_are_dense_up_to_min_length() -> None:
    s = step(8, 20, k=0.25, min_length=15, sink=0, recent=0, min_k=0)
    counts = find("loki").allowed(s).sum(-1)[0, 0].tolist()
    assert counts == [13, 14, 15, 4, 5, 5, 5, 5]
    auto = LokiConfig().on("cpu").min_length
    assert auto
    assert [
        LokiConfig(**c).on("cpu").min_length
        for c in ({"prefill": "masked"}, {"backend": "torch"}, {"stats": True}, {"min_length": 7})
    ] == [0, 0, 0, 7]


def test_work_is_cut_into_parts_without_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for chunk in (1 << 25, 700):
        monkeypatch.setattr("loki.method.CHUNK", chunk)
        for name in ("loki", "quest", "pca", "full"):
            results.append(find(name).attend(step(30, 30, pads=4)))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(results[:4], results[4:], strict=True))


def test_the_basis_of_one_model_fits_every_method_of_it() -> None:
    assert isinstance(basis_of("Llama"), Basis)
    assert {find(n).needs_basis for n in ("loki", "pca")} == {True}
    assert not any(find(n).needs_basis for n in NAMES if n not in ("loki", "pca"))
