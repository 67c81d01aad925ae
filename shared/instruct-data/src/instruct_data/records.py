"""Instruction records from any usual file, checked one by one, in constant memory.

records = read("alpaca_data.json")                      # the schema is detected, faults are named
for record in records:                                  # as often as needed
    record.id, record.data, record.examples
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from model_hooks.errors import RequestError
from model_hooks.files import atomic_file

from .errors import BadRecord, DuplicateIds, RecordFault, Where
from .formats import Source, open_source
from .ids import SeenIds
from .json_stream import Row, dump
from .schemas import SCHEMAS, Example, Schema, choose

__all__ = ["SCHEMAS", "BadRecord", "DuplicateIds", "Example", "Record", "Records", "Where", "read"]

_LOOKED_AT = 32


@dataclass(frozen=True, slots=True)
class Record:
    """A good record: `data` is all of it as it was read, `examples` the common view, one for each answer.

    `index` is the position in the source, bad records counted. `id` is data["id"] as text, or the index where the
    record has none.
    """

    index: int
    id: str
    data: dict[str, Any]
    where: Where
    examples: tuple[Example, ...]


class _Rejects:
    """The rejects file of one pass and how many it holds."""

    def __init__(self, file: BinaryIO | None) -> None:
        self.file, self.count = file, 0

    def add(self, error: BadRecord) -> None:
        self.count += 1
        if self.file is not None:
            self.file.write(dump(error.reject(), default=repr) + b"\n")


class Records:
    """The records of one source: iterate over them as often as you like; each pass reads the source again.

    A pass raises `BadRecord` or `DuplicateIds`, or, with on_bad_record="skip", leaves such records out, writes them to
    the rejects file when it comes to its end, and raises `RequestError` if no record was good.

    name: what errors call the source. schema: the record shape. arrow: the columns' types, None for JSON.
    rejected: how many records the last whole pass left out.
    """

    def __init__(self, source: Source, schema: str, on_bad_record: str, rejects: str | Path | None, reid: bool) -> None:
        if on_bad_record not in ("fail", "skip"):
            raise RequestError(f"on_bad_record is {on_bad_record!r}; give fail or skip")
        if on_bad_record == "skip" and rejects is None:
            raise RequestError("skipping bad records needs a file to write them to (rejects)")
        self._source, self._skip, self._rejects, self._reid = source, on_bad_record == "skip", rejects, reid
        self._count: int | None = None
        self.rejected = 0
        self.name, self.arrow = source.name, source.arrow
        self.schema = self._choose(schema)

    def _choose(self, wanted: str) -> Schema:
        """The schema, from the first records. Raises for a source that has none."""
        first: list[Mapping[str, Any]] = []
        rows = self._source.rows()
        index = -1
        for index, row in enumerate(rows):
            if row.fault is not None and not self._skip:
                raise _unreadable(row, index)
            if isinstance(row.data, Mapping):
                first.append(row.data)
            if len(first) == _LOOKED_AT:
                break
        if index < 0:
            path = Path(self.name)
            nothing = "is empty" if path.is_file() and path.stat().st_size == 0 else "holds no record"
            raise RequestError(f"{self.name} {nothing}; give a file with at least one record")
        if not first and self._skip and wanted == "auto":
            raise RequestError(f"{self.name} has no record that could be read; look at it with --on-bad-record fail")
        if not first and wanted == "auto":
            raise _unreadable(next(self._source.rows()), 0)
        return choose(wanted, first, self.name)

    def __iter__(self) -> Iterator[Record]:
        good = 0
        with _file(self._rejects) if self._skip and self._rejects else nullcontext() as rejects:
            bad = _Rejects(rejects)
            for record in self._checked(bad):
                good += 1
                yield record
        if not good:
            raise RequestError(f"{self.name} has no good record: all {bad.count} were bad, see {self._rejects}")
        self._count, self.rejected = good, bad.count

    def _checked(self, bad: _Rejects) -> Iterator[Record]:
        seen = SeenIds()
        rows = enumerate(self._source.rows())
        for index, row in rows:
            try:
                record = self._record(row, index)
                if not seen.add(record.id):
                    if not self._skip:
                        raise DuplicateIds(self.name, self._duplicates(record, rows, seen))
                    raise _repeated(record)
            except BadRecord as error:
                if not self._skip:
                    raise
                bad.add(error)
            else:
                yield record

    def count(self) -> int:
        """How many good records there are. Reads and checks everything unless a whole pass has been made already."""
        if self._count is None:
            for _ in self:
                pass
        assert self._count is not None
        return self._count

    def _record(self, row: Row, index: int) -> Record:
        data = row.data
        if row.fault is not None or not isinstance(data, dict):
            raise _unreadable(row, index)
        id: str | None = None
        try:
            id = _id(data, index)
            if self._reid:
                data, id = _renumbered(data, index), str(index)
            return Record(index, id, data, row.where, self.schema.examples(data))
        except RecordFault as fault:
            raise BadRecord(row.where, index, fault.reason, id=id, key=fault.key, data=data) from None

    def _duplicates(self, record: Record, rows: Iterator[tuple[int, Row]], seen: SeenIds) -> list[tuple[str, Where]]:
        """The first five records whose id is an earlier one's: this one, and four more of those that follow."""
        found = [(record.id, record.where)]
        for index, row in rows:
            try:
                record = self._record(row, index)
            except BadRecord:
                continue
            if not seen.add(record.id):
                found.append((record.id, record.where))
            if len(found) == 5:
                break
        return found


def read(
    source: Any,
    schema: str = "auto",
    *,
    name: str | None = None,
    split: str | None = None,
    subset: str | None = None,
    on_bad_record: str = "fail",
    rejects: str | Path | None = None,
    encoding_errors: str = "strict",
    reid: bool = False,
    limit: int | None = None,
) -> Records:
    """The records of `source`: a path, a folder of `datasets`, a hub name or zoo:pairs (`instruct_data.formats` has the
    list), a dataset of the `datasets` library, or a list (or any other re-iterable) of dicts, called `name` in errors.

    schema: auto (from the first records), alpaca, sharegpt, messages, items or instances (`instruct_data.schemas`).
    split, subset: of a folder or hub dataset; a split can also be written as NAME:SPLIT.
    on_bad_record: "fail" raises at the first; "skip" goes on and writes them to the file `rejects` as JSON lines (an
        empty file where all were good).
    encoding_errors: "strict", or "replace" to read bytes that are no UTF-8 as U+FFFD.
    reid: give each record its position as id, and write it to its "id" where it has one (as text if it was text).

    limit: read only the first so many, bad ones counted.

    Raises `BadRecord`, `DuplicateIds` and plain `RequestError`: here for what the first records show, later from the
    passes over the result.
    """
    if limit is not None and limit < 1:
        raise RequestError(f"limit {limit}: at least 1 record is needed")
    found = open_source(source, name, split, subset, encoding_errors)
    if limit is not None:
        found = replace(found, rows=lambda whole=found.rows: islice(whole(), limit))  # type: ignore[misc]
    return Records(found, schema, on_bad_record, rejects, reid)


def _id(data: Mapping[str, Any], index: int) -> str:
    value = data.get("id")
    if value is None:
        return str(index)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise RecordFault("id", f"is {value!r}, must be a string or a whole number")
    return str(value)


def _renumbered(data: dict[str, Any], index: int) -> dict[str, Any]:
    old = data.get("id")
    return data if old is None else {**data, "id": str(index) if isinstance(old, str) else index}


def _unreadable(row: Row, index: int) -> BadRecord:
    if row.fault is not None:
        return BadRecord(row.where, index, row.fault, text=row.text)
    return BadRecord(row.where, index, f"is of type {type(row.data).__name__}, must be an object", data=row.data)


def _repeated(record: Record) -> BadRecord:
    reason = "is an earlier record's id too"
    return BadRecord(record.where, record.index, reason, id=record.id, key="id", data=record.data)


@contextmanager
def _file(path: str | Path) -> Iterator[BinaryIO]:
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        yield file
