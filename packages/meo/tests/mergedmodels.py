"""Tiny random models of every family, and banks whose gates differ."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from meo.converting import banks, convert
from transformers import PreTrainedTokenizerFast

from model_hooks.zoo import tokenizer as zoo_tokenizer

VOCAB, HIDDEN, LAYERS = 97, 32, 2
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2}
GPT2 = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": None}  # fmt: skip
T5 = {"vocab_size": VOCAB, "d_model": HIDDEN, "d_kv": 8, "d_ff": 64, "num_layers": LAYERS, "num_heads": 4,
      "decoder_start_token_id": 0, "pad_token_id": 0}  # fmt: skip
BART = {
    "vocab_size": VOCAB, "d_model": HIDDEN, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_layers": LAYERS,
    "decoder_layers": LAYERS, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "pad_token_id": 0,
    "max_position_embeddings": 64, "eos_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", "BertConfig", SMALL),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", {**SMALL, "pad_token_id": 1, "bos_token_id": 0}),
    "deberta": ("DebertaV2ForMaskedLM", "DebertaV2Config", SMALL),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "opt": ("OPTForCausalLM", "OPTConfig", {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": HIDDEN}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 8}),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "t5-gated": ("T5ForConditionalGeneration", "T5Config", {**T5, "feed_forward_proj": "gated-gelu"}),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART),
    "classifier": ("BertForSequenceClassification", "BertConfig", {**SMALL, "num_labels": 3}),
}
DECODERS = ("gpt2", "opt", "llama", "qwen2", "qwen3", "mistral")


@cache
def _parent(name: str) -> Any:
    model, config, values = FAMILIES[name]
    torch.manual_seed(0)
    built = getattr(transformers, model)(getattr(transformers, config)(**values))
    with torch.no_grad():
        for parameter in built.parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(noise * 0.2) if parameter.dim() > 1 else parameter.add_(noise * 0.1)
    return built.eval()


def dense(name: str) -> Any:
    """A model that the test may change."""
    return copy.deepcopy(_parent(name))


def merged(name: str, **changes: Any) -> Any:
    """A converted one, whose experts and gates differ widely."""
    return randomise(convert(dense(name), **{"experts": 4, "k": 2, "chunk": 4, **changes}))


@torch.no_grad()
def randomise(model: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for bank in banks(model).values():
        for name, parameter in bank.named_parameters():
            scale = 1.0 if "gate" in name or name == "first" else 0.15
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random token ids, none of them padding."""
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def inputs(name: str, *shape: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """A call's inputs: a decoder gets half as many tokens of its own."""
    found = {"input_ids": ids(*shape, seed=seed)}
    if name.startswith(("t5", "bart")):
        found["decoder_input_ids"] = ids(shape[0], shape[1] // 2, seed=seed + 1)
    return found


def write(folder: Path, model: str, config: str, values: dict[str, Any]) -> Path:
    """A random model with a tokenizer of the zoo's vocabulary that also masks, separates and pads."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=zoo_tokenizer.load()._tokenizer, eos_token="<|end|>", pad_token="<|pad|>",
        **({"mask_token": "<|mask|>", "sep_token": "<|sep|>"} if config == "BertConfig" else {}),
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    built = getattr(transformers, config)(**{**values, "vocab_size": len(tokenizer), **ends})
    getattr(transformers, model)(built).save_pretrained(folder)
    return folder
