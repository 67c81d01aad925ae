"""Records into a file: the format that its name asks for, whole or not at all, in constant memory.

What was read and not changed is written with equal values, types, keys and order. NaN becomes null in JSON. Parquet and
Arrow tell a missing key from a null one in no way, and hold one type a column: a list of mixed types needs JSON.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import pickle
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from model_hooks.errors import RequestError
from model_hooks.files import FULL, atomic_file, atomic_folder, refuse_existing

from .formats import BATCH, COMPRESSED, JSON_SUFFIXES, json_kind, one_line
from .json_stream import dump
from .records import Record, Records

if TYPE_CHECKING:
    import pyarrow as pa

GROUP_ROWS, GROUP_BYTES = 1 << 15, 1 << 26


def write(
    path: str | Path,
    rows: Iterable[Record | Mapping[str, Any]],
    *,
    like: Records | None = None,
    types: Mapping[str, pa.DataType] | None = None,
    overwrite: bool = False,
) -> int:
    """Write `rows` (records, or their `data` with columns added or changed) to `path`; returns how many they are.

    path: .json (an array, a record a line), .jsonl or .ndjson, these and .gz or .zst, .parquet, or a name without
        suffix for a folder that `datasets.load_from_disk` opens.
    like: the records that `rows` came from; Parquet and Arrow keep their columns, types and metadata.
    types: Arrow types of added columns for Parquet and Arrow; what is not given is inferred from all the rows.

    Raises `RequestError` for an existing `path` (unless `overwrite`), a name of no known format, and a value that the
    format cannot hold; `OSError` with the path for a full disk. Whatever is raised, the old file stays as it was.
    """
    refuse_existing(path, overwrite)
    path = Path(path)
    plain = (row.data if isinstance(row, Record) else row for row in rows)
    try:
        if kind := json_kind(path):
            with atomic_file(path) as temporary, _open(temporary, kind[1]) as file:
                return _write_json(file, plain, kind[0], path)
        arrow = None if like is None else like.arrow
        if path.suffix.lower() == ".parquet":
            with atomic_file(path) as temporary, _typed(plain, path, arrow, types) as typed:
                return _write_parquet(temporary, typed)
        if path.suffix and not path.is_dir():
            known = ", ".join((*JSON_SUFFIXES, ".parquet"))
            raise RequestError(
                f"{path} ends in no known format; give {known}, one of the first with {' or '.join(COMPRESSED)}, "
                "or no suffix for a folder"
            )
        with atomic_folder(path, overwrite) as folder, _typed(plain, path, arrow, types) as typed:
            return _write_folder(folder, typed)
    except OSError as error:
        if error.errno in FULL and error.filename is None:
            raise OSError(
                error.errno, "the disk is full, nothing was written; make room and run again", str(path)
            ) from error
        raise


@contextmanager
def _open(path: Path, packing: str) -> Iterator[IO[bytes]]:
    with ExitStack() as stack:
        if packing == ".zst":
            import pyarrow as pa

            yield stack.enter_context(pa.CompressedOutputStream(str(path), "zstd"))
            return
        file: IO[bytes] = stack.enter_context(path.open("wb"))
        if packing == ".gz":  # no name and no time inside: the same records give the same file
            file = cast(IO[bytes], stack.enter_context(gzip.GzipFile("", "wb", fileobj=file, mtime=0)))
        yield file


def _write_json(file: IO[bytes], rows: Iterable[Mapping[str, Any]], form: str, path: Path) -> int:
    before, between, after = (b"[\n", b",\n", b"\n]\n") if form == "json" else (b"", b"\n", b"\n")
    count = 0
    file.write(before)
    for count, row in enumerate(rows, 1):
        try:
            line = dump(row)
        except TypeError as error:
            raise RequestError(
                f"record {count - 1} cannot be written to {path}: {one_line(error)}; write .parquet"
            ) from None
        file.write(between + line if count > 1 else line)
    if count or form == "json":
        file.write(after)
    return count


class _Typed:
    """Rows with one Arrow type a column. They wait in `file` until the type of every column is known."""

    def __init__(self, file: IO[bytes], path: Path, arrow: pa.Schema | None, types: Mapping[str, pa.DataType]) -> None:
        import pyarrow as pa

        self.file, self.path, self.count = file, path, 0
        self.fields: dict[str, pa.Field] = {} if arrow is None else {field.name: field for field in arrow}
        self.metadata = None if arrow is None else arrow.metadata
        self.fields.update({name: pa.field(name, kind) for name, kind in types.items()})
        self.known = set(self.fields)

    def spool(self, rows: Iterator[Mapping[str, Any]]) -> None:
        """Take all rows in, and find the types of the columns that have none."""
        while batch := list(islice(rows, BATCH)):
            self.count += len(batch)
            for name in dict.fromkeys(key for row in batch for key in row):
                if name not in self.known:
                    self._infer(name, [row.get(name) for row in batch])
            pickle.dump(batch, self.file, pickle.HIGHEST_PROTOCOL)

    def _infer(self, name: str, values: Sequence[Any]) -> None:
        import pyarrow as pa

        try:
            found = [pa.schema([pa.field(name, pa.infer_type(values))])]
            if name in self.fields:
                found.insert(0, pa.schema([self.fields[name]]))
            self.fields[name] = pa.unify_schemas(found, promote_options="permissive").field(0)
        except (pa.ArrowException, UnicodeError, OverflowError) as error:
            raise self._unfit(name, error) from None

    def _unfit(self, name: str, error: Exception) -> RequestError:
        reason = one_line(error)
        return RequestError(f"{self.path}: column {name!r} fits no one type ({reason}); write .jsonl or .json instead")

    @property
    def schema(self) -> pa.Schema:
        import pyarrow as pa

        return pa.schema(list(self.fields.values()), self.metadata)

    def tables(self) -> Iterator[pa.Table]:
        """The rows in tables of up to `GROUP_ROWS` rows or about `GROUP_BYTES`."""
        import pyarrow as pa

        self.file.seek(0)
        schema, left, waiting = self.schema, self.count, []
        while left:
            batch = pickle.load(self.file)
            left -= len(batch)
            waiting.append(pa.table([self._column(field, batch) for field in schema], schema=schema))
            if not left or len(waiting) * BATCH >= GROUP_ROWS or sum(table.nbytes for table in waiting) >= GROUP_BYTES:
                yield pa.concat_tables(waiting)
                waiting = []

    def _column(self, field: pa.Field, batch: Sequence[Mapping[str, Any]]) -> pa.Array:
        import pyarrow as pa

        try:
            return pa.array([row.get(field.name) for row in batch], field.type)
        except (pa.ArrowException, UnicodeError, OverflowError) as error:
            raise self._unfit(field.name, error) from None

    @contextmanager
    def fitting(self) -> Iterator[None]:
        """A clear error for a type that the format does not have."""
        import pyarrow as pa

        try:
            yield
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise RequestError(f"{self.path} cannot hold these columns: {one_line(error)}; write .jsonl") from None


@contextmanager
def _typed(
    rows: Iterator[Mapping[str, Any]], path: Path, arrow: pa.Schema | None, types: Mapping[str, pa.DataType] | None
) -> Iterator[_Typed]:
    with tempfile.TemporaryFile(dir=path.parent) as file:
        typed = _Typed(file, path, arrow, types or {})
        typed.spool(rows)
        yield typed


def _write_parquet(path: Path, typed: _Typed) -> int:
    import pyarrow.parquet as pq

    with typed.fitting(), pq.ParquetWriter(path, typed.schema, compression="zstd") as writer:
        for table in typed.tables():
            writer.write_table(table)
    return typed.count


def _write_folder(folder: Path, typed: _Typed) -> int:
    """What `Dataset.save_to_disk` writes, in one Arrow file."""
    import datasets
    import pyarrow as pa

    try:
        features = datasets.Features.from_arrow_schema(typed.schema)
    except (ValueError, pa.ArrowException) as error:
        raise RequestError(
            f"{typed.path}: `datasets` has no type for a column: {one_line(error)}; write .parquet"
        ) from None
    data = folder / "data-00000-of-00001.arrow"
    schema = typed.schema.with_metadata(features.arrow_schema.metadata)
    with typed.fitting(), data.open("wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for table in typed.tables():
            writer.write_table(table.replace_schema_metadata(schema.metadata))
    datasets.DatasetInfo(features=features).write_to_directory(str(folder))
    state: dict[str, Any] = {
        "_data_files": [{"filename": data.name}],
        "_fingerprint": _digest(data),  # `datasets` caches by it
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    return typed.count


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
