"""Models with random weights to time (what weights are does not change speed), and the usual way to time them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .timing import Timed, Timing, decode, interleaved, prefill


def probe_model(layers: int = 16, hidden_size: int = 512) -> Any:
    """A Llama with random weights in float32: speed does not depend on what the weights are."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=2048, hidden_size=hidden_size, intermediate_size=hidden_size * 8 // 3 // 32 * 32,
        num_hidden_layers=layers, num_attention_heads=hidden_size // 64, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def token_ids(model: Any, batch: int, length: int) -> torch.Tensor:
    """Some token ids, [batch, length], on the model's device."""
    weight = model.get_input_embeddings().weight
    ids = torch.arange(batch * length, device=weight.device) * 7 + 3
    return ids.remainder(weight.shape[0]).view(batch, length)


def speed(
    parent: Any, variants: Mapping[str, Any], *, context: int = 512, new_tokens: int = 32, rounds: int = 7
) -> dict[str, dict[str, Timing]]:
    """Prefill of `context` tokens and decoding of `new_tokens` after them, batch 1: variant -> phase -> `Timing`."""
    ids = token_ids(parent, 1, context)
    models = {"parent": parent, **variants}
    phases: dict[str, Callable[[Any], Timed]] = {
        "prefill": lambda m: prefill(m, ids), "decode": lambda m: decode(m, ids, new_tokens),
    }  # fmt: skip
    timed = {p: interleaved({n: make(m) for n, m in models.items()}, rounds=rounds) for p, make in phases.items()}
    return {name: {phase: timed[phase][name] for phase in phases} for name in variants}
