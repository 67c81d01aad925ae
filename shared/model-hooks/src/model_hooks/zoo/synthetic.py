"""Synthetic key-value recall: a table of random names and values, then queries only the table can answer.

Retrieval from the context is what compressing a cache or dropping attention destroys first. Text alone teaches it
slowly; here every query is a dense training signal, and the same generator with another seed makes the task.

There are two kinds. ``recall`` is code: names and values of several tokens, asked in another form than the table's.
``table`` is plain associative recall: a line is a key and a value of one token each, and a key that comes again asks
for the value it came with.
"""

from __future__ import annotations

import json
import random
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

VOCABULARY = Path(__file__).parent / "data" / "tokenizer" / "tokenizer.json"
CONSONANTS = "bdfgjklmnprstvz"
VOWELS = "aeiou"
# how a pair is written in the table, the table's frame, how a query is written up to its answer, and its end
FORMS = (
    ('    "{key}": {value},\n', "{name} = {{\n", "}}\n", 'assert {name}["{key}"] == ', "\n"),
    ("{key} = {value}\n", "# {name}\n", "", "assert {key} == ", "\n"),
    ("    {key}={value},\n", "{name} = dict(\n", ")\n", "print({name}.{key})  # ", "\n"),
)


def word(rng: random.Random, syllables: int) -> str:
    return "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(syllables))


def value(rng: random.Random) -> str:
    """A quoted word or a number of two to four digits."""
    if rng.random() < 0.5:
        return f'"{word(rng, rng.randint(1, 3))}"'
    return str(rng.randint(10, 9999))


def recall(rng: random.Random, pairs: int) -> str:
    """A document of ``pairs`` different names with different values, asked about each of them."""
    pair, opening, closing, query, end = rng.choice(FORMS)
    keys: dict[str, str] = {}
    while len(keys) < pairs:
        key, val = word(rng, rng.randint(2, 3)), value(rng)
        if val not in keys.values():
            keys[key] = val
    name = word(rng, 2)
    lines = [pair.format(key=k, value=v) for k, v in keys.items()]
    asked = rng.sample(sorted(keys), pairs)
    queries = (query.format(name=name, key=key) + keys[key] + end for key in asked)
    return "".join([opening.format(name=name), *lines, closing.format(), *queries])


class Line(NamedTuple):
    """``prompt`` ends with the key and its colon, ``answer`` is the value; together four tokens of the tokenizer."""

    prompt: str
    answer: str
    asked: bool = False


@cache
def words() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(keys, values): the words that are one token after an indentation, and those that are one after a space."""
    vocabulary = json.loads(VOCABULARY.read_text(encoding="utf-8"))["model"]["vocab"]
    keys = sorted(token for token in vocabulary if re.fullmatch(r"[a-z]{2,}", token))
    values = sorted(token[1:] for token in vocabulary if re.fullmatch(r"\u0120[a-z]{3,}", token))  # \u0120: a space
    return tuple(keys), tuple(values)


def pairs(rng: random.Random, count: int) -> list[Line]:
    """Lines of ``count`` different keys, each with a value of its own draw: two keys may share one."""
    keys, values = words()
    return [Line(f"\n  {key}:", f" {rng.choice(values)}") for key in rng.sample(keys, count)]


def table(rng: random.Random, lines: int) -> list[Line]:
    """A table of ``lines`` lines, 20 to 80 % of them new keys, the others asked for a key above.

    In half of the tables all new keys come first, in the others they are strewn among the questions.
    """
    new = max(1, round(lines * rng.uniform(0.2, 0.8)))
    known = pairs(rng, new)
    asking = [False] * (new - 1) + [True] * (lines - new)
    if rng.random() < 0.5:
        rng.shuffle(asking)
    result, seen = [known[0]], 1
    for ask in asking:
        result.append(known[rng.randrange(seen)]._replace(asked=True) if ask else known[seen])
        seen += not ask
    return result
