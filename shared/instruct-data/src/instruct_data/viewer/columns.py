"""Rows into columns: numbers, categories, short labels and texts, as the page stores them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from model_hooks.errors import RequestError

from .values import flat, is_number, packed, plain

BLOCK = 512  # rows whose texts are packed together: opening one record unpacks this many
PREVIEW = 110  # characters of a text that the list can show without unpacking it
CATEGORIES = 64  # more different values than this are no list to choose from
LABEL = 80  # characters; a longer string is a text
# Bars of 34 pixels: browsers cut an element off at about 17 million.
MOST_ROWS = 400_000

_MISSING = object()


@dataclass
class Texts:
    """A text column: blocks of `BLOCK` values packed as they come, previews and lengths for all rows at hand."""

    blocks: list[str] = field(default_factory=list)
    previews: list[str] = field(default_factory=list)
    lengths: list[int | None] = field(default_factory=list)
    characters: int = 0
    _open: list[Any] = field(default_factory=list)

    def append(self, value: Any) -> None:
        words = flat(value)
        self.previews.append(preview(words))
        self.lengths.append(None if value is None else len(words))
        self.characters += len(words)
        self._open.append(value)
        if len(self._open) == BLOCK:
            self.close()

    def close(self) -> None:
        """Pack what is left over after the last full block."""
        if self._open:
            self.blocks.append(packed(self._open))
            self._open = []


def preview(words: str) -> str:
    """The beginning of a text in one line."""
    start = " ".join(words[: 4 * PREVIEW].split())
    if len(start) > PREVIEW:
        return start[:PREVIEW].rstrip() + "…"
    return start + "…" if len(words) > 4 * PREVIEW else start


@dataclass
class Column:
    """A column by name: its values in row order, and the rows that do not have its key."""

    name: str
    values: Texts | list[Any]
    missing: list[int] = field(default_factory=list)

    def append(self, row: int, value: Any) -> None:
        if value is _MISSING:
            self.missing.append(row)
            value = None
        self.values.append(value)


@dataclass
class Gathered:
    """All rows as columns, in the order in which their keys were first seen."""

    columns: dict[str, Column]
    count: int


def gather(rows: Iterable[Mapping[str, Any]], text: Sequence[str], wanted: Sequence[str] | None) -> Gathered:
    """Read the rows once. Columns named in `text` are packed as they come, the others are kept for `kind_of`.

    `wanted`: the columns to keep, in this order; None keeps all. Raises `RequestError` on a row that is no mapping, and
    on more rows than a page can show.
    """
    columns: dict[str, Column] = {}
    for name in wanted or ():
        columns[name] = Column(name, Texts() if name in text else [])
    count = 0
    for count, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise RequestError(
                f"row {count - 1} is a {type(row).__name__}; each row must be a mapping of names to values"
            )
        if count > MOST_ROWS:
            raise RequestError(
                f"more than {MOST_ROWS:,} rows; a page shows that many at most: give a selection or a sample"
            )
        for name in row:
            if wanted is None and name not in columns:
                columns[name] = _late(name, count - 1, name in text)
        for name, column in columns.items():
            value = row.get(name, _MISSING)
            column.append(count - 1, value if value is _MISSING else plain(value))
    return Gathered(
        {name: column for name, column in columns.items() if len(column.missing) < count or not count}, count
    )


def _late(name: str, rows: int, is_text: bool) -> Column:
    """A column whose key was not in the first `rows` rows."""
    if not isinstance(name, str):
        raise RequestError(f"row {rows} has the key {name!r}; the names of columns must be strings")
    column = Column(name, Texts() if is_text else [])
    for row in range(rows):
        column.append(row, _MISSING)
    return column


def kind_of(name: str, values: Sequence[Any]) -> str:
    """`number`, `category`, `label` or `text`, by the values that are there.

    A category has at most `CATEGORIES` different values, each twice on average (a `status` always is one if it can be);
    a label is a short string, such as an id.
    """
    there = [value for value in values if value is not None]
    if there and all(map(is_number, there)):
        return "number"
    if any(isinstance(value, dict | list) for value in there):
        return "text"
    if any(isinstance(value, str) and (len(value) > LABEL or "\n" in value) for value in there):
        return "text"
    different = {(type(value), value) for value in there}
    few = len(different) <= CATEGORIES and (2 * len(different) <= len(there) or name == "status")
    return "category" if few or all(isinstance(value, bool) for value in there) else "label"


def pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """Columns that hold a text before and after a change: `before` and `after`, `before_x`, `x_before` and the like."""
    names = list(names)
    found = []
    for name in names:
        other = re.sub(r"^before(?=_|$)|(?<=_)before$", "after", name)
        if other != name and other in names:
            found.append((name, other))
    return found


def encode(column: Column, kind: str, previews: bool) -> dict[str, Any]:
    """A column as the page's head holds it. The blocks of a text are not in it: they are unpacked when needed."""
    values = column.values
    entry: dict[str, Any] = {"name": column.name, "kind": kind}
    if column.missing:
        entry["missing"] = column.missing
    if isinstance(values, Texts):
        entry |= {"blocks": len(values.blocks), "length": values.lengths}
        return entry | {"preview": values.previews} if previews else entry
    if kind != "category":
        return entry | {"values": values}
    codes: dict[tuple[type, Any], int] = {}
    coded = [-1 if value is None else codes.setdefault((type(value), value), len(codes)) for value in values]
    return entry | {"values": [value for _, value in codes], "codes": coded}
