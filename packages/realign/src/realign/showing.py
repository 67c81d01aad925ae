"""Rewritten records to look at and to train on: counts, the page of differences, and the exports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any

from instruct_data import Record, Records, write, write_page
from instruct_data.completions import preference, prompt_messages
from instruct_data.schemas import question_of
from instruct_data.texts import count_words
from model_hooks.errors import RequestError

from .turns import TURNS, answers_of

EXPORTS = ("sft", "preference")


def stats(records: Records) -> dict[str, Any]:
    """What became of the answers, by reason and by task, and how lengths changed."""
    why: Counter[str] = Counter()
    tasks: dict[str, Counter[str]] = {}
    ratios, used = [], Counter[str](records=0)
    for record in _rewritten(records):
        used["records"] += 1
        used["prompt_tokens"] += record.data.get("realign_tokens_in") or 0
        used["completion_tokens"] += record.data.get("realign_tokens_out") or 0
        for answer in answers_of(record):
            rejected, reason = answer.reject_reason, answer.reason or ""
            why[f"{reason} ({rejected.partition(':')[0]})" if rejected else reason or answer.status] += 1
            tasks.setdefault(answer.category or "none", Counter())[answer.status] += 1
            if answer.original:
                ratios.append(count_words(answer.example.response) / max(1, count_words(answer.original)))
    rows = [
        {"task": name, "answers": c.total(), "rewritten": c["rewrite"], "share": c["rewrite"] / c.total()}
        for name, c in sorted(tasks.items(), key=lambda item: -item[1].total())
    ]
    said: dict[str, Any] = {**used, "answers": why.total(), "rewritten": len(ratios)}
    if ratios:
        said |= {"length_ratio_median": median(ratios), "length_ratio_mean": mean(ratios)}
    return said | {"outcomes": [{"outcome": k, "answers": n} for k, n in why.most_common()], "tasks": rows}


def _rewritten(records: Records) -> Iterator[Record]:
    """The records, of which each must have been through `run` or `rewrite`. Raises `RequestError`."""
    for record in records:
        if record.data.get("realign_status") not in ("rewrite", "original"):
            raise RequestError(
                f"{record.where}: record {record.id} has no realign_status; give what `realign run` wrote"
            )
        yield record


def view(records: Records, page: Path) -> dict[str, Any]:
    """One HTML page: every answer before and after, to filter by task, status and reject reason."""

    def rows() -> Iterator[dict[str, Any]]:
        for record in _rewritten(records):
            for answer in answers_of(record):
                after, rejected = answer.example.response, answer.reject_reason
                several = bool(record.data.get(TURNS))
                yield {
                    "id": f"{record.id}, answer {answer.at + 1}" if several else record.id,
                    "instruction": question_of(answer.example),
                    "before": after if answer.original is None else answer.original, "after": after,
                    "status": answer.status, "task": answer.category, "reason": answer.reason or None,
                    "rejected by": rejected.partition(":")[0] if rejected else None, "reject reason": rejected,
                    "evidence": "\n\n".join(record.data.get("realign_evidence") or ()) or None,
                    "tokens out": record.data.get("realign_tokens_out"),
                }  # fmt: skip

    told = stats(records)
    summary = {"data": records.name} | {name: told[name] for name in ("records", "answers", "rewritten")}
    title = f"Answers of {Path(records.name).name}, before and after"
    write_page(rows(), page, title=title, score=None, text=("instruction", "evidence", "before", "after"),
               summary=summary, facts=True)  # fmt: skip
    return {"page": page, **summary}


def export(records: Records, output: Path, form: str, overwrite: bool) -> dict[str, Any]:
    """sft: `messages` of every record. preference: `prompt`, `chosen` (the rewritten answer) and `rejected` (the
    original), of the rewritten answers alone, as TRL's DPOTrainer reads them."""
    if form not in EXPORTS:
        raise RequestError(f"form {form!r}; choose {' or '.join(EXPORTS)}")

    def rows() -> Iterator[dict[str, Any]]:
        for record in _rewritten(records):
            if form == "sft":
                last = record.examples[-1]
                answer = [{"role": "assistant", "content": last.response}]
                yield {"id": record.id, "messages": prompt_messages(last) + answer}
                continue
            for one in answers_of(record):
                if one.original is not None:
                    prompt = prompt_messages(one.example)
                    yield preference(record.id, prompt, one.example.response, one.original)

    return {"output": output, "records": write(output, rows(), overwrite=overwrite)}
