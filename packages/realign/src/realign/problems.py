"""Word problems of a few steps, from a generator: questions, terse answers in mixed forms, and worked answers.

They stand in for GSM8K in the tables that run without a download. The worked answer is the form that the taxonomy of
tables/problems-taxonomy.yaml asks for; the terse one has the same result and none of the steps.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

MOST = 9  # no total on the way is larger, and none is below 0
THINGS = ("pens", "cups", "maps", "nuts", "keys", "bags")
HOLDERS = ("A box", "A shop", "Tom", "Anna", "The bus", "A pot")
MORE = ("{n} are added.", "Then {n} more.", "It gets {n}.", "Plus {n}.")
FEWER = ("{n} are taken.", "Then {n} less.", "It loses {n}.", "Minus {n}.")
TERSE = ("{result}", "#### {result}", "The answer is {result}.", "= {result}", "It is {result}", "{thing}: {result}")


@dataclass(frozen=True)
class Problem:
    """`question`; `terse`, its answer in one of several forms; `worked`, step by step; and the `result`."""

    question: str
    terse: str
    worked: str
    result: int


def problem(rng: random.Random, steps: int) -> Problem:
    """One problem of `steps` additions and subtractions within 0 to `MOST`."""
    thing, total = rng.choice(THINGS), rng.randint(1, 9)
    parts, worked = [f"{rng.choice(HOLDERS)} has {total} {thing}."], []
    for number in range(1, steps + 1):
        n = rng.randint(1, max(total, MOST - total))
        more = n <= MOST - total and (n > total or rng.random() < 0.5)
        after = total + n if more else total - n
        parts.append(rng.choice(MORE if more else FEWER).format(n=n))
        worked.append(f"{number}. {total} {'+' if more else '-'} {n} = {after}")
        total = after
    question = " ".join([*parts, f"How many {thing}?"])
    terse = rng.choice(TERSE).format(result=total, thing=thing)
    return Problem(question, terse, "\n".join([*worked, f"The result is {total}."]), total)


def problems(count: int, steps: int, seed: str) -> list[Problem]:
    """`count` different problems, drawn by `seed`. Sets of different seeds may share some: see `apart`."""
    rng, found = random.Random(seed), dict[str, Problem]()
    while len(found) < count:
        made = problem(rng, steps)
        found.setdefault(made.question, made)
    return list(found.values())


def apart(count: int, steps: int, seed: str, others: list[Problem]) -> list[Problem]:
    """`count` problems of which none is among `others`."""
    known = {other.question for other in others}
    return [p for p in problems(count + len(known), steps, seed) if p.question not in known][:count]
