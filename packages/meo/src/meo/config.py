"""What is converted and how it is gated: section `meo` of config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from model_hooks.errors import RequestError
from paper_tables.errors import nearest

VERSION = 1

LEVELS = ("task", "sequence", "token", "prefix", "chunk", "cumulative")
CAUSAL_LEVELS = ("task", "prefix", "chunk", "cumulative")
DECODER_GATES = ("encoder", *CAUSAL_LEVELS)
GATES = ("noisy-topk", "topk", "softmax", "sigmoid", "gumbel-st", "hash")
CHOICES: dict[str, tuple[str, ...]] = {
    "method": ("meo", "moe"),
    "level": ("", *LEVELS),
    "decoder_gate": ("", *DECODER_GATES),
    "gate": GATES,
    "gate_scope": ("linear", "ffn", "layer", "model"),
    "init": ("copy", "noise", "split", "lora"),
    "order": ("auto", "merge", "output"),
}


@dataclass(frozen=True)
class MeoConfig:
    """Settings of a conversion.

    Args:
        experts: Experts of a bank, n.
        k: Experts that a group of tokens selects.
        method: meo (merge the experts, then apply the one matrix) or moe (apply each, then mix the outputs).
        level: What has a gate of its own: task, sequence, token (MEO: sequence, with the token block; MoE: every
            token), prefix (the prompt, for all that follows), chunk (the text before each chunk), cumulative (the text
            up to each token). Empty: sequence, and for decoders prefix.
        decoder_gate: Of an encoder-decoder's decoder: encoder (its mean output), or a causal level; empty: encoder, or
            task where the level is task.
        gate: noisy-topk (the paper's), topk, softmax (all experts), sigmoid, gumbel-st or hash (fixed, at random).
        gate_scope: Who shares a decision: linear (none: the paper's), ffn, layer (the same here) or model.
        token_block: The bottleneck that changes each token before it is used: on, off, or None (on for level token).
        reduce: The block's hidden width is that of the tokens divided by this.
        balance_coef, z_coef: Weights of the balance loss and of the squared log-partition of the gates.
        bias_rate: Balance without a loss (DeepSeek-V3): biases that count for the selection alone, not for the weights,
            move by this after each step, up for experts that were selected less than the mean, down for the others.
            0: none. Take balance_coef 0 with it, and `move_biases` in a training loop of your own.
        noise_eps: Least standard deviation of the gates' noise.
        temperature: Divides the gates' logits.
        straight_through: Give experts that were not selected a gradient at their gates too.
        init: copy (the paper's: all experts alike), noise, split (each has rows of its own made larger) or lora (one
            shared matrix and a low-rank difference for each expert).
        init_scale: Size of the differences at the start, relative to the weights.
        lora_rank: Rank of the differences; 0: width / 48, to a multiple of 8.
        targets, exclude: Regular expressions of module names; targets empty: the linears of all feed-forwards.
        chunk: Tokens of a chunk.
        order: auto, merge or output: what is computed first; the result is the same.
        merge_chunk: Merged matrices that exist at once.
        tasks: Task name -> description, or "" for a random code.
        allow_future_leak: Let a decoder's gates see later tokens, as the original did; its perplexity means nothing.
        seed: Of what is drawn at conversion.

    Raises:
        RequestError: a value is not accepted.
    """

    experts: int = 8
    k: int = 2
    method: str = "meo"
    level: str = ""
    decoder_gate: str = ""
    gate: str = "noisy-topk"
    gate_scope: str = "linear"
    token_block: bool | None = None
    reduce: int = 64
    balance_coef: float = 0.01
    z_coef: float = 0.0
    bias_rate: float = 0.0
    noise_eps: float = 0.01
    temperature: float = 1.0
    straight_through: bool = False
    init: str = "noise"
    init_scale: float = 1e-2
    lora_rank: int = 0
    targets: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    chunk: int = 64
    order: str = "auto"
    merge_chunk: int = 4
    tasks: Mapping[str, str] = field(default_factory=dict)
    allow_future_leak: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, accepted in CHOICES.items():
            value = getattr(self, name)
            if value not in accepted:
                raise RequestError(f"unknown {name.replace('_', ' ')} {value!r}{nearest(value, accepted)}")
        if self.experts < 2:
            raise RequestError(f"experts is {self.experts}; a bank has at least 2")
        if not 1 <= self.k <= self.experts:
            raise RequestError(f"k is {self.k}; between 1 and the {self.experts} experts can be selected")
        for name, least in (("reduce", 1), ("chunk", 1), ("merge_chunk", 1), ("lora_rank", 0)):
            if getattr(self, name) < least:
                raise RequestError(f"{name} is {getattr(self, name)}; at least {least} is needed")
        if self.bias_rate < 0:
            raise RequestError(f"bias_rate is {self.bias_rate}; 0 or more is needed")
        if self.bias_rate and self.gate in ("softmax", "hash"):
            raise RequestError(f"gate {self.gate} selects the same experts always; leave bias_rate out")
        if self.temperature <= 0:
            raise RequestError(f"temperature is {self.temperature}; a number above 0 is needed")
        for pattern in (*self.targets, *self.exclude):
            try:
                re.compile(pattern)
            except re.error as error:
                raise RequestError(f"{pattern!r} is no regular expression: {error}") from None
        if "task" in (self.level, self.decoder_gate) and not self.tasks:
            raise RequestError("level task needs tasks: their names, each with a description or with none")
        if self.method == "moe" and (self.init == "lora" or self.token_block):
            raise RequestError("method moe has no token block and no low-rank experts; leave them out, or take meo")

    @property
    def has_block(self) -> bool:
        """Whether banks have the token block."""
        meant = self.level == "token" if self.token_block is None else self.token_block
        return meant and self.method == "meo"

    def rank(self, width: int) -> int:
        """Rank of low-rank experts of a linear whose smaller side has this width."""
        return self.lora_rank or max(8, round(width / 48 / 8) * 8)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it, with the format's version."""
        lists = {"targets": list(self.targets), "exclude": list(self.exclude), "tasks": dict(self.tasks)}
        return {"version": VERSION, **asdict(self), **lists}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> MeoConfig:
        """Back from `to_dict`. Raises `RequestError` for another version or an unknown key."""
        values = dict(record)
        version = values.pop("version", None)
        if version != VERSION:
            raise RequestError(f"the section `meo` has version {version}, this meo reads {VERSION}: upgrade it")
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                raise RequestError(f"unknown key {key!r} in the section `meo`{nearest(key, known)}")
        return cls(**{**values, "targets": tuple(values["targets"]), "exclude": tuple(values["exclude"])})
