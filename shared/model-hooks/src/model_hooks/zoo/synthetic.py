"""Synthetic key-value recall: a table of random names and values, then queries only the table can answer.

Retrieval from the context is what compressing a cache or dropping attention destroys first. Text alone teaches it
slowly; here every query is a dense training signal, and the same generator with another seed makes the task.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

CONSONANTS = "bdfgjklmnprstvz"
VOWELS = "aeiou"
# how a pair is written in the table, the table's frame, how a query is written up to its answer, and its end
FORMS = (
    ('    "{key}": {value},\n', "{name} = {{\n", "}}\n", 'assert {name}["{key}"] == ', "\n"),
    ("{key} = {value}\n", "# {name}\n", "", "assert {key} == ", "\n"),
    ("    {key}={value},\n", "{name} = dict(\n", ")\n", "print({name}.{key})  # ", "\n"),
)


@dataclass(frozen=True)
class Recall:
    """One document: ``head`` ends where the first query begins; ``queries`` are (prompt, answer) in order.

    ``values`` are all values of the table, so other answers can be drawn from them.
    """

    head: str
    queries: tuple[tuple[str, str], ...]
    values: tuple[str, ...]
    end: str

    def text(self) -> str:
        return self.head + "".join(prompt + answer + self.end for prompt, answer in self.queries)


def word(rng: random.Random, syllables: int) -> str:
    return "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(syllables))


def value(rng: random.Random) -> str:
    """A quoted word or a number of two to four digits."""
    if rng.random() < 0.5:
        return f'"{word(rng, rng.randint(1, 3))}"'
    return str(rng.randint(10, 9999))


def recall(rng: random.Random, pairs: int, queries: int) -> Recall:
    """A document of ``pairs`` different names with different values, asked about ``queries`` of them."""
    pair, opening, closing, query, end = rng.choice(FORMS)
    keys: dict[str, str] = {}
    while len(keys) < pairs:
        key, val = word(rng, rng.randint(2, 3)), value(rng)
        if val not in keys.values():
            keys[key] = val
    name = word(rng, 2)
    lines = [pair.format(key=k, value=v) for k, v in keys.items()]
    asked = rng.sample(sorted(keys), min(queries, pairs))
    return Recall(
        head=opening.format(name=name) + "".join(lines) + closing.format(),
        queries=tuple((query.format(name=name, key=key), keys[key]) for key in asked),
        values=tuple(keys.values()),
        end=end,
    )
