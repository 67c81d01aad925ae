"""Spoil a known share of records in known ways, to see whether a filter finds them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

KINDS = ("shuffled", "truncated", "empty", "duplicated")
CLEAN = "clean"


def spoil(records: Sequence[Mapping[str, Any]], share: float, seed: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Alpaca records of which `share` are spoilt, in equal parts of each kind; and what each is (CLEAN or a kind).

        shuffled     the answer is another spoilt record's
        truncated    the answer ends after a fifth of its characters
        empty        there is no answer
        duplicated   the answer says itself twice

    The same seed spoils the same records in the same way. `ValueError` unless there are two records of each kind.
    """
    each = int(len(records) * share) // len(KINDS)
    if each < 2:
        raise ValueError(f"{share} of {len(records)} records is fewer than two of each of {len(KINDS)} kinds")
    lot = random.Random(f"noise/{seed}").sample(range(len(records)), each * len(KINDS))
    made = [dict(record) for record in records]
    kinds = [CLEAN] * len(made)
    for number, kind in enumerate(KINDS):
        places = lot[number * each : (number + 1) * each]
        answers = [made[place]["output"] for place in places]
        for k, place in enumerate(places):
            changed = {
                "shuffled": answers[k - 1], "truncated": answers[k][: len(answers[k]) // 5], "empty": "",
                "duplicated": f"{answers[k]}\n{answers[k]}",
            }  # fmt: skip
            kinds[place], made[place]["output"] = kind, changed[kind]
    return made, kinds
