"""A GLUE-like set of four small tasks of two classes, made from the zoo's text: Python's standard library.

    order       are these lines as they were written, or shuffled?                    (acceptability, as CoLA)
    origin      are they from a test, or from the library itself?                     (one text, as SST-2)
    returns     does the function of this first line and docstring return something?  (inference, as RTE)
    describes   does this docstring belong to this function?                          (a pair, as MRPC)

Training text is that of the splits train or calibration, evaluation is on held-out modules. Both classes are about
equally frequent.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from functools import cache
from itertools import islice
from typing import Any

from model_hooks.errors import RequestError
from paper_tables.errors import nearest

LINES = 6  # of a passage
Record = dict[str, Any]


def records(name: str, split: str = "train", samples: int = 1000, seed: int = 0) -> list[Record]:
    """`samples` records of a task: text (and text_pair), label 0 or 1. Raises `RequestError` for an unknown name."""
    if name not in TASKS:
        raise RequestError(f"unknown task zoo:glue:{name}{nearest(name, TASKS)}")
    rng = random.Random(f"{name} {split} {seed}")
    return [{**r, "task": name} for r in islice(TASKS[name](split, rng), samples)]


@cache
def _passages(split: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(module, lines) of all passages of a split, in order, blank lines left out."""
    from model_hooks.zoo import text

    try:
        documents = text(split)
    except ValueError as error:
        raise RequestError(str(error)) from None
    found = []
    for module, document in documents:
        lines = [line for line in document.splitlines() if line.strip()]
        starts = range(0, len(lines) - LINES + 1, LINES)
        found += [(module, tuple(lines[i : i + LINES])) for i in starts]
    return tuple(found)


def _drawn(split: str, rng: random.Random) -> Iterator[int]:
    """Places of passages, each once, at random."""
    places = list(range(len(_passages(split)) - 1))
    rng.shuffle(places)
    yield from places


def _order(split: str, rng: random.Random) -> Iterator[Record]:
    for place in _drawn(split, rng):
        lines = list(_passages(split)[place][1])
        label = rng.randrange(2)
        if label == 0:
            rng.shuffle(lines)
        yield {"text": "\n".join(lines), "label": label}


def _origin(split: str, rng: random.Random) -> Iterator[Record]:
    passages = _passages(split)
    kinds: dict[int, list[int]] = {0: [], 1: []}
    for place in _drawn(split, rng):
        kinds[passages[place][0].startswith("test.")].append(place)
    for place, label in _balanced(kinds, rng):
        yield {"text": "\n".join(passages[place][1]), "label": label}


def _balanced(kinds: dict[int, list[int]], rng: random.Random) -> Iterator[tuple[int, int]]:
    """(item, class) with as many of one class as of the other."""
    for pair in zip(kinds[0], kinds[1]):
        for label in rng.sample((0, 1), 2):
            yield pair[label], label


@cache
def _pairs(split: str) -> list[tuple[str, str]]:
    from model_hooks.zoo import pairs

    return pairs(split)


def _returns(split: str, rng: random.Random) -> Iterator[Record]:
    found = _pairs(split)
    kinds: dict[int, list[int]] = {0: [], 1: []}
    for place in rng.sample(range(len(found)), len(found)):
        kinds[bool(re.search(r"^\s+return \S", found[place][1], re.MULTILINE))].append(place)
    for place, label in _balanced(kinds, rng):
        docstring, function = found[place]
        yield {"text": f"{function.splitlines()[0]}\n{docstring}", "label": label}


def _describes(split: str, rng: random.Random) -> Iterator[Record]:
    found = _pairs(split)
    for place in rng.sample(range(len(found)), len(found)):
        label = rng.randrange(2)
        function = found[place if label else rng.randrange(len(found))][1]
        yield {"text": found[place][0].splitlines()[0], "text_pair": function, "label": label}


TASKS = {"order": _order, "origin": _origin, "returns": _returns, "describes": _describes}
