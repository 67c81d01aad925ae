"""What the commands do: from names of data, models and files to results."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from instruct_data.records import Record, Records
from instruct_data.writing import write
from model_hooks import RequestError
from model_hooks.files import atomic_write
from paper_tables import WorkFailed, progress

from .scores import BY, RecordScores, check_request, check_same, content_of, read_scores, scores_within
from .selection import Selection, select


class TooFew(WorkFailed):
    """Fewer records were chosen than asked for, and --strict was given; what was chosen is written."""

    exit_code = 3


def scores_for(records: Records, file: Path | None, by: str, turns: Any = "mean") -> RecordScores:
    """The scores of `records`: of a file, checked to be of these records, or those that the records carry."""
    if by not in BY:
        raise RequestError(f"no score {by!r}; choose one of {', '.join(BY)}")
    if file is None:
        return scores_within(records, by)
    found = read_scores(file, turns)
    if file.suffix not in (".json", ".jsonl"):
        check_same(records, found, file)
    elif len(found.ids) != records.count():
        raise RequestError(f"{file} has {len(found.ids)} lines, {records.name} {records.count()} records")
    return found


def labels_of(records: Records, key: str) -> list[str]:
    """The value of `key` of every record, as text. Raises `RequestError` for a record without it."""
    found = []
    for record in records:
        if record.data.get(key) is None:
            raise RequestError(f"{record.where}: record {record.id} has no {key!r} to group by")
        found.append(str(record.data[key]))
    return found


def select_records(
    records: Records,
    scores: RecordScores,
    output: Path,
    *,
    by: str = "ifd_ppl",
    group_by: str = "",
    bare: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Choose by score and write the chosen, best first, as they were read; their scores beside them unless `bare`."""
    groups = labels_of(records, group_by) if group_by else None
    found = select(scores.by(by), scores.ids, groups=groups, **options)
    count = write_chosen(records, found.chosen, output, None if bare else scores, overwrite=overwrite)
    return {"output": output, "chosen": count, **tell(found, records.rejected)}


def tell(found: Selection, rejected: int = 0) -> dict[str, Any]:
    """What to say of a selection."""
    said: dict[str, Any] = {"records": len(found.reasons), "asked": found.asked, "survivors": found.survivors}
    if rejected:
        said["bad_records"] = rejected
    if found.missing:
        said["warning"] = f"{found.missing} fewer than asked for: only {found.survivors} have a score within the bounds"
    said["dropped"] = [{"reason": reason, "records": count} for reason, count in found.dropped.items() if count]
    if found.groups:
        said["groups"] = [{"group": label, **asdict(count)} for label, count in found.groups.items()]
    return said


def write_chosen(
    records: Records, chosen: NDArray[np.int64], output: Path, scores: RecordScores | None, *, overwrite: bool = False
) -> int:
    """Write the records at the positions `chosen`, in that order."""
    place = {int(position): k for k, position in enumerate(chosen)}
    kept: list[Any] = [None] * len(chosen)
    for position, record in enumerate(records):
        if position in place:
            side = {} if scores is None else scores.side_columns(position)
            kept[place[position]] = {**record.data, **side}
    return write(output, kept, like=records, overwrite=overwrite)


def text_of(instruction: str, input: str, response: str, text: str = "whole") -> str:
    """What is embedded of a record (the original's `emb_type`): all fields, a line each, an empty input too, or one."""
    fields = {"whole": f"{instruction}\n{input}\n{response}", "instruction": instruction, "response": response}
    if text not in fields:
        raise RequestError(f"unknown text {text!r} to embed; there are {', '.join(fields)}")
    return fields[text]


def texts_of(records: Records, text: str) -> Iterator[str]:
    """What is embedded of each record: of a conversation all its turns."""
    for record in records:
        yield "\n".join(text_of(e.instruction, e.input, e.response, text) for e in record.examples)


def embeddings_of(records: Records, text: str, encoder: str, *, batch_size: int = 64, long: str = "cut") -> Any:
    """Embeddings [records, dimension] by `encoder`: minilm, or a model's folder or name."""
    import torch

    from instruct_data.embedding import MINILM, embed, load_encoder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load_encoder(MINILM if encoder == "minilm" else encoder, device=device)
    total = records.count()
    with progress("records embedded", total) as bar:
        return embed(texts_of(records, text), loaded, batch_size=batch_size, long=long, progress=bar)  # type: ignore[arg-type]


def diversify_records(
    records: Records,
    output: Path,
    *,
    number: int,
    text: str = "whole",
    encoder: str = "minilm",
    long: str = "cut",
    group_by: str = "",
    given: Sequence[int] = (),
    curve: Path | None = None,
    overwrite: bool = False,
    embeddings: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """Choose `number` records that stand for all of them and write them in the order of choice."""
    from .facility import facility_location
    from .selection import allot

    if not 0 < number <= records.count():
        raise RequestError(f"cannot choose {number} of {records.count()} records; ask for 1 to {records.count()}")
    if group_by:
        labels = labels_of(records, group_by)
        sizes: dict[Hashable, int] = {label: labels.count(label) for label in dict.fromkeys(labels)}
        options |= {"groups": labels, "quotas": allot(sizes, number)}
    if embeddings is None:
        embeddings = embeddings_of(records, text, encoder, long=long)
    with progress("records chosen", number) as bar:
        found = facility_location(embeddings, None if group_by else number, given=given, progress=bar, **options)
    count = write_chosen(records, found.chosen, output, None, overwrite=overwrite)
    if curve is not None:
        atomic_write(curve, json.dumps({"gains": found.gains.tolist(), "objective": found.covered.objective}) + "\n")
    half = len(found.gains) // 2
    return {
        "output": output, "chosen": count, "records": records.count(), "coverage": found.covered.coverage,
        "mean_distance_to_nearest": found.covered.mean_distance, "first_gain": float(found.gains[0]),
        "gain_at_half": float(found.gains[half]), "last_gain": float(found.gains[-1]),
    }  # fmt: skip


def positions_of(records: Records, others: Records) -> list[int]:
    """Where the records of `others` stand among `records`, by their texts and the ids that they carry; the second of
    two equal ones is the second there. Raises `RequestError` for one that is not there."""
    places: dict[tuple[Any, int], list[int]] = {}
    for position, record in enumerate(records):
        places.setdefault(_identity(record), []).append(position)
    found = []
    for record in others:
        left = places.get(_identity(record))
        if not left:
            raise RequestError(f"record {record.id} of {others.name} is not in {records.name}")
        found.append(left.pop(0))
    return found


def _identity(record: Record) -> tuple[Any, int]:
    return record.data.get("id"), content_of(record)


def rows_of(records: Records, scores: RecordScores, chosen: Sequence[int] = ()) -> Iterator[dict[str, Any]]:
    """Rows for the viewer: the texts, the scores and the state of each record."""
    picked = set(map(int, chosen))
    for position, record in enumerate(records):
        row = {"id": record.id, **_texts(record), **scores.side_columns(position), "status": scores.statuses[position]}
        row["tokens"] = int(scores.tokens[position])
        if picked:
            row["selected"] = position in picked
        yield row


def _texts(record: Record) -> Mapping[str, Any]:
    if len(record.examples) == 1 and not record.examples[0].history:
        example = record.examples[0]
        return {"instruction": example.instruction, "input": example.input, "response": example.response}
    turns = [
        [("user", e.instruction + (f"\n{e.input}" if e.input else "")), ("assistant", e.response)]
        for e in record.examples
    ]
    return {
        "instruction": record.examples[0].instruction,
        "conversation": [{"role": role, "content": text} for pair in turns for role, text in pair],
        "response": record.examples[-1].response,
    }


def write_viewer(
    records: Records,
    scores: RecordScores,
    page: Path,
    *,
    by: str = "ifd_ppl",
    chosen: Sequence[int] = (),
    title: str = "",
) -> Path:
    """The static page over a scored data set."""
    from instruct_data.viewer import write_page

    facts = scores.facts
    summary = {"data": records.name, "model": facts.get("model_name", ""), "records": len(scores.ids)}
    if chosen is not None and len(chosen):
        summary["selected"] = len(chosen)
    summary = {name: value for name, value in summary.items() if value != ""}
    return write_page(
        rows_of(records, scores, chosen), page, title=title or f"{by} of {Path(records.name).name}", score=by,
        text=("instruction", "input", "conversation", "response"), summary=summary,
    )  # fmt: skip


def number_of(records: int, top: str, top_n: int) -> int:
    """How many of `records` a share or a number asks for. Raises `RequestError` for neither or none."""
    from .selection import parse_share

    if bool(top) == bool(top_n):
        raise RequestError("give --top SHARE or --top-n N, one of them")
    number = top_n or int(parse_share(top) * records)
    if not number:
        raise RequestError(f"{top} of {records} records is less than one; give a larger share, or --top-n")
    return number


def tell_scores(told: Any, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What to say of fresh scores."""
    tokens = facts["forwarded_tokens"]
    return {
        "records": told.records, "below_1": told.below_maximum, "median": told.quantiles.get(0.5),
        "statuses": ", ".join(f"{count} {status}" for status, count in told.statuses.items()),
        "tokens": facts["tokens"], "tokens_a_second": round(tokens / facts["seconds"]) if facts["seconds"] else None,
        "from_journal": facts["journalled"], "bad_records": facts["rejected"], "seconds": facts["seconds"],
        "how": facts["how"],
    }  # fmt: skip


def compare_scores(first: Path, second: Path, *, by: str, turns: Any, resamples: int) -> dict[str, Any]:
    """Rank correlation and overlaps of two files of scores, joined by record id."""
    from .agreement import align, compare

    a, b = read_scores(first, turns), read_scores(second, turns)
    ids, left, right = align(a.ids, a.by(by), b.ids, b.by(by))
    tokens = dict(zip(a.ids, a.tokens.tolist()))
    lengths = [tokens.get(str(id), 0) for id in ids]
    found = compare(left, right, ids=ids, lengths=lengths if any(lengths) else None, resamples=resamples)
    rows = [
        {"top": f"{100 * o.share:g}%", "records": o.asked, "in both": o.shared, "overlap": o.ratio.value,
         "low": o.ratio.low, "high": o.ratio.high, "by chance": o.chance}
        for o in found.overlaps
    ]  # fmt: skip
    lengths_rows = [
        {"tokens of the answer": f"{row.low:g} to {row.high:g}", "records": row.records, "spearman": row.spearman}
        for row in found.by_length
    ]
    rank = found.spearman
    said: dict[str, Any] = {"records": found.records, "only_first": found.only_first, "only_second": found.only_second,
                            "spearman": rank.value, "spearman_low": rank.low, "spearman_high": rank.high}  # fmt: skip
    return {**said, "overlaps": rows, **({"by_length": lengths_rows} if lengths_rows else {})}


def describe(scores: RecordScores, by: str = "ifd_ppl") -> dict[str, Any]:
    """The whole report on scores, as JSON can hold it."""
    from .summary import stats

    lengths = scores.tokens if scores.tokens.any() else None
    told = asdict(stats(scores.by(by), statuses=scores.statuses, lengths=lengths))
    told["examples"] = {f"{level:g}": [scores.ids[i] for i in found] for level, found in told["examples"].items()}
    told["quantiles"] = {f"{level:g}": value for level, value in told["quantiles"].items()}
    return {"score": by, **told, "run": dict(scores.facts)}


def short(told: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a report that fits a terminal."""
    said = {k: told[k] for k in ("score", "records", "scored", "below_maximum", "mean")}
    said["statuses"] = ", ".join(f"{count} {status}" for status, count in told["statuses"].items())
    said["quantiles"] = [{"quantile": level, "score": value} for level, value in told["quantiles"].items()]
    if told["lengths"] is not None:
        said["rank_correlation_with_length"] = told["lengths"]["spearman"]
        said["by_length"] = [
            {"tokens": f"{row['low']:g} to {row['high']:g}", "records": row["records"], "median": row["median"],
             "below 1": row["below_maximum"]}
            for row in told["lengths"]["rows"]
        ]  # fmt: skip
    return said


def run_all(
    records: Records, model: str, folder: Path, *, top: str, diverse: str, encoder: str, template: str, compat: str,
    max_length: int, dtype: str, overwrite: bool,
) -> dict[str, Any]:  # fmt: skip
    """The whole pipeline into `folder`: scores.parquet, selected.jsonl, diverse.jsonl, stats.json, page.html.

    Scores that are there already are not made again; all else is.
    """
    from instruct_data.records import read
    from model_hooks.loading import load_placed

    from .scores import score_records

    file = folder / "scores.parquet"
    total = records.count()
    number_of(total, top, 0)  # shows now what could not be chosen later
    final = number_of(total, diverse, 0) if diverse else 0
    check_request(template, compat)
    if file.exists() and not overwrite:
        _check_run(file, model, template=template, compat=compat, max_length=max_length, dtype=dtype)
    else:
        loaded, tokenizer = load_placed(model, dtype)
        with progress("tokens scored") as bar:
            score_records(
                loaded, tokenizer, records, file, template=template, name=model, compat=compat,
                max_length=max_length, progress=bar,
            )  # fmt: skip
    scores = scores_for(records, file, "ifd_ppl")
    chosen = folder / "selected.jsonl"
    said = select_records(records, scores, chosen, top=top, overwrite=True)
    if final:
        picked = read(str(chosen), records.schema.name)
        number = min(final, picked.count())
        spread = diversify_records(picked, folder / "diverse.jsonl", number=number, encoder=encoder, overwrite=True)
        said |= {"output": spread["output"], "diverse": spread["chosen"], "coverage": spread["coverage"]}
        chosen = folder / "diverse.jsonl"
    atomic_write(folder / "stats.json", json.dumps(describe(scores), indent=1, allow_nan=False) + "\n")
    marked = positions_of(records, read(str(chosen), records.schema.name))
    page = write_viewer(records, scores, folder / "page.html", chosen=marked)
    return {**said, "page": page}


def _check_run(file: Path, model: str, **wanted: Any) -> None:
    """Raise `RequestError` where the scores that were found are of another request."""
    facts = read_scores(file).facts
    made = {**facts.get("settings", {}), "max_length": facts.get("max_length"), "model": facts.get("model_name")}
    if wanted["dtype"] == "auto":
        del wanted["dtype"]
    for name, value in {"model": model, **wanted}.items():
        if made.get(name) != value:
            raise RequestError(
                f"{file} was made with {name} {made.get(name)}, not {value}; give --overwrite to score again"
            )
