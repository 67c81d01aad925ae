"""Segments on disk: token ids and tables in flat files, read back as memory maps, so that millions need no RAM."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .pairs import STATUSES, Encoded, Segment

SEGMENT = np.dtype([("offset", "<i8"), ("length", "<i4"), ("first", "<i4"), ("digest", "u1", (32,))])
PAIR = np.dtype([("index", "<i8"), ("cond", "<i8"), ("direct", "<i8"), ("truncated", "?"), ("status", "u1")])
TOKENS, SEGMENTS, PAIRS, KEYS = "tokens.bin", "segments.bin", "pairs.bin", "keys.jsonl"


class SegmentWriter:
    """Appends encoded pairs to the files of `folder`; 4 bytes a token, 48 a segment, 26 and its key a pair."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self._open = ExitStack()
        names = (TOKENS, SEGMENTS, PAIRS, KEYS)
        self._files: dict[str, BinaryIO] = {n: self._open.enter_context((folder / n).open("wb")) for n in names}
        self._segments = self._tokens = 0

    def __enter__(self) -> SegmentWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def add(self, index: int, key: str, encoded: Encoded) -> None:
        places = (self._add(encoded.cond), self._add(encoded.direct))
        row = np.array((index, *places, encoded.truncated, STATUSES.index(encoded.status)), PAIR)
        self._files[PAIRS].write(row.tobytes())
        self._files[KEYS].write(json.dumps(key).encode() + b"\n")

    def _add(self, segment: Segment | None) -> int:
        """The segment's number, -1 for none."""
        if segment is None or not segment.targets:
            return -1
        data = np.asarray(segment.ids, "<u4").tobytes()
        digest = hashlib.sha256(segment.first.to_bytes(4, "little") + data).digest()
        row = np.array((self._tokens, len(segment.ids), segment.first, np.frombuffer(digest, np.uint8)), SEGMENT)
        self._files[TOKENS].write(data)
        self._files[SEGMENTS].write(row.tobytes())
        self._tokens += len(segment.ids)
        self._segments += 1
        return self._segments - 1


def _map(path: Path, dtype: Any) -> NDArray[Any]:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)


class Segments:
    """The files read back, and the order in which segments are scored.

    order: number of each distinct segment, longest first; equal lengths by content, so that the order and with it
        every batch is the same however the input was ordered.
    place: for each segment, its position in `order` (equal segments share one).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokens, self.table = _map(folder / TOKENS, "<u4"), _map(folder / SEGMENTS, SEGMENT)
        self.pairs = _map(folder / PAIRS, PAIR)
        halves = np.ascontiguousarray(self.table["digest"][:, :16]).view("<u8").reshape(-1, 2)
        by = np.lexsort((halves[:, 1], halves[:, 0], -self.table["length"]))
        distinct = np.ones(len(by), bool)
        distinct[1:] = (halves[by][1:] != halves[by][:-1]).any(axis=1)
        self.order = by[distinct]
        self.place = np.empty(len(by), np.int64)
        self.place[by] = np.cumsum(distinct) - 1
        self.lengths = np.asarray(self.table["length"][self.order], np.int64)  # of the distinct ones, longest first

    def __len__(self) -> int:
        return len(self.order)

    def segment(self, place: int) -> Segment:
        row = self.table[self.order[place]]
        start = int(row["offset"])
        return Segment(self.tokens[start : start + int(row["length"])], int(row["first"]))  # type: ignore[arg-type]

    def key(self, place: int) -> str:
        """SHA-256 of the ids and `first`: the segment's key in the journal."""
        return bytes(self.table["digest"][self.order[place]]).hex()

    def targets(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many tokens each of the numbered segments predicts; 0 for -1."""
        if not len(self.table):
            return np.zeros(len(numbers), np.int64)
        rows = self.table[numbers]
        return np.where(numbers < 0, 0, rows["length"] - rows["first"]).astype(np.int64)

    def keys(self) -> Iterator[str]:
        """The pairs' keys, in order."""
        with (self.folder / KEYS).open() as file:
            yield from (json.loads(line) for line in file)
