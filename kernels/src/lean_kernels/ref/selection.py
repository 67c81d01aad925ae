"""Which cached tokens a query reads: scores from the leading dimensions, the best of them, always-read ends, blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Indices = npt.NDArray[np.int64]
Scores = npt.NDArray[Any]


@dataclass(frozen=True)
class Rule:
    """The arguments of `loki_decode` of the same names."""

    d: int
    select: str = "group"
    reduce: str = "softmax_mean"
    sink: int = 0
    recent: int = 0
    block: int = 1


@dataclass(frozen=True)
class Visible:
    """The tokens that a query may read: lo <= j < hi, and of these `only` (ascending, counted from lo) if given."""

    lo: int
    hi: int
    only: Indices | None = None

    def __len__(self) -> int:
        return self.hi - self.lo if self.only is None else len(self.only)

    def all(self) -> Indices | slice:
        """All of them: a slice where they are a run."""
        return slice(self.lo, self.hi) if self.only is None else self.lo + self.only

    def tokens(self, positions: Indices) -> Indices:
        """Token numbers of positions in the ascending list of visible tokens."""
        return self.lo + (positions if self.only is None else self.only[positions])


def pick(scores: Tensor, topk: int, rule: Rule, visible: Visible) -> list[Indices]:
    """Token numbers, ascending, that the query heads of one KV head read: one array for the group, or one a head.

    `scores` [G, hi - lo] are the heads' scaled products with the low keys.
    """
    if visible.only is not None:
        scores = scores[:, torch.from_numpy(visible.only).to(scores.device)]
    if rule.select == "head":
        rows = list(_without_nan(scores).cpu().numpy())
    else:
        rows = [reduce_group(scores, rule).cpu().numpy()]
    count = min(max(topk, rule.sink + rule.recent), len(visible))
    return [visible.tokens(_positions(row, count, rule, visible)) for row in rows]


def reduce_group(scores: Tensor, rule: Rule) -> Tensor:
    """One score a token from those of G heads [G, S]: the greatest, or the mean of the heads' softmax. NaN is -inf."""
    if rule.reduce == "max":
        return _without_nan(scores.amax(0) if not _has_nan(scores) else _without_nan(scores).amax(0))
    shares = scores.softmax(-1)
    # one NaN or +inf makes a head's whole row NaN, so a column tells of all
    if not bool(shares[:, 0].isnan().any()):
        return shares.mean(0)
    finite = torch.nan_to_num(scores, nan=-torch.inf, posinf=torch.finfo(scores.dtype).max)
    shares = torch.nan_to_num(finite.softmax(-1), nan=0.0)
    return shares.mean(0).masked_fill_(scores.isnan().all(0), -torch.inf)


def _has_nan(scores: Tensor) -> bool:
    return bool(scores.sum().isnan())


def _without_nan(scores: Tensor) -> Tensor:
    return torch.where(scores.isnan(), -torch.inf, scores) if _has_nan(scores) else scores


def _positions(scores: Scores, count: int, rule: Rule, visible: Visible) -> Indices:
    """Positions of the `count` best of the visible tokens, or of all tokens in the best blocks."""
    total = len(scores)
    if rule.block == 1:
        return _best(scores, count, min(rule.sink, total), min(rule.recent, total))
    tokens = visible.tokens(np.arange(total))
    # visible tokens come in order, so a block's are a run of them
    first = np.flatnonzero(np.diff(tokens // rule.block, prepend=-1))
    of_token = np.repeat(np.arange(len(first)), np.diff(first, append=total))
    sink = of_token[rule.sink - 1] + 1 if rule.sink else 0
    recent = len(first) - of_token[max(0, total - rule.recent)] if rule.recent else 0
    best = _best(np.maximum.reduceat(scores, first), -(-count // rule.block), int(sink), int(recent))
    chosen = np.zeros(len(first), dtype=bool)
    chosen[best] = True
    return np.flatnonzero(chosen[of_token])


def _best(scores: Scores, count: int, first: int, last: int) -> Indices:
    """Ascending positions: the `first` and `last` ones, and the best others until there are `count`; ties by place."""
    total = len(scores)
    count = max(count, first + last)
    if count >= total:
        return np.arange(total)
    middle, wanted = scores[first : total - last], count - first - last
    if wanted:
        threshold = np.partition(middle, len(middle) - wanted)[len(middle) - wanted]
        chosen = np.flatnonzero(middle >= threshold)
        surplus = len(chosen) - wanted
        if surplus:
            equal = np.flatnonzero(middle[chosen] == threshold)
            chosen = np.delete(chosen, equal[-surplus:])
    else:
        chosen = np.arange(0)
    if not first and not last:
        return chosen
    return np.concatenate([np.arange(first), chosen + first, np.arange(total - last, total)])
