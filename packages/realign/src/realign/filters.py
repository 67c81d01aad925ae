"""Does a rewritten answer still say what the original said? (the paper's step 3, post-processing)

A filter takes a `Change` and returns why it refuses it, or None. A refused answer is not used: the original stays.
The presets are the rules of the published scripts, filter by filter; the filters after `alpaca-headers` are additions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from instruct_data.texts import refuses, repeated, script
from model_hooks.errors import RequestError

from . import meaning

LENGTH_SHARE = 0.5  # of the original's tokens; the published threshold
KEPT_SHARE = 0.9  # of the numbers and names of the original
SAME = ("True", "False")


@dataclass(frozen=True)
class Change:
    """A question, its original answer and the rewritten one, with the task's name and both answers' tokens."""

    question: str
    original: str
    rewritten: str
    task: str = ""
    original_tokens: int = 0
    rewritten_tokens: int = 0


Filter = Callable[[Change], str | None]


def has_code(text: str) -> bool:
    """A fenced block, or a definition that returns something."""
    return "```" in text or ("def " in text and "return " in text)


def length(change: Change) -> str | None:
    """At most half as long as the original, in tokens, is refused."""
    if change.rewritten_tokens <= LENGTH_SHARE * change.original_tokens:
        return f"length: {change.rewritten_tokens} tokens, the original has {change.original_tokens}"
    return None


def code_parity(change: Change) -> str | None:
    """Code must not appear or vanish."""
    if has_code(change.original) != has_code(change.rewritten):
        return f"code: {'lost' if has_code(change.original) else 'added'}"
    return None


def choice(change: Change) -> str | None:
    """An answer of one character must be there, with no ASCII letter beside it."""
    letter = change.original.strip()
    if len(letter) != 1 or re.search(rf"(?<![A-Za-z]){re.escape(letter)}(?![A-Za-z])", change.rewritten):
        return None
    return f"choice: {letter!r} is not in it"


def leaked_label(change: Change) -> str | None:
    """The labels of the reply must not be in the answer."""
    if re.search(r"revised response:|^reasoning:", change.rewritten, re.IGNORECASE | re.MULTILINE):
        return "label: a label of the reply is in it"
    return None


def real_plan(change: Change) -> str | None:
    """Neither what fits no task, nor a "planning" whose question speaks of no plan."""
    if change.task == "default":
        return "task: default"
    if change.task == "planning" and " plan" not in change.question and " Plan" not in change.question:
        return "task: planning, but the question has no plan in it"
    return None


def alpaca_headers(change: Change) -> str | None:
    """Headers of the Alpaca prompt must not be in the answer."""
    found = re.search(r"^###\s*(Instruction|Input|Response)\s*:", change.rewritten, re.MULTILINE)
    return "header: a header of the Alpaca prompt is in it" if found else None


def final_number(change: Change) -> str | None:
    """The result of a calculation (see `result_of`) must be the same."""
    before, after = result_of(change.original), result_of(change.rewritten)
    return None if before is None or before == after else f"result: {after} instead of {before}"


def kept_facts(change: Change) -> str | None:
    """Nine tenths of the numbers, links and names (capitalised words inside sentences) must still be there."""
    facts = facts_of(change.original)
    kept = facts & facts_of(change.rewritten) | {fact for fact in facts if fact in change.rewritten}
    if len(kept) >= KEPT_SHARE * len(facts):
        return None
    lost = sorted(facts - kept)
    return f"facts: {len(lost)} of {len(facts)} are lost ({', '.join(lost[:3])})"


def repetition(change: Change) -> str | None:
    """Sequences of 6 words that come again must be no more than a third, unless the original repeats itself too."""
    share = repeated(change.rewritten)
    return f"repetition: {share:.0%}" if share > max(1 / 3, repeated(change.original)) else None


def new_refusal(change: Change) -> str | None:
    """A refusal must not take the place of an answer."""
    if refuses(change.rewritten) and not refuses(change.original):
        return "refusal: the original has none"
    return None


def same_script(change: Change) -> str | None:
    """The answer must stay in its language, as far as the script tells it (Latin, Cyrillic, CJK ...)."""
    before, after = script(change.original), script(change.rewritten)
    return f"language: {after} script instead of {before}" if before and after and before != after else None


def same_meaning(change: Change, least: float = meaning.LEAST) -> str | None:
    """The answers' embeddings must have a cosine of at least `least`."""
    found = meaning.similarity(change.original, change.rewritten)
    return None if found >= least else f"meaning: cosine {found:.2f}, {least:g} is needed"


FILTERS: dict[str, Filter] = {
    "length": length, "code-parity": code_parity, "choice": choice, "label": leaked_label, "real-plan": real_plan,
    "alpaca-headers": alpaca_headers, "final-number": final_number, "facts": kept_facts, "repetition": repetition,
    "refusal": new_refusal, "script": same_script,
    "meaning": same_meaning,
}  # fmt: skip

PRESETS: dict[str, tuple[str, ...]] = {
    "open-platypus": ("choice", "code-parity", "length"),
    "alpaca": ("code-parity", "length"),
    "no-robots": ("real-plan", "label", "code-parity", "length"),
    "gsm8k": ("final-number", "label", "length"),
    "math": ("final-number", "label", "length"),
    "careful": ("label", "choice", "code-parity", "length", "refusal", "script", "repetition", "facts"),
    "none": (),
}


def chosen(names: str) -> tuple[str, ...]:
    """The filters of a preset, or those named with commas between; `meaning=0.7` sets its least cosine.

    Raises `RequestError` for an unknown name, and for `meaning` without its encoder.
    """
    if names in PRESETS:
        return PRESETS[names]
    found = tuple(name.strip() for name in names.split(",") if name.strip())
    for name in found:
        filter_of(name)
        if name.startswith("meaning"):
            meaning.encoder()  # loaded before anything is paid for
    return found


def filter_of(name: str) -> Filter:
    """The filter of a name, or of `meaning=COSINE`."""
    plain, given, value = name.partition("=")
    if not given and plain in FILTERS:
        return FILTERS[plain]
    try:
        least = float(value)
    except ValueError:
        least = 2.0
    if plain == "meaning" and -1 <= least <= 1:
        return partial(same_meaning, least=least)
    raise RequestError(
        f"unknown filter {name!r}; give a preset ({', '.join(PRESETS)}), or filters: {', '.join(FILTERS)} "
        "(meaning=0.7 for another least cosine)"
    )


def refuse(change: Change, names: Sequence[str]) -> str | None:
    """Why the change is refused; None if every filter passes it.

    An original of one character or of True or False alone is a verdict: with `choice` among the filters, only it
    decides, for an explanation is always longer and may well bring code.
    """
    original = change.original.strip()
    if "choice" in names and (original in SAME or len(original) == 1):
        return choice(change)
    return next((reason for name in names if (reason := filter_of(name)(change)) is not None), None)


def result_of(text: str) -> str | None:
    """The number that a solution ends in: after the last ``####``, in the last ``\\boxed{}``, or the last one."""
    for pattern in (r"####\s*(.+)", r"\\boxed\{([^{}]*)\}"):
        if marked := re.findall(pattern, text):
            text = marked[-1]
            break
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    if not numbers:
        return None
    value = numbers[-1].replace(",", "")
    return value.rstrip("0").rstrip(".") if "." in value else value


def facts_of(text: str) -> set[str]:
    """Links, numbers but for those of a list's items, and capitalised words that do not begin a sentence."""
    text = re.sub(r"^\s*\d+[.)](?=[ \t]+\S)", "", text, flags=re.MULTILINE)
    links = set(re.findall(r"https?://[^\s)>\]]+", text))
    numbers = {n.replace(",", "").rstrip(".") for n in re.findall(r"\d[\d,.]*", text)}
    names = set(re.findall(r"(?<=[a-z,;] )[A-Z][\w-]+", text))
    return links | numbers | names
