"""The end of a scoring that several processes share: the last one to finish has all scores, the others know who is
still at work."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model_hooks.errors import FingerprintMismatch, RequestError

from .results import Scores, merge, shard_folder


@contextmanager
def finished(folder: Path, rank: int, world: int, *, keep: bool = False) -> Iterator[Scores | list[int]]:
    """All scores in `folder`, after this rank's are there; or the ranks that have not finished.

    One process at a time is inside. `folder` goes with the block that had the scores, unless `keep`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "merge.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not shard_folder(folder, rank, world).is_dir():  # another process was the last, and has used them
            shutil.rmtree(folder, ignore_errors=True)
            yield []
            return
        try:
            merged = merge(folder, world)
        except FingerprintMismatch:
            raise
        except RequestError:
            if world == 1:
                raise
            yield [r for r in range(world) if not shard_folder(folder, r, world).is_dir()]
            return
        yield merged
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
