"""Where each key of a journal is: sorted arrays, and a small dictionary of what came since they were sorted."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

RECENT = 1 << 13
OFFSET_BITS = 40  # a segment file of up to 1 TB, up to 16 M segments

Column = NDArray[np.uint64]


def _halves(key: str) -> tuple[int, int]:
    return int(key[:16], 16), int(key[16:32], 16)


class Index:
    """Keys of hex digits -> (segment, offset), by their first 128 bits: 24 bytes an entry in three sorted columns."""

    def __init__(self) -> None:
        self._high, self._low, self._place = (np.empty(0, np.uint64) for _ in range(3))
        self._recent: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self._high) + len(self._recent)

    def add(self, key: str, segment: int, offset: int) -> None:
        self._recent.setdefault(_halves(key), segment << OFFSET_BITS | offset)
        if len(self._recent) >= max(RECENT, len(self._high) >> 6):
            self.settle()

    def settle(self) -> None:
        """Merge the dictionary into the sorted columns; of a key that is there twice, the first place stays."""
        keys = np.array(list(self._recent), np.uint64).reshape(-1, 2)
        places = np.fromiter(self._recent.values(), np.uint64, len(self._recent))
        self._recent = {}
        order = np.lexsort((keys[:, 1], keys[:, 0]))
        high, low, places = keys[order, 0], keys[order, 1], places[order]
        at = np.searchsorted(self._high, high)
        known = np.zeros(len(high), bool)
        inside = at < len(self._high)
        known[inside] = (self._high[at[inside]] == high[inside]) & (self._low[at[inside]] == low[inside])
        new, at = ~known, at[~known]
        self._high = np.insert(self._high, at, high[new])
        self._low = np.insert(self._low, at, low[new])
        self._place = np.insert(self._place, at, places[new])

    def find(self, key: str) -> tuple[int, int] | None:
        high, low = _halves(key)
        place = self._recent.get((high, low))
        if place is None:
            at = int(np.searchsorted(self._high, np.uint64(high)))
            while at < len(self._high) and int(self._high[at]) == high and int(self._low[at]) != low:
                at += 1
            if at == len(self._high) or int(self._high[at]) != high:
                return None
            place = int(self._place[at])
        return place >> OFFSET_BITS, place & ((1 << OFFSET_BITS) - 1)
