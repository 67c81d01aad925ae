"""Scores of records: made by the scoring engine of instruct_data, kept as one Parquet file, read again by every verb.

A file holds one row per assistant turn, so that how turns become one score is decided when it is read. The original's
JSON lines (`{"ppl": [0, direct, 0, cond], "loss": [...]}`, bare NaN included) and records that carry `ifd_ppl` are read
as well.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from instruct_data.journal import canonical
from instruct_data.records import Record, Records
from instruct_data.scoring import Pair
from instruct_data.scoring.pairs import Compat
from instruct_data.scoring.results import SCHEMA as ENGINE
from instruct_data.scoring.shards import ranks
from instruct_data.scoring.together import finished
from instruct_data.templates import TEMPLATES
from instruct_data.templates import template as template_named
from model_hooks import FingerprintMismatch, RequestError
from model_hooks.files import atomic_file, atomic_write

from .selection import Turns, aggregate

By = Literal["ifd_ppl", "ifd_loss"]
BY = ("ifd_ppl", "ifd_loss")
FACTS = b"superfiltering"  # the key of the run's facts in the Parquet file's metadata
KEYS = (("id", pa.string()), ("record", pa.int64()), ("turn", pa.int32()), ("content", pa.int64()))
SCHEMA = pa.schema([*KEYS, *list(ENGINE)[2:]])


@dataclass(frozen=True)
class RecordScores:
    """One score a record. `ifd_ppl`, `ifd_loss`: float64 [records], NaN for none; `tokens`: of the answers, or 0.

    columns: further float64 columns by name. facts: of the run that made them, {} where there are none.
    contents: `content_of` each record when it was scored, None where that was not kept.
    """

    ids: list[str]
    ifd_ppl: NDArray[np.float64]
    ifd_loss: NDArray[np.float64]
    tokens: NDArray[np.int64]
    statuses: list[str]
    columns: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    contents: list[int] | None = None

    def by(self, name: str) -> NDArray[np.float64]:
        if name not in BY:
            raise RequestError(f"no score {name!r}; choose one of {', '.join(BY)}")
        found: NDArray[np.float64] = getattr(self, name)
        return found

    def side_columns(self, position: int) -> dict[str, Any]:
        """What a written record carries of its score; None where undefined."""
        values = {"ifd_ppl": self.ifd_ppl, "ifd_loss": self.ifd_loss, **self.columns}
        return {name: _or_none(column[position]) for name, column in values.items()}


def _or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def content_of(record: Record) -> int:
    """64 bits of a hash of a record's texts: its id aside, what a score is of."""
    texts = canonical([(e.system, e.history, e.instruction, e.input, e.response) for e in record.examples])
    digest = hashlib.blake2b(texts.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def pairs_of(records: Iterable[Record], prompt: Callable[[Any], str]) -> Iterator[Pair]:
    """A pair for every assistant turn, keyed `id<TAB>record<TAB>turn<TAB>content`."""
    for position, record in enumerate(records):
        content = content_of(record)
        for turn, example in enumerate(record.examples):
            yield Pair(f"{record.id}\t{position}\t{turn}\t{content}", prompt(example), example.response)


def check_request(template: str, compat: str) -> None:
    """Raise `RequestError` for names that are not known: before a model is loaded, not after."""
    for what, given, known in (("template", template, TEMPLATES), ("compat", compat, get_args(Compat))):
        if given not in known:
            raise RequestError(f"no {what} {given!r}; choose one of {', '.join(known)}")


def score_records(
    model: Any,
    tokenizer: Any,
    records: Records,
    output: str | Path,
    *,
    template: str = "none",
    name: str = "",
    progress: Callable[[int, int], Any] | None = None,
    **engine: Any,
) -> dict[str, Any]:
    """Score every assistant turn and write `output` (Parquet), whole or not at all. Returns the run's facts.

    A killed run goes on when it is called again with the same arguments: what is done is in a folder beside the
    output until it is written. Under a launcher (RANK and WORLD_SIZE) each process scores its share, and the last one
    to finish writes; for the others the facts have `pending`, the ranks that are still at work. `engine`: options of
    `instruct_data.scoring.score`.
    """
    from instruct_data.scoring import score

    output = Path(output)
    work = work_folder(output)
    prompt = template_named(template, tokenizer)
    settings = {"template": template}
    rank, world = ranks(engine.pop("rank", None), engine.pop("world", None))
    score(
        model, tokenizer, pairs_of(records, prompt), folder=work, rank=rank, world=world, settings=settings,
        progress=progress, **engine,
    )  # fmt: skip
    with finished(work, rank, world) as scores:
        if isinstance(scores, list):
            return {"pending": scores}
        facts = {
            **scores.facts, "model_name": name, "data": records.name, "rejected": records.rejected,
            "max_length": engine.get("max_length", 1024),
        }  # fmt: skip
        _write(output, scores.batches(), facts)
    return facts


def work_folder(output: Path) -> Path:
    """Where a run keeps what it has done until `output` is written."""
    return output.with_name(f".{output.name}.run")


def _write(output: Path, batches: Iterable[pa.RecordBatch], facts: Mapping[str, Any]) -> None:
    schema = SCHEMA.with_metadata({FACTS: json.dumps(dict(facts), allow_nan=False).encode()})
    with atomic_file(output) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for batch in batches:
            ids, *places = zip(*(key.rsplit("\t", 3) for key in batch["key"].to_pylist()))
            named = [ids, *([int(number) for number in column] for column in places)]
            arrays = [pa.array(column, field.type) for column, field in zip(named, schema)]
            writer.write_batch(pa.RecordBatch.from_arrays([*arrays, *batch.columns[2:]], schema=schema))


def read_scores(path: str | Path, turns: Turns = "mean") -> RecordScores:
    """Scores from what `score_records` wrote, or from the original's JSON lines (ids are then line numbers from 0)."""
    path = Path(path)
    if not path.is_file():
        raise RequestError(f"{path} does not exist; give what `superfiltering score` wrote")
    if path.suffix in (".jsonl", ".json"):
        return _from_original(path)
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise RequestError(f"{path} is no Parquet file of scores ({str(error).splitlines()[0]})") from None
    if missing := [name for name in SCHEMA.names if name not in table.column_names]:
        raise RequestError(f"{path} has no column {missing[0]!r}; give what `superfiltering score` wrote")
    column = {name: table[name].to_numpy() for name in SCHEMA.names if name not in ("id", "status")}
    of = column["record"]
    sums = [column[name] for name in ("loss_cond_sum", "n_cond", "loss_direct_sum", "n_direct")]
    records = int(of.max(initial=-1)) + 1
    ppl, loss = aggregate(of, *sums, how=turns, records=records)
    first = np.searchsorted(of, np.arange(records))
    statuses, ids = table["status"].to_pylist(), table["id"].to_pylist()
    best = ["ok" if "ok" in part else part[0] for part in _parts(statuses, first)]
    lone = np.bincount(of, minlength=records) == 1  # perplexities are a turn's own; of several there is no single one
    extra = {name: np.where(lone, column[name][first], np.nan) for name in ("ppl_A_direct", "ppl_A_condition")}
    tokens = np.bincount(of, column["n_cond"], records).astype(np.int64)
    facts = json.loads((table.schema.metadata or {}).get(FACTS, b"{}"))
    contents = column["content"][first].tolist()
    return RecordScores([ids[i] for i in first], ppl, loss, tokens, best, extra, facts, contents)


def _parts(values: list[str], first: NDArray[np.int64]) -> Iterator[list[str]]:
    ends = [*first[1:].tolist(), len(values)]
    return (values[start:end] for start, end in zip(first.tolist(), ends))


def _from_original(path: Path) -> RecordScores:
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            found = json.loads(line)
            (direct, cond), (loss_direct, loss_cond) = found["ppl"][1::2], found["loss"][1::2]
            rows.append([float("nan" if v is None else v) for v in (direct, cond, loss_direct, loss_cond)])
        except (ValueError, KeyError, TypeError, IndexError):
            raise RequestError(
                f'{path}:{number}: is no line of the original\'s scores ({{"ppl": [0, direct, 0, cond], "loss": ...}})'
            ) from None
    direct, cond, loss_direct, loss_cond = np.array(rows, np.float64).reshape(-1, 4).T
    with np.errstate(all="ignore"):
        ppl, loss = cond / direct, loss_cond / loss_direct
    failed = (cond == 0) | (direct == 0)  # how the original writes a record that raised: never a score here
    ppl, loss = (np.where(failed | ~np.isfinite(column), np.nan, column) for column in (ppl, loss))
    statuses = ["ok" if math.isfinite(value) else "failed" if bad else "no_score" for value, bad in zip(ppl, failed)]
    columns = {"ppl_A_direct": direct, "ppl_A_condition": cond}
    none = np.zeros(len(rows), np.int64)
    return RecordScores([str(i) for i in range(len(rows))], ppl, loss, none, statuses, columns)


def scores_within(records: Records, key: str = "ifd_ppl") -> RecordScores:
    """The scores that records carry themselves, in the column `key`. Raises `RequestError` where none has it."""
    ids, values, seen = [], [], False
    for record in records:
        value = record.data.get(key)
        seen |= key in record.data
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise RequestError(f"{record.where}: {key!r} is {value!r}, must be a number or null")
        ids.append(record.id)
        values.append(math.nan if value is None else float(value))
    if not seen:
        raise RequestError(f"no record of {records.name} has {key!r}; score them first and give --scores")
    found = np.array(values, np.float64)
    statuses = ["ok" if math.isfinite(value) else "no_score" for value in values]
    none = np.full(len(ids), np.nan)
    loss = found if key == "ifd_loss" else none
    return RecordScores(ids, found if key != "ifd_loss" else none, loss, np.zeros(len(ids), np.int64), statuses)


def check_same(records: Records, scores: RecordScores, path: str | Path) -> None:
    """Raise `FingerprintMismatch` unless `scores` are of these records, in this order."""
    count = 0
    for position, record in enumerate(records):
        count += 1
        if position >= len(scores.ids) or record.id != scores.ids[position]:
            there = scores.ids[position] if position < len(scores.ids) else "none"
            raise FingerprintMismatch(
                f"{path} is not of {records.name}: record {position} has id {record.id}, its score id {there}; "
                "score the data as it is now"
            )
        if scores.contents is not None and content_of(record) != scores.contents[position]:
            raise FingerprintMismatch(
                f"{path} is not of {records.name} as it is now: the texts of record {position}, id {record.id}, "
                "are others than those that were scored; score the data again"
            )
    if count != len(scores.ids):
        raise FingerprintMismatch(
            f"{path} has {len(scores.ids)} scores, {records.name} {count} records; score it again"
        )


def write_original(scores_file: str | Path, output: str | Path) -> int:
    """Write the original's JSON lines of a Parquet file of scores (null for its NaN); returns how many."""
    lines = []
    for row in pq.read_table(scores_file).to_pylist():
        losses = [
            None
            if row[f"loss_{side}_sum"] is None or not row[f"n_{side}"]
            else row[f"loss_{side}_sum"] / row[f"n_{side}"]
            for side in ("direct", "cond")
        ]
        shown = {
            "ppl": [0, row["ppl_A_direct"], 0, row["ppl_A_condition"]],
            "loss": [0, losses[0], 0, losses[1]],
        }
        lines.append(json.dumps(shown, allow_nan=False) + "\n")
    atomic_write(output, "".join(lines))
    return len(lines)
