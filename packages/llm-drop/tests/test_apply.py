"""Applying plans: fingerprints, repair constants, rounding to few bits, and drafting for the parent."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from llm_drop import Plan, Scores, apply, draft_of, score, select
from llm_drop.rtn import quantise, quantised
from llm_drop.speculative import generate, sharing_copy

from model_hooks import FingerprintMismatch, RequestError, fingerprint


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def test_a_plan_of_another_model_is_refused_and_nothing_changes(model: Any, scores: Scores) -> None:
    plan = select(scores, attention=2)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    before = fingerprint(model)
    with pytest.raises(FingerprintMismatch, match="score it and plan again"):
        apply(model, plan)
    with pytest.raises(FingerprintMismatch, match="the plan is for 9 layers, the model has 6"):
        apply(model, Plan(9, (1,)))
    assert fingerprint(model) == before


def test_repair_by_the_scores_of_another_model_is_refused(model: Any, scores: Scores) -> None:
    plan = select(scores, attention=2)
    before = fingerprint(model)
    with pytest.raises(FingerprintMismatch, match="the scores are of another model"):
        apply(model, plan, repair=replace(scores, fingerprint="of another"))
    with pytest.raises(FingerprintMismatch, match="the scores are of another model"):
        apply(model, replace(plan, fingerprint=""), repair=replace(scores, fingerprint="of another"))
    assert fingerprint(model) == before
    assert apply(model, plan, repair=scores) is model


def test_plans_compose_in_the_original_indices(model: Any, sequences: torch.Tensor) -> None:
    at_once = apply(copy.deepcopy(model), Plan(6, (1, 4), (4, 5)))
    apply(apply(model, Plan(6, (4,), (5,)), check=False), Plan(6, (1,), (4,)), check=False)
    assert torch.equal(logits(at_once, sequences[:2]), logits(model, sequences[:2]))
    with pytest.raises(RequestError, match="already dropped"):
        apply(model, Plan(6, (1,)), check=False)


def test_repair_adds_the_mean_of_what_was_dropped(model: Any, sequences: torch.Tensor, scores: Scores) -> None:
    """Oracle: the mean over all tokens of the sublayer's own output, taken by a hook."""
    taken: list[torch.Tensor] = []
    hook = model.model.layers[3].mlp.register_forward_hook(lambda m, a, out: taken.append(out.double()))
    whole = logits(model, sequences)
    hook.remove()
    mean = taken[0].flatten(0, 1).mean(0)
    assert torch.allclose(scores.deltas["mlp", 3].double(), mean, atol=1e-5)

    def replaced(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return mean.to(output).expand_as(output)

    hook = model.model.layers[3].mlp.register_forward_hook(replaced)
    expected = logits(model, sequences)
    hook.remove()
    plan = Plan(6, mlp=(3,))
    bare = apply(sharing_copy(model), plan, check=False)
    repaired = apply(sharing_copy(model), plan, repair=scores, check=False)
    assert torch.allclose(logits(repaired, sequences), expected, atol=1e-4)
    errors = [float((logits(m, sequences) - whole).square().mean()) for m in (repaired, bare)]
    assert errors[0] < errors[1]


def test_repair_needs_the_mean_changes(model: Any, scores: Scores) -> None:
    with pytest.raises(RequestError, match="no mean change of attention 2; score again"):
        apply(model, Plan(6, (2,)), repair=replace(scores, deltas={}), check=False)


def test_the_draft_shares_the_weights_and_the_text_is_the_parents(model: Any, scores: Scores) -> None:
    draft = draft_of(model, select(scores, attention=3))
    mine = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in draft.parameters()} <= mine
    prompt = torch.arange(20, 32).unsqueeze(0)
    found = generate(model, draft, prompt, max_new_tokens=24)
    plain = model.generate(prompt, do_sample=False, max_new_tokens=24)
    assert torch.equal(found.sequences, plain)
    assert found.new_tokens == plain.shape[1] - 12
    assert 0 <= found.acceptance <= 1
    assert found.parent_steps <= found.new_tokens + 1


def test_a_draft_that_is_its_parent_is_always_accepted(model: Any) -> None:
    found = generate(model, sharing_copy(model), torch.arange(20, 32).unsqueeze(0), max_new_tokens=24)
    assert found.parent_steps <= found.new_tokens / 2
    assert found.acceptance > 0.8


@given(st.integers(2, 8), st.integers(1, 40), st.integers(0, 5))
def test_rounding_stays_on_the_grid_and_within_half_a_step(bits: int, group: int, seed: int) -> None:
    weight = torch.randn(5, 37, generator=torch.Generator().manual_seed(seed))
    rounded = quantised(weight, bits, group).double()
    most = 2 ** (bits - 1) - 1
    for row in range(5):
        for start in range(0, 37, group):
            part, result = weight[row, start : start + group].double(), rounded[row, start : start + group]
            scale = part.abs().max() / most
            assert (part - result).abs().max() <= scale / 2 * (1 + 1e-5)
            assert torch.allclose(result / scale, (result / scale).round(), atol=1e-4)


def test_quantising_touches_the_blocks_alone_and_leaves_the_parent(model: Any, sequences: torch.Tensor) -> None:
    before = logits(model, sequences[:2])
    small = quantise(sharing_copy(model), 4)
    assert torch.equal(logits(model, sequences[:2]), before)
    assert torch.equal(small.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert small.model.layers[0].mlp.up_proj.weight.unique().numel() < model.model.layers[0].mlp.up_proj.weight.numel()
    assert not torch.equal(logits(small, sequences[:2]), before)
    with pytest.raises(RequestError, match="2 to 8 bits"):
        quantise(model, 1)


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_matrices_that_are_no_linear_layers_are_rounded_too(name: str) -> None:
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    moe = {"intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 4}
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(name, **sizes, **(moe if name == "mixtral" else {}))
    ).eval()
    before = {n: p.clone() for n, p in model.named_parameters()}
    after = dict(quantise(model, 2, 8).named_parameters())
    for n, p in before.items():
        rounded = p.dim() > 1 and (".h." in n or ".layers." in n)
        assert torch.equal(after[n], p) != rounded, n
    if name == "gpt2":  # a group of 8 is of the inputs of one output, and Conv1D holds outputs in columns
        column = after["transformer.h.0.mlp.c_fc.weight"][:8, 3]
        assert column.abs().unique().numel() <= 2


def test_a_planted_idle_block_is_dropped_first_and_not_missed(model: Any, sequences: torch.Tensor) -> None:
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    scores = score(model, sequences)
    assert scores.block[2] == pytest.approx(1, abs=1e-6)
    before = logits(model, sequences)
    for request in ({"attention": 1}, {"mlp": 1}, {"blocks": 1}, {"blocks": 1, "consecutive": True}):
        plan = select(scores, **request)  # type: ignore[arg-type]
        assert {i for _, i in plan.units} == {2}
        dropped = apply(sharing_copy(model), plan, check=False)
        assert torch.allclose(logits(dropped, sequences), before, atol=1e-5)
