"""Five multiple-choice tasks, made from held-out modules or drawn, 200 questions each with four choices (chance 0.25).

They are built when asked for, always the same: from the shipped text, with their own small lexer and a fixed seed,
so neither the Python version nor any library changes a question. This folder is an lm-eval task folder as well:

    lm_eval --model hf --model_args pretrained=FOLDER --include_path $(python -m model_hooks.zoo.tasks) --tasks zoo_name

A question is a context and four continuations; the model's answer is the most likely one. Contexts never end in
white space, so that a continuation always starts a token.
"""

from __future__ import annotations

import keyword
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from model_hooks.zoo import corpus, retrieval, synthetic

SIZE = 200  # questions a task
CHOICES = 4
CHANCE = 1 / CHOICES
CONTEXT = 900  # characters of code before a question, about 300 tokens
RECALL_TOKENS = 512

LEXEMES = re.compile(
    r"(?P<skip>[rbfuRBFU]{0,2}(?:'''.*?'''|\"\"\".*?\"\"\"|'(?:\\.|[^'\\\n])*'|\"(?:\\.|[^\"\\\n])*\")|\#[^\n]*)"
    r"|(?P<name>[A-Za-z_]\w*)|(?P<open>[(\[{])|(?P<close>[)\]}]+)|\d\w*|\s+|.",
    re.DOTALL,
)
CLOSING = {"(": ")", "[": "]", "{": "}"}
KEYWORDS = frozenset([*keyword.kwlist, "self"])


@dataclass(frozen=True)
class Question:
    """``choices`` continue ``context``; ``answer`` is the index of the true one."""

    context: str
    choices: tuple[str, ...]
    answer: int


def _question(rng: random.Random, context: str, true: str, wrong: list[str]) -> Question:
    """Put the true continuation among the wrong ones; white space at the border goes to the continuations."""
    kept = context.rstrip()
    choices = [context[len(kept) :] + c for c in (true, *wrong)]
    order = rng.sample(range(CHOICES), CHOICES)
    return Question(kept, tuple(choices[i] for i in order), order.index(0))


def _context(text: str, end: int) -> str:
    """The last 900 characters before ``end``, from the start of a line."""
    start = max(0, end - CONTEXT)
    return text[text.find("\n", start, end) + 1 if start else 0 : end]


def _line_end(text: str, at: int) -> int:
    found = text.find("\n", at)
    return len(text) if found < 0 else found


Candidate = Callable[[random.Random, str], "Question | None"]


def _next_line(rng: random.Random, text: str) -> Question | None:
    """Which line comes next? The others are lines of the same file, alike in indentation and length."""
    lines = text.split("\n")
    at = rng.randrange(len(lines))
    true, end = lines[at], sum(len(line) + 1 for line in lines[:at]) - 1
    if end < CONTEXT or len(true.strip()) < 12:
        return None
    context = _context(text, end)
    indent = len(true) - len(true.lstrip())
    alike = {
        line
        for line in lines
        if abs(len(line) - len(true)) <= 0.25 * len(true)
        and abs(len(line) - len(line.lstrip()) - indent) <= 4
        and len(line.strip()) >= 12
    }
    wrong = sorted(line for line in alike - {true} if line not in context)
    if len(wrong) < CHOICES - 1 or true in context:
        return None
    return _question(rng, context + "\n", true, rng.sample(wrong, CHOICES - 1))


@cache
def _lexemes(text: str) -> list[re.Match[str]]:
    return [m for m in LEXEMES.finditer(text) if m.lastgroup in ("name", "open", "close")]


def _name(rng: random.Random, text: str) -> Question | None:
    """Which identifier comes here? The others occur in the same file, as often as they are drawn."""
    names = [m for m in _lexemes(text) if m.lastgroup == "name" and len(m[0]) > 2 and m[0] not in KEYWORDS]
    picked = rng.choice(names)
    if picked.start() < CONTEXT:
        return None
    rest = text[picked.end() : _line_end(text, picked.end())]
    wrong = sorted({m[0] for m in rng.sample(names, min(60, len(names))) if abs(len(m[0]) - len(picked[0])) <= 3})
    wrong = [w for w in wrong if w != picked[0]]
    if len(wrong) < CHOICES - 1 or text[picked.start() - 1] not in " .([\n":
        return None
    chosen = [w + rest for w in rng.sample(wrong, CHOICES - 1)]
    return _question(rng, _context(text, picked.start()), picked[0] + rest, chosen)


def _bracket(rng: random.Random, text: str) -> Question | None:
    """Which brackets close the code here? The others close too few, too many or the wrong ones."""
    found = _lexemes(text)
    closers = [i for i, m in enumerate(found) if m.lastgroup == "close"]
    at = rng.choice(closers)
    run, start = found[at][0], found[at].start()
    if start < CONTEXT or not (text[start - 1].isalnum() or text[start - 1] == "_"):
        return None
    stack: list[str] = []
    for m in found[:at]:
        if m.start() < start - CONTEXT:
            continue
        for c in m[0] if m.lastgroup in ("open", "close") else "":
            if c in CLOSING:
                stack.append(CLOSING[c])
            elif stack:
                stack.pop()
    if len(stack) < max(2, len(run)):
        return None
    swap = {")": "]", "]": ")", "}": ")"}
    others = {run[:-1], run + stack[-1], run + swap[run[-1]], swap[run[0]] + run}
    others |= {swap[run[0]] + run[1:], run[:-1] + swap[run[-1]]}
    rest = text[found[at].end() : _line_end(text, _line_end(text, found[at].end()) + 1)]  # and the next line
    wrong = [w + rest for w in rng.sample(sorted(others - {run}), CHOICES - 1)]
    return _question(rng, _context(text, start), run + rest, wrong)


def _recall(rng: random.Random) -> Question:
    """Which value has this key? Four lines ``key: value`` are hidden in held-out code, 512 tokens with the question."""
    count, pairs = _encoder(), synthetic.pairs(rng, CHOICES)
    if len({pair.answer for pair in pairs}) < CHOICES:
        return _recall(rng)
    documents = _documents()
    text = rng.choices(documents, [len(text) for text in documents])[0].splitlines()
    at, room = rng.randrange(len(text)), RECALL_TOKENS - sum(count(p.prompt + p.answer) for p in (*pairs, pairs[0]))
    lines: list[str] = []
    while (room := room - count("\n" + text[at])) >= 0:
        lines.append(text[at])
        at = (at + 1) % len(text)
    for pair in rng.sample(pairs, CHOICES):
        lines.insert(rng.randint(0, len(lines)), (pair.prompt + pair.answer)[1:])
    return _question(rng, "\n".join(lines) + pairs[0].prompt, pairs[0].answer, [pair.answer for pair in pairs[1:]])


def _lookup(rng: random.Random) -> Question:
    """Which value has this key? A table of one-token pairs fills 512 tokens; the others are values of the table."""
    (lookup,) = retrieval.lookups(RECALL_TOKENS, 1, rng.getrandbits(32))
    return _question(rng, lookup.prompt, lookup.answer, rng.sample(lookup.others, CHOICES - 1))


def _documents() -> list[str]:
    return [text for _, text in corpus.text("heldout") if len(text) > 2 * CONTEXT]


@cache
def _encoder() -> Callable[[str], int]:
    from model_hooks.zoo import tokenizer

    bpe = tokenizer.load().backend_tokenizer
    return lambda text: len(bpe.encode(text).ids)


FROM_TEXT: dict[str, Candidate] = {"zoo_next_line": _next_line, "zoo_bracket": _bracket, "zoo_name": _name}
DRAWN: dict[str, Callable[[random.Random], Question]] = {"zoo_recall": _recall, "zoo_lookup": _lookup}
TASKS = ("zoo_next_line", "zoo_recall", "zoo_bracket", "zoo_name", "zoo_lookup")


@cache
def questions(task: str, seed: int = 0) -> tuple[Question, ...]:
    """The questions of a task; another ``seed`` gives other questions of the same kind."""
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; the zoo has {', '.join(TASKS)}")
    rng = random.Random(f"{task}/{seed}")
    if task in DRAWN:
        return tuple(DRAWN[task](rng) for _ in range(SIZE))
    documents = _documents()
    weights = [len(text) for text in documents]
    seen: dict[str, Question] = {}
    while len(seen) < SIZE:
        question = FROM_TEXT[task](rng, rng.choices(documents, weights)[0])
        if question:
            seen.setdefault(question.context, question)
    return tuple(seen.values())
