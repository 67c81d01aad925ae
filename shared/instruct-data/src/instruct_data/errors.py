"""What can be wrong with records, always named by file, line, byte, record, id and key."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from model_hooks.errors import RequestError


@dataclass(frozen=True, slots=True)
class Where:
    """A place in a file: `line` and `column` from 1, `offset` in bytes from 0, in the text as decompressed.

    All but `file` are None where the format has no lines (Parquet, Arrow, hub); there the record's index is the place.
    """

    file: str
    line: int | None = None
    offset: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        parts = [("line", self.line), ("column", self.column), ("byte", self.offset)]
        return ", ".join([self.file, *(f"{name} {value}" for name, value in parts if value is not None)])


class RecordFault(ValueError):
    """What is wrong with one record's content, not yet its place: the schemas raise it, `Records` adds the rest."""

    def __init__(self, key: str | None, reason: str) -> None:
        super().__init__(key, reason)
        self.key, self.reason = key, reason


class BadRecord(RequestError):
    """A record that cannot be used.

    `where` is the place of the fault inside a broken text, and the record's beginning otherwise; `index` counts the
    source's records from 0; `id` is None where it was not readable; `key` is the path to the value
    (``messages[1].content``) and None where the fault is none of a value; `data` is the record, or None where `text`
    (the raw text) could not be read as one.
    """

    def __init__(
        self,
        where: Where,
        index: int,
        reason: str,
        *,
        id: str | None = None,
        key: str | None = None,
        data: Any = None,
        text: str | None = None,
    ) -> None:
        self.where, self.index, self.reason, self.id, self.key = where, index, reason, id, key
        self.data, self.text = data, text
        record = f"record {index}" if id is None else f"record {index}, id {json.dumps(id)}"
        about = "" if key is None else f", key {json.dumps(key)}"
        super().__init__(f"{where}, {record}{about}: {reason}; mend it, or leave such out with --on-bad-record skip")

    def reject(self) -> dict[str, Any]:
        """The line of rejects.jsonl: what is wrong, where, and the record itself or its raw text."""
        return {
            "file": self.where.file,
            "line": self.where.line,
            "column": self.where.column,
            "offset": self.where.offset,
            "index": self.index,
            "id": self.id,
            "key": self.key,
            "reason": self.reason,
            "record": self.data,
            "text": self.text,
        }


class DuplicateIds(RequestError):
    """Ids that several records have. `first` holds (id, place of its later record), five of them at most."""

    def __init__(self, name: str, first: Sequence[tuple[str, Where]]) -> None:
        self.first = list(first)
        places = ", ".join(f"{json.dumps(id)} ({_short(where)})" for id, where in self.first)
        more = "the first five: " if len(self.first) == 5 else ""
        super().__init__(
            f"{name} has ids that more than one record bears, {more}{places}; "
            "number the records anew with --reid, or leave repeated ones out with --on-bad-record skip"
        )


def _short(where: Where) -> str:
    return where.file if where.line is None else f"line {where.line}"
