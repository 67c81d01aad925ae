"""Scores as rows in input order: an Arrow file and the facts of its run, whole or absent; and their merge."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from model_hooks.errors import FingerprintMismatch, RequestError
from model_hooks.files import atomic_folder

from .shards import WINDOW

SCHEMA = pa.schema(
    [
        ("index", pa.int64()), ("key", pa.string()),
        ("loss_cond_sum", pa.float64()), ("n_cond", pa.int32()),
        ("loss_direct_sum", pa.float64()), ("n_direct", pa.int32()),
        ("ppl_A_condition", pa.float64()), ("ppl_A_direct", pa.float64()),
        ("ifd_ppl", pa.float64()), ("ifd_loss", pa.float64()),
        ("truncated", pa.bool_()), ("status", pa.string()),
    ]
)  # fmt: skip
ROWS, FACTS = "rows.arrow", "facts.json"


class Scores:
    """The rows of one shard, or of all, read from disk each time. Iterating gives dicts; undefined numbers are None.

    facts: how it was computed: `how`, `budget`, `rank`, `world`, `total`, `input`, counts of segments and tokens,
        `failed`, `seconds`.
    """

    def __init__(self, folder: Path, keep: Any = None) -> None:
        self.folder, self._keep = folder, keep  # `keep`: a temporary folder that lives as long as the scores
        self.facts: dict[str, Any] = json.loads((folder / FACTS).read_text())

    def __len__(self) -> int:
        return int(self.facts["rows"])

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Record batches of `SCHEMA` in input order, one per window of the input."""
        with pa.memory_map(str(self.folder / ROWS)) as source:
            reader = pa.ipc.open_file(source)
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.batches():
            yield from batch.to_pylist()

    def table(self) -> pa.Table:
        """All rows in memory."""
        return pa.Table.from_batches(self.batches(), SCHEMA)


def write(folder: Path, batches: Iterable[pa.RecordBatch], facts: Mapping[str, Any]) -> None:
    """Write rows and facts to `folder`, replacing what was there, in one rename. Adds `rows` to the facts."""
    with atomic_folder(folder, overwrite=True) as part:
        count = 0
        with pa.OSFile(str(part / ROWS), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            for batch in batches:
                writer.write_batch(batch)
                count += batch.num_rows
        (part / FACTS).write_text(json.dumps({**facts, "rows": count}, indent=1, allow_nan=False) + "\n")


def shard_folder(folder: Path, rank: int, world: int) -> Path:
    return folder / f"scores-{rank}-of-{world}"


def merge(folder: str | Path, world: int | None = None) -> Scores:
    """The scores of all ranks as one, in input order, in `folder/scores` (complete, or nothing is written).

    Raises `RequestError` naming the ranks that have not finished, `FingerprintMismatch` for ranks of other input.
    """
    folder = Path(folder)
    worlds = {int(p.name.rsplit("-", 1)[1]) for p in folder.glob("scores-*-of-*")}
    if world is None:
        if len(worlds) != 1:
            said = f"of {', '.join(map(str, sorted(worlds)))} ranks" if worlds else "none"
            raise RequestError(f"{folder} holds scores {said}; give world, the number of ranks to merge")
        world = worlds.pop()
    missing = [rank for rank in range(world) if not (shard_folder(folder, rank, world) / FACTS).is_file()]
    if missing:
        raise RequestError(
            f"{folder} lacks the scores of ranks {', '.join(map(str, missing))} of {world}; run them, then merge again"
        )
    shards = [Scores(shard_folder(folder, rank, world)) for rank in range(world)]
    first = shards[0].facts
    for shard in shards[1:]:
        for name in ("input", "total", "settings"):
            if shard.facts[name] != first[name]:
                raise FingerprintMismatch(
                    f"ranks 0 and {shard.facts['rank']} of {folder} were scored with another {name}; "
                    "run the older one again"
                )
    write(folder / "scores", _in_order(shards, first["total"]), _together([shard.facts for shard in shards]))
    return Scores(folder / "scores")


def _in_order(shards: list[Scores], total: int) -> Iterator[pa.RecordBatch]:
    """Window by window, so that memory stays flat."""
    streams = [shard.batches() for shard in shards]
    for start in range(0, total, WINDOW):
        table = pa.Table.from_batches([next(stream) for stream in streams], SCHEMA).sort_by("index").combine_chunks()
        stop = min(total, start + WINDOW)
        if table["index"].to_pylist() != list(range(start, stop)):
            have = set(table["index"].to_pylist())
            lost = next((i for i in range(start, stop) if i not in have), None)
            raise RequestError(
                f"the shards do not fit together: record {lost} of {start} to {stop - 1} is not there once"
            )
        yield from table.to_batches()


def _together(facts: list[dict[str, Any]]) -> dict[str, Any]:
    summed = ("segments", "tokens", "duplicates", "journalled", "forwarded", "forwarded_tokens", "failed")
    how = sorted({fact["how"] for fact in facts if fact["how"]})
    return {
        **{name: facts[0][name] for name in ("input", "total", "settings", "world")},
        **{name: sum(fact[name] for fact in facts) for name in summed},
        "how": "; ".join(how),
        **{name: max(fact[name] for fact in facts) for name in ("forward_seconds", "seconds")},
    }
