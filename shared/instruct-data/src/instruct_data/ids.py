"""Which ids were seen, in about 13 bytes an id and in none at all for records that are simply numbered."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

_EMPTY = 0


class SeenIds:
    """A set of ids that keeps 64-bit hashes only.

    Two of ten million different ids have the same hash with a probability of 3e-6; they would be taken for equal.
    As long as ids are "0", "1", "2", ... in this order they are only counted.
    """

    def __init__(self) -> None:
        self.counted = 0
        self.used = 0
        self.table = array("Q", [_EMPTY]) * 1024

    def add(self, id: str) -> bool:
        """Note `id`; False if it was there already."""
        if id.isascii() and id.isdigit() and len(id) < 19 and (id == "0" or id[0] != "0"):
            number = int(id)
            if number < self.counted:
                return False
            if number == self.counted and not self.used:
                self.counted += 1
                return True
        if not self._insert(hash(id) & 0xFFFF_FFFF_FFFF_FFFF or 1):
            return False
        if 3 * self.used > 2 * len(self.table):
            self._grow()
        return True

    def _insert(self, value: int) -> bool:
        table, mask = self.table, len(self.table) - 1
        at = value & mask
        while table[at] != _EMPTY:
            if table[at] == value:
                return False
            at = (at + 1) & mask
        table[at] = value
        self.used += 1
        return True

    def _grow(self) -> None:
        old: Iterator[int] = (value for value in self.table if value != _EMPTY)
        self.table, self.used = array("Q", [_EMPTY]) * (2 * len(self.table)), 0
        for value in old:
            self._insert(value)
