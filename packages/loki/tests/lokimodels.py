"""Tiny random models of the seven families, built once a process and copied on demand; bases; teacher forcing."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
import transformers
from loki import Basis, calibrate
from torch import Tensor

VOCAB, LAYERS = 97, 4
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, **MIXED},
    "Gemma3Text": {"head_dim": 16, "query_pre_attn_scalar": 16, **MIXED},
    "Phi": {"partial_rotary_factor": 0.5},
}


@cache
def _built(family: str) -> Any:
    torch.manual_seed(0)
    name = family.removesuffix("Text")
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **FAMILIES[family]})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # with transformers' own 0.02 such a model hardly looks at its context
                parameter.normal_(0, 0.15)
    return model


@cache
def basis_of(family: str) -> Basis:
    return calibrate(build(family), tokens(24, 32, seed=5))


def build(family: str = "Llama") -> Any:
    return copy.deepcopy(_built(family))


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def decoded(model: Any, ids: Tensor, prompt: int = 1, **kwargs: Any) -> Tensor:
    """Logits [B, T, V] with the first `prompt` tokens at once and the others one by one through the cache."""
    cache, logits, mask = kwargs.pop("cache", None), [], kwargs.get("attention_mask")
    for start, end in [(0, prompt), *((i, i + 1) for i in range(prompt, ids.shape[1]))]:
        if mask is not None:
            kwargs["attention_mask"] = mask[:, :end]
        out = model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True, **kwargs)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, dim=1)
