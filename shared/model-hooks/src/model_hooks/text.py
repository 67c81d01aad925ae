"""Text to calibrate, heal and measure on: the zoo's, a file, a saved dataset or a hub dataset, packed into sequences.

A source is one of

    zoo:train, zoo:calibration, zoo:heldout      Python's standard library (see `model_hooks.zoo`)
    FILE.txt                                     one document
    FILE.jsonl, FILE.json, FILE.parquet          a record each; `.gz` may follow the first two
    FOLDER                                       a dataset saved by `datasets`
    OWNER/NAME[:CONFIG[:SPLIT]]                  a hub dataset, read as a stream; the split is "train" if none is named

A record's text is its field `text`, or else all of its text fields in their order, a line each.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import RequestError

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
POOL = 16  # a seeded choice is made among this many times the sequences wanted


def read_documents(source: str | Path) -> Iterator[str]:
    """The documents of `source`, one by one, empty ones left out.

    Raises `RequestError`, naming file and line, for what cannot be read, is not UTF-8 or holds no text.
    """
    texts = _open(str(source))
    count = 0
    for text in texts:
        if text.strip():
            count += 1
            yield text
    if not count:
        raise RequestError(f"{source} holds no text; nothing can be measured on it")


def load_sequences(tokenizer: Any, source: str | Path, *, samples: int, length: int, seed: int | None = None) -> Tensor:
    """Token ids [n, length], n at most `samples`: documents with EOS after each, joined and cut, as the papers do it.

    Without a seed these are the first sequences of the source; with one, a choice among the first `16 * samples`.
    Fewer than `samples` are returned where there is no more text. Raises `RequestError` for less than one sequence.
    """
    if samples < 1 or length < 2:
        raise RequestError(f"samples {samples} and length {length}: at least 1 sequence of 2 tokens is needed")
    wanted = samples * (1 if seed is None else POOL)
    ids, found = pack(tokenizer, read_documents(source), wanted, length)
    if not len(ids):
        raise RequestError(f"{source} is too short: {found} tokens found, {length} are needed for one sequence")
    if seed is None:
        return ids
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    return ids[order[:samples]]


def pack(tokenizer: Any, documents: Iterable[str], sequences: int, length: int) -> tuple[Tensor, int]:
    """The first `sequences` full windows of the joined documents, [n, length], and how many tokens were seen."""
    end = tokenizer.eos_token_id
    stream: list[int] = []
    for text in documents:
        stream += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        stream += [] if end is None else [end]
        if len(stream) >= sequences * length:
            break
    full = min(len(stream) // length, sequences)
    return torch.tensor(stream[: full * length], dtype=torch.long).view(full, length), len(stream)


def _open(source: str) -> Iterable[str]:
    if source.startswith("zoo:"):
        from . import zoo

        try:
            return (text for _, text in zoo.text(source.removeprefix("zoo:")))
        except ValueError as error:
            raise RequestError(str(error)) from None
    path = Path(source)
    if path.is_dir():
        return _records(_saved_dataset(path))
    name = path.name.removesuffix(".gz")
    if path.is_file():
        for suffix, reader in ((".txt", _txt), (".jsonl", _jsonl), (".json", _json), (".parquet", _parquet)):
            if name.endswith(suffix):
                return reader(path)
        raise RequestError(f"{source}: unknown kind of file; {', '.join(SUFFIXES)} (and .gz) are read")
    if name.endswith(SUFFIXES) or path.is_absolute() or source.startswith((".", "~")):
        raise RequestError(f"no file {source}; give a text file, a hub dataset (owner/name) or zoo:calibration")
    return _records(_hub_dataset(source))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a text file; the encoding is checked line by line, so that an error can say where."""
    with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise RequestError(f"{path}:{number}: not UTF-8 (byte {error.start} of the line); convert it") from None


def _txt(path: Path) -> Iterator[str]:
    yield "".join(line for _, line in _lines(path))


def _jsonl(path: Path) -> Iterator[str]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise RequestError(f"{path}:{number}: not JSON ({error}); mend or remove this line") from None
        yield _text_of(record, f"{path}:{number}")


def _json(path: Path) -> Iterator[str]:
    try:
        records = json.loads("".join(line for _, line in _lines(path)))
    except ValueError as error:
        if isinstance(error, RequestError):
            raise
        line = getattr(error, "lineno", 1)
        raise RequestError(f"{path}:{line}: not JSON ({error}); a list of records is expected") from None
    if not isinstance(records, list):
        raise RequestError(f"{path} holds one {type(records).__name__}; a list of records is expected")
    for number, record in enumerate(records):
        yield _text_of(record, f"{path}, record {number}")


def _parquet(path: Path) -> Iterator[str]:
    try:
        rows = _datasets().load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        for number, row in enumerate(rows):
            yield _text_of(row, f"{path}, row {number}")
    except RequestError:
        raise
    except Exception as error:
        raise RequestError(f"{path} is not a Parquet file ({str(error).splitlines()[0]})") from None


def _records(dataset: Iterable[Any]) -> Iterator[str]:
    return (_text_of(record, f"record {number}") for number, record in enumerate(dataset))


def _text_of(record: Any, where: str) -> str:
    if isinstance(record, str):
        return record
    if isinstance(record, Mapping):
        if isinstance(record.get("text"), str):
            return str(record["text"])
        parts = [value for value in record.values() if isinstance(value, str) and value.strip()]
        if parts:
            return "\n".join(parts)
    raise RequestError(f"{where}: no text in it; a record has a field `text`, or other fields that are text")


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise RequestError("reading a dataset needs the package datasets; install it, or give a text file") from None
    return datasets


def _saved_dataset(folder: Path) -> Iterable[Any]:
    try:
        found = _datasets().load_from_disk(str(folder))
    except FileNotFoundError:
        raise RequestError(f"{folder} is no dataset saved by datasets; give a file in it, or such a folder") from None
    if isinstance(found, Mapping):
        raise RequestError(f"{folder} holds the splits {', '.join(found)}; give the folder of one of them")
    return found  # type: ignore[no-any-return]


def _hub_dataset(source: str) -> Iterable[Any]:
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    try:
        return _datasets().load_dataset(name, config or None, split=split or "train", streaming=True)  # type: ignore[no-any-return]
    except RequestError:
        raise
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise RequestError(f"no dataset {source}: {reason}; give a file, owner/name or zoo:calibration") from None
