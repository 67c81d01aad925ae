"""Tiny models and pairs for the scoring tests, and the published procedure: one record, one plain forward at a time."""

from __future__ import annotations

import math
import random
from functools import cache
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers.processors import TemplateProcessing

from instruct_data.scoring import Pair
from model_hooks.zoo import tokenizer as zoo_tokenizer

VOCAB, HIDDEN, CONTEXT = 2048, 32, 128
END = "<|endoftext|>"
SMALL = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2LMHeadModel": ("GPT2Config", {}),
    "LlamaForCausalLM": ("LlamaConfig", {}),
    "Gemma2ForCausalLM": ("Gemma2Config", {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0}),
    "CohereForCausalLM": ("CohereConfig", {"logit_scale": 0.25}),
    "GraniteForCausalLM": ("GraniteConfig", {"logits_scaling": 4.0}),
    "MistralForCausalLM": ("MistralConfig", {"sliding_window": 5}),
    "MixtralForCausalLM": ("MixtralConfig", {"num_local_experts": 4}),
    "OPTForCausalLM": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": HIDDEN}),
    "PhiForCausalLM": ("PhiConfig", {}),  # its head has a bias
    "MambaForCausalLM": ("MambaConfig", {"state_size": 4}),
}


@cache
def model(name: str = "GPT2LMHeadModel", seed: int = 0, **changes: Any) -> Any:
    """A random model in eval mode, shared by the tests: never change it. Its weights are wide: context matters."""
    config, own = MODELS[name]
    made = getattr(transformers, name)(getattr(transformers, config)(**(SMALL | own | changes)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.2) if parameter.dim() > 1 else parameter.add_(noise * 0.1)
    return made.eval()


@cache
def tokenizer(kind: str = "plain") -> Any:
    """The zoo's tokenizer: `plain` adds nothing (as GPT-2), `bos` a BOS (as Llama), `closed` a BOS and an EOS."""
    made = zoo_tokenizer.load()
    if kind != "plain":
        end = f" {END}" if kind == "closed" else ""
        made.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{END} $A{end}", special_tokens=[(END, made.eos_token_id)]
        )
    return made


WORDS = ["the", "value", "of", "self", "is", "returned", "a", "list", "not", "in", "if", "for", "(x)", "0", "\n", "."]


def some_pairs(count: int, seed: int = 0) -> list[Pair]:
    """Pairs of 1 to 100 tokens, responses of none to 50."""
    rng = random.Random(seed)

    def words(most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(0, most)))

    return [Pair(f"r{i}", words(30) + "\n", words(40)) for i in range(count)]


class Expected(NamedTuple):
    cond: float
    n_cond: int
    direct: float
    n_direct: int


@torch.no_grad()
def summed_loss(model: Any, ids: list[int], first: int) -> tuple[float, int]:
    """Float64 sum over the targets of fp32 logits of the whole model on one sequence."""
    first = max(1, first)
    if len(ids) <= first:
        return 0.0, 0
    logits = model(torch.tensor([ids], device=model.device)).logits[0].double()
    losses = [float(torch.logsumexp(logits[t - 1], 0) - logits[t - 1, ids[t]]) for t in range(first, len(ids))]
    return math.fsum(losses), len(losses)


def original(model: Any, tokenizer: Any, prompt: str, response: str, max_length: int) -> Expected:
    """superfiltering.md section 2.2."""
    if response == "":
        return Expected(0.0, 0, 0.0, 0)
    text = prompt + response
    kept_of_prompt = tokenizer.encode(prompt, truncation=True, max_length=max_length)
    together = tokenizer.encode(text, truncation=True, max_length=max_length)
    masked = len(tokenizer.encode(text[: text.rfind(response)]))
    room = max_length - len(kept_of_prompt) + 1
    fits = room >= len(tokenizer.encode(""))  # else the tokenizer refuses, and nothing is scored
    alone = tokenizer.encode(response, truncation=True, max_length=room) if fits else []
    return Expected(*summed_loss(model, together, masked), *summed_loss(model, alone, 1))


def aligned(model: Any, tokenizer: Any, prompt: str, response: str, max_length: int) -> Expected:
    """The same target tokens after the prompt and after a BOS."""
    if response == "":
        return Expected(0.0, 0, 0.0, 0)
    together, before = tokenizer.encode(prompt + response), tokenizer.encode(prompt)
    start = 0
    while start < min(len(together), len(before)) and together[start] == before[start]:
        start += 1
    if start == 0:
        together, start = [tokenizer.bos_token_id, *together], 1
    closing = tokenizer.encode("")[1:]
    if len(together) > max_length:
        together = together[: max_length - len(closing)] + closing
    alone = [tokenizer.bos_token_id, *together[start:]]
    return Expected(*summed_loss(model, together, start), *summed_loss(model, alone, 1))


REFERENCES = {"original": original, "aligned": aligned}
