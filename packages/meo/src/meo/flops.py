"""What a forward pass costs, in floating-point operations, by formula: dense, MoE and MEO (figure 2 of the paper).

A multiply-add is two operations. With the sizes of the paper's models, one sequence of 128 tokens and the masked-LM
head, it gives the paper's figures: 28.5 G dense, 72.0 G vanilla MoE with four experts, MEO 28.73 G (28.90 G with
additions).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from model_hooks.errors import RequestError
from paper_tables.errors import nearest


@dataclass(frozen=True)
class Sizes:
    """Of a transformer.

    Attributes:
        layers, hidden, inner: blocks, width, width of the feed-forward.
        vocabulary: of the head; 0: none. transform: whether the head has a linear of its own before (BERT's).
        linears: of a feed-forward: 2, or 3 where it is gated.
        kv: width of keys and values; 0: as of queries.
    """

    layers: int
    hidden: int
    inner: int
    vocabulary: int = 0
    transform: bool = False
    linears: int = 2
    kv: int = 0


SIZES = {
    "small": Sizes(4, 512, 2048, 30522, True),
    "base": Sizes(12, 768, 3072, 30522, True),
    "large": Sizes(24, 1024, 4096, 30522, True),
}


def named(name: str) -> Sizes:
    """One of the paper's: small, base or large. Raises `RequestError`."""
    if name not in SIZES:
        raise RequestError(f"unknown size {name!r}{nearest(name, SIZES)}")
    return SIZES[name]


def sizes_of(config: Any, head: bool = True) -> Sizes:
    """The sizes that a transformers config (of an encoder or a decoder) says.

    Raises `RequestError` for an encoder-decoder, and for what else the formula does not count.
    """
    kind = config.model_type.removeprefix("meo_")
    if config.is_encoder_decoder:
        raise RequestError(f"{kind} is an encoder-decoder; the formula counts one stack: give an encoder or a decoder")
    hidden = config.hidden_size
    heads = config.num_attention_heads
    width = (getattr(config, "head_dim", None) or hidden // heads) * heads
    if width != hidden:
        raise RequestError(f"attention is {width} wide and the model {hidden}; the formula takes them as equal")
    kv = width // heads * (getattr(config, "num_key_value_heads", None) or heads)
    layers = config.num_hidden_layers
    inner, linears = _feed_forward(config, kind, layers, hidden)
    transform = kind in ("bert", "roberta", "deberta-v2", "distilbert")
    return Sizes(layers, hidden, inner, config.vocab_size if head else 0, transform, linears, kv)


def _feed_forward(config: Any, kind: str, layers: int, hidden: int) -> tuple[int, int]:
    """Width of a feed-forward and how many linears it has: of the stock model that the config describes, on meta."""
    import torch
    from transformers import CONFIG_MAPPING, MODEL_MAPPING

    from meo.config import MeoConfig
    from meo.converting import would_convert

    with torch.device("meta"):
        found = would_convert(MODEL_MAPPING[CONFIG_MAPPING[kind]](config), MeoConfig())
    inner = max(found[0]["in"], found[0]["out"])
    linears, rest = divmod(sum(row["in"] * row["out"] for row in found), layers * hidden * inner)
    if rest:
        raise RequestError(f"{kind}: the formula takes {layers} layers with feed-forwards of one size; these are not")
    return inner, linears


def count(
    sizes: Sizes, *, method: str = "dense", k: int = 1, batch: int = 1, tokens: int = 128, groups: int | None = None,
    additions: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Operations of one forward pass over [batch, tokens].

    Args:
        method: dense, moe (k times the feed-forward) or meo (the feed-forward once, and merges).
        groups: merges of each bank: one a sequence unless given (1 for a task, batch * chunks for chunks).
        additions: count a merge's additions beside its multiplications (the paper's two figures differ by this).

    Returns:
        ffn, attention (projections), scores, head, merge, total.
    """
    if method not in ("dense", "moe", "meo"):
        raise RequestError(f"unknown method {method!r}{nearest(method, ('dense', 'moe', 'meo'))}")
    s, all_tokens = sizes, batch * tokens
    bank = s.linears * s.hidden * s.inner  # weights of one feed-forward
    ffn = 2 * all_tokens * s.layers * bank * (k if method == "moe" else 1)
    projections = 2 * s.hidden + 2 * (s.kv or s.hidden)
    found = {
        "ffn": ffn,
        "attention": 2 * all_tokens * s.layers * s.hidden * projections,
        "scores": 4 * all_tokens * tokens * s.layers * s.hidden,
        "head": 2 * all_tokens * s.hidden * (s.vocabulary + (s.hidden if s.transform and s.vocabulary else 0)),
        "merge": 0,
    }
    if method == "meo":
        found["merge"] = (batch if groups is None else groups) * s.layers * bank * (2 * k - 1 if additions else k)
    return {**{part: float(value) for part, value in found.items()}, "total": float(sum(found.values()))}


def merge_bytes(sizes: Sizes, k: int, groups: int, width: int = 4) -> int:
    """Bytes that merging moves at least: k experts read and one matrix written, for each group and bank."""
    return groups * (k + 1) * sizes.layers * sizes.linears * sizes.hidden * sizes.inner * width
