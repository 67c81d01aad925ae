"""Tiny random mixtures of experts that the package's tests are about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from model_hooks.zoo import tokenizer

SMALL: dict[str, Any] = {
    "vocab_size": 2048, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip
DEEPSEEK = {
    "kv_lora_rank": 8, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "n_routed_experts": 8, "n_shared_experts": 1, "moe_intermediate_size": 32,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "head_dim": 8,
}  # fmt: skip
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 8}),
    "qwen2_moe": ("Qwen2Moe", MOE | {"shared_expert_intermediate_size": 32}),
    "qwen3_moe": ("Qwen3Moe", MOE | {"head_dim": 8}),
    "olmoe": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 2}),
    "deepseek_v2": ("DeepseekV2", DEEPSEEK | {"n_group": 1}),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK),
}


@torch.no_grad()
def build(family: str = "mixtral", seed: int = 0, **changes: Any) -> Any:
    """A random model whose sublayers and routers do enough to tell them apart."""
    name, own = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**SMALL | own | changes)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.2)
    return model


def save_with_tokenizer(model: Any, path: Path) -> Path:
    model.save_pretrained(path)
    tokenizer.load().save_pretrained(path)
    return path


def logits(model: Any, length: int = 9) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=(torch.arange(2 * length) * 7 + 20).view(2, length)).logits
