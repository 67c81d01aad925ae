"""Batches of segments sorted by length, and the choice of how many padded tokens a batch may hold."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Batching = Literal["padded", "equal_length", "one_by_one"]

CPU_BUDGET, GPU_BUDGET = 256, 32768  # on CPUs larger batches leave the caches
HANDFUL = 1024  # padded tokens whose targets go through the head together; a larger batch goes alone
CPU_CANDIDATES = (128, 256, 512, 1024, 2048)
GPU_CANDIDATES = (4096, 8192, 16384, 32768, 65536)
PROBE_SECONDS = 5.0


def plan(lengths: NDArray[np.int64], budget: int, batching: Batching = "padded") -> Iterator[range]:
    """Batches of places in `lengths` (descending): rows times longest <= budget, one row where one is too long."""
    start = 0
    while start < len(lengths):
        longest = int(lengths[start])
        rows = max(1, budget // longest) if batching != "one_by_one" else 1
        stop = min(len(lengths), start + rows)
        if batching == "equal_length":  # the first that is shorter ends the batch
            stop = start + int(np.searchsorted(-lengths[start:stop], -longest, side="right"))
        yield range(start, stop)
        start = stop


def handfuls(lengths: NDArray[np.int64], batches: Iterable[range], tokens: int) -> Iterator[list[range]]:
    """Consecutive batches of so many padded tokens in all, at least; the last may be of fewer."""
    held: list[range] = []
    count = 0
    for batch in batches:
        held.append(batch)
        count += len(batch) * int(lengths[batch.start])
        if count >= tokens:
            yield held
            held, count = [], 0
    if held:
        yield held


def tune(
    lengths: NDArray[np.int64],
    run: Callable[[Sequence[int]], object],
    candidates: Sequence[int],
    seconds: float = PROBE_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """The fastest of one by one (answered as 1) and the `candidates`, by tokens a second around the median length.

    `run` forwards the segments at the places given. Stops before a trial that is expected to end after `seconds`.
    """
    if not len(lengths):
        return 1
    middle, begin = len(lengths) // 2, clock()
    run([middle])  # the first call pays for what is made once

    def speed(places: Sequence[int], groups: Sequence[Sequence[int]]) -> float:
        started = clock()
        for group in groups:
            run(group)
        return float(lengths[list(places)].sum()) / max(clock() - started, 1e-9)

    few = range(middle, min(len(lengths), middle + 4))
    best, best_speed = 1, speed(few, [[place] for place in few])
    for budget in candidates:
        places = range(middle, min(len(lengths), middle + max(1, budget // int(lengths[middle]))))
        tokens = float(lengths[list(places)].sum())
        if clock() - begin + tokens / best_speed > seconds:
            break
        found = speed(places, [places])
        if found > best_speed:
            best, best_speed = budget, found
        if places.stop == len(lengths):
            break
    return best
