"""Labelled instructions of the user's, and the classifier that is trained on them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model_hooks.errors import RequestError

from .instructions import generate
from .linear import measure, train
from .taxonomy import Taxonomy

EACH = 60  # generated instructions a task of the shipped classifier


def read_labels(path: str, taxonomy: Taxonomy) -> tuple[list[str], list[str]]:
    """Texts and tasks of a file with `instruction` and `category`. Raises `RequestError` naming the place."""
    from instruct_data.formats import open_source

    texts, tasks = [], []
    for number, row in enumerate(open_source(path, None, None, None, "strict").rows()):
        data = row.data if isinstance(row.data, Mapping) else {}
        text, name = data.get("instruction"), data.get("category")
        if row.fault is not None or not isinstance(text, str) or not isinstance(name, str):
            raise RequestError(f"{row.where}, label {number}: {row.fault or 'needs texts instruction and category'}")
        task = taxonomy.find(name)
        if task is None:
            raise RequestError(f"{row.where}, label {number}: {name!r} is no task of the taxonomy")
        texts.append(text)
        tasks.append(task)
    return texts, tasks


def train_classifier(data: str, output: Path, taxonomy: Taxonomy, heldout: float, seed: int) -> dict[str, Any]:
    """Train on a file's labels, or on the generated instructions, and measure on the share that is held out."""
    texts, tasks = read_labels(data, taxonomy) if data else generate(EACH, seed)
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    kept = int(heldout * len(order))
    rest, held = order[kept:], order[:kept]
    found = train([texts[i] for i in rest], [tasks[i] for i in rest], list(taxonomy.tasks), seed=seed)
    found.save(output)
    said: dict[str, Any] = {"output": output, "trained_on": len(rest), "heldout": len(held)}
    return said | (measure(found, [texts[i] for i in held], [tasks[i] for i in held]) if held else {})
