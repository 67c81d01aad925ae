"""The published files: a JSON file of records for each version, and JSON lines of its scores; read and written.

A line of scores is {"ppl": [instruction alone, answer alone, instruction given the answer, answer given the
instruction], "loss": [the same]}, or {} for a record without an answer. The published scorer writes 0 for a record that
raised: here that is no score.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from instruct_data import Record, Records, read, write
from instruct_data.ifd import mean
from instruct_data.schemas import question_of
from model_hooks.errors import FingerprintMismatch, RequestError
from model_hooks.files import atomic_folder

from .policy import VERSIONS
from .versions import Version, columns, original, types, versions_of

SUMS = (("loss_x", "tokens_x"), ("loss_y", "tokens_y"), ("loss_x_y", "tokens_x_y"), ("loss_y_x", "tokens_y_x"))


def read_line(line: str | bytes, where: str) -> dict[str, Any]:
    """The scores of a line as fields of a `Version`. Raises `RequestError` for what is no such line."""
    try:
        found = json.loads(line)
        if found == {}:
            return {"score_status": "empty_answer"}
        ppl, loss = ([math.nan if v is None else float(v) for v in found[name]] for name in ("ppl", "loss"))
        if len(ppl) != 4 or len(loss) != 4:
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise RequestError(
            f'{where}: is no line of the published scores ({{"ppl": [four numbers], "loss": [four numbers]}})'
        ) from None
    ratios = {
        "ifd": ratio(ppl[3], ppl[1]), "rifd": ratio(ppl[2], ppl[0]),
        "ifd_loss": ratio(loss[3], loss[1]), "rifd_loss": ratio(loss[2], loss[0]),
    }  # fmt: skip
    return ratios | {"score_status": "failed" if None in (ratios["ifd"], ratios["rifd"]) else "ok"}


def ratio(given: float, alone: float) -> float | None:
    """None unless both are finite and above 0."""
    return given / alone if math.isfinite(given) and math.isfinite(alone) and given > 0 and alone > 0 else None


def line_of(version: Version) -> str:
    """A version's scores as a line; null where there is none."""
    losses = [mean(getattr(version, total), getattr(version, count) or 0) for total, count in SUMS]
    ppl = [_exp(loss) for loss in losses]
    return json.dumps({"ppl": ppl, "loss": losses}, allow_nan=False)


def _exp(value: float | None) -> float | None:
    try:
        return None if value is None else math.exp(value)
    except OverflowError:
        return None


def write_originals(records: Records, folder: Path) -> None:
    """A file of lines for each version that some record has, `NAME.jsonl`; {} where a record has it not."""
    with atomic_folder(folder, overwrite=True) as part:
        files = {name: (part / f"{name}.jsonl").open("w") for name in VERSIONS}
        seen = set()
        try:
            for record in records:
                versions = versions_of(record)
                seen |= set(versions)
                for name, file in files.items():
                    made = versions.get(name)
                    scored = made is not None and made.loss_y_x is not None
                    file.write((line_of(made) if made and scored else "{}") + "\n")
        finally:
            for file in files.values():
                file.close()
        for name in set(VERSIONS) - seen:
            (part / f"{name}.jsonl").unlink()


def gather(
    records: Records, versions: Sequence[str], scores: Sequence[str], output: Path, overwrite: bool
) -> dict[str, Any]:
    """One row a record, of files that hold one version each and are joined here, once, by position: their lengths must
    be equal, and a version A must have the original instructions. Raises `RequestError`, `FingerprintMismatch`."""
    files = named(versions, VERSIONS[1:], "version")
    score_files = named(scores, ("ori", *files), "scores")
    for path in score_files.values():
        if not path.is_file():
            raise RequestError(f"{path} does not exist")
    sources: dict[str, Any] = {name: read(str(path), records.schema.name) for name, path in files.items()}

    def rows() -> Iterator[dict[str, Any]]:
        lines = {name: lines_of(path) for name, path in score_files.items()}
        for record, *others in zip_longest(records, *sources.values()):
            made = dict(zip(sources, others))
            if record is None or None in made.values():
                short = "the original" if record is None else next(k for k, v in made.items() if v is None)
                raise FingerprintMismatch(f"{short} has fewer records than the others: they are not of the same data")
            found = {"ori": original(record)}
            found |= {name: version_of(name, record, one) for name, one in made.items()}
            yield {**record.data, **columns({n: with_line(v, lines.get(n), n) for n, v in found.items()})}
        for name, rest in lines.items():
            if next(rest, None) is not None:
                raise FingerprintMismatch(f"{score_files[name]} has more lines than there are records")

    count = write(output, rows(), like=records, types=types(), overwrite=overwrite)
    return {"output": output, "records": count, "versions": ["ori", *files], "scores": list(score_files)}


def named(given: Sequence[str], known: Sequence[str], what: str) -> dict[str, Path]:
    """NAME=FILE as a mapping, in the order of `known`."""
    found: dict[str, Path] = {}
    for text in given:
        name, sign, path = text.partition("=")
        if not sign or not path or name not in known:
            raise RequestError(f"--{what} {text!r}; give NAME=FILE with NAME one of {', '.join(known)}")
        found[name] = Path(path)
    return {name: found[name] for name in known if name in found}


def lines_of(path: Path) -> Iterator[tuple[str, str]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            yield line, f"{path}, line {number}"


def version_of(name: str, record: Record, other: Record) -> Version:
    """What another file's record is as a version of `record`."""
    example = other.examples[-1]
    question = question_of(example)
    if name == "A":
        if question != question_of(record.examples[-1]):
            raise FingerprintMismatch(
                f"{other.where}: the version A of record {record.id} has another instruction than the original"
            )
        return Version(answer=example.response)
    return Version(instruction=question, answer=example.response)


def with_line(version: Version, lines: Iterator[tuple[str, str]] | None, name: str) -> Version:
    if lines is None:
        return version
    line = next(lines, None)
    if line is None:
        raise FingerprintMismatch(f"the scores of {name} have fewer lines than there are records")
    fields: Mapping[str, Any] = read_line(*line)
    return Version(**{**version.__dict__, **fields})
