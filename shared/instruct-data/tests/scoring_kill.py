"""Run by test_scoring_kill: score, be killed, go on. Forks a child for each life, so that libraries load once.

    python scoring_kill.py FOLDER KILLS WORLD

Prints JSON: kills that hit a running child, how often each segment was forwarded, and the largest batch.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import scoring_reference as reference

from instruct_data.scoring import forward, merge, score
from instruct_data.scoring.losses import Losses

BUDGET, HANDFUL = 64, 256  # padded tokens of a batch, and of those that share a pass through the head


def live(folder: Path, log: int, rank: int, world: int) -> None:
    """One life: slow forwards, each noted once it is done and before its sums can be journalled."""
    real = Losses.__call__

    def noted(self: Losses, segments: Any, *parts: Any) -> Any:
        time.sleep(0.02)
        found = real(self, segments, *parts)
        names = [f"{segment.first}:{','.join(map(str, segment.ids))}" for segment in segments]
        os.write(log, (json.dumps(names) + "\n").encode())
        return found

    Losses.check = lambda self, segments: None  # type: ignore[method-assign]
    Losses.__call__ = noted  # type: ignore[method-assign]
    pairs, model = reference.some_pairs(90), reference.model()
    forward.HANDFUL = HANDFUL
    score(model, reference.tokenizer(), pairs, max_length=128, budget=BUDGET, folder=folder, rank=rank, world=world)


def await_growth(log: int, batches: int) -> None:
    """Return once `batches` more batches are noted, or after a few seconds without."""
    before, until = os.fstat(log).st_size, time.monotonic() + 5
    for _ in range(batches):
        while os.fstat(log).st_size == before and time.monotonic() < until:
            time.sleep(0.001)
        before = os.fstat(log).st_size


def main(folder: Path, kills: int, world: int) -> None:
    rng, hits = random.Random(0), 0
    log = os.open(folder.with_suffix(".log"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    # imports what a first run imports
    score(reference.model(), reference.tokenizer(), reference.some_pairs(9), max_length=128)
    for rank in range(world):
        for life in range(kills + 1):
            child = os.fork()
            if child == 0:
                try:
                    live(folder, log, rank, world)
                finally:
                    os._exit(0)
            if life < kills:
                await_growth(log, rng.randint(0, 3))
                time.sleep(rng.uniform(0, 0.03))
                os.kill(child, signal.SIGKILL)
            hits += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    noted = [json.loads(line) for line in folder.with_suffix(".log").read_text().splitlines()]
    forwarded = Counter(name for batch in noted for name in batch)
    merge(folder)
    print(json.dumps({"hits": hits, "forwarded": list(forwarded.values()), "largest": max(map(len, noted))}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
