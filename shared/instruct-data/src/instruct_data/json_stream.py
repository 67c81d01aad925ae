"""JSON arrays and JSON lines as streams of rows: one record in memory at a time, every fault with its place.

And strict JSON for what is written.
"""

from __future__ import annotations

import codecs
import io
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .errors import Where

CHUNK, PIECE = 1 << 20, 1 << 16
LONGEST = 1 << 26  # characters: beyond this a record's end is not looked for, or one lost quote would fill the memory
_SPACE = re.compile(r"[ \t\n\r]*")
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{},]', re.DOTALL)
_DECODER = json.JSONDecoder()
_LOST = "the records after this place cannot be read"


@dataclass(slots=True)
class Row:
    """What a source has at one place: `data` (not yet known to be an object), or a `fault` and the raw `text`."""

    where: Where
    data: Any = None
    fault: str | None = None
    text: str | None = None


def parse(raw: bytes, where: Where, encoding_errors: str) -> Row:
    """The one JSON value that `raw`, which begins at `where`, should be. Bare NaN and Infinity are accepted."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        text = raw.decode(errors="replace")
        if encoding_errors == "strict":
            fault = f"byte 0x{raw[error.start]:02x} is not UTF-8; --encoding-errors replace reads it as U+FFFD"
            return Row(_inside(where, raw[: error.start].decode(), error.start), fault=fault, text=text)
    try:
        return Row(where, data=json.loads(text))
    except json.JSONDecodeError as error:
        before = text[: error.pos]
        return Row(_inside(where, before, len(before.encode())), fault=f"malformed JSON: {error.msg}", text=text)
    except RecursionError:
        return Row(where, fault="malformed JSON: nested too deep", text=text)
    except ValueError as error:  # a whole number of more than 4,300 digits
        return Row(where, fault=f"malformed JSON: {error}", text=text)


def _inside(where: Where, before: str, size: int) -> Where:
    """The place `size` bytes behind `where`, with the text `before` in between."""
    lines = before.count("\n")
    column = len(before) - before.rfind("\n") if lines else (where.column or 1) + len(before)
    return Where(where.file, (where.line or 1) + lines, (where.offset or 0) + size, column)


def read_lines(stream: io.BufferedIOBase, name: str, encoding_errors: str) -> Iterator[Row]:
    """A row for each line that is not blank. Only a line feed ends a line; a byte order mark is passed over."""
    offset = 0
    for number, line in enumerate(stream, 1):
        start = offset
        offset += len(line)
        if number == 1 and line.startswith(codecs.BOM_UTF8):
            line, start = line[3:], start + 3
        content = line.strip(b" \t\r\n")
        if not content:
            continue
        indent = len(line) - len(line.lstrip(b" \t\r\n"))
        row = parse(content, Where(name, number, start + indent, 1 + indent), encoding_errors)
        if row.fault is None:
            row.where = Where(name, number, start + indent)
        elif number == 1 and content[:1] in b"[{" and len(content) <= 2:
            row.fault += " (a JSON array over several lines needs a name that ends in .json)"
        yield row


class _Text:
    """A UTF-8 stream as text, and the place of its next character. Bytes that are no UTF-8 become lone surrogates."""

    def __init__(self, stream: io.BufferedIOBase, name: str) -> None:
        self.stream, self.name = stream, name
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.buffer, self.at, self.ended = "", 0, False
        self.line, self.column, self.offset = 1, 1, 0

    def place(self) -> Where:
        return Where(self.name, self.line, self.offset, self.column)

    def fill(self) -> bool:
        """Read on, as much again as is waiting, so that a long record is scanned a few times only. False at the end."""
        if self.ended:
            return False
        data = self._read(max(CHUNK, len(self.buffer) - self.at))
        self.ended = not data
        self.buffer = self.buffer[self.at :] + self.decoder.decode(data, self.ended)
        self.at = 0
        return True

    def _read(self, size: int) -> bytes:
        """The next `size` bytes; fewer before damage in a compressed stream, which the next call meets again."""
        data = b""
        while len(data) < size:
            try:
                piece = self.stream.read1(min(size - len(data), PIECE))
            except (OSError, EOFError, zlib.error):
                if not data:
                    raise
                break
            if not piece:
                break
            data += piece
        return data

    def take(self, to: int) -> bytes:
        """The bytes up to `to`, which are gone from the text then."""
        passed = self.buffer[self.at : to]
        raw = passed.encode(errors="surrogateescape")
        lines = passed.count("\n")
        self.line += lines
        self.column = len(passed) - passed.rfind("\n") if lines else self.column + len(passed)
        self.offset += len(raw)
        self.at = to
        return raw

    def peek(self) -> str:
        """The next character that is no space, or "" at the end."""
        while True:
            match = _SPACE.match(self.buffer, self.at)
            self.take(match.end() if match else self.at)
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self.fill():
                return ""

    def value(self) -> tuple[Any, int] | None:
        """The JSON value here and its end, if it is all in the buffer, well formed and followed as it should be."""
        try:
            data, end = _DECODER.raw_decode(self.buffer, self.at)
            self.buffer[self.at : end].encode()
        except (ValueError, RecursionError):
            return None
        match = _SPACE.match(self.buffer, end)
        after = match.end() if match else end
        return (data, end) if self.buffer[after : after + 1] in {",", "]"} else None

    def extent(self) -> int | None:
        """Where the element here ends (at a comma or bracket of the array itself), None if not in the buffer."""
        depth = 0
        for match in _TOKEN.finditer(self.buffer, self.at):
            token = match.group()
            if token == '"':
                return None
            if token in "[{":
                depth += 1
            elif depth == 0 and token in ",]":
                return match.start()
            elif token in "]}":
                depth = max(depth - 1, 0)
        return None


def read_array(stream: io.BufferedIOBase, name: str, encoding_errors: str) -> Iterator[Row]:
    """A row for each element of the JSON array that `stream` holds.

    An element that is malformed in itself is one faulty row. Where the array is cut off, or has no end that could be
    found, the last row says so.
    """
    text = _Text(stream, name)
    while not text.buffer and text.fill():
        pass
    if text.buffer.startswith("\ufeff"):
        text.take(1)
        text.column = 1
    text.peek()
    text.take(text.at + 1)  # the bracket, which the caller has seen
    if text.peek() == "]":
        text.take(text.at + 1)
        yield from _end(text)
        return
    while True:
        if text.peek() == "":
            yield Row(text.place(), fault=f"the file ends before the array is closed; {_LOST}", text="")
            return
        row, last = _element(text, encoding_errors)
        yield row
        if last:
            return
        mark = text.peek()
        if mark:
            text.take(text.at + 1)
        if mark == "]":
            yield from _end(text)
            return


def _end(text: _Text) -> Iterator[Row]:
    if text.peek():
        yield Row(text.place(), fault="text after the end of the array", text=text.buffer[text.at : text.at + 80])


def _element(text: _Text, encoding_errors: str) -> tuple[Row, bool]:
    """The element here, and whether it is the last that can be read."""
    place = text.place()
    start = Where(place.file, place.line, place.offset)
    while True:
        found = text.value()
        if found:
            text.take(found[1])
            return Row(start, data=found[0]), False
        end = text.extent()
        if end is not None:
            row = parse(text.take(end).rstrip(b" \t\r\n"), place, encoding_errors)
            row.where = row.where if row.fault else start
            return row, False
        if len(text.buffer) - text.at > LONGEST:
            fault = f"no end of this record in {LONGEST:,} characters (a quote or bracket is lost?); {_LOST}"
            return Row(place, fault=fault, text=text.buffer[text.at : text.at + 1000]), True
        if not text.fill():
            return _tail(text, place, start, encoding_errors)


def _tail(text: _Text, place: Where, start: Where, encoding_errors: str) -> tuple[Row, bool]:
    """What is left at the end of a file whose array is not closed: a whole last element, or a part of one."""
    row = parse(text.take(len(text.buffer)).rstrip(b" \t\r\n"), place, encoding_errors)
    if row.fault is None and isinstance(row.data, dict):
        row.where = start
        return row, False
    return Row(
        row.where, fault=f"{row.fault or 'cut off'}: the file ends inside the array; {_LOST}", text=row.text
    ), True


def dump(value: Any, default: Callable[[Any], Any] | None = None) -> bytes:
    """`value` as one line of strict JSON in UTF-8: NaN and infinities are null, lone surrogates are escaped.

    Raises `TypeError` for what JSON has no form for, unless `default` gives one.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=default)
    except (ValueError, TypeError):
        value = _plain(value)
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=default)
    try:
        return text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False, default=default).encode()


def _plain(value: Any) -> Any:
    """`value` with NumPy's scalars as Python's and None for what is not finite."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "dtype") and getattr(value, "ndim", 1) == 0:
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
