"""All versions of a record in one row: the column `reflection`, so that nothing is ever joined by position.

`reflection` holds `ori`, `Q`, `A` and `QA` (see `policy`), each null or a `Version`. The record itself stays as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from instruct_data import Example, Record
from instruct_data.schemas import question_of
from model_hooks.errors import FingerprintMismatch, RequestError

from .policy import VERSIONS, Ratios

COLUMN = "reflection"
OK = "ok"


@dataclass(frozen=True)
class Version:
    """One version of a record.

    status: ok; rejected (reject_reason: the check that refused it); parse_failed, truncated, failed or too_long: no
        usable reply. instruction: None where it is the original one (with its input). criticism: what the teacher said.
    loss_y_x, loss_y, loss_x_y, loss_x: summed losses in nats of the answer given the instruction, of the answer alone,
        of the instruction given the answer, of the instruction alone; tokens_*: how many tokens each sum is over.
    score_status: ok, or what kept it from being scored; None before scoring. truncated: something was cut at the
        student's max_length.
    """

    status: str = OK
    instruction: str | None = None
    answer: str | None = None
    criticism: str | None = None
    reject_reason: str | None = None
    request_key: str | None = None
    tokens_in: int = 0
    tokens_out: int = 0
    loss_y_x: float | None = None
    tokens_y_x: int | None = None
    loss_y: float | None = None
    tokens_y: int | None = None
    loss_x_y: float | None = None
    tokens_x_y: int | None = None
    loss_x: float | None = None
    tokens_x: int | None = None
    ifd: float | None = None
    rifd: float | None = None
    ifd_loss: float | None = None
    rifd_loss: float | None = None
    score_status: str | None = None
    truncated: bool | None = None

    @property
    def usable(self) -> bool:
        return self.status == OK

    @property
    def ratios(self) -> Ratios | None:
        """The scores, None before scoring."""
        if self.score_status is None:
            return None
        return Ratios(self.ifd, self.rifd, self.ifd_loss, self.rifd_loss)

    def example(self, original: Example) -> Example:
        """The version as the last turn of its conversation."""
        instruction, input = (original.instruction, original.input)
        if self.instruction is not None and self.instruction != question_of(original):
            instruction, input = self.instruction, ""
        answer = original.response if self.answer is None else self.answer
        return Example(instruction, input, answer, original.history, original.system)


Versions = Mapping[str, Version]


def original(record: Record) -> Version:
    """The record as its own version `ori`."""
    example = record.examples[-1]
    return Version(instruction=question_of(example), answer=example.response)


def columns(versions: Versions) -> dict[str, Any]:
    """What the row of a record holds of its versions."""
    reasons = [v.reject_reason or v.status for name, v in versions.items() if name != "ori" and not v.usable]
    usable = [name for name, v in versions.items() if name != "ori" and v.usable]
    return {
        COLUMN: {name: asdict(versions[name]) if name in versions else None for name in VERSIONS},
        f"{COLUMN}_status": "reflected" if usable else "original",
        f"{COLUMN}_reason": None if usable or not reasons else reasons[0],
    }


def versions_of(record: Record, *, needed: bool = True) -> dict[str, Version]:
    """The versions of a record, `ori` first and as the record itself is.

    Raises `RequestError` for a record without any (unless not `needed`: then it is its own only version) and for a
    column that is no such thing; `FingerprintMismatch` where the record is another than the one that was reflected on.
    """
    found = record.data.get(COLUMN)
    if found is None:
        if needed:
            raise RequestError(
                f"{record.where}: record {record.id} has no {COLUMN}; give what `reflection-tuning reflect` wrote"
            )
        return {"ori": original(record)}
    names = {f.name for f in fields(Version)}
    if not isinstance(found, Mapping) or not isinstance(found.get("ori"), Mapping):
        raise RequestError(f"{record.where}: {COLUMN} of record {record.id} is not what `reflect` writes")
    versions = {
        name: Version(**{k: v for k, v in found[name].items() if k in names})
        for name in VERSIONS
        if isinstance(found.get(name), Mapping)
    }
    own = original(record)
    if (versions["ori"].instruction, versions["ori"].answer) != (own.instruction, own.answer):
        raise FingerprintMismatch(
            f"{record.where}: record {record.id} is another than the one that was reflected on; reflect on it again"
        )
    return versions


def types() -> dict[str, Any]:
    """Arrow types of the columns."""
    import pyarrow as pa

    kinds = {"str": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
    version = pa.struct([(f.name, kinds[str(f.type).split(" ")[0]]) for f in fields(Version)])
    return {
        COLUMN: pa.struct([(name, version) for name in VERSIONS]),
        f"{COLUMN}_status": pa.string(), f"{COLUMN}_reason": pa.string(),
    }  # fmt: skip
