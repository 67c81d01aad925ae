"""What the teacher is asked. The wording is this package's; VERSION is part of every request's key."""

from __future__ import annotations

from collections.abc import Sequence

from instruct_data.llm import Request

from .parsing import ANSWER_CRITERIA, INSTRUCTION, INSTRUCTION_CRITERIA, RESPONSE, form_of

VERSION = "1"

CHECKER = "You check instruction data for language models: helpful, precise, and hard to please."
INSTRUCTION_TASK = (
    "You are given an instruction and its answer. Do three things, in this order.\n"
    "1. Criticise. Judge the instruction by: {instruction}. Judge the answer by: {response}. Then say how weaknesses "
    "of the instruction led to weaknesses of the answer.\n"
    "2. Write a new instruction on a related matter: complete, demanding, not to be answered in a word, and to be "
    "understood by somebody who has never seen the old one.\n"
    "3. Answer the new instruction, correctly and in as much detail as you can."
)
RESPONSE_TASK = (
    "You are given an instruction and its answer. Do two things, in this order.\n"
    "1. Criticise the answer by: {response}. Say where it falls short, and why.\n"
    "2. Write a better answer to the same instruction: new, complete, correct, and as detailed as you can. It stands "
    "alone and does not speak of the old answer."
)
INSTRUCTION_JSON = (
    'Reply with one JSON object and nothing else: {"criticism": {"complexity": a sentence, "detail_required": ..., '
    '"knowledge_required": ..., "ambiguity": ..., "reasoning_required": ..., "helpfulness": ..., "relevance": ..., '
    '"accuracy": ..., "detail": ...}, "new_instruction": its text, "new_answer": its text}.'
)
RESPONSE_JSON = (
    'Reply with one JSON object and nothing else: {"criticism": {"helpfulness": a sentence, "relevance": ..., '
    '"accuracy": ..., "detail": ...}, "better_answer": its text}.'
)
INSTRUCTION_TAGS = (
    "Write the criticism first. Then write [New Instruction] on a line of its own, the new instruction, and [End]; "
    "then [New Answer] on a line of its own, its answer, and [End]. Write each tag once."
)
RESPONSE_TAGS = (
    "Write the criticism first. Then write [Better Answer] on a line of its own, the better answer, and [End]. Write "
    "each tag once."
)


def reflection(
    names: Sequence[str],
    instruction: str,
    answer: str,
    input: str = "",
    *,
    history: Sequence[tuple[str, str]] = (),
    structured: bool = True,
) -> tuple[dict[str, str], ...]:
    """The messages that ask for a reflection on the instruction (names: INSTRUCTION; section 3.1 of both papers) or on
    the answer (RESPONSE). `history`: earlier turns, as context."""
    on_instruction = tuple(names) == INSTRUCTION
    task = INSTRUCTION_TASK if on_instruction else RESPONSE_TASK
    forms = (INSTRUCTION_JSON, INSTRUCTION_TAGS) if on_instruction else (RESPONSE_JSON, RESPONSE_TAGS)
    criteria = {"instruction": INSTRUCTION_CRITERIA, "response": ANSWER_CRITERIA}
    system = task.format(**{name: ", ".join(found.values()) for name, found in criteria.items()})
    parts = [("instruction", instruction)]
    if history:
        parts.insert(0, ("conversation so far", "\n".join(f"User: {u}\nAssistant: {a}" for u, a in history)))
    if input:
        parts.append(("input", input))
    parts.append(("answer", answer))
    user = "\n\n".join(f"<{name}>\n{text}\n</{name}>" for name, text in parts)
    return (
        {"role": "system", "content": f"{CHECKER}\n\n{system}\n\n{forms[0] if structured else forms[1]}"},
        {"role": "user", "content": user},
    )


def probe(model: str) -> Request:
    """The request that shows whether an endpoint keeps to a schema: it must give the object and nothing else."""
    messages = reflection(RESPONSE, "What is 1 + 1?", "It is 2.")
    schema = form_of(RESPONSE).schema
    return Request("probe", model, messages, {"temperature": 0, "max_tokens": 512}, schema, VERSION)
