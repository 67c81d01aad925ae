"""Tiny random models for the tests: wide weights, so that attention and positions matter; and routers that differ."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from mod_router.attaching import routers

from model_hooks.zoo import tokenizer as zoo_tokenizer

VOCAB, HIDDEN, LAYERS = 97, 32, 4
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 5}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, **MIXED}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": 5}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GEMMA),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA),
    "phi": ("PhiForCausalLM", "PhiConfig", {}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", {}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": 128}),
    "opt": ("OPTForCausalLM", "OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": HIDDEN}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


@cache
def _parent(name: str, attention: str) -> Any:
    model, config, changes = FAMILIES[name]
    made = getattr(transformers, config)(**(SMALL | changes), attn_implementation=attention)
    torch.manual_seed(0)
    built = getattr(transformers, model)(made)
    with torch.no_grad():
        for parameter in built.parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(noise * 0.3) if parameter.dim() > 1 else parameter.add_(noise * 0.1)
    return built.eval()


def build(name: str = "llama", attention: str = "sdpa") -> Any:
    """A model that the test may change."""
    return copy.deepcopy(_parent(name, attention))


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random token ids, none of them padding."""
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask, [B, longest]."""
    tokens = ids(len(lengths), max(lengths), seed=seed)
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return tokens * mask, mask.long()


def randomise(model: Any, seed: int = 0, scale: float = 3.0) -> Any:
    """Random routers, with which some rows are open and some closed."""
    generator = torch.Generator().manual_seed(seed)
    for router in routers(model).values():
        router.weight.data.copy_(torch.randn(router.weight.shape, generator=generator) * scale)
    return model


def write_tiny(folder: Path, **changes: Any) -> Path:
    """A random model of six layers with the zoo's tokenizer."""
    tokenizer = zoo_tokenizer.load()
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0,
             "eos_token_id": 0, "pad_token_id": 1}  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
