"""What a package offers: its tables and the function that measures a row."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from .errors import TableError, nearest, one_line
from .progress import Bar, progress
from .table import SCALES, Table, read_table

T = TypeVar("T")
GROUP = "paper_tables.tables"


@dataclass
class Context:
    """What `Paper.run` is given beside the cell; it lives as long as the process, so work can be shared by units."""

    memo: dict[Hashable, Any] = field(default_factory=dict)
    artefacts: dict[str, Any] = field(default_factory=dict)
    _latest: dict[str, tuple[Hashable, Any]] = field(default_factory=dict)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """`make()`, made once for each `key` and kept: for small things."""
        if key not in self.memo:
            self.memo[key] = make()
        result: T = self.memo[key]
        return result

    def latest(self, kind: str, key: Hashable, make: Callable[[], T]) -> T:
        """`make()`, kept until another `key` of the same `kind` is asked for: for large things, such as models."""
        if self._latest.get(kind, (None, None))[0] != key or kind not in self._latest:
            self._latest.pop(kind, None)  # let go of the old one before the new one is made
            self._latest[kind] = (key, make())
        result: T = self._latest[kind][1]
        return result

    def artefact(self, name: str, matrix: Any) -> None:
        """Keep a list, a matrix or a tensor with this unit's result: for heat maps and for whoever reads the JSON."""
        self.artefacts[name] = matrix.tolist() if hasattr(matrix, "tolist") else matrix

    def progress(self, description: str, total: float | None = None) -> AbstractContextManager[Bar]:
        """A bar below the runner's own: `with context.progress("documents", 40) as bar: bar.advance()`."""
        return progress(description, total)


Run = Callable[[Mapping[str, Any], Context], Mapping[str, Any]]


@dataclass(frozen=True)
class Paper:
    """A paper: the package's name, the folder with its YAML files, and the function that measures a row.

    `run(cell, context)` gets the cell (scale settings, row parameters, `package`, `table`, `scale`, `row`, `seed`) and
    returns column id -> number or {"value": number, "se": number}; a column left out counts as not measured.
    `code`: import names whose files, besides the package's own, decide whether a result is still valid.
    """

    name: str
    tables_folder: Path
    run: Run
    title: str = ""
    code: tuple[str, ...] = ("model_hooks", "lean_kernels")

    @property
    def committed(self) -> Path:
        """The folder of the results that ship with the package: `TABLE/SCALE.json`."""
        return self.tables_folder / "results"

    def tables(self) -> dict[str, Table]:
        """The package's tables by id, in the order of their file names. Raises `TableError`."""
        if not self.tables_folder.is_dir():
            raise TableError(f"{self.name}: no folder {self.tables_folder} with tables; reinstall the package")
        return {path.stem: read_table(path, self.name) for path in sorted(self.tables_folder.glob("*.yaml"))}


def tables_folder(module_file: str) -> Path:
    """Where a package's YAML files are: `_tables` beside the module (in a wheel), else `tables` of its folder."""
    here = Path(module_file).resolve().parent
    inside = here / "_tables"
    return inside if inside.is_dir() else here.parent.parent / "tables"


def installed() -> tuple[dict[str, Paper], dict[str, str]]:
    """The papers of the installed packages by name, and one line for each that could not be loaded."""
    papers: dict[str, Paper] = {}
    broken: dict[str, str] = {}
    for point in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda p: p.name):
        try:
            paper = point.load()
            if not isinstance(paper, Paper):
                raise TypeError(f"{point.value} is not a paper_tables.Paper")
            papers[point.name] = paper
        except Exception as error:  # a package that does not import must not take the others with it
            broken[point.name] = one_line(error)
    return papers, broken


def choose(papers: Iterable[Paper], targets: Iterable[str] = ()) -> list[tuple[Paper, Table]]:
    """The tables that `targets` (`PACKAGE` or `PACKAGE/TABLE`) name; all of them without targets."""
    by_name = {paper.name: paper for paper in papers}
    wanted = list(targets) or list(by_name)
    chosen: dict[tuple[str, str], tuple[Paper, Table]] = {}
    for target in wanted:
        name, _, table_id = target.partition("/")
        if name not in by_name:
            raise TableError(f"no package {name!r} with tables is installed{nearest(name, by_name)}")
        tables = by_name[name].tables()
        if table_id and table_id not in tables:
            raise TableError(f"{name} has no table {table_id!r}{nearest(table_id, tables)}")
        for key in [table_id] if table_id else tables:
            chosen[name, key] = (by_name[name], tables[key])
    return list(chosen.values())


def check_scale(scale: str) -> str:
    """`scale`, if it is one. Raises `TableError`."""
    if scale not in SCALES:
        raise TableError(f"unknown scale {scale!r}{nearest(scale, SCALES)}")
    return scale
