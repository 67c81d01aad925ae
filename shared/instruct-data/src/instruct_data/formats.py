"""Where records come from: each source gives rows as often as it is asked to, in the memory of a few records.

| source                                    | format                                                         |
|-------------------------------------------|----------------------------------------------------------------|
| .json                                     | a JSON array, or an object a line                              |
| .jsonl, .ndjson                           | an object a line                                               |
| either of these and .gz or .zst           | the same, compressed                                           |
| .parquet                                  | Parquet                                                        |
| a folder                                  | what `datasets` saved (memory-mapped), or a folder of its files|
| OWNER/NAME                                | a dataset of the hub, streamed                                 |

A folder and a hub name may end in :SPLIT.
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from model_hooks.errors import RequestError

from . import zoo
from .errors import Where
from .json_stream import Row, read_array, read_lines

if TYPE_CHECKING:
    import pyarrow as pa

BATCH = 256
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
COMPRESSED = (".gz", ".zst")
ACCEPTED = "a .json, .jsonl or .ndjson file (also .gz or .zst), a .parquet file, a folder or a hub name"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """A named origin of rows. `rows()` begins anew at each call; `arrow` is the Arrow schema where there is one."""

    name: str
    rows: Callable[[], Iterator[Row]]
    arrow: pa.Schema | None = None


def json_kind(path: Path) -> tuple[str, str] | None:
    """("json" or "jsonl", "" or ".gz" or ".zst") for a name that ends so, else None."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packing = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSED else ""
    if not suffixes or suffixes[-1] not in JSON_SUFFIXES:
        return None
    return ("json" if suffixes[-1] == ".json" else "jsonl"), packing


def open_source(source: Any, name: str | None, split: str | None, subset: str | None, encoding_errors: str) -> Source:
    """The `Source` behind a path, a hub name, a dataset of `datasets`, or anything that can be iterated over again."""
    if encoding_errors not in ("strict", "replace"):
        raise RequestError(f"encoding errors {encoding_errors!r}; give strict or replace")
    if not isinstance(source, (str, Path)):
        return _from_object(source, name)
    path = Path(source).expanduser()
    name = name or str(source)
    if str(source).startswith(zoo.PREFIX) and not path.exists():
        return _from_object(zoo.pairs(str(source)), name)
    kind = json_kind(path)
    if path.is_file():
        if kind:
            return Source(name, lambda: _json_rows(path, kind, name, encoding_errors))
        if path.suffix.lower() == ".parquet":
            return _from_parquet(path, name)
        raise RequestError(f"{name} is no file of records that is known by its name; give {ACCEPTED}")
    stem, colon, ending = str(source).rpartition(":")
    if not path.exists() and colon and split is None:
        return open_source(stem, name, ending, subset, encoding_errors)
    from . import hub

    if path.is_dir():
        return from_dataset(hub.load_folder(path, name, split, subset), name)
    if kind or path.suffix.lower() == ".parquet" or not _HUB_NAME.fullmatch(str(source)):
        raise RequestError(f"{name} does not exist; give {ACCEPTED}")
    return from_dataset(hub.load_name(str(source), split, subset), name)


def _from_object(source: Any, name: str | None) -> Source:
    name = name or type(source).__name__
    if hasattr(source, "with_format") and hasattr(source, "features"):
        return from_dataset(source, name)
    if not isinstance(source, Iterable) or isinstance(source, (Iterator, Mapping, bytes)):
        raise RequestError(f"{name} cannot be read more than once as records; give {ACCEPTED}, or a list of dicts")
    return Source(name, lambda: (Row(Where(name), data=data) for data in source))


def _open(path: Path, packing: str) -> io.BufferedIOBase:
    if packing == ".gz":
        return cast(io.BufferedIOBase, gzip.open(path, "rb"))
    if packing == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"), 1 << 16)
    return path.open("rb")


def _is_array(path: Path, packing: str) -> bool:
    """Whether the first sign of a .json file is a bracket."""
    with _open(path, packing) as stream:
        head = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        while not head and (more := stream.read(4096)):
            head = more.lstrip()
    return head.startswith(b"[")


def _json_rows(path: Path, kind: tuple[str, str], name: str, encoding_errors: str) -> Iterator[Row]:
    last = Where(name)
    try:
        form = read_array if kind[0] == "json" and _is_array(path, kind[1]) else read_lines
        with _open(path, kind[1]) as stream:
            for row in form(stream, name, encoding_errors):
                last = row.where
                yield row
    except (OSError, EOFError, zlib.error) as error:
        if not kind[1] or (isinstance(error, OSError) and error.filename is not None):
            raise
        after = f" after line {last.line}" if last.line else ""
        yield Row(Where(name), fault=f"the compressed file is damaged or cut off{after} ({error})", text="")


def _from_parquet(path: Path, name: str) -> Source:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
    except pa.ArrowInvalid as error:
        raise RequestError(f"{name} is no whole Parquet file: {one_line(error)}") from None

    def batches() -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(path, buffer_size=1 << 16) as file:  # or whole row groups would be read at once
            yield from file.iter_batches(batch_size=BATCH)

    return Source(name, lambda: _arrow_rows(batches, name), _distinct(schema, name))


def from_dataset(dataset: Any, name: str) -> Source:
    """The rows of a `datasets.Dataset` or `IterableDataset`, as its Arrow tables have them (nothing is decoded)."""
    features = dataset.features
    dataset = dataset.with_format("arrow")

    def batches() -> Iterator[pa.Table]:
        yield from dataset.iter(batch_size=BATCH)

    schema = features.arrow_schema if features is not None else next((table.schema for table in batches()), None)
    return Source(name, lambda: _arrow_rows(batches, name), None if schema is None else _distinct(schema, name))


def _distinct(schema: pa.Schema, name: str) -> pa.Schema:
    twice = sorted({key for key in schema.names if schema.names.count(key) > 1})
    if twice:
        raise RequestError(f"{name} has several columns of one name ({', '.join(twice)}); rename or drop them first")
    return schema


def _arrow_rows(batches: Callable[[], Iterator[pa.RecordBatch | pa.Table]], name: str) -> Iterator[Row]:
    where = Where(name)
    try:
        for batch in batches():
            try:
                rows = batch.to_pylist()
            except UnicodeDecodeError:
                yield from (_arrow_row(batch.slice(at, 1), where) for at in range(batch.num_rows))
            else:
                yield from (Row(where, data=data) for data in rows)
    except Exception as error:
        if not _damaged(error):
            raise
        yield Row(where, fault=f"the file is damaged here ({one_line(error)}); what follows cannot be read", text="")


def _arrow_row(batch: pa.RecordBatch | pa.Table, where: Where) -> Row:
    """A row of a batch that has a string which is no UTF-8."""
    data: dict[str, Any] = {}
    for key, column in zip(batch.schema.names, batch.columns):
        try:
            data[key] = column.to_pylist()[0]
        except UnicodeDecodeError as error:
            fault = f"column {key} is not UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start} of the text)"
            return Row(where, fault=fault, text=error.object.decode(errors="replace"))
    return Row(where, data=data)


def _damaged(error: Exception) -> bool:
    import pyarrow as pa

    return (
        isinstance(error, pa.ArrowException)
        or "datasets" in type(error).__module__
        or (isinstance(error, OSError) and error.errno is None)
    )


def one_line(error: BaseException) -> str:
    """An error's message in one line."""
    return " ".join(f"{error}".split()) or type(error).__name__
