"""Tiny random models of many architectures, each built once a process and copied on demand.

Weights are spread wider than transformers' initialisation, so that attention and positions matter: with the usual
standard deviation of 0.02 a model of this size hardly looks at its context.
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
    "falcon_shared": Family(
        "FalconForCausalLM",
        "FalconConfig",
        changes=FALCON | {"new_decoder_architecture": False, "multi_query": True},
        **SHARED,
    ),
    "smollm3": Family("SmolLM3ForCausalLM", "SmolLM3Config"),
    "granite": Family("GraniteForCausalLM", "GraniteConfig", changes={"residual_multiplier": 0.25}, scale=0.25),
    "stablelm": Family("StableLmForCausalLM", "StableLmConfig"),
    "stablelm_parallel": Family(
        "StableLmForCausalLM", "StableLmConfig", changes={"use_parallel_residual": True}, **SHARED
    ),
    "starcoder2": Family("Starcoder2ForCausalLM", "Starcoder2Config", changes=WINDOW),
    "mixtral": Family("MixtralForCausalLM", "MixtralConfig", changes={"num_local_experts": 4}, experts=4),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        changes=MOE | {"num_experts": 4, "shared_expert_intermediate_size": 16},
        experts=4,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig", changes=MOE | {"num_experts": 4, "head_dim": 8}, experts=4
    ),
    "olmoe": Family("OlmoeForCausalLM", "OlmoeConfig", changes={"num_experts": 4, "num_experts_per_tok": 2}, experts=4),
    "deepseek_v2": Family("DeepseekV2ForCausalLM", "DeepseekV2Config", changes=DEEPSEEK, experts=4),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", "DeepseekV3Config", changes=DEEPSEEK, experts=4),
}


def small(config: str, **changes: Any) -> Any:
    """A tiny configuration of class `config`."""
    return getattr(transformers, config)(**(SMALL | changes))


@torch.no_grad()
def spread(model: Any, seed: int = 0) -> Any:
    """Wide random weights in place, norms kept near what they were; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise * 0.3) if parameter.dim() > 1 else parameter.add_(noise * 0.1)
    return model.eval()


def _new(name: str, changes: dict[str, Any]) -> Any:
    family = FAMILIES[name]
    return spread(getattr(transformers, family.model)(small(family.config, **(family.changes | changes))))


@cache
def parent(name: str) -> Any:
    """The family's model, shared by all tests of a process: never change it."""
    return _new(name, {})


def build(name: str, **changes: Any) -> Any:
    """A model of the family that the test may change, `changes` going to its configuration."""
    return _new(name, changes) if changes else copy.deepcopy(parent(name))


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random token ids, none of them padding."""
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
QWEN_VISION = {"depth": LAYERS, "embed_dim": 32, "hidden_size": HIDDEN, "num_heads": 4, "patch_size": 8}


@cache
def vlm(name: str) -> Any:
    """A tiny image-text model, its vision tower as deep as its language model so that depth alone tells nothing."""
    t = transformers
    text, image = SMALL | {"vocab_size": VOCAB + 3}, {"image_token_id": VOCAB}
    llama, clip = t.LlamaConfig(**text), t.CLIPVisionConfig(**VISION)
    siglip = t.SiglipVisionConfig(**VISION, projection_dim=HIDDEN)
    if name == "llava":
        config = t.LlavaConfig(vision_config=clip, text_config=llama, image_token_index=VOCAB)
    elif name == "qwen2_vl":
        mrope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
        config = t.Qwen2VLConfig(text_config=text | mrope, vision_config=QWEN_VISION, video_token_id=VOCAB + 1, **image)
    elif name == "paligemma":
        gemma = t.GemmaConfig(**text, head_dim=8)
        config = t.PaliGemmaConfig(
            vision_config=siglip, text_config=gemma, image_token_index=VOCAB, projection_dim=HIDDEN
        )
    else:
        config = t.Idefics3Config(vision_config=VISION, text_config=llama, scale_factor=2, **image)
    return spread(t.AutoModelForImageTextToText.from_config(config))
