"""Merged experts of pretrained mixtures: exact where linear, measured where not, untouched above the threshold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from meo import merge_pretrained
from meo.pretrained import fused_experts
from mergedmodels import dense, ids
from torch import nn

from model_hooks import RequestError

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                           "shared_expert_intermediate_size": 24}),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
}  # fmt: skip


def mixture(name: str = "mixtral", scale: float = 0.2, **changes: Any) -> Any:
    stem, more = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{stem}Config")(**{**SIZES, **more, **changes})
    model = getattr(transformers, f"{stem}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, scale)
    return model.eval()


def make_linear(model: Any) -> None:
    """Experts without an activation whose gated half is a constant: linear, so that the mean may be taken first."""
    for experts in fused_experts(model).values():
        experts._apply_gate = lambda h: h.chunk(2, dim=-1)[1]
        with torch.no_grad():
            experts.gate_up_proj.copy_(experts.gate_up_proj[:1].expand_as(experts.gate_up_proj))


@pytest.mark.parametrize("name", FAMILIES)
def test_linear_experts_are_exact(name: str) -> None:
    """One of the two linear maps alike in all experts: the mean of products is the product of means."""
    model = mixture(name, num_experts_per_tok=4)
    make_linear(model)
    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter"):
            nn.init.zeros_(module.weight)
    tokens = ids(2, 8)
    with torch.no_grad():
        want = model(input_ids=tokens, use_cache=False).logits
        rows = merge_pretrained(model, tokens, threshold=1e-4)
        assert [row["merged"] for row in rows] == [True, True]
        torch.testing.assert_close(model(input_ids=tokens, use_cache=False).logits, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pool", ["task", "sequence"])
def test_the_error_is_the_brute_force_one(pool: str) -> None:
    model, tokens = mixture(), ids(3, 8)
    first = model.model.layers[0].mlp
    seen: list[Any] = []
    handle = first.experts.register_forward_hook(lambda m, args, out: seen.append((args, out)))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    handle.remove()
    (x, index, weights), true = seen[0]
    total = torch.zeros_like(true)
    parts = [range(24)] if pool == "task" else [range(8 * r, 8 * r + 8) for r in range(3)]
    for part in parts:
        gates = torch.zeros(4)
        for t in part:
            for j in range(2):
                gates[index[t, j]] += weights[t, j] / len(part)
        up = sum(g * first.experts.gate_up_proj[i] for i, g in enumerate(gates))
        down = sum(g * first.experts.down_proj[i] for i, g in enumerate(gates))
        for t in part:
            gate, value = (up @ x[t]).chunk(2)
            total[t] = down @ (nn.functional.silu(gate) * value)
    expected = float((total - true).norm() / true.norm())
    rows = merge_pretrained(model, tokens, threshold=0.0, pool=pool, allow_future_leak=True)
    assert rows[0]["error"] == pytest.approx(expected, rel=1e-4)
    assert 0.05 < expected < 2
    assert not any(row["merged"] for row in rows)


def test_layers_above_the_threshold_stay_untouched() -> None:
    model, tokens = mixture(), ids(3, 8)
    with torch.no_grad():
        want = model(input_ids=tokens, use_cache=False).logits
        errors = [row["error"] for row in merge_pretrained(model, tokens, threshold=0.0)]
        assert torch.equal(model(input_ids=tokens, use_cache=False).logits, want)
        rows = merge_pretrained(model, tokens, threshold=(min(errors) + max(errors)) / 2)
        assert sum(row["merged"] for row in rows) == 1
        implementations = [m.config._experts_implementation for m in fused_experts(model).values()]
        assert implementations.count("meo") == 1
        changed = model(input_ids=tokens, use_cache=False).logits
    assert not torch.equal(changed, want)


def test_sequences_are_merged_apart_and_padding_does_not_count() -> None:
    model, tokens = mixture(), ids(2, 8)
    merge_pretrained(model, tokens, threshold=9.0, pool="sequence", allow_future_leak=True)
    with torch.no_grad():
        alone = model(input_ids=tokens[:1], use_cache=False).logits
        batch = torch.cat([tokens, torch.zeros(2, 3, dtype=torch.long)], 1)
        mask = torch.tensor([[1] * 8 + [0] * 3] * 2)
        found = model(input_ids=batch, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(found[:1, :8], alone, atol=1e-5, rtol=1e-4)


def test_refusals() -> None:
    with pytest.raises(RequestError, match="no fused experts"):
        merge_pretrained(dense("llama"), ids(1, 4))
    with pytest.raises(RequestError, match="looks at future tokens"):
        merge_pretrained(mixture(), ids(1, 4), pool="sequence")
    with pytest.raises(RequestError, match="did you mean 'task'"):
        merge_pretrained(mixture(), ids(1, 4), pool="tasks")
