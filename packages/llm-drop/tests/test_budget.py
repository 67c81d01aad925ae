"""The planner finds the cheapest set that meets every budget: checked against all sets there are."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llm_drop import Scores, apply, plan_for_budget, score
from llm_drop.budget import Costs, choose, kv_costs, latency_costs, parameter_costs
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from model_hooks import RequestError
from paper_tables import metrics

KV = {("attention", i): (2.0 if i == 1 else 1.0) for i in range(4)}
SIZE = {**{("attention", i): 3.0 for i in range(4)}, **{("mlp", i): 5.0 for i in range(4)}}
UNITS = list(SIZE)


def exhaustive(importance: dict[Any, float], demands: list[tuple[dict[Any, float], float]]) -> float | None:
    """The least sum of importance over all subsets that meet the demands and keep one attention."""
    best = None
    for size in range(len(UNITS) + 1):
        for chosen in itertools.combinations(UNITS, size):
            if all(("attention", i) in chosen for i in range(4)):
                continue
            if all(sum(savings.get(u, 0.0) for u in chosen) >= amount - 1e-9 for savings, amount in demands):
                cost = sum(importance[u] for u in chosen)
                best = cost if best is None else min(best, cost)
    return best


@given(
    st.lists(st.floats(0.001, 1), min_size=8, max_size=8),
    st.integers(0, 6),
    st.integers(0, 33),
)
def test_no_set_within_the_budgets_is_cheaper(values: list[float], kv: int, size: int) -> None:
    importance = dict(zip(UNITS, values, strict=True))
    demands = [(KV, kv), (SIZE, size)]
    best = exhaustive(importance, demands)
    if best is None:
        with pytest.raises(RequestError, match="the budget cannot be met"):
            choose(importance, demands)
        return
    chosen = choose(importance, demands)
    assert sum(importance[u] for u in chosen) == pytest.approx(best)
    assert len(set(chosen)) == len(chosen)
    assert {("attention", i) for i in range(4)} - set(chosen)
    for savings, amount in demands:
        assert sum(savings.get(u, 0.0) for u in chosen) >= amount - 1e-6


def test_half_of_the_cache_is_exactly_half_of_it(model: Any, scores: Scores) -> None:
    costs = kv_costs(model, 100)
    ids = torch.arange(100).unsqueeze(0) + 20
    assert costs.total == metrics.kv_bytes(model, ids)
    plan = plan_for_budget(scores, {"kv": costs}, {"kv": 0.5})
    assert len(plan.attention) == 3
    assert not plan.mlp
    assert metrics.kv_bytes(apply(model, plan, check=False), ids) == costs.total / 2


def test_sliding_windows_count_for_what_they_hold() -> None:
    """Of 40 tokens a window of 16 holds 15, so that a full layer is worth more than two sliding ones."""
    torch.manual_seed(0)
    types = ["sliding_attention", "full_attention"] * 2
    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, layer_types=types, sliding_window=16, pad_token_id=0,
    )  # fmt: skip
    model, ids = Gemma3ForCausalLM(config).eval(), torch.arange(40).unsqueeze(0) + 3
    costs = kv_costs(model, 40)
    assert costs.total == metrics.kv_bytes(model, ids)
    assert [costs.units["attention", i] for i in range(4)] == [15 * 2 * 2 * 8 * 4, 40 * 2 * 2 * 8 * 4] * 2
    plan = plan_for_budget(score(model, ids, name="sliding"), {"kv": costs}, {"kv": 0.7})
    assert metrics.kv_bytes(apply(model, plan, check=False), ids) == costs.total - sum(
        costs.units[u] for u in plan.units
    )
    assert set(plan.attention) in ({1}, {3})


def test_a_parameter_budget_is_kept(model: Any, scores: Scores) -> None:
    costs = parameter_costs(model)
    assert costs.total == metrics.parameters(model)
    plan = plan_for_budget(scores, {"parameters": costs}, {"parameters": 0.8})
    apply(model, plan, check=False)
    assert metrics.parameters(model) <= 0.8 * costs.total
    assert metrics.parameters(model) == costs.total - sum(costs.units[u] for u in plan.units)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_latency_is_shared_out_over_the_sublayers(model: Any, phase: Any) -> None:
    costs = latency_costs(model, context=64, rounds=3, phase=phase)
    assert set(costs.units) == {(kind, i) for kind in ("attention", "mlp") for i in range(6)}
    assert 0 < sum(costs.units.values()) < costs.total * 1.5
    assert len({costs.units["attention", i] for i in range(6)}) == 1  # alike: the noise between them must not choose
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 1.5])
def test_a_budget_is_a_share(scores: Scores, share: float) -> None:
    with pytest.raises(RequestError, match="give the share that may remain"):
        plan_for_budget(scores, {"kv": Costs(1.0, {})}, {"kv": share})


def test_a_budget_that_would_take_all_attention_is_refused(model: Any, scores: Scores) -> None:
    with pytest.raises(RequestError, match="at least one attention layer must stay"):
        plan_for_budget(scores, {"kv": kv_costs(model, 64)}, {"kv": 0.05})
