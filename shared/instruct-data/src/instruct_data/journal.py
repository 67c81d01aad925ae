"""An append-only journal: what was computed once, or paid for once, is never lost to a kill and never done again.

A folder holds `manifest.json` (the settings all entries were made under) and a segment file per writer, `WRITER.jsonl`.
A line is JSON: {"crc": CRC32 of the rest, "key": 64 hex digits, "more": lines that still belong to this append,
"value": any strict JSON}. An append is one unbuffered write, so after kill -9 everything appended is there; an append
torn by a power cut or a full disk is dropped whole when the journal is opened. Entries are found by content hash
(`content_key`), never by position. In memory an entry costs 24 bytes: half its digest and its place.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from model_hooks.errors import FingerprintMismatch, RequestError
from model_hooks.files import atomic_write

from .journal_index import Index

MANIFEST = "manifest.json"
SYNC_SECONDS = 0.2
_HEAD = len('{"crc":"00000000",')
_KEY = slice(len('{"crc":"00000000","key":"'), len('{"crc":"00000000","key":"') + 64)


def canonical(value: Any) -> str:
    """The one JSON text of `value`: keys sorted, no spaces, UTF-8. Raises `ValueError` for NaN and infinities."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def content_key(value: Any) -> str:
    """SHA-256, 64 hex digits, of the canonical JSON of `value`."""
    return hashlib.sha256(canonical(value).encode("utf-8", "surrogatepass")).hexdigest()


def encode(entries: Iterable[tuple[str, Any]]) -> list[bytes]:
    """The lines of one append."""
    pairs = list(entries)
    lines = []
    for left, (key, value) in zip(range(len(pairs) - 1, -1, -1), pairs):
        if len(key) != 64:
            raise ValueError(f"a journal key is 64 hex digits (see content_key), not {key!r}")
        text = json.dumps(value, separators=(",", ":"), allow_nan=False)
        body = f'"key":"{key}","more":{left},"value":{text}}}'.encode()
        lines.append(b'{"crc":"%08x",%s\n' % (zlib.crc32(body), body))
    return lines


def _is_whole(line: bytes) -> bool:
    if not (line.startswith(b'{"crc":"') and line.endswith(b"}\n")):
        return False
    try:
        return int(line[8:16], 16) == zlib.crc32(line[_HEAD:-1])
    except ValueError:
        return False


def _more(line: bytes) -> int:
    start = _KEY.stop + len('","more":')
    return int(line[start : line.index(b",", start)])


def scan(path: Path) -> Iterator[tuple[str, int, int]]:
    """(key, offset, end of its append) of every entry of every whole append in a segment; torn ones are left out."""
    group: list[tuple[str, int]] = []
    expected, offset = 0, 0
    with path.open("rb") as file:
        for line in file:
            if _is_whole(line):
                more = _more(line)
                if group and more != expected:  # the rest of an append is gone
                    group = []
                group.append((line[_KEY].decode(), offset))
                expected = more - 1
                if more == 0:
                    end = offset + len(line)
                    yield from ((key, start, end) for key, start in group)
                    group = []
            else:
                group = []
            offset += len(line)


class Journal:
    """A journal folder, open for reading everything in it and for appending to the segment of one writer.

    Args:
        folder: made where it is not there.
        settings: what entries depend on beside their key (model fingerprint, dtype, template ...); strict JSON. The
            first to open the folder writes them down; anyone else must bring the same.
        writer: the segment's name; one process at a time may hold it, others raise `RequestError`. None: only read.
        sync_seconds: at most this long after an append it is safe from a power cut too; 0 syncs with every append.

    Raises `FingerprintMismatch` where the folder was made with other settings, naming each that differs.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: Mapping[str, Any],
        writer: str | None = "0",
        sync_seconds: float = SYNC_SECONDS,
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        check_settings(self.folder, settings)
        self._lock, self._sync_seconds = threading.Lock(), sync_seconds
        self._descriptor: int | None = None if writer is None else _hold(self.folder / f"{writer}.jsonl")
        self._segments = sorted(self.folder.glob("*.jsonl"))
        self._readers: dict[int, int] = {}
        self._index = Index()
        self._size = 0
        for number, path in enumerate(self._segments):
            self._load(number, path, own=path.name == f"{writer}.jsonl")
        self._index.settle()
        self._syncer = _Syncer(self._descriptor, sync_seconds) if self._descriptor is not None else None

    def _load(self, number: int, path: Path, own: bool) -> None:
        end = 0
        for key, offset, end in scan(path):  # noqa: B007 - the last end is the end of the whole appends
            self._index.add(key, number, offset)
        if own:
            self._own, self._size = number, end
            assert self._descriptor is not None
            os.ftruncate(self._descriptor, end)

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: str) -> bool:
        return self._index.find(key) is not None

    def get(self, key: str, default: Any = None) -> Any:
        """The value appended under `key`, or `default`. Where there are several, one of them."""
        place = self._index.find(key)
        if place is None:
            return default
        line = self._line(*place)
        if line[_KEY].decode() != key:
            return default
        return json.loads(line)["value"]

    def _line(self, segment: int, offset: int) -> bytes:
        with self._lock:
            if segment not in self._readers:
                self._readers[segment] = os.open(self._segments[segment], os.O_RDONLY)
        size = 1024
        while True:
            chunk = os.pread(self._readers[segment], size, offset)
            end = chunk.find(b"\n")
            if end >= 0:
                return chunk[: end + 1]
            if len(chunk) < size:
                raise OSError(f"{self._segments[segment]} became shorter while it was read")
            size *= 4

    def append(self, key: str, value: Any) -> None:
        """Append one entry; on return it survives kill -9. Raises `OSError` naming the file (a full disk)."""
        self.extend([(key, value)])

    def extend(self, entries: Iterable[tuple[str, Any]]) -> None:
        """Append entries in one write: after a crash all of them are there, or none."""
        lines = encode(entries)
        if self._descriptor is None or self._syncer is None:
            raise RequestError(f"the journal {self.folder} was opened for reading only")
        with self._lock:
            self._write(b"".join(lines))
            for line in lines:
                self._index.add(line[_KEY].decode(), self._own, self._size)
                self._size += len(line)
        self._syncer.appended()

    def _write(self, data: bytes) -> None:
        assert self._descriptor is not None
        written = 0
        try:
            while written < len(data):
                written += os.write(self._descriptor, data[written:])
        except OSError as error:
            os.ftruncate(self._descriptor, self._size)
            raise OSError(error.errno, error.strerror, str(self._segments[self._own])) from error

    def close(self) -> None:
        """Sync, and let the next process have this writer's segment."""
        if self._syncer is not None:
            self._syncer.close()
        for descriptor in (*self._readers.values(), *(() if self._descriptor is None else (self._descriptor,))):
            os.close(descriptor)
        self._readers, self._descriptor, self._syncer = {}, None, None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Syncer:
    """fsync of one descriptor, grouped: a thread syncs what was appended in the last `seconds`."""

    def __init__(self, descriptor: int, seconds: float) -> None:
        self._descriptor, self._seconds = descriptor, seconds
        self._dirty, self._closing = threading.Event(), threading.Event()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        if seconds > 0:
            self._thread.start()

    def appended(self) -> None:
        if self._seconds <= 0:
            os.fsync(self._descriptor)
        elif self._error is not None:
            raise self._error
        else:
            self._dirty.set()

    def _run(self) -> None:
        while not self._closing.is_set():
            self._dirty.wait()
            self._dirty.clear()
            try:
                os.fsync(self._descriptor)
            except OSError as error:
                self._error = error
                return
            self._closing.wait(self._seconds)

    def close(self) -> None:
        self._closing.set()
        self._dirty.set()
        if self._thread.is_alive():
            self._thread.join()
        os.fsync(self._descriptor)


def _hold(path: Path) -> int:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise RequestError(f"{path} is being written by another process; wait for it or give another folder") from None
    return descriptor


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write `settings` as the folder's manifest, or compare them with the one it has.

    Raises `FingerprintMismatch` naming every setting that differs, with both values.
    """
    path = folder / MANIFEST
    given = json.loads(canonical({"format": 1, **settings}))
    if not path.exists():
        atomic_write(path, json.dumps(given, indent=1, sort_keys=True) + "\n")
    try:
        found = json.loads(path.read_text())
    except ValueError:
        raise RequestError(f"{path} is not JSON; give another folder, or remove this one and begin again") from None
    differing = [name for name in sorted({*found, *given}) if found.get(name) != given.get(name)]
    if differing:
        said = "; ".join(f"{name}: {found.get(name)!r} there, {given.get(name)!r} now" for name in differing)
        raise FingerprintMismatch(f"{folder} was made with other settings ({said}); give another folder")
