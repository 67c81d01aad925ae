"""Which cached tokens each row may see: read off the attention mask once for all layers of a forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from model_hooks.errors import RequestError

from .config import Amount, LokiConfig, tokens_read


@dataclass
class Rows:
    """What the Q queries of each of B rows see of S cached tokens: query i the tokens start <= j < lens - Q + 1 + i, of
    these only those in `mask` where there is one.

    Attributes:
        lens: [B] int32.
        start: [B] int32, or None for 0 everywhere (no left padding).
        mask: [B, 1, Q, S] bool, or None where the formula says it all.
        counts: tokens seen, [B, Q]; or a list of Q numbers where all rows agree.
    """

    batch: int
    queries: int
    tokens: int
    lens: Tensor
    start: Tensor | None
    mask: Tensor | None
    counts: Tensor | list[int]

    @cached_property
    def visible(self) -> Tensor:
        """[B or 1, 1, Q, S] bool."""
        if self.mask is not None:
            return self.mask
        device = self.lens.device
        place = torch.arange(self.tokens, device=device)
        last = self.lens[:, None].long() - self.queries + 1 + torch.arange(self.queries, device=device)  # [B, Q]
        seen = place < last[..., None]
        if self.start is not None:
            seen &= place >= self.start[:, None, None]
        return seen[:, None]

    def read(self, k: Amount, config: LokiConfig) -> Tensor:
        """How many tokens each query reads, [B or 1, Q] int64."""
        if isinstance(self.counts, list):
            read = [tokens_read(k, n, config) for n in self.counts]
            return torch.tensor([read], device=self.lens.device)
        counts = self.counts.long()
        wanted = (k * counts.double()).ceil().long() if isinstance(k, float) else torch.full_like(counts, k)
        wanted = wanted.clamp_min(max(config.min_k, config.sink + config.recent, 1))
        return torch.where(counts <= (config.min_length or 0), counts, torch.minimum(wanted, counts))

    def read_by_query(self, k: Amount, config: LokiConfig, query: int) -> int | Tensor:
        """As `read`, for one query: a number where all rows agree, else [B] int32."""
        if isinstance(self.counts, list):
            return tokens_read(k, self.counts[query], config)
        return self.read(k, config)[:, query].int().clamp_min(1)


class MaskReader:
    """Reads masks, and remembers the last one: every layer of a forward pass is shown the same."""

    def __init__(self) -> None:
        self.key: Any = None
        self.mask: Tensor | None = None  # held, so that its id stays its own
        self.rows: Rows | None = None

    def __call__(self, mask: Tensor | None, batch: int, queries: int, tokens: int, device: torch.device) -> Rows:
        if torch.compiler.is_compiling():
            return read_mask(mask, batch, queries, tokens, device)
        version = 0 if mask is None or mask.is_inference() else mask._version
        key = (None if mask is None else id(mask), version, batch, queries, tokens, device)
        if self.rows is None or key != self.key:
            self.key, self.mask, self.rows = key, mask, read_mask(mask, batch, queries, tokens, device)
        return self.rows


def read_mask(mask: Tensor | None, batch: int, queries: int, tokens: int, device: torch.device) -> Rows:
    """Raises `RequestError` for a mask that differs between heads, NotImplementedError for one that adds a bias."""
    full = torch.full((batch,), tokens, dtype=torch.int32, device=device)
    if mask is None:
        return Rows(batch, queries, tokens, full, None, None, [tokens - queries + 1 + i for i in range(queries)])
    mask = as_bool(mask)
    if mask.dim() != 4 or mask.shape[1] != 1:
        raise RequestError(f"attention_mask of shape {tuple(mask.shape)}: [batch, 1, queries, tokens] is accepted")
    mask = mask[..., :tokens].expand(batch, 1, queries, tokens)
    seen = mask[:, 0]
    counts = seen.sum(-1)
    if torch.compiler.is_compiling():  # to tell padding from other masks would ask the device
        return Rows(batch, queries, tokens, full, None, mask, counts)
    last = seen[:, -1]  # [B, S] of the last query, which sees most
    start = last.int().argmax(-1)
    lens = torch.where(last.any(-1), tokens - last.flip(-1).int().argmax(-1), queries)
    rows = Rows(batch, queries, tokens, lens.int(), start.int(), None, counts)
    if not torch.equal(rows.visible[:, 0].expand_as(seen), seen):
        return Rows(batch, queries, tokens, full, None, mask, counts)
    if not bool(start.any()):
        rows.start = None
    lengths = lens.tolist()
    if rows.start is None and len(set(lengths)) == 1:
        rows.counts = [lengths[0] - queries + 1 + i for i in range(queries)]
    return rows


def as_bool(mask: Tensor) -> Tensor:
    """A bool mask; one that adds 0 or a very low number is read as what it means."""
    if mask.dtype == torch.bool:
        return mask
    seen = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask != 0
    if mask.is_floating_point() and not torch.compiler.is_compiling() and bool((mask[seen] != 0).any()):
        raise NotImplementedError("the attention mask adds a bias to scores (ALiBi?); Loki takes masks of yes and no")
    return seen
