"""What to attend to: the settings of the method, checked when they are made and again against a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_type_hints

from model_hooks.errors import RequestError

MethodName = Literal["full", "topk", "h2o", "pca", "quest", "snapkv", "loki"]


@dataclass(frozen=True)
class Variance:
    """A number of dimensions stated by what they explain: the fewest that hold at least `share` of the variance.

    Each layer takes the largest count among its heads (the paper's variable d_f, appendix; the crossing one counts).
    """

    share: float

    def __post_init__(self) -> None:
        _number("d", self.share)
        if not 0 < self.share <= 1:
            raise RequestError(f"d=Variance({self.share}): a share of the variance lies in (0, 1]")


# Lengths up to which reading all tokens takes about as long, by device: on a CPU measured (one row, head width 128, k =
# 0.25, float32 in C: 1.2 to 1.4 times as long at 2048), on a GPU taken from the bytes and launches of the kernels.
CROSSOVER = {"cpu": 2048, "cuda": 4096}

Amount = float | int
K = Amount | Sequence[Amount]
D = Amount | Variance | Sequence[Amount]


@dataclass(frozen=True)
class LokiConfig:
    """How a query at decoding picks the tokens it reads. The paper's are k = d = 0.25 and sink = recent = min_k = 0.

    Attributes:
        method: "loki", or a baseline: "full", "topk" (exact), "h2o", "pca", "quest", "snapkv". One that does not read
            `select`, `group_reduce`, `block` or `mass` refuses them.
        k: tokens read. A float in (0, 1] is a share of the row's own tokens, an int a count, a list one for each layer.
        d: dimensions that tokens are picked by. Share, count, list, or `Variance(0.9)`.
        select: "group": all queries of a KV head read the same tokens; "head": each its own (slow where heads are
            grouped, but the paper's form).
        group_reduce: how a group agrees: "softmax_mean" of its approximate attention weights, or "max" of its scores.
        sink, recent: first and last tokens that are always read. They count towards k.
        min_k: least number of tokens read, where a share of a short row would be less.
        block: tokens are picked in runs of 1, 16, 32 or 64, for paged caches.
        mass: instead of a fixed k, the fewest tokens with this share of the approximate attention, at most k of them.
        skip_layers: layers that attend to all tokens.
        min_length: queries that see at most so many tokens read them all. None: where backend is "auto" and neither a
            masked prefill nor stats are asked for, as many as are read sooner than sorted (`CROSSOVER`); else 0.
        prefill: "dense": the prompt attends as ever; "masked": every query of a forward pass sees only what it would
            see when decoding (quadratic work, for perplexity tables).
        backend: of the kernels: "auto", "torch", "triton"; "projected": keep keys as they are, and project queries.
        stats: measure recall and captured attention of a sample of the steps (see `loki.stats`).
        stats_every: one step in this many is sampled.
    """

    method: MethodName = "loki"
    k: K = 0.25
    d: D = 0.25
    select: Literal["group", "head"] = "group"
    group_reduce: Literal["softmax_mean", "max"] = "softmax_mean"
    sink: int = 4
    recent: int = 64
    min_k: int = 64
    block: Literal[1, 16, 32, 64] = 1
    mass: float | None = None
    skip_layers: Sequence[int] = ()
    min_length: int | None = None
    prefill: Literal["dense", "masked"] = "dense"
    backend: Literal["auto", "torch", "triton", "projected"] = "auto"
    stats: bool = False
    stats_every: int = 16

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for f in fields(self):
            choices = get_args(hints[f.name])
            value = getattr(self, f.name)
            if choices and all(isinstance(c, (str, int)) for c in choices) and value not in choices:
                raise RequestError(f"{f.name}={value!r}: it is one of {', '.join(map(repr, choices))}")
        for name in ("sink", "recent", "min_k"):
            _count(name, getattr(self, name), least=0)
        if self.min_length is not None:
            _count("min_length", self.min_length, least=0)
        _count("stats_every", self.stats_every, least=1)
        for name in ("k", "d"):
            value = getattr(self, name)
            for amount in value if _is_list(value) else (value,):
                if not (name == "d" and isinstance(amount, Variance)):
                    _amount(name, amount)
        if self.mass is not None:
            _number("mass", self.mass)
            if not 0 < self.mass <= 1:
                raise RequestError(f"mass={self.mass}: a share of the attention lies in (0, 1]")

    def on(self, device: str) -> LokiConfig:
        """These settings with `min_length` as a number, for a model on a device of this type."""
        if self.min_length is not None:
            return self
        for_speed = self.backend == "auto" and self.prefill == "dense" and not self.stats
        return replace(self, min_length=CROSSOVER.get(device, 0) if for_speed else 0)

    def for_layers(self, layers: int) -> None:
        """Raise `RequestError` where lists do not fit a model of `layers` layers."""
        for name in ("k", "d"):
            value = getattr(self, name)
            if _is_list(value) and len(value) != layers:
                raise RequestError(f"{name} lists {len(value)} layers, the model has {layers}; give one for each")
        wrong = [layer for layer in self.skip_layers if not 0 <= layer < layers]
        if wrong:
            raise RequestError(f"skip_layers names layer {wrong[0]}, the model has layers 0 to {layers - 1}")

    def k_of(self, layer: int) -> Amount:
        return self.k[layer] if isinstance(self.k, Sequence) else self.k

    def d_of(self, layer: int) -> Amount | Variance:
        return self.d[layer] if isinstance(self.d, Sequence) else self.d


def make_config(config: LokiConfig | None, changes: dict[str, Any]) -> LokiConfig:
    """`config`, or the defaults, with `changes`; an unknown name raises `RequestError` that lists the known ones."""
    known = [f.name for f in fields(LokiConfig)]
    for name in changes:
        if name not in known:
            raise RequestError(f"{name!r} is no setting of LokiConfig; it has {', '.join(known)}")
    return replace(config or LokiConfig(), **changes)


def tokens_read(k: Amount, visible: int, config: LokiConfig) -> int:
    """How many of `visible` tokens a query reads; at least one."""
    if visible <= (config.min_length or 0):
        return visible
    wanted = math.ceil(k * visible) if isinstance(k, float) else k
    return min(visible, max(wanted, config.min_k, config.sink + config.recent, 1))


def dimensions(d: Amount, width: int) -> int:
    """How many of `width` dimensions tokens are picked by. Raises `RequestError` for more than there are."""
    if isinstance(d, float):
        return max(1, round(d * width))
    if d > width:
        raise RequestError(f"d={d} is more than the head width {width}")
    return d


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise RequestError(f"{name}={value!r}: a finite number is needed")


def _amount(name: str, value: Any) -> None:
    _number(name, value)
    if value <= 0 or (isinstance(value, float) and value > 1):
        raise RequestError(f"{name}={value!r}: give a share in (0, 1] (1.0 is all) or a count from 1 on (an int)")


def _count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise RequestError(f"{name}={value!r}: a whole number from {least} on is needed")
