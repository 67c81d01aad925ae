"""Instructions for every task from the templates of data/instructions.yaml: what the shipped classifier learned."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from paper_tables.yamlfile import Reader, read_yaml

SHIPPED = Path(__file__).parent / "data" / "instructions.yaml"
_CHOICE = re.compile(r"\(([^()]*\|[^()]*)\)")


def templates() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """(slots, templates by task)."""
    top = Reader(SHIPPED, read_yaml(SHIPPED), "the instructions")
    slots, tasks = top.inner("slots", "slots").map, top.inner("tasks", "tasks").map
    return {name: [str(v) for v in values] for name, values in slots.items()}, dict(tasks)


def expand(template: str, slots: Mapping[str, Sequence[str]], rng: random.Random) -> str:
    """One text of a template."""
    while found := _CHOICE.search(template):  # the innermost first
        template = template[: found.start()] + rng.choice(found[1].split("|")) + template[found.end() :]
    return re.sub(r"\{(\w+)\}", lambda slot: rng.choice(slots[slot[1]]), template)


def generate(each: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """`each` instructions of every task, and their tasks' names."""
    slots, tasks = templates()
    rng = random.Random(seed)
    pairs = [(expand(rng.choice(found), slots, rng), task) for task, found in tasks.items() for _ in range(each)]
    return [text for text, _ in pairs], [task for _, task in pairs]
