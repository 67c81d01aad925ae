"""Scores of all versions under the student: IFD, and r-IFD by the reverse prompt (section 2.1 of v2).

IFD = exp(L(y|T(x)) - L(y)) and r-IFD = exp(L(x|G(y)) - L(x)), where T is the prompt template and G shows the answer and
asks for its instruction, in the same template. x is instruction and input with nothing between them.

Both are pairs of the scoring engine, which forwards every distinct segment once: versions that share an instruction or
an answer share its loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from os.path import commonprefix
from typing import Any

from instruct_data import Example, Record
from instruct_data.ifd import ifd
from instruct_data.scoring import Pair

from .versions import Version, Versions, versions_of

REVERSE = (
    "A response follows. Guess which instruction it was written for.\n{answer}\n"
    "Write the instruction that the response above belongs to."
)
SIDES = ("y", "x")
Prompt = Callable[[Example], str]


def scored_text(example: Example) -> str:
    """x: what r-IFD is the loss of."""
    return example.instruction + example.input


def heads_of(prompt: Prompt) -> list[str]:
    """What the prompts of all records begin with: of T, without and with an input, and of G."""
    kinds = [[Example(text, input, "") for text in "ab"] for input in ("", "c")]
    kinds.append([reverse_of(Example("", "", answer)) for answer in "ab"])
    # of characters, which is meant
    return [commonprefix([prompt(example) for example in kind]) for kind in kinds]  # noqa: RUF071


def reverse_of(example: Example) -> Example:
    """The question of the reverse prompt, as an instruction without an input."""
    return replace(example, instruction=REVERSE.format(answer=example.response), input="")


def status_of(version: Version, example: Example) -> str | None:
    """Why a version is not scored at all; None where it is."""
    if not version.usable:
        return "not_used"
    if not example.response.strip():
        return "empty_answer"
    return None if scored_text(example).strip() else "empty_instruction"


def pairs_of_version(key: str, example: Example, prompt: Prompt) -> tuple[Pair, Pair]:
    """The answer behind its prompt, and the instruction behind the reverse prompt."""
    return (
        Pair(f"{key}\ty", prompt(example), example.response),
        Pair(f"{key}\tx", prompt(reverse_of(example)), scored_text(example)),
    )


def pairs_of(records: Iterable[Record], prompt: Prompt) -> Iterator[Pair]:
    """Two pairs for every version that is scored, keyed `record<TAB>version<TAB>side`."""
    for position, record in enumerate(records):
        for name, version in versions_of(record, needed=False).items():
            example = version.example(record.examples[-1])
            if status_of(version, example) is None:
                yield from pairs_of_version(f"{position}\t{name}", example, prompt)


def scored(records: Iterable[Record], rows: Iterable[dict[str, Any]]) -> Iterator[tuple[Record, Versions]]:
    """The records with the scores of their versions; `rows` are the engine's, of `pairs_of` the same records."""
    stream = iter(rows)
    for position, record in enumerate(records):
        made = {}
        for name, version in versions_of(record, needed=False).items():
            status = status_of(version, version.example(record.examples[-1]))
            if status is None:
                y, x = next(stream), next(stream)
                assert (y["key"], x["key"]) == (f"{position}\t{name}\ty", f"{position}\t{name}\tx")
                made[name] = with_scores(version, y, x)
            else:
                made[name] = replace(version, score_status=status)
        yield record, made


def with_scores(version: Version, y: dict[str, Any], x: dict[str, Any]) -> Version:
    """The version with the losses of the engine's rows for its answer and its instruction.

    A side that has no loss has no ratio: it is never 0, and never NaN.
    """
    names = ("loss_cond_sum", "n_cond", "loss_direct_sum", "n_direct")
    given, reverse = (ifd(*(row[name] for name in names)) for row in (y, x))
    problems = [f"{side}: {row['status']}" for side, row in zip(SIDES, (y, x)) if row["status"] != "ok"]
    ratios: dict[str, Any] = {
        "ifd": given.ifd_ppl, "rifd": reverse.ifd_ppl, "ifd_loss": given.ifd_loss, "rifd_loss": reverse.ifd_loss,
    }  # fmt: skip
    if not problems and any(value is None or not math.isfinite(value) for value in ratios.values()):
        problems = ["no ratio"]
    return replace(
        version, loss_y_x=y["loss_cond_sum"], tokens_y_x=y["n_cond"], loss_y=y["loss_direct_sum"],
        tokens_y=y["n_direct"], loss_x_y=x["loss_cond_sum"], tokens_x_y=x["n_cond"], loss_x=x["loss_direct_sum"],
        tokens_x=x["n_direct"], score_status="; ".join(problems) or "ok", truncated=y["truncated"] or x["truncated"],
        **ratios,
    )  # fmt: skip
