"""Instruction-following difficulty from summed losses (Superfiltering, arXiv 2402.00530, section 2).

L_cond = loss_cond_sum / n_cond is the mean loss of a response's tokens given its prompt, L_direct that of the response
alone, in nats a token. What is undefined is None: never 0, never NaN, so that no failure can look like a score.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _exp(value: float | None) -> float | None:
    try:
        return None if value is None else math.exp(value)
    except OverflowError:
        return None


def mean(total: float | None, count: int) -> float | None:
    """`total / count`, None where nothing was summed or the sum is unknown."""
    return None if total is None or count < 1 else _finite(total / count)


@dataclass(frozen=True)
class Ifd:
    """The scores of one pair.

    ifd_ppl: exp(L_cond - L_direct), the ratio of perplexities Superfiltering ranks by.
    ifd_loss: L_cond / L_direct, the ratio of losses Cherry_LLM defined.
    """

    loss_cond: float | None
    loss_direct: float | None
    ppl_A_condition: float | None
    ppl_A_direct: float | None
    ifd_ppl: float | None
    ifd_loss: float | None


def ifd(loss_cond_sum: float | None, n_cond: int, loss_direct_sum: float | None, n_direct: int) -> Ifd:
    """Scores from sums in nats and the numbers of tokens summed."""
    cond, direct = mean(loss_cond_sum, n_cond), mean(loss_direct_sum, n_direct)
    both = cond is not None and direct is not None
    return Ifd(
        loss_cond=cond,
        loss_direct=direct,
        ppl_A_condition=_exp(cond),
        ppl_A_direct=_exp(direct),
        ifd_ppl=_exp(cond - direct) if both else None,  # type: ignore[operator]
        ifd_loss=_finite(cond / direct) if both and direct else None,  # type: ignore[operator]
    )
