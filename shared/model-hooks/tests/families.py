"""Tiny random models of many architectures, each built once a process and copied on demand.

Weights are spread wider than transformers' initialisation (standard deviation 0.1), so that attention matters and
greedy text varies: with the usual 0.02 a model of this size hardly looks at its context.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers

VOCAB, HIDDEN, LAYERS = 97, 32, 4
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
WINDOW = {"sliding_window": 5}
MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 5}


@dataclass(frozen=True)
class Family:
    """A model class, its configuration class, and what the anatomy must find in it."""

    model: str
    config: str
    layout: str = "pre_norm"
    changes: dict[str, Any] = field(default_factory=dict)
    attention: tuple[str, ...] = ("input_layernorm",)  # norms that go with the attention
    mlp: tuple[str, ...] = ("post_attention_layernorm",)
    shared: tuple[str, ...] = ()
    experts: int = 0
    scale: float = 1.0


SANDWICH = {
    "layout": "sandwich",
    "attention": ("input_layernorm", "post_attention_layernorm"),
    "mlp": ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
}
POST = {"layout": "post_norm", "attention": ("post_attention_layernorm",), "mlp": ("post_feedforward_layernorm",)}
SHARED = {"layout": "parallel", "attention": (), "mlp": (), "shared": ("input_layernorm",)}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
GPT2 = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": 128, "resid_pdrop": 0.1}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": HIDDEN}
FALCON = {"num_attention_heads": 4, "new_decoder_architecture": True, "num_kv_heads": 2, "parallel_attn": True}
DEEPSEEK = {
    "kv_lora_rank": 8, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 16,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "head_dim": 8,
}  # fmt: skip
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", "LlamaConfig"),
    "mistral": Family("MistralForCausalLM", "MistralConfig", changes={"sliding_window": None}),
    "mistral_window": Family("MistralForCausalLM", "MistralConfig", changes=WINDOW),
    "qwen2": Family("Qwen2ForCausalLM", "Qwen2Config"),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", changes={"head_dim": 8}),
    "gemma": Family("GemmaForCausalLM", "GemmaConfig", changes={"head_dim": 8}),
    "gemma2": Family("Gemma2ForCausalLM", "Gemma2Config", changes=GEMMA | MIXED, **SANDWICH),
    "gemma3": Family("Gemma3ForCausalLM", "Gemma3TextConfig", changes=GEMMA | MIXED, **SANDWICH),
    "phi": Family("PhiForCausalLM", "PhiConfig", changes={"resid_pdrop": 0.1}, **SHARED),
    "phi3": Family("Phi3ForCausalLM", "Phi3Config", changes={"resid_pdrop": 0.1}),
    "olmo": Family("OlmoForCausalLM", "OlmoConfig"),
    "olmo2": Family("Olmo2ForCausalLM", "Olmo2Config", **POST),
    "olmo3": Family("Olmo3ForCausalLM", "Olmo3Config", changes=MIXED, **POST),
    "gpt_neox": Family("GPTNeoXForCausalLM", "GPTNeoXConfig", layout="parallel"),
    "gpt_neox_sequential": Family("GPTNeoXForCausalLM", "GPTNeoXConfig", changes={"use_parallel_residual": False}),
    "gpt2": Family("GPT2LMHeadModel", "GPT2Config", changes=GPT2, attention=("ln_1",), mlp=("ln_2",)),
    "opt": Family("OPTForCausalLM", "OPTConfig", changes=OPT),
    "cohere": Family("CohereForCausalLM", "CohereConfig", **SHARED),
    "falcon": Family("FalconForCausalLM", "FalconConfig", "parallel", FALCON, ("ln_attn",), ("ln_mlp",)),
    "falcon_shared": Family("FalconForCausalLM", "FalconConfig", changes=FALCON | {"new_decoder_architecture": False, "multi_query": True}, **SHARED),
    "smollm3": Family("SmolLM3ForCausalLM", "SmolLM3Config"),
    "granite": Family("GraniteForCausalLM", "GraniteConfig", changes={"residual_multiplier": 0.25}, scale=0.25),
    "stablelm": Family("StableLmForCausalLM", "StableLmConfig"),
    "stablelm_parallel": Family("StableLmForCausalLM", "StableLmConfig", changes={"use_parallel_residual": True}, **SHARED),
    "starcoder2": Family("Starcoder2ForCausalLM", "Starcoder2Config", changes=WINDOW),
    "mixtral": Family("MixtralForCausalLM", "MixtralConfig", changes={"num_local_experts": 4}, experts=4),
    "qwen2_moe": Family("Qwen2MoeForCausalLM", "Qwen2MoeConfig", changes=MOE | {"num_experts": 4, "shared_expert_intermediate_size": 16}, experts=4),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", "Qwen3MoeConfig", changes=MOE | {"num_experts": 4, "head_dim": 8}, experts=4),
    "olmoe": Family("OlmoeForCausalLM", "OlmoeConfig", changes={"num_experts": 4, "num_experts_per_tok": 2}, experts=4),
    "deepseek_v2": Family("DeepseekV2ForCausalLM", "DeepseekV2Config", changes=DEEPSEEK, experts=4),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", "DeepseekV3Config", changes=DEEPSEEK, experts=4),
}


def small(config: str, **changes: Any) -> Any:
    """A tiny configuration of class `config`; settings that the class does not know are kept out."""
    cls = getattr(transformers, config)
    return cls(**(SMALL | changes))


@torch.no_grad()
def spread(model: Any, seed: int = 0) -> Any:
    """Wide random weights in place, norms kept near what they were; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise * 0.15) if parameter.dim() > 1 else parameter.add_(noise * 0.1)
    return model.eval()


@cache
def _built(name: str) -> Any:
    family = FAMILIES[name]
    torch.manual_seed(0)
    return spread(getattr(transformers, family.model)(small(family.config, **family.changes)))


def parent(name: str) -> Any:
    """The family's model, shared by all tests of a process: never change it."""
    return _built(name)


def build(name: str) -> Any:
    """A copy of the family's model that the test may change."""
    return copy.deepcopy(_built(name))


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random token ids, none of them padding."""
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))
