"""Kinds of task and the forms of their answers: data, not code (the paper's step 1, criteria definition)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from paper_tables.yamlfile import Map, Reader, read_yaml

SHIPPED = Path(__file__).parent / "data" / "taxonomy.yaml"
KEYS = ("description", "format", "rewrite", "retrieve", "checks")


@dataclass(frozen=True)
class Task:
    """A kind of task. `rewrite`: answers are rewritten into `format`. `retrieve`: with evidence that was looked up.
    `checks`: filters (`realign.filters`) that a rewritten answer must pass beside those of the run."""

    name: str
    group: str
    description: str
    format: str = ""
    rewrite: bool = False
    retrieve: bool = False
    checks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Taxonomy:
    """All tasks by name, in order; `default` is the name of the one for whatever fits no other."""

    tasks: Mapping[str, Task]
    default: str

    def __getitem__(self, name: str) -> Task:
        return self.tasks[name]

    @cached_property
    def groups(self) -> list[str]:
        return list(dict.fromkeys(task.group for task in self.tasks.values()))

    def find(self, text: str) -> str | None:
        """The task that `text` names, however it is written ("Open QA.", '"open-qa"'); None if it names none."""
        plain = re.sub(r"[\s-]+", "_", text.strip().strip("\"'`.*:").strip().casefold())
        return plain if plain in self.tasks else None


def load_taxonomy(path: str | Path | None = None) -> Taxonomy:
    """The paper's taxonomy, or that of a YAML file. Raises `TableError` naming file and line."""
    path = Path(path) if path else SHIPPED
    top = Reader(path, read_yaml(path), "the taxonomy")
    _known(top, ("default", "formats", "groups"))
    groups = top.inner("groups", "groups")
    tasks: dict[str, Task] = {}
    for group in groups.map:
        members = groups.inner(group, f"group {group}")
        for name in members.map:
            if name in tasks:
                raise members.fail(f"{name} is in {tasks[name].group} already", name)
            tasks[name] = _task(members.inner(name, f"task {name}"), name, group)
    default = top.map.get("default")
    if default not in tasks:
        raise top.fail(f"default is {default!r}; name one of the {len(tasks)} tasks", "default")
    return Taxonomy(tasks, default)


def _known(reader: Reader, keys: tuple[str, ...]) -> None:
    for key in reader.map:
        if key not in keys:
            raise reader.fail(f"unknown key {key!r}; known are {', '.join(keys)}", key)


def _task(reader: Reader, name: Any, group: Any) -> Task:
    from .filters import FILTERS

    _known(reader, KEYS)
    given: Map = reader.map
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9_]+", name):
        raise reader.fail("a task's name is made of a-z, 0-9 and _")
    for key, kind in (("description", str), ("format", str), ("rewrite", bool), ("retrieve", bool), ("checks", list)):
        if key in given and not isinstance(given[key], kind):
            raise reader.fail(f"{key} is {given[key]!r}, must be {'a list' if kind is list else kind.__name__}", key)
    form = given.get("format", "").strip()
    rewrite = given.get("rewrite", bool(form))
    if rewrite and not form:
        raise reader.fail("is to be rewritten but has no format", "rewrite")
    for check in given.get("checks", ()):
        if check not in FILTERS:
            raise reader.fail(f"unknown check {check!r}; known are {', '.join(FILTERS)}", "checks")
    return Task(
        name, str(group), given.get("description", ""), form, rewrite, given.get("retrieve", False),
        tuple(given.get("checks", ())),
    )  # fmt: skip
