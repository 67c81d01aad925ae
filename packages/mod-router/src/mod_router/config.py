"""What is gated, by which rule, and what the routers are trained for: checked when made, and again against a model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from model_hooks.errors import RequestError

Unit = Literal["attention", "mlp", "block"]


@dataclass(frozen=True)
class RouterConfig:
    """Which parts of which layers a router may skip, and how it decides.

    Args:
        layers: last:N (the N layers before the very last one, the paper's choice), last (half of the layers, so
            chosen), numbers and ranges ("3,5,8-11"), a list of numbers, or auto:N (the N that `scores` finds least
            important, never the first or the last).
        scores: With auto: a scores file of `llm-drop score`.
        unit: What a gate skips: attention (the paper's), mlp, or block.
        level: sequence (one decision for a whole sequence, the paper's) or token (each token its own).
        pool: What of a sequence decides: prompt_mean (mean over the prompt), masked_mean (mean over all real tokens,
            the paper's but for padding), last (the prompt's last token), ema (a mean in which later prompt tokens weigh
            more).
        tau: A gate is open where sigmoid(router) >= tau.
        route_on: full-prompt, or first-chunk where a prompt is fed in chunks and the first decides.
        objective: capacity (reach `target_capacity`) or paper (a linear penalty on what is used).
        target_capacity: Share of (sequence, layer) pairs that run.
        penalty: The paper's lambda: weight of the mean number of open gates, with objective paper.
        cheap_train: Skipped rows are not computed in training either; closed gates then get no gradient (the paper's).
        noise: Standard deviation of noise on router logits in training; falls to 0 over the run.
        distill: Share of the loss that is KL from the ungated model; the rest is cross-entropy.
        repair: What a skipped unit adds to the residual stream: none (the paper's), or mean: of what it adds on other
            data, measured before training.

    Raises:
        RequestError: a value is not accepted.
    """

    layers: str | tuple[int, ...] = "last"
    scores: str = ""
    unit: Unit = "attention"
    level: Literal["sequence", "token"] = "sequence"
    pool: Literal["prompt_mean", "masked_mean", "last", "ema"] = "prompt_mean"
    tau: float = 0.5
    route_on: Literal["full-prompt", "first-chunk"] = "full-prompt"
    objective: Literal["capacity", "paper"] = "capacity"
    target_capacity: float = 0.6
    penalty: float = 0.0
    cheap_train: bool = False
    noise: float = 0.0
    distill: float = 1.0
    repair: Literal["none", "mean"] = "none"

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for f in fields(self):
            choices = get_args(hints[f.name])
            value = getattr(self, f.name)
            if choices and all(isinstance(c, str) for c in choices) and value not in choices:
                raise RequestError(f"{f.name}={value!r}: it is one of {', '.join(choices)}")
        for name in ("tau", "target_capacity", "penalty", "noise", "distill"):
            _finite(name, getattr(self, name))
        if not 0 < self.tau < 1:
            raise RequestError(f"tau={self.tau}: a threshold for a probability lies in (0, 1)")
        if not 0 < self.target_capacity <= 1:
            raise RequestError(f"target_capacity={self.target_capacity}: a share of what runs lies in (0, 1]")
        if self.penalty < 0 or self.noise < 0:
            raise RequestError(f"penalty={self.penalty}, noise={self.noise}: numbers from 0 on are needed")
        if not 0 <= self.distill <= 1:
            raise RequestError(f"distill={self.distill}: a share of the loss lies in [0, 1]")
        if self.cheap_train and self.level == "token":
            raise RequestError("cheap_train=True skips whole sequences; with level='token' leave it out")
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))

    def resolved(self, depth: int) -> tuple[int, ...]:
        """The gated layers of a model of `depth` layers, ascending. Raises `RequestError` naming the valid range."""
        if not isinstance(self.layers, str):
            return _checked(self.layers, depth)
        kind, _, count = self.layers.partition(":")
        if kind == "last":
            return last_layers(depth, _count(count, self.layers) if count else depth // 2)
        if kind == "auto":
            if not self.scores:
                raise RequestError("layers=auto needs scores: a file that `llm-drop score` wrote")
            return least_important(self.scores, self.unit, depth, _count(count, self.layers) if count else depth // 2)
        return _checked(_numbers(self.layers), depth)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def paper_recipe(**changes: Any) -> RouterConfig:
    """The paper's method: attention, whole sequences, mean over the text, lambda 0, closed gates get no gradient."""
    settings = {"pool": "masked_mean", "objective": "paper", "cheap_train": True, "distill": 0.0, **changes}
    return make_config(None, settings)


def make_config(config: RouterConfig | None, changes: dict[str, Any]) -> RouterConfig:
    """`config`, or the defaults, with `changes`; an unknown name raises `RequestError` that lists the known ones."""
    known = [f.name for f in fields(RouterConfig)]
    for name in changes:
        if name not in known:
            raise RequestError(f"{name!r} is no setting of RouterConfig; it has {', '.join(known)}")
    return replace(config or RouterConfig(), **changes)


def last_layers(depth: int, count: int) -> tuple[int, ...]:
    """Layers `depth - count - 1 .. depth - 2`: the last `count` without the very last, as the paper's code has it."""
    if not 1 <= count < depth:
        raise RequestError(f"layers=last:{count}: a model of {depth} layers takes last:1 to last:{depth - 1}")
    return tuple(range(depth - count - 1, depth - 1))


def least_important(file: str | Path, unit: Unit, depth: int, count: int) -> tuple[int, ...]:
    """The `count` layers whose `unit` changes the residual stream least, by a scores file of llm-drop; never an end."""
    path = Path(file)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        similarity = {int(k): float(v) for k, v in record[unit].items()}
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file; make one with `llm-drop score`") from None
    except (UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError):
        raise RequestError(f"{path}: not a scores file of llm-drop with a part {unit!r}") from None
    if record.get("num_layers") != depth:
        raise RequestError(f"{path}: scores of {record.get('num_layers')} layers, the model has {depth}; score again")
    offered = sorted((i for i in similarity if 0 < i < depth - 1), key=lambda i: -similarity[i])
    if not 1 <= count <= len(offered):
        raise RequestError(f"layers=auto:{count}: 1 to {len(offered)} layers can be chosen, the ends never are")
    return tuple(sorted(offered[:count]))


def _numbers(text: str) -> list[int]:
    found: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        try:
            found += range(int(low), int(high) + 1) if dash else [int(low)]
        except ValueError:
            raise RequestError(
                f"layers={text!r}: give last, last:N, auto:N, or numbers and ranges such as 3,5,8-11"
            ) from None
    return found


def _count(text: str, whole: str) -> int:
    if not text.isdecimal():
        raise RequestError(f"layers={whole!r}: a whole number is needed after the colon, such as last:16")
    return int(text)


def _checked(layers: Iterable[Any], depth: int) -> tuple[int, ...]:
    given = list(layers)
    if not given:
        raise RequestError(f"layers is empty; give one or more of 0 to {depth - 1}")
    for layer in given:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < depth:
            raise RequestError(f"layer {layer!r} is not in this model; it has layers 0 to {depth - 1}")
    twice = sorted({layer for layer in given if given.count(layer) > 1})
    if twice:
        raise RequestError(f"layer {twice[0]} is given twice; give each of 0 to {depth - 1} at most once")
    return tuple(sorted(given))


def _finite(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise RequestError(f"{name}={value!r}: a finite number is needed")
