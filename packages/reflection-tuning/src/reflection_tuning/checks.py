"""Is a reflected text worth a score? Checks before the student sees it; what they refuse is not used."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from instruct_data.texts import count_words, refuses, repeated, script
from model_hooks.errors import RequestError

LEAST_LENGTH = 0.25  # of the old answer, in words, for a better answer to the same instruction
_TAG = re.compile(r"\[\s*(new instruction|new answer|better answer|end)\s*\]", re.IGNORECASE)
_REFERENCE = re.compile(
    r"\b(the|this|your) (original|old|previous|given|provided) (instruction|answer|response|prompt)\b"
    r"|\b(instruction|answer|response) (above|given above)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Change:
    """A pair before and after. `same_instruction`: only the answer was reflected on."""

    old_instruction: str
    old_answer: str
    instruction: str
    answer: str
    same_instruction: bool


Check = Callable[[Change], str | None]


def unchanged(change: Change) -> str | None:
    """A reflected text must differ from the old one in more than case and spaces."""
    if _plain(change.answer) == _plain(change.old_answer):
        return "unchanged: the answer is the old one"
    if not change.same_instruction and _plain(change.instruction) == _plain(change.old_instruction):
        return "unchanged: the instruction is the old one"
    return None


def tags(change: Change) -> str | None:
    """The tags of the reply must not be in the texts, unless they were before."""
    for new, old in ((change.instruction, change.old_instruction), (change.answer, change.old_answer)):
        if _TAG.search(new) and not _TAG.search(old):
            return "tags: a tag of the reply is in the text"
    return None


def reference(change: Change) -> str | None:
    """A text must stand alone, and not speak of the one that it replaces."""
    parts = [(change.answer, change.old_answer)]
    if not change.same_instruction:
        parts.append((change.instruction, change.old_instruction))
    for new, old in parts:
        found = _REFERENCE.search(new)
        if found and not _REFERENCE.search(old):
            return f"reference: it speaks of {found[0]!r}"
    return None


def language(change: Change) -> str | None:
    """The texts stay in their language, as far as the script tells it."""
    for new, old in ((change.instruction, change.old_instruction), (change.answer, change.old_answer)):
        before, after = script(old), script(new)
        if before and after and before != after:
            return f"language: {after} script instead of {before}"
    return None


def length(change: Change) -> str | None:
    """A better answer to the same instruction must not be much shorter than the old one."""
    new, old = count_words(change.answer), count_words(change.old_answer)
    if change.same_instruction and new < LEAST_LENGTH * old:
        return f"length: {new} words, the old answer has {old}"
    return None


def repetition(change: Change) -> str | None:
    """Sequences of 6 words that come again must be no more than a third, unless the old answer repeats itself too."""
    share = repeated(change.answer)
    return f"repetition: {share:.0%}" if share > max(1 / 3, repeated(change.old_answer)) else None


def refusal(change: Change) -> str | None:
    """A refusal must not take the place of an answer."""
    return "refusal: the old answer is none" if refuses(change.answer) and not refuses(change.old_answer) else None


CHECKS: dict[str, Check] = {
    "unchanged": unchanged, "tags": tags, "reference": reference, "language": language, "length": length,
    "repetition": repetition, "refusal": refusal,
}  # fmt: skip
PRESETS: dict[str, tuple[str, ...]] = {"careful": tuple(CHECKS), "none": ()}


def chosen(names: str) -> tuple[str, ...]:
    """The checks of a preset, or those named with commas between. Raises `RequestError` for an unknown name."""
    if names in PRESETS:
        return PRESETS[names]
    found = tuple(name.strip() for name in names.split(",") if name.strip())
    for name in found:
        if name not in CHECKS:
            raise RequestError(
                f"unknown check {name!r}; give a preset ({', '.join(PRESETS)}), or checks: {', '.join(CHECKS)}"
            )
    return found


def refuse(change: Change, names: Sequence[str]) -> str | None:
    """Why the change is refused, `check: what`; None if every check passes it."""
    return next((reason for name in names if (reason := CHECKS[name](change)) is not None), None)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
