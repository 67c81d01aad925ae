"""Which records to keep by their score: the paper's rule, on shares of the data that is really there.

The rule (the original's select step): keep scores below 1, sort them falling, take the first tenth of all records. A
score of 1 or more says that the instruction does not help to predict its answer; a small one that the answer is easy
already; the highest below 1 are the useful ones.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from instruct_data.ifd import ifd
from model_hooks import RequestError

Share = float | str | Fraction
Turns = Literal["mean", "min", "token-weighted", "last"]
TURNS = ("mean", "min", "token-weighted", "last")
NO_SCORE, TOO_HIGH, TOO_LOW, RANKED_LOWER = "no score", "not below the maximum", "not above the minimum", "ranked lower"
REASONS = (NO_SCORE, TOO_HIGH, TOO_LOW, RANKED_LOWER)
KEPT = REASONS.index(RANKED_LOWER)  # what a record within the bounds has until it is chosen


@dataclass(frozen=True)
class GroupCount:
    """One group's part of a selection."""

    records: int
    asked: int
    survivors: int
    chosen: int


@dataclass(frozen=True)
class Selection:
    """What was chosen, and what became of the rest. Fields:

    chosen: positions, highest score first.
    asked: how many were asked for; `survivors`: how many have a score within the bounds.
    reasons: for each record the index in REASONS of why it was dropped, -1 if chosen (int8 [records]).
    groups: by label, where groups were given.
    """

    chosen: NDArray[np.int64]
    asked: int
    survivors: int
    reasons: NDArray[np.int8]
    groups: dict[Hashable, GroupCount] = field(default_factory=dict)

    @property
    def missing(self) -> int:
        """How many fewer were chosen than asked for: too few survive the bounds."""
        return self.asked - len(self.chosen)

    @property
    def dropped(self) -> dict[str, int]:
        """The number of records dropped, by reason."""
        return {reason: int((self.reasons == k).sum()) for k, reason in enumerate(REASONS)}


def as_scores(scores: ArrayLike | Sequence[float | None]) -> NDArray[np.float64]:
    """Scores as float64 [records]; None becomes NaN. Raises `RequestError` for what is neither number nor None."""
    try:
        found = np.asarray(scores, dtype=np.float64)  # None becomes NaN here
    except (TypeError, ValueError):
        raise RequestError("a score is a number, or null for none; the scores given hold something else") from None
    if found.ndim != 1:
        raise RequestError(f"scores of shape {list(found.shape)}; one score a record is needed")
    return found


def parse_share(share: Share) -> Fraction:
    """A share of the records, `0.1` or `"10%"`, as an exact number within 0 (excluded) and 1.

    Exact, because 100 * 0.29 in floating point is below 29.
    """
    text = str(share).strip()
    try:
        value = Fraction(text.removesuffix("%").strip()) / (100 if text.endswith("%") else 1)
    except (ValueError, ZeroDivisionError):
        raise RequestError(f"share {share!r} is no number; give a share like 10% or 0.1") from None
    if not 0 < value <= 1:
        raise RequestError(f"share {share}: a share is above 0 and at most 100% (or 1); give --top-n for a number")
    return value


def select(
    scores: ArrayLike | Sequence[float | None],
    ids: Sequence[int | str] | None = None,
    *,
    top: Share | None = None,
    top_n: int | None = None,
    of: Literal["all", "kept"] = "all",
    maximum: float | None = 1.0,
    minimum: float | None = None,
    groups: Sequence[Hashable] | None = None,
) -> Selection:
    """Choose the highest scores strictly within the bounds.

    Args:
        scores: one a record; NaN, None and -inf are never chosen.
        ids: of the records; equal scores go by id (numbers first, by value), then by position. Default: position.
        top: share of all records (`of="all"`, the paper's meaning) or of those within the bounds (`of="kept"`),
            rounded down.
        top_n: a number instead. With neither, all within the bounds are chosen.
        maximum, minimum: exclusive bounds; None for none.
        groups: a label for each record: `top` is then taken within each group, and `top_n` is divided among the
            groups in proportion to their size.

    Fewer within the bounds than asked for is no error: see `Selection.missing`. Raises `RequestError` where the
    request comes to no record at all, and for numbers out of range.
    """
    values = as_scores(scores)
    _check(len(values), ids, groups, top, top_n, of, minimum, maximum)
    reasons = np.full(len(values), KEPT, np.int8)
    if minimum is not None:
        reasons[values <= minimum] = REASONS.index(TOO_LOW)
    if maximum is not None:
        reasons[values >= maximum] = REASONS.index(TOO_HIGH)
    reasons[~(values > -np.inf)] = REASONS.index(NO_SCORE)
    kept = ranked(values, np.flatnonzero(reasons == KEPT), ids)
    labels, codes = _codes(groups, len(values))
    records, survivors = (np.bincount(c, minlength=len(labels)).tolist() for c in (codes, codes[kept]))
    asked, total = _asked(records if of == "all" else survivors, survivors, top, top_n, of)
    chosen = kept[_rank_within(codes[kept]) < np.array(asked)[codes[kept]]]
    reasons[chosen] = -1
    found = np.bincount(codes[chosen], minlength=len(labels)).tolist()
    counts = {label: GroupCount(*four) for label, *four in zip(labels, records, asked, survivors, found)}
    return Selection(chosen, total, len(kept), reasons, counts if groups is not None else {})


def original_selection(
    scores: ArrayLike | Sequence[float | None], rate: float = 0.1, *, threshold: float = 1.0, records: int | None = None
) -> NDArray[np.int64]:
    """The original's rule to the letter: score < `threshold`, stable by position, the first int(records * rate).

    `records` defaults to the number of scores; the original has 52002 there, whatever the data.
    """
    values = as_scores(scores)
    kept = np.flatnonzero(values < threshold)
    order = np.argsort(-values[kept], kind="stable")
    return kept[order][: int((len(values) if records is None else records) * rate)]


def ranked(
    values: NDArray[np.float64], positions: NDArray[np.int64], ids: Sequence[int | str] | None = None
) -> NDArray[np.int64]:
    """`positions` (rising) by falling value; equal values by id, then by position."""
    order = positions[np.argsort(-values[positions], kind="stable")]
    if ids is None or len(order) < 2:
        return order
    falling = values[order]
    borders = np.flatnonzero(falling[1:] != falling[:-1]) + 1
    starts, ends = np.concatenate([[0], borders]), np.concatenate([borders, [len(order)]])
    for start, end in zip(starts, ends):
        if end - start > 1:  # only ties are sorted in Python
            order[start:end] = sorted(order[start:end], key=lambda k: (_id_key(ids[k]), k))
    return order


def _id_key(value: int | str) -> tuple[int, int, str]:
    """Numbers by value, also those that went through text, then text by code point."""
    text = str(value)
    digits = text.removeprefix("-")
    number = digits.isascii() and digits.isdigit()
    return (0, int(text), text) if number else (1, 0, text)


def allot(sizes: Mapping[Hashable, int], total: int) -> dict[Hashable, int]:
    """Divide `total` among groups in proportion to their `sizes`: largest remainders, equal ones in the order given.

    No group gets more than its size. Raises `RequestError` for more than there is.
    """
    everything = sum(sizes.values())
    if not 0 <= total <= everything:
        raise RequestError(f"{total} of {everything} records in {len(sizes)} groups; ask for 0 to {everything}")
    parts = {label: divmod(total * size, everything) if everything else (0, 0) for label, size in sizes.items()}
    left = total - sum(whole for whole, _ in parts.values())
    first = sorted(parts, key=lambda label: -parts[label][1])[:left]
    return {label: whole + (label in first) for label, (whole, _) in parts.items()}


def aggregate(
    record: ArrayLike,
    loss_cond_sum: ArrayLike,
    n_cond: ArrayLike,
    loss_direct_sum: ArrayLike,
    n_direct: ArrayLike,
    *,
    how: Turns = "mean",
    records: int | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(ifd_ppl, ifd_loss) of each conversation [records], from the sums of its assistant turns [turns], in nats.

    `record` is the conversation of each turn; turns stand in their order. A turn's own score is `instruct_data.ifd`'s.

        mean, min         of the turns' scores
        token-weighted    the score of all turns' tokens together: exp(sum cond / n cond - sum direct / n direct)
        last              the last turn's score

    Turns without a score (a one-token answer, say) are left out, but a last turn without one leaves `last` without one.
    NaN where there is no score. Raises `RequestError` for an unknown `how`.
    """
    if how not in TURNS:
        raise RequestError(f"unknown aggregation of turns {how!r}; there are {', '.join(TURNS)}")
    of = np.asarray(record, dtype=np.int64)
    sums = [np.asarray(column, dtype=np.float64) for column in (loss_cond_sum, n_cond, loss_direct_sum, n_direct)]
    n = int(of.max(initial=-1)) + 1 if records is None else records
    turns = _ifd(*sums)
    scored = ~np.isnan(turns).any(0)
    of_scored = of[scored]
    if how == "token-weighted":
        pooled = [np.bincount(of_scored, column[scored], n) for column in sums]
        ppl, loss = _ifd(*pooled)
        return ppl, loss
    if how == "last":
        last = np.full(n, -1)
        last[of] = np.arange(len(of))  # of repeated places the last assignment stays
        found = np.concatenate([turns, np.full((2, 1), np.nan)], axis=1)[:, last]
        return found[0], found[1]
    if how == "min":
        lowest = np.full((2, n), np.inf)
        for row, values in zip(lowest, turns):
            np.minimum.at(row, of_scored, values[scored])
        lowest[np.isinf(lowest)] = np.nan
        return lowest[0], lowest[1]
    with np.errstate(invalid="ignore"):  # 0 / 0 where no turn has a score
        count = np.bincount(of_scored, minlength=n)
        return np.bincount(of_scored, turns[0, scored], n) / count, np.bincount(of_scored, turns[1, scored], n) / count


def _ifd(cond: Any, n_cond: Any, direct: Any, n_direct: Any) -> NDArray[np.float64]:
    """[2, k]: ifd_ppl and ifd_loss, NaN where undefined."""
    none = math.nan
    found = np.empty((2, len(cond)))
    for k, (a, n, b, m) in enumerate(zip(cond.tolist(), n_cond.tolist(), direct.tolist(), n_direct.tolist())):
        one = ifd(a, n, b, m)
        found[:, k] = none if one.ifd_ppl is None else one.ifd_ppl, none if one.ifd_loss is None else one.ifd_loss
    return found


def _codes(groups: Sequence[Hashable] | None, n: int) -> tuple[list[Hashable], NDArray[np.int64]]:
    """Labels in the order in which they first occur, and each record's place among them; one for all without groups."""
    if groups is None:
        return [None], np.zeros(n, np.int64)
    places: dict[Hashable, int] = {}
    codes = [places.setdefault(label, len(places)) for label in groups]
    return list(places), np.array(codes, np.int64)


def _rank_within(codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many entries before each one have its code."""
    order = np.argsort(codes, kind="stable")
    ahead = np.searchsorted(codes[order], codes[order])  # where each code's run starts
    ranks = np.empty(len(codes), np.int64)
    ranks[order] = np.arange(len(codes)) - ahead
    return ranks


def _asked(
    sizes: list[int], survivors: list[int], top: Share | None, top_n: int | None, of: str
) -> tuple[list[int], int]:
    """How many records each group is asked for, and all together. Raises `RequestError` where a share comes to none."""
    if top_n is not None:
        parts = allot(dict(enumerate(sizes)), min(top_n, sum(sizes)))
        return list(parts.values()), top_n
    if top is None:
        return survivors, sum(survivors)
    share = parse_share(top)
    asked = [math.floor(share * size) for size in sizes]
    if not any(asked):
        whose = f"{sum(sizes)} records" + (" within the bounds" if of == "kept" else "")
        each = " in a group" if len(sizes) > 1 else ""
        raise RequestError(
            f"{float(100 * share):g}% of {whose}{f' in {len(sizes)} groups' if each else ''}, rounded down, is no "
            f"record at all: at least {math.ceil(1 / share)}{each} are needed; ask for a larger share, or for a number "
            "(--top-n)"
        )
    return asked, sum(asked)


def _check(
    n: int,
    ids: Sequence[Any] | None,
    groups: Sequence[Any] | None,
    top: Share | None,
    top_n: int | None,
    of: str,
    minimum: float | None,
    maximum: float | None,
) -> None:
    if not n:
        raise RequestError("no records to select from; the input has none")
    for name, given in (("ids", ids), ("group labels", groups)):
        if given is not None and len(given) != n:
            raise RequestError(f"{len(given)} {name} for {n} scores; one for each record is needed")
    if top is not None and top_n is not None:
        raise RequestError(f"both a share ({top}) and a number ({top_n}) were asked for; give one of the two")
    if top_n is not None and top_n < 1:
        raise RequestError(f"{top_n} records were asked for; ask for 1 or more")
    if of not in ("all", "kept"):
        raise RequestError(f"a share of {of!r}; it is taken of all records (all) or of those within the bounds (kept)")
    for bound in (minimum, maximum):
        if bound is not None and math.isnan(bound):
            raise RequestError("a bound of the scores is not a number")
    if minimum is not None and maximum is not None and minimum >= maximum:
        raise RequestError(f"minimum {minimum} is not below maximum {maximum}: no score lies strictly between them")
