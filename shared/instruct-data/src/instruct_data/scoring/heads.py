"""Beginnings that many segments share, such as a template's fixed text: forwarded once, their keys and values kept."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from .pairs import Segment

LEAST = 8  # tokens; a shorter beginning costs more to look after than it saves


class Heads:
    """`ids`: token ids of each beginning. A segment has the longest one that it begins with, of which nothing is a
    target: the token that predicts the first target belongs to the rest."""

    def __init__(self, ids: Sequence[Sequence[int]]) -> None:
        distinct = {tuple(head) for head in ids if len(head) >= LEAST}
        self.ids = sorted(distinct, key=lambda head: (-len(head), head))
        self._kept: dict[int, Any] = {}

    def number_of(self, segment: Segment) -> int:
        """The segment's head, -1 for none."""
        for number, head in enumerate(self.ids):
            if segment.first > len(head) and tuple(segment.ids[: len(head)]) == head:
                return number
        return -1

    def groups(self, segments: Sequence[Segment]) -> list[tuple[int, list[int]]]:
        """(head, places of its segments in the batch)."""
        found: dict[int, list[int]] = {}
        for place, segment in enumerate(segments):
            found.setdefault(self.number_of(segment), []).append(place)
        return list(found.items())

    def cache(self, number: int, rows: int, base: Any, device: Any) -> Any:
        """Keys and values of a head for a batch of `rows`, new each time: a forward adds to what it is given."""
        if number not in self._kept:
            ids = torch.tensor([self.ids[number]], device=device)
            self._kept[number] = base(input_ids=ids, use_cache=True).past_key_values
        made = copy.deepcopy(self._kept[number])
        made.batch_repeat_interleave(rows)
        return made

    @property
    def forwarded(self) -> int:
        """Tokens of the heads that have been forwarded themselves."""
        return sum(len(self.ids[number]) for number in self._kept)
