"""Records of one answer, and conversations with several: which were rewritten, what they were, and back again.

A record's side columns speak of its last answer. Where all turns of a conversation are rewritten (`--turns all`),
`realign_turns` says the same of each answer, in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from instruct_data import Example, Record
from instruct_data.editing import edited
from model_hooks.errors import RequestError

from .rewriting import ORIGINAL, Outcome

TURNS = "realign_turns"
TOLD = ("status", "category", "reason", "reject_reason", "original")  # of each turn
TEXTS = ("status", "category", "reason", "reject_reason", "model", "prompt_version", "request_key", "original")


@dataclass(frozen=True)
class Answer:
    """An answer of a record: its place among them, what it answers, what became of it, and the original answer; None
    for one that is as it was."""

    at: int
    example: Example
    status: str
    category: str | None
    reason: str | None
    reject_reason: str | None
    original: str | None


def answers_of(record: Record) -> Iterator[Answer]:
    """The answers that the side columns of a record speak of: the last one, or all of a conversation."""
    told = record.data.get(TURNS)
    if told:
        if len(told) != len(record.examples):
            raise RequestError(
                f"{record.where}: record {record.id} has {len(record.examples)} answers, its {TURNS} speaks of "
                f"{len(told)}; give what `realign run` wrote, or remove {TURNS}"
            )
        for at, (example, turn) in enumerate(zip(record.examples, told)):
            yield Answer(at, example, *(turn.get(name) for name in TOLD))
    else:
        one: list[Any] = [record.data.get(f"realign_{name}") for name in TOLD]
        yield Answer(len(record.examples) - 1, record.examples[-1], *one)


def apply(schema: str, record: Record, outcome: Outcome, bare: bool = False) -> dict[str, Any]:
    """The record with its new answers, if it has any; and the side columns, unless `bare`. Old answers are kept."""
    each = [Outcome(**turn) for turn in outcome.turns or ()] or [outcome]
    first = len(record.examples) - len(each)
    data: Mapping[str, Any] = record.data
    for at, one in enumerate(each, first):
        data = data if one.text is None else edited(schema, data, response=one.text, at=at)
    if bare:
        return dict(data)
    originals = [
        example.response if one.text is not None else None for example, one in zip(record.examples[first:], each)
    ]
    columns = {**outcome.columns(), ORIGINAL: originals[-1]}
    if outcome.turns is not None:
        told = [{**asdict(one), "original": original} for one, original in zip(each, originals)]
        columns[TURNS] = [{name: turn[name] for name in TOLD} for turn in told] if outcome.turns else None
    elif TURNS in data:
        columns[TURNS] = None  # of a run before this one
    return {**data, **columns}


def put_back(schema: str, data: Mapping[str, Any], refused: Sequence[tuple[Answer, str]]) -> dict[str, Any]:
    """`data` with the originals of these rewritten answers, each with the reason why it was refused."""
    made = dict(data)
    reason = {"status": "original", "reason": "rejected", "original": None}
    turns = [dict(turn) for turn in data.get(TURNS) or ()]
    for answer, why in refused:
        made = edited(schema, made, response=answer.original, at=answer.at)
        if turns:
            turns[answer.at] |= {**reason, "reject_reason": why}
        if not turns or answer.at == len(turns) - 1:
            made |= {f"realign_{name}": value for name, value in {**reason, "reject_reason": why}.items()}
    if turns:
        made[TURNS] = turns
        rewritten = any(turn["status"] == "rewrite" for turn in turns)
        made["realign_status"] = "rewrite" if rewritten else "original"
        made["realign_reason"] = "" if rewritten else turns[-1]["reason"]
    return made


def types(bare: bool = False, turns: str = "last") -> dict[str, Any]:
    """Arrow types of the side columns."""
    import pyarrow as pa

    if bare:
        return {}
    found: dict[str, Any] = {f"realign_{name}": pa.string() for name in TEXTS}
    found |= {"realign_category_score": pa.float64(), "realign_cost": pa.float64()}
    found |= {"realign_tokens_in": pa.int64(), "realign_tokens_out": pa.int64()}
    found["realign_evidence"] = pa.list_(pa.string())
    each = pa.list_(pa.struct([(name, pa.string()) for name in TOLD]))
    return found | ({TURNS: each} if turns == "all" else {})
