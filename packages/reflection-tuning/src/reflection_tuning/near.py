"""Instructions that are nearly the same: teachers drift towards the same topics, and so do their new instructions.

MinHash over sequences of three words, looked up by bands of hashes; what a band suggests is compared exactly, so that
no pair below the limit is ever taken for one.
"""

from __future__ import annotations

import hashlib
import re

import numpy as np
from numpy.typing import NDArray

HASHES, ROWS = 128, 4  # 32 bands: of pairs that are 80 % alike fewer than one in 10^7 shares none
TOP = np.uint64(32)  # a product modulo 2^64 is mixed in its upper half


def shingles(text: str) -> frozenset[int]:
    """Hashes of the sequences of three words (of all words, where there are fewer), without case and signs."""
    words = re.findall(r"\w+", text.casefold())
    runs = {" ".join(words[at : at + 3]) for at in range(max(1, len(words) - 2))}
    return frozenset(int.from_bytes(hashlib.blake2b(run.encode(), digest_size=4).digest(), "little") for run in runs)


def alike(a: frozenset[int], b: frozenset[int]) -> float:
    """Jaccard similarity."""
    return len(a & b) / len(a | b)


class Seen:
    """Texts that were seen; `like(text, limit)` says which earlier one is that much alike, and remembers the text."""

    def __init__(self, seed: int = 0) -> None:
        draw = np.random.default_rng(seed)
        self._by, self._plus = (draw.integers(0, 1 << 63, HASHES, np.uint64) for _ in range(2))
        self._sets: list[frozenset[int]] = []
        self._bands: dict[bytes, list[int]] = {}

    def like(self, text: str, limit: float) -> int | None:
        """The number of the first earlier text with a similarity of `limit` or more; None, and remembered, else."""
        found = shingles(text)
        keys = self._keys(found)
        near = sorted({number for key in keys for number in self._bands.get(key, ())})
        for number in near:
            if alike(found, self._sets[number]) >= limit:
                return number
        for key in keys:
            self._bands.setdefault(key, []).append(len(self._sets))
        self._sets.append(found)
        return None

    def _keys(self, found: frozenset[int]) -> list[bytes]:
        values: NDArray[np.uint64] = np.fromiter(found, np.uint64, len(found))
        mixed = (values[:, None] * (2 * self._by + np.uint64(1)) + self._plus) >> TOP  # [shingles, hashes]
        least = mixed.min(axis=0).reshape(-1, ROWS)  # [bands, rows]
        return [band.to_bytes(1, "little") + row.tobytes() for band, row in enumerate(least)]
