"""The tiny random model that the package's tests are about."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def build(layers: int = 6, **changes: Any) -> LlamaForCausalLM:
    """A random Llama whose sublayers turn the residual stream enough to tell them apart."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": 2048, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
            "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, **changes,
        }
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model
