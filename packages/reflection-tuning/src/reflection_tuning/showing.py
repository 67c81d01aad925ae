"""What selection makes of scored records: written, counted, shown side by side, exported. No forward pass is needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from instruct_data import Record, Records, write, write_page
from instruct_data.completions import preference, prompt_messages
from instruct_data.editing import edited
from instruct_data.schemas import question_of
from model_hooks.errors import RequestError

from .near import Seen
from .policy import VERSIONS, Decision, SelectionPolicy
from .versions import COLUMN, Versions, versions_of

EXPORTS = ("sft", "preference")
RANKS = {"ifd": True, "rifd": False}  # whether the highest come first


@dataclass(frozen=True)
class Decided:
    """A record, its versions, and what the policy makes of them."""

    schema: str
    record: Record
    versions: Versions
    decision: Decision

    @property
    def data(self) -> dict[str, Any]:
        """The record with the winner's texts, as its own schema has them."""
        chosen = self.versions[self.decision.version]
        if self.decision.version == "ori":
            return dict(self.record.data)
        answer = chosen.answer if chosen.answer is not None else self.record.examples[-1].response
        return edited(self.schema, self.record.data, response=answer, instruction=chosen.instruction)


def decided(records: Records, policy: SelectionPolicy) -> Iterator[Decided]:
    """Every record with its decision, in order. Raises `RequestError` for records that a policy of scores finds without
    any."""
    for record in records:
        versions = versions_of(record)
        if policy.needs_scores and versions["ori"].score_status is None:
            raise RequestError(
                f"{record.where}: record {record.id} has no scores, which the policy {policy.name} needs; give what "
                "`reflection-tuning score` wrote, or --policy v1"
            )
        scores = {name: made.ratios for name, made in versions.items() if made.usable}
        yield Decided(records.schema.name, record, versions, policy.decide(scores))


def best(records: Records, policy: SelectionPolicy, rank_by: str, share: float, number: int) -> set[int] | None:
    """Positions of the emitted records that are kept; None for all of them.

    share or number: of the emitted, those with the highest IFD (or the lowest r-IFD) of the winner; equals in order.
    """
    if rank_by not in RANKS:
        raise RequestError(f"rank-by {rank_by!r}; choose {' or '.join(RANKS)}")
    if share and number:
        raise RequestError("give --top or --top-n, not both")
    if not share and not number:
        return None
    found = []
    for position, one in enumerate(decided(records, policy)):
        ratios = one.versions[one.decision.version].ratios
        value = ratios.known(rank_by) if ratios and one.decision.emitted else None
        if value is not None:
            found.append((-value if RANKS[rank_by] else value, position))
    found.sort()
    return {position for _, position in found[: number or round(share * len(found))]}


def select(
    records: Records, output: Path, policy: SelectionPolicy, *, rank_by: str = "ifd", share: float = 0.0,
    number: int = 0, near: float = 0.0, bare: bool = False, overwrite: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Write the records that the policy emits, each with its winner's texts. A replay over stored scores.

    near: leave out new instructions that are so much like one before (Jaccard similarity of sequences of three words).
    """
    kept = best(records, policy, rank_by, share, number)
    counts: Counter[str] = Counter()
    seen = Seen()

    def rows() -> Iterator[dict[str, Any]]:
        for position, one in enumerate(decided(records, policy)):
            counts["records"] += 1
            if not one.decision.emitted or (kept is not None and position not in kept):
                continue
            instruction = one.versions[one.decision.version].instruction
            if near and one.decision.version in ("Q", "QA") and seen.like(instruction or "", near) is not None:
                counts["near_duplicates"] += 1
                continue
            counts[one.decision.version] += 1
            row = {k: v for k, v in one.data.items() if k not in own}
            yield row if bare else row | side(one)
        if not any(counts[name] for name in VERSIONS):
            raise RequestError(f"the policy {policy.name} emits none of {counts['records']} records; nothing written")

    own = (COLUMN, f"{COLUMN}_status", f"{COLUMN}_reason")
    written = write(output, rows(), overwrite=overwrite)
    said = {"output": output, "policy": policy.name, "records": counts["records"], "selected": written}
    return said | {name: counts[name] for name in (*VERSIONS, "near_duplicates") if counts[name]}


def side(one: Decided) -> dict[str, Any]:
    """The columns beside a selected record."""
    won = one.versions[one.decision.version]
    return {f"{COLUMN}_version": one.decision.version, f"{COLUMN}_ifd": won.ifd, f"{COLUMN}_rifd": won.rifd}


def stats(records: Records, policy: SelectionPolicy) -> dict[str, Any]:
    """The funnel: what the teacher's replies became, what the student accepted, what is emitted and why the rest is
    not; medians of the scores by version; and tokens."""
    counts: Counter[str] = Counter()
    replies: dict[str, Counter[str]] = {name: Counter() for name in VERSIONS[1:]}
    scores: dict[str, list[tuple[float, float]]] = {name: [] for name in VERSIONS}
    why: Counter[str] = Counter()
    for one in decided(records, policy):
        counts["records"] += 1
        counts[one.decision.version] += 1
        why[f"{one.decision.version}: {one.decision.reason or 'emitted'}"] += 1
        counts["emitted"] += one.decision.emitted
        for name, made in one.versions.items():
            if name != "ori":
                replies[name][(made.reject_reason or made.status).partition(":")[0]] += 1
            counts["prompt_tokens"] += made.tokens_in
            counts["completion_tokens"] += made.tokens_out
            if made.ifd is not None and made.rifd is not None:
                scores[name].append((made.ifd, made.rifd))
    total = counts["records"]
    return {
        "policy": policy.name, "records": total, "emitted": counts["emitted"],
        "instruction_accepted": (counts["Q"] + counts["QA"]) / total,
        "answer_accepted": (counts["A"] + counts["QA"]) / total,
        **{name: counts[name] for name in ("prompt_tokens", "completion_tokens")},
        "replies": [{"version": name, "outcome": k, "records": n} for name, c in replies.items()
                    for k, n in c.most_common()],
        "winners": [{"winner": k, "records": n} for k, n in why.most_common()],
        "scores": [{"version": name, "scored": len(found), "ifd_median": median(f[0] for f in found),
                    "rifd_median": median(f[1] for f in found)} for name, found in scores.items() if found],
    }  # fmt: skip


def view(records: Records, page: Path, policy: SelectionPolicy) -> dict[str, Any]:
    """One HTML page: instruction and answer before and after, to filter by task, status and reject reason."""
    counts: Counter[str] = Counter()

    def rows() -> Iterator[dict[str, Any]]:
        for one in decided(records, policy):
            winner, old = one.versions[one.decision.version], one.versions["ori"]
            new = winner.example(one.record.examples[-1])
            counts["records"] += 1
            counts["emitted"] += one.decision.emitted
            refused = {name: v.reject_reason or v.status for name, v in one.versions.items() if not v.usable}
            yield {
                "id": one.record.id, "instruction_before": old.instruction, "instruction_after": question_of(new),
                "answer_before": old.answer, "answer_after": new.response, "version": one.decision.version,
                "status": "emitted" if one.decision.emitted else one.decision.reason, "task": task_of(one.record.data),
                "reject reason": next((r.partition(":")[0] for r in refused.values()), None),
                "refused": "\n".join(f"{name}: {reason}" for name, reason in refused.items()) or None,
                "criticism": winner.criticism, "ifd before": old.ifd, "ifd": winner.ifd, "rifd before": old.rifd,
                "rifd": winner.rifd,
            }  # fmt: skip

    texts = ("criticism", "refused", "instruction_before", "instruction_after", "answer_before", "answer_after")
    title = f"Reflections of {Path(records.name).name}, before and after"
    write_page(rows(), page, title=title, score=None, text=texts, summary={"data": Path(records.name).name,
               "policy": policy.name}, facts=True)  # fmt: skip
    return {"page": page, "policy": policy.name, **counts}


def task_of(data: Mapping[str, Any]) -> str | None:
    """The kind of task, where the records have one."""
    found = (data.get(name) for name in ("task", "category", "realign_category"))
    return next((value for value in found if isinstance(value, str)), None)


def export(
    records: Records, output: Path, policy: SelectionPolicy, form: str = "sft", overwrite: bool = False
) -> dict[str, Any]:
    """sft: `messages` of every record that is emitted. preference: `prompt`, `chosen` (the rewritten answer) and
    `rejected` (the answer that it replaced, under the same instruction), of those whose answer was rewritten."""
    if form not in EXPORTS:
        raise RequestError(f"form {form!r}; choose {' or '.join(EXPORTS)}")

    def rows() -> Iterator[dict[str, Any]]:
        for one in decided(records, policy):
            name = one.decision.version
            if not one.decision.emitted:
                continue
            won = one.versions[name].example(one.record.examples[-1])
            prompt = prompt_messages(won)
            if form == "sft":
                answer = {"role": "assistant", "content": won.response}
                yield {"id": one.record.id, "messages": [*prompt, answer]}
            elif name in ("A", "QA"):
                loser = one.versions["Q" if name == "QA" else "ori"].example(one.record.examples[-1])
                yield preference(one.record.id, prompt, won.response, loser.response)

    return {"output": output, "form": form, "records": write(output, rows(), overwrite=overwrite)}
