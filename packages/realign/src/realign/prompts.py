"""What the models are asked. The wording is this package's; VERSION is part of every request's key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from instruct_data.llm import Form, Request

from .taxonomy import Taxonomy

VERSION = "1"

REWRITE = (
    "You rewrite the layout of an answer. You are given a question, its answer and a format. {judge}"
    "Bring the answer into the format and change nothing else: keep its meaning and all of its information, add no "
    "facts of your own, and let it remain a correct and fluent answer to the question. Do not write headings that the "
    "format does not ask for.{evidence}"
)
JUDGE = (
    "First judge whether the format suits the question. If it does not, give the answer back exactly as it is. "
    "Otherwise: "
)
EVIDENCE = " There is evidence too: decide which parts of it help, and support the answer with those alone."
AS_JSON = (
    ' Reply with one JSON object and nothing else: {"suitable": whether the format suits the question, "reasoning": '
    'why, in a sentence or two, "revised_response": the final text}.'
)
AS_LABELS = (
    " Reply in two parts and nothing else: after the label `Reasoning:` a sentence or two on what you do and why, and "
    "after the label `Revised response:`, on a new line, the final text."
)

REVISION = Form(
    {
        "type": "object",
        "properties": {
            "suitable": {"type": "boolean"},
            "reasoning": {"type": "string"},
            "revised_response": {"type": "string"},
        },
        "required": ["suitable", "reasoning", "revised_response"],
        "additionalProperties": False,
    },
    (("Reasoning", "reasoning"), ("Revised response", "revised_response")),
)
# A reply by labels does not say whether the format suits.
REVISION_LENIENT = Form({**REVISION.schema, "required": ["revised_response"]}, REVISION.labels)


def rewriting(
    question: str,
    response: str,
    form: str,
    evidence: Sequence[str] = (),
    *,
    history: Sequence[tuple[str, str]] = (),
    adaptive: bool = True,
    structured: bool = True,
) -> tuple[dict[str, str], ...]:
    """The messages that ask for a rewritten answer. `adaptive`: the model first judges whether the format suits (the
    paper's ablation leaves it out). `history`: earlier turns, as context."""
    system = REWRITE.format(judge=JUDGE if adaptive else "", evidence=EVIDENCE if evidence else "")
    parts = []
    if history:
        parts.append(("conversation so far", "\n".join(f"User: {u}\nAssistant: {a}" for u, a in history)))
    parts += [("question", question), ("response", response), ("format", form)]
    if evidence:
        parts.append(("evidence", "\n\n".join(f"{n}. {text}" for n, text in enumerate(evidence, 1))))
    user = "\n\n".join(f"[{name} starts]\n{text}\n[{name} ends]" for name, text in parts)
    return (
        {"role": "system", "content": system + (AS_JSON if structured else AS_LABELS)},
        {"role": "user", "content": user},
    )


def probe(model: str) -> Request:
    """The request that shows whether an endpoint keeps to a schema: it must give the object and nothing else."""
    messages = rewriting("What is 1 + 1?", "2", "One sentence.")
    return Request("probe", model, messages, {"temperature": 0, "max_tokens": 256}, REVISION.schema, VERSION)


def classifying(question: str, taxonomy: Taxonomy) -> tuple[dict[str, str], ...]:
    """The messages that ask for the name of a question's task."""
    tasks = "\n".join(f"- {task.name}: {task.description}" for task in taxonomy.tasks.values())
    system = (
        "You sort questions by the kind of task that they ask for. These are all kinds:\n"
        f"{tasks}\n"
        "Reply with the name of exactly one of them, copied without any change, and with nothing else."
    )
    return ({"role": "system", "content": system}, {"role": "user", "content": question})


def task_schema(taxonomy: Taxonomy) -> dict[str, Any]:
    """A JSON schema that admits the names of the tasks alone."""
    return {
        "type": "object",
        "properties": {"task": {"type": "string", "enum": list(taxonomy.tasks)}},
        "required": ["task"],
        "additionalProperties": False,
    }
