"""The forward passes of a run: what the journal lacks is computed batch by batch and journalled batch by batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from instruct_data.journal import Journal, content_key

from .batches import CPU_BUDGET, CPU_CANDIDATES, GPU_BUDGET, GPU_CANDIDATES, HANDFUL, handfuls, plan, tune
from .heads import Heads
from .losses import SAMPLES, Losses
from .segments import Segments

Progress = Callable[[int, int], None]
Sums = NDArray[np.float64]


class Forward:
    """Sums of all `segments`, from the journal or from the model.

    sums: float64, nats, by place; NaN where it is not known, and in the end where it failed: the segment alone does not
        fit into memory, or the model's own numbers are not finite. Failures are not journalled, so that a resumed run
        tries them again.
    """

    def __init__(self, losses: Losses, segments: Segments, journal: Journal) -> None:
        self.losses, self.segments, self.journal = losses, segments, journal
        known = (journal.get(segments.key(place)) for place in range(len(segments)))
        self.sums = np.fromiter((np.nan if v is None else v["loss_sum"] for v in known), np.float64, len(segments))
        self._pending = np.isnan(self.sums)
        self._cap: float = np.inf  # padded tokens that are known to be too many
        self.facts: dict[str, Any] = {
            "segments": len(segments),
            "tokens": int(segments.lengths.sum()),
            "duplicates": len(segments.table) - len(segments),
            "journalled": int((~self._pending).sum()),
            "forwarded": 0,
            "forwarded_tokens": 0,
            "forward_seconds": 0.0,
        }

    def prepare(self, budget: int | Literal["auto"] | None, share: tuple[int, int], heads: Heads | None = None) -> None:
        """Settle how to forward and the budget; both are journalled, for a run that has nothing left to do."""
        key = content_key({"plan": budget, "rank": share[0], "world": share[1]})
        before = self.journal.get(key)
        if before and not self._pending.any():
            self.facts.update(before)
            return
        if len(self.segments):
            spread = np.unique(np.linspace(0, len(self.segments) - 1, SAMPLES).astype(int))
            sample = [self.segments.segment(int(place)) for place in spread]
            self.losses.check(sample)
            if heads is not None and heads.ids:
                self.losses.share(heads, sample)
        on_cpu = self.losses.model.device.type == "cpu"
        if budget is None:
            chosen = CPU_BUDGET if on_cpu else GPU_BUDGET
        elif budget != "auto":
            chosen = budget
        elif before:
            chosen = before["budget"]
        else:
            chosen = tune(self.segments.lengths, self._losses, CPU_CANDIDATES if on_cpu else GPU_CANDIDATES)
        now = {"budget": chosen, "how": self.losses.how}
        if now != before:
            self.journal.append(key, now)
        self.facts.update(now)

    def run(self, progress: Progress | None = None) -> None:
        """Forward what is pending. What shares the head is one append: after a kill it is there whole, or is forwarded
        again."""
        lengths, done, began = self.segments.lengths, 0, time.perf_counter()
        batches = plan(lengths, self.facts["budget"], self.losses.batching) if self._pending.any() else ()
        # one by one means the head too: the same bits then in any batch and any share of processes
        tokens = HANDFUL if self.facts["budget"] > 1 else 1
        for together in handfuls(lengths, batches, tokens):
            wanted = [[place for place in batch if self._pending[place]] for batch in together]
            todo = [place for batch in wanted for place in batch]
            if todo:
                self.sums[todo] = found = self._together([batch for batch in wanted if batch])
                entries = ((self.segments.key(place), float(value)) for place, value in zip(todo, found))
                self.journal.extend((key, {"loss_sum": value}) for key, value in entries if np.isfinite(value))
                self.facts["forwarded"] += len(todo)
                self.facts["forwarded_tokens"] += int(lengths[todo].sum())
            done += int(lengths[together[0].start : together[-1].stop].sum())
            if progress:
                progress(done, self.facts["tokens"])
        self.sums[~np.isfinite(self.sums)] = np.nan
        self.facts["forwarded_tokens"] -= self.losses.spared - self.losses.heads.forwarded
        self.facts["forward_seconds"] = round(time.perf_counter() - began, 3)

    def _together(self, batches: Sequence[Sequence[int]]) -> Sums:
        """Summed losses of batches that share a pass through the head; each by itself where memory runs out."""
        if len(batches) > 1:
            ends = np.cumsum([len(batch) for batch in batches]).tolist()
            parts = [slice(start, end) for start, end in zip([0, *ends], ends)]
            try:
                return self.losses([self.segments.segment(p) for batch in batches for p in batch], parts)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
        return np.concatenate([self._losses(batch) for batch in batches])

    def _losses(self, places: Sequence[int]) -> Sums:
        """Summed losses; a batch that does not fit into memory is halved, a single segment that does not is NaN."""
        padded = len(places) * int(self.segments.lengths[places[0]])
        if len(places) == 1 or padded < self._cap:
            try:
                return self.losses([self.segments.segment(place) for place in places])
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
            # outside the except block, which would keep the tensors of the failed call alive
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if len(places) == 1:
                return np.array([np.nan])
            self._cap = min(self._cap, padded)
        half = (len(places) + 1) // 2
        return np.concatenate([self._losses(places[:half]), self._losses(places[half:])])


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, on a GPU or on the CPU."""
    text = str(error).lower()
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError) or "out of memory" in text or "allocate memory" in text
    )
