"""A run in N parts, on machines that know nothing of each other, and the merge that proves nothing is missing.

What a part writes is a JSON line a record, {"id", "content", "value"}, between a head line that says of which run and
which part it is and a last line with their count. Records go to parts by a hash of their id.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from instruct_data.journal import content_key
from instruct_data.json_stream import dump
from instruct_data.records import Record
from model_hooks.errors import FingerprintMismatch, RequestError
from model_hooks.files import atomic_file, refuse_existing


def parse_shard(text: str) -> tuple[int, int]:
    """(part, of) from "2/8", parts counted from 1. Raises `RequestError`."""
    part, _, of = text.partition("/")
    if not (part.isdigit() and of.isdigit() and 1 <= int(part) <= int(of)):
        raise RequestError(f"shard {text!r}; give PART/OF, such as 1/4 to 4/4")
    return int(part), int(of)


def part_of(id: str, of: int) -> int:
    """The part, from 1, that the record `id` belongs to: the same on every machine and in every Python."""
    digest = hashlib.sha256(id.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") % of + 1


def write_part(
    path: str | Path, shard: tuple[int, int], recipe: Mapping[str, Any],
    values: Iterable[tuple[Record, Any]], overwrite: bool = False,
) -> int:  # fmt: skip
    """Write one part, whole or not at all; `values` are (record, strict JSON) in the records' order."""
    refuse_existing(path, overwrite)
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        file.write(dump({"part": shard[0], "of": shard[1], "recipe": dict(recipe)}) + b"\n")
        count = 0
        for record, value in values:
            count += 1
            file.write(dump({"id": record.id, "content": content_key(record.data), "value": value}) + b"\n")
        file.write(dump({"records": count}) + b"\n")
    return count


def merge_parts(records: Iterable[Record], parts: Sequence[str | Path]) -> Iterator[tuple[Record, Any]]:
    """(record, value) for every record, in order and in constant memory.

    Raises `RequestError`, before the first is given or where it is found: parts that are missing, given twice, of
    another number or not whole; and `FingerprintMismatch`: parts of different runs, or of other records than these.
    """
    with ExitStack() as stack:
        lines: dict[int, Iterator[dict[str, Any]]] = {}
        first: dict[str, Any] = {}
        for path in parts:
            entries = _entries(stack.enter_context(Path(path).open("rb")), path)
            head = next(entries)
            if not {"part", "of", "recipe"} <= set(head):
                raise RequestError(f"{path} is no part of a run")
            first = first or head
            _check_head(head, first, path)
            if head["part"] in lines:
                raise RequestError(f"part {head['part']} is given twice, the second time as {path}")
            lines[head["part"]] = entries
        missing = [f"{part}/{first['of']}" for part in range(1, first.get("of", 0) + 1) if part not in lines]
        if not parts or missing:
            raise RequestError(f"parts are missing: {', '.join(missing[:5]) or 'all'}; give all of them")
        counts = dict.fromkeys(lines, 0)
        for record in records:
            part = part_of(record.id, first["of"])
            entry = next(lines[part], {})
            if entry.get("id") != record.id or entry.get("content") != content_key(record.data):
                raise FingerprintMismatch(f"part {part} does not have record {record.id}: it is of other records")
            counts[part] += 1
            yield record, entry["value"]
        for part, entries in lines.items():
            if next(entries, {}).get("records") != counts[part] or next(entries, None) is not None:
                raise FingerprintMismatch(f"part {part} has other records than these")


def _entries(lines: Iterable[bytes], path: str | Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except ValueError:
            raise RequestError(f"{path}, line {number}: no JSON; the part is not whole") from None
        if not isinstance(entry, dict):
            raise RequestError(f"{path}, line {number}: no object; this is no part of a run")
        yield entry


def _check_head(head: Mapping[str, Any], first: Mapping[str, Any], path: str | Path) -> None:
    if head["of"] != first["of"]:
        raise RequestError(f"{path} is a part of {head['of']}, the others are of {first['of']}")
    names = [k for k in first["recipe"] | head["recipe"] if first["recipe"].get(k) != head["recipe"].get(k)]
    if names:
        raise FingerprintMismatch(
            f"{path} was made with {names[0]} {head['recipe'].get(names[0])!r}, "
            f"the first part with {first['recipe'].get(names[0])!r}"
        )


def only(records: Iterable[Record], shard: tuple[int, int] | None) -> Iterator[Record]:
    """The records of one part, or all of them."""
    return (r for r in records if shard is None or part_of(r.id, shard[1]) == shard[0])
