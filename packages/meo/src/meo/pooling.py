"""What a gate looks at: means over the tokens that may decide, with running sums beside the KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model_hooks.errors import RequestError

if TYPE_CHECKING:
    from .context import Frame


def pooled(x: Tensor, frame: Frame, bank: str) -> tuple[Tensor, Tensor | None]:
    """Router input of every group (of every task, of every token), and at level chunk which groups have none.

    Args:
        x: the bank's input, [B, T, D]. bank: its name, under which sums are kept.

    Returns:
        [groups, router], and [groups] bool or None.
    """
    level = frame.runtime.level
    if level == "task":
        assert frame.codes is not None
        return frame.codes, None
    if level == "encoder":
        assert frame.encoder is not None
        return frame.encoder, None
    if frame.runtime.per_token and level == "token":
        return x.flatten(0, 1), None
    if level == "prefix":
        return _prefix(x, frame, bank), None
    if level == "chunk":
        return _chunk(x, frame, bank)
    if level == "cumulative":
        return _cumulative(x, frame, bank), None
    return _mean(x, frame), None


def _mean(x: Tensor, frame: Frame) -> Tensor:
    """Mean over the deciding tokens of each group, Σ m x / max(1, Σ m)."""
    if frame.real is None and frame.documents is None and frame.runtime.level != "prefix":
        return x.mean(1)
    sums, count = _sums(x, frame.deciding, frame)
    return sums / count.clamp_min(1)


def _sums(x: Tensor, mask: Tensor, frame: Frame) -> tuple[Tensor, Tensor]:
    """Sums [groups, D] and counts [groups, 1] of the tokens in `mask`, in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = mask[..., None].to(wide)
    layout = frame.layout
    zero = torch.where(mask[..., None], x.to(wide), 0)  # not a product: what is padded may be infinite
    return layout.split(zero).sum(1), layout.split(weight).sum(1)


def _kept(frame: Frame, bank: str) -> dict[str, Tensor] | None:
    """The bank's sums of earlier calls; None at a beginning."""
    if not frame.past:
        return None
    found = None if frame.state is None else frame.state.get(bank)
    if found is None:
        raise RequestError("this KV cache was filled without the gates' sums; start from an empty cache")
    return found


def _prefix(x: Tensor, frame: Frame, bank: str) -> Tensor:
    """The prompt's mean decides for all that follows."""
    kept = _kept(frame, bank)
    if kept is not None:
        return kept["mean"]
    mean = _mean(x, frame)
    if frame.state is not None:
        frame.state[bank] = {"mean": mean.detach()}
    return mean


def _chunk(x: Tensor, frame: Frame, bank: str) -> tuple[Tensor, Tensor]:
    """Each chunk by the mean of the text before it (as in Lory, 2024)."""
    layout, size = frame.layout, frame.runtime.config.chunk
    sums, _ = _sums(x, frame.real_or_all, frame)  # [groups, D]
    total = sums.cumsum(0)
    before = total - sums  # exclusive
    before = before - before[layout.first]  # of the same document, in this call
    kept = _kept(frame, bank)
    if kept is not None:
        full = (frame.seen_before % size == 0)[:, None]
        closed = torch.where(full, kept["total"], kept["closed"])  # of the chunks that are complete, [B, D]
        opened = (kept["total"] - closed)[layout.row]
        is_first = layout.first == torch.arange(layout.groups, device=x.device)
        before = before + closed[layout.row] + torch.where(is_first[:, None], 0, opened)
    if frame.state is not None:
        frame.state[bank] = _after(sums, before, frame, kept)
    count = (layout.number * size)[:, None]
    return before / count.clamp_min(1), layout.number == 0


def _after(sums: Tensor, before: Tensor, frame: Frame, kept: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Per row [B, D]: the sum of all tokens, and that of the chunks before the last one touched."""
    layout = frame.layout
    zero = sums.new_zeros(frame.batch, sums.shape[1])
    total = (zero if kept is None else kept["total"]).index_add(0, layout.row, sums)
    last = torch.ones_like(layout.row, dtype=torch.bool)
    last[:-1] = layout.row[1:] != layout.row[:-1]
    closed = zero if kept is None else kept["closed"]
    return {"total": total.detach(), "closed": closed.index_copy(0, layout.row[last], before[last]).detach()}


def _cumulative(x: Tensor, frame: Frame, bank: str) -> Tensor:
    """Each token by the mean of the text up to it, [B * T, D]."""
    real = frame.real_or_all[..., None]
    wide = torch.promote_types(x.dtype, torch.float32)
    inside = frame.layout.split(torch.where(real, x.to(wide), 0)).cumsum(1)
    sums = frame.layout.join(inside, frame.batch, frame.tokens)  # [B, T, D]
    kept = _kept(frame, bank)
    if kept is not None:
        sums = sums + kept["total"][:, None]
    if frame.state is not None:
        frame.state[bank] = {"total": sums[:, -1].detach()}
    return (sums / (frame.places + 1).clamp_min(1)[..., None]).flatten(0, 1)
