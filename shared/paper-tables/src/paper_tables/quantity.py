"""A measured figure with its standard error, and arithmetic that carries the error along.

Where two figures come from the same seeds, arithmetic is done seed by seed, so that the error of a difference is that
of the paired differences. Otherwise errors are taken as independent and added in quadrature (first order).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev


@dataclass(frozen=True)
class Quantity:
    """`value` with standard error `se`; `samples` are the values by seed where there are several."""

    value: float
    se: float = 0.0
    samples: Mapping[int, float] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """A plain number: no error, no seeds."""
        return not self.se and not self.samples

    @property
    def varies(self) -> bool:
        """Do the seeds differ? If not, the error is the metric's own, and seeds say nothing about it."""
        return len(set(self.samples.values())) > 1


def merge(by_seed: Mapping[int, tuple[float, float | None]]) -> Quantity | None:
    """One cell from its seeds' (value, own standard error or None). None where nothing was measured.

    The value is the mean. The error is the larger of two: the standard error over seeds, and the metric's own (its
    mean over seeds: repeating the same measurement does not make it surer).
    """
    if not by_seed:
        return None
    samples = {seed: by_seed[seed][0] for seed in sorted(by_seed)}
    errors = [error for _, error in by_seed.values() if error is not None]
    own = fmean(errors) if errors else 0.0
    if len(samples) == 1:
        return Quantity(next(iter(samples.values())), own)
    return Quantity(fmean(samples.values()), max(spread(list(samples.values())), own), samples)


def spread(values: Sequence[float]) -> float:
    """Standard error of the mean of `values`: sample standard deviation over the root of their number."""
    if len(values) < 2 or min(values) == max(values):  # stdev of equal values need not be exactly 0
        return 0.0
    return stdev(values) / math.sqrt(len(values))


def combine(operation: Callable[[float, float], float], a: Quantity, b: Quantity) -> Quantity:
    """`operation(a, b)` with its error. Raises what the operation raises (ZeroDivisionError, OverflowError)."""
    value = operation(a.value, b.value)
    samples: dict[int, float] = {}
    seeds = a.samples.keys() or b.samples.keys()
    if all(q.samples.keys() == seeds or q.exact for q in (a, b)):
        samples = {s: operation(a.samples.get(s, a.value), b.samples.get(s, b.value)) for s in seeds}
    if samples and (a.varies or b.varies):
        return Quantity(value, spread(list(samples.values())), samples)
    first = _error(lambda x: operation(x, b.value), a)
    second = _error(lambda x: operation(a.value, x), b)
    return Quantity(value, math.hypot(first, second), samples)


def apply(function: Callable[[float], float], a: Quantity) -> Quantity:
    """`function(a)` with its error."""
    return combine(lambda x, _: function(x), a, Quantity(0.0))


def _error(function: Callable[[float], float], a: Quantity) -> float:
    """Error of `function(a)` to first order: slope times error, the slope over a step far below the error."""
    if not a.se:
        return 0.0
    step = 1e-3 * a.se
    try:
        slope = (function(a.value + step) - function(a.value - step)) / (2 * step)
    except (ValueError, ZeroDivisionError, OverflowError):  # at the edge of what the function takes
        slope = (function(a.value + step) - function(a.value)) / step
    return abs(slope) * a.se
