"""Time as ratios: variants run in turn in one process, so that what slows the machine slows them all."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from .errors import TableError


@dataclass(frozen=True)
class Timed:
    """Something to time: `run(setup())`, of which only `run` is timed."""

    run: Callable[[Any], Any]
    setup: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Timing:
    """Of one variant over all rounds.

    `seconds`: median. `speedup`: median over rounds of (time of the base / time of this one) in the same round, so
    above 1 is faster than the base. `low`, `high`: its quartiles; `se`: standard error of that median, taken from the
    quartiles (normal approximation: 1.2533 * IQR / 1.349 / sqrt(rounds)).
    """

    seconds: float
    speedup: float
    low: float
    high: float
    se: float
    rounds: int

    @property
    def figure(self) -> dict[str, float]:
        """The speedup as a table's cell."""
        return {"value": self.speedup, "se": self.se}


def synchronize() -> None:
    """Wait for the GPU, if torch uses one."""
    torch = sys.modules.get("torch")  # what does not use torch needs not wait for it either
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(
    variants: Mapping[str, Callable[[], Any] | Timed],
    *,
    rounds: int = 9,
    warmup: int = 2,
    base: str | None = None,
) -> dict[str, Timing]:
    """Time `variants` in `rounds` rounds after `warmup` untimed ones; each round runs each variant once.

    The order turns round by round, so that none is always first. `base` (default: the first) is what speedups are
    relative to. Raises `TableError` for no variants, an unknown base or less than one round.
    """
    names = list(variants)
    base = base or next(iter(names), "")
    if base not in names or rounds < 1 or warmup < 0:
        raise TableError(
            f"base {base!r} must be one of {names}, rounds at least 1 and warmup at least 0; got {rounds} and {warmup}"
        )
    timed = {name: v if isinstance(v, Timed) else _without_setup(v) for name, v in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            elapsed = _once(timed[name])
            if turn >= 0:
                seconds[name].append(elapsed)
    return {name: _timing(seconds[base], own) for name, own in seconds.items()}


def _without_setup(function: Callable[[], Any]) -> Timed:
    return Timed(lambda _: function())


def _once(timed: Timed) -> float:
    prepared = timed.setup()
    synchronize()
    begun = time.perf_counter()
    timed.run(prepared)
    synchronize()
    return max(time.perf_counter() - begun, 1e-9)


def _timing(base: list[float], own: list[float]) -> Timing:
    ratios = sorted(b / o for b, o in zip(base, own, strict=True))
    low, high = _quantile(ratios, 0.25), _quantile(ratios, 0.75)
    error = 1.2533 * (high - low) / 1.349 / len(ratios) ** 0.5
    return Timing(median(own), median(ratios), low, high, error, len(ratios))


def _quantile(ordered: list[float], share: float) -> float:
    """Linear quantile of an ordered list."""
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def prefill(model: Any, ids: Any) -> Timed:
    """One forward over `ids` [batch, T] that fills a cache and computes the last position's logits only."""

    def run(_: Any) -> Any:
        return _forward(model, ids, None)

    return Timed(run)


def decode(model: Any, ids: Any, new_tokens: int) -> Timed:
    """Greedy decoding of `new_tokens` after the context `ids` [batch, T]; the clock starts after the prefill."""

    def setup() -> Any:
        out = _forward(model, ids, None)
        return out.past_key_values, out.logits[:, -1:].argmax(-1)

    def run(prepared: Any) -> Any:
        import torch

        cache, token = prepared
        tokens = [token]
        for _ in range(new_tokens):
            token = _forward(model, token, cache).logits[:, -1:].argmax(-1)
            tokens.append(token)
        return torch.cat(tokens, dim=1)

    return Timed(run, setup)


def _forward(model: Any, ids: Any, cache: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
