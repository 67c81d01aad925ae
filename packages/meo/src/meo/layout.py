"""Groups of tokens that share a decision: rows, packed documents or chunks, as a tensor [groups, length, D]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .context import Frame


@dataclass(frozen=True)
class Layout:
    """Where each token of a call [B, T] lies in [groups, length].

    Attributes:
        slot: [B * T] places, groups * length for padding; None where tokens lie as they stand.
        row: the row of each group, [groups]. number: its number among the chunks of its document.
        first: the first group of its document that is in this call.
    """

    groups: int
    length: int
    slot: Tensor | None
    row: Tensor
    number: Tensor
    first: Tensor

    def split(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [groups, length, D], zeros where there is no token."""
        if self.slot is None:
            return x.reshape(self.groups, self.length, x.shape[-1])
        flat = x.new_zeros(self.groups * self.length + 1, x.shape[-1]).index_copy(0, self.slot, x.flatten(0, 1))
        return flat[:-1].view(self.groups, self.length, -1)

    def join(self, y: Tensor, batch: int, tokens: int) -> Tensor:
        """[groups, length, D] -> [B, T, D], zeros at padding."""
        if self.slot is None:
            return y.reshape(batch, tokens, -1)
        flat = torch.cat([y.flatten(0, 1), y.new_zeros(1, y.shape[-1])])
        return flat[self.slot].view(batch, tokens, -1)


def segments(batch: int, tokens: int, device: Any) -> Layout:
    """Every row is a group."""
    row = torch.arange(batch, device=device)
    return Layout(batch, tokens, None, row, torch.zeros_like(row), row)


def chunks(batch: int, tokens: int, size: int, device: Any) -> Layout:
    """Whole chunks of unpadded rows: static shapes."""
    count = tokens // size
    group = torch.arange(batch * count, device=device)
    row, number = group // count, group % count
    return Layout(batch * count, size, None, row, number, row * count)


def by_segment(frame: Frame, size: int | None) -> Layout:
    """Documents, or their chunks of `size` tokens, counted from each document's first real token."""
    real, place = frame.real_or_all, frame.places
    number = torch.zeros_like(place) if size is None else place // size
    document = torch.zeros_like(place) if frame.documents is None else frame.documents
    row = torch.arange(frame.batch, device=frame.device)[:, None].expand_as(place)
    keys = torch.stack([row, document, number], -1)[real]  # [real tokens, 3]
    found, group = keys.unique(dim=0, return_inverse=True)
    within = (place if size is None else place % size)[real]
    length = size or int(within.max()) + 1
    slot = torch.full((frame.batch * frame.tokens,), len(found) * length, device=frame.device)
    slot[real.flatten()] = group * length + within
    new = torch.ones(len(found), dtype=torch.bool, device=frame.device)
    new[1:] = (found[1:, :2] != found[:-1, :2]).any(1)
    index = torch.arange(len(found), device=frame.device)
    first = torch.where(new, index, 0).cummax(0).values
    return Layout(len(found), length, slot, found[:, 0], found[:, 2], first)
