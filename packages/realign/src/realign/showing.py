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

from .rewriting import ORIGINAL

EXPORTS = ("sft", "preference")


def stats(records: Records) -> dict[str, Any]:
    """What became of the records, by reason and by task, and how lengths changed."""
    why: Counter[str] = Counter()
    tasks: dict[str, Counter[str]] = {}
    ratios, used = [], Counter[str]()
    for record in _rewritten(records):
        data = record.data
        status, reason = data["realign_status"], data.get("realign_reason") or ""
        rejected = data.get("realign_reject_reason")
        why[f"{reason} ({rejected.partition(':')[0]})" if rejected else reason or status] += 1
        tasks.setdefault(data.get("realign_category") or "none", Counter())[status] += 1
        used["prompt_tokens"] += data.get("realign_tokens_in") or 0
        used["completion_tokens"] += data.get("realign_tokens_out") or 0
        if data.get(ORIGINAL):
            ratios.append(count_words(record.examples[-1].response) / max(1, count_words(data[ORIGINAL])))
    rows = [
        {"task": name, "records": c.total(), "rewritten": c["rewrite"], "share": c["rewrite"] / c.total()}
        for name, c in sorted(tasks.items(), key=lambda item: -item[1].total())
    ]
    said: dict[str, Any] = {"records": sum(why.values()), "rewritten": len(ratios), **used}
    if ratios:
        said |= {"length_ratio_median": median(ratios), "length_ratio_mean": mean(ratios)}
    return said | {"outcomes": [{"outcome": k, "records": n} for k, n in why.most_common()], "tasks": rows}


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
            data, answer = record.data, record.examples[-1].response
            rejected = data.get("realign_reject_reason")
            yield {
                "id": record.id, "instruction": question_of(record.examples[-1]),
                "before": answer if data.get(ORIGINAL) is None else data[ORIGINAL], "after": answer,
                "status": data["realign_status"], "task": data.get("realign_category"),
                "reason": data.get("realign_reason") or None,
                "rejected by": rejected.partition(":")[0] if rejected else None, "reject reason": rejected,
                "evidence": "\n\n".join(data.get("realign_evidence") or ()) or None,
                "tokens out": data.get("realign_tokens_out"),
            }  # fmt: skip

    told = stats(records)
    summary = {"data": records.name, "records": told["records"], "rewritten": told["rewritten"]}
    title = f"Answers of {Path(records.name).name}, before and after"
    write_page(rows(), page, title=title, score=None, text=("instruction", "before", "after", "evidence"),
               summary=summary, facts=True)  # fmt: skip
    return {"page": page, **summary}


def export(records: Records, output: Path, form: str, overwrite: bool) -> dict[str, Any]:
    """sft: `messages` of every record. preference: `prompt`, `chosen` (the rewritten answer) and `rejected` (the
    original), of the rewritten records alone, as TRL's DPOTrainer reads them."""
    if form not in EXPORTS:
        raise RequestError(f"form {form!r}; choose {' or '.join(EXPORTS)}")

    def rows() -> Iterator[dict[str, Any]]:
        for record in _rewritten(records):
            example = record.examples[-1]
            prompt, original = prompt_messages(example), record.data.get(ORIGINAL)
            if form == "sft":
                answer = [{"role": "assistant", "content": example.response}]
                yield {"id": record.id, "messages": prompt + answer}
            elif original is not None:
                yield preference(record.id, prompt, example.response, original)

    return {"output": output, "records": write(output, rows(), overwrite=overwrite)}
