"""What a teacher's reply holds: JSON first, then tags that stand alone, one pair or none.

    [New Instruction] ... [End] [New Answer] ... [End]           [Better Answer] ... [End]

A tag counts where it begins a line (after a list number, at most) and is not inside a fence; the last complete set
wins, since teachers quote the form before they fill it in. The bare word "End" ends nothing. An instruction without its
answer, or an answer without its instruction, is no reply.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from instruct_data.llm import Form, ParseError

TAGS = {"new_instruction": "New Instruction", "new_answer": "New Answer", "better_answer": "Better Answer"}
_TAG = re.compile(
    r"^[ \t>*#]*(?:\d+[.)][ \t]*)?[*]*"
    r"\[[ \t]*(new[ \t_]+instruction|new[ \t_]+answer|better[ \t_]+answer|end)[ \t]*\][*]*[ \t]*:?"
    r"|\[[ \t]*(end)[ \t]*\](?=[*]*[ \t]*$)",
    re.IGNORECASE | re.MULTILINE,
)
_FENCE = re.compile(r"^[ \t]*(```+|~~~+).*?^[ \t]*\1[`~]*[ \t]*$", re.DOTALL | re.MULTILINE)
_ONE_FENCE = re.compile(r"(```+|~~~+)[^\n]*\n(.*)\n\1", re.DOTALL)
# what prompts show where a text is wanted; a reply that is nothing else was not filled in
_PLACEHOLDER = re.compile(r"\W*(your (new |better )?(instruction|answer)|n/?a|\.\.\.|…|its text)\W*", re.IGNORECASE)


INSTRUCTION, RESPONSE = ("new_instruction", "new_answer"), ("better_answer",)
# the criteria of both papers: the key of a reply's criticism, and what it is about
ANSWER_CRITERIA = {
    "helpfulness": "helpfulness", "relevance": "relevance", "accuracy": "accuracy", "detail": "level of detail",
}  # fmt: skip
INSTRUCTION_CRITERIA = {
    "complexity": "complexity of the topic", "detail_required": "level of detail required",
    "knowledge_required": "knowledge required", "ambiguity": "ambiguity of the instruction",
    "reasoning_required": "logical reasoning or problem solving involved",
}  # fmt: skip


def form_of(names: Sequence[str]) -> Form:
    """The JSON schema of a reply that holds these texts, after the criticism by criterion."""
    criteria = [*(INSTRUCTION_CRITERIA if tuple(names) == INSTRUCTION else ()), *ANSWER_CRITERIA]
    properties: dict[str, Any] = {"criticism": _strings(criteria)}
    properties |= {name: {"type": "string"} for name in names}
    return Form({
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False,
    })  # fmt: skip


def _strings(names: Sequence[str]) -> dict[str, Any]:
    return {
        "type": "object", "properties": {name: {"type": "string"} for name in names}, "required": list(names),
        "additionalProperties": False,
    }  # fmt: skip


def parse(text: str, names: Sequence[str]) -> dict[str, Any]:
    """The texts `names` in a reply, all of them, with `criticism`: a text. Raises `ParseError`."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if whole := _ONE_FENCE.fullmatch(text.strip()):
        text = whole[2]
    found = _by_json(text, names) or _by_tags(text, names)
    if found is None:
        wanted = " ... ".join(f"[{TAGS[name]}] ... [End]" for name in names)
        raise ParseError(f"the reply holds neither the JSON object nor {wanted}")
    for name in names:
        value = found[name] = found[name].strip()
        if not value or _PLACEHOLDER.fullmatch(value):
            raise ParseError(f"the text of {TAGS[name]} is {value!r}: nothing was written there")
    return found


def _by_json(text: str, names: Sequence[str]) -> dict[str, Any] | None:
    try:
        value = Form(_strings(names)).parse(text)  # a criticism in another form does no harm
    except ParseError:
        return None
    said = value.get("criticism", "")
    if isinstance(said, dict):
        said = "\n".join(f"{criterion}: {remark}" for criterion, remark in said.items())
    return {"criticism": str(said).strip(), **{name: value[name] for name in names}}


def _by_tags(text: str, names: Sequence[str]) -> dict[str, Any] | None:
    """The last run of tags `names`, each with the text up to its [End], the next tag or the end of the reply."""
    fences = [match.span() for match in _FENCE.finditer(text)]
    tags = [
        (re.sub(r"[\s_]+", "_", (match[1] or match[2]).lower()), match.start(), match.end())
        for match in _TAG.finditer(text)
        if not any(start <= match.start() < end for start, end in fences)
    ]
    best = None
    for at in range(len(tags)):
        found, place = dict[str, Any](), at
        for name in names:
            if place >= len(tags) or tags[place][0] != name:
                break
            after = tags[place + 1][1] if place + 1 < len(tags) else len(text)
            found[name] = text[tags[place][2] : after]
            place += 2 if place + 1 < len(tags) and tags[place + 1][0] == "end" else 1
        else:
            best = {"criticism": text[: tags[at][1]].strip(), **found}
    return best
