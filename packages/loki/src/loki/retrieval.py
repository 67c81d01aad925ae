"""Does a model find in its context what it is asked for? Needles in text and tables of keys and values, by length.

A question is put the way decoding meets it: the context is read at once, then the query token by token, so that every
token of the query and of the answer attends through the method. (A prompt read as a whole attends to everything, and so
does the first token after it: a one-token answer to such a prompt would say nothing about a method of decoding.)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model_hooks.errors import RequestError

Progress = Callable[[int, int], Any]


@dataclass(frozen=True)
class Question:
    """`context` is read at once, `query` token by token; a hit is `answer` as the greedy continuation.

    `depth`: where in the context the answer stands, from 0 (its beginning) to 1.
    """

    context: str
    query: str
    answer: str
    depth: float


def needle(tokenizer: Any, text: str, tokens: int, depth: float, seed: int = 0) -> Question:
    """One sentence with a secret number, hidden in `text` at `depth`; the whole takes about `tokens` tokens.

    Raises `RequestError` where the text is too short.
    """
    lot = random.Random(f"needle/{seed}/{tokens}/{depth}")
    name, number = "".join(lot.choices("bcdfghjklmnprstvw", k=5)), str(lot.randint(1000, 9999))
    sentence = f"\nThe secret number of {name} is {number}.\n"
    query = f"\nThe secret number of {name} is"
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    room = tokens - len(tokenizer(sentence + query, add_special_tokens=False)["input_ids"])
    if len(ids) < room or room < 1:
        raise RequestError(f"a haystack of {tokens} tokens was asked for, the text has {len(ids)}; give a longer one")
    before, after = tokenizer.decode(ids[: int(room * depth)]), tokenizer.decode(ids[int(room * depth) : room])
    return Question(before + sentence + after, query, f" {number}", depth)


def needles(tokenizer: Any, data: str, tokens: int, questions: int, seed: int = 0) -> list[Question]:
    """Needles at evenly spread depths in the first texts that together are long enough."""
    from model_hooks.text import read_documents

    haystack = ""
    for document in read_documents(data):
        haystack += document + "\n"
        if len(haystack) > 8 * tokens:  # characters; a token is rarely longer
            break
    return [needle(tokenizer, haystack, tokens, i / max(1, questions - 1), seed=seed + i) for i in range(questions)]


def key_values(tokenizer: Any, tokens: int, seed: int = 0) -> Question:
    """A JSON object of random keys and values that takes about `tokens` tokens, asked about one of them.

    The task of "Lost in the Middle" (arXiv 2307.03172), with shorter strings.
    """
    lot = random.Random(f"pairs/{seed}/{tokens}")

    def line() -> tuple[str, str]:
        key, value = (f"{lot.getrandbits(32):08x}" for _ in range(2))
        return key, value

    cost = len(tokenizer(' "{}": "{}",\n'.format(*line()), add_special_tokens=False)["input_ids"])
    pairs = [line() for _ in range(max(2, (tokens - 2 * cost) // cost))]
    asked = lot.randrange(len(pairs))
    table = "{\n" + "".join(f' "{key}": "{value}",\n' for key, value in pairs) + "}\n"
    return Question(table, f' "{pairs[asked][0]}": "', pairs[asked][1], asked / (len(pairs) - 1))


def lookups(tokens: int, count: int, seed: int = 0) -> list[Question]:
    """Tables that the zoo's recall model is trained to read, each asked about one of its keys."""
    from model_hooks import zoo

    try:
        found = zoo.lookups(tokens, count, seed)
    except ValueError as error:
        raise RequestError(str(error)) from error
    cuts = [lookup.prompt.rindex("\n") for lookup in found]
    return [Question(f.prompt[:cut], f.prompt[cut:], f.answer, f.depth) for f, cut in zip(found, cuts, strict=True)]


@torch.no_grad()
def hits(
    model: Any, tokenizer: Any, questions: Sequence[Question], *, batch_size: int = 8, progress: Progress | None = None
) -> list[bool]:
    """Whether `model`, as it attends now, answers each question; contexts of a batch are padded on the left."""
    encoded = [_encode(tokenizer, question) for question in questions]
    found: list[bool] = []
    for batch in _batches(encoded, batch_size):
        found += _hits(model, batch)
        if progress is not None:
            progress(len(found), len(questions))
    return found


@dataclass(frozen=True)
class _Encoded:
    context: list[int]
    tail: list[int]  # query and answer
    answer: int  # where in the tail the answer starts


def _encode(tokenizer: Any, question: Question) -> _Encoded:
    """Tokens of the whole text, cut where those of its parts agree with them: a cut may not split a token."""
    parts = (question.context, question.context + question.query, question.context + question.query + question.answer)
    context, asked, whole = (tokenizer(part, verbose=False)["input_ids"] for part in parts)
    start, answer = _agreement(context, whole), _agreement(asked, whole)
    return _Encoded(whole[:start], whole[start:], max(answer - start, 1))


def _agreement(part: list[int], whole: list[int]) -> int:
    same = next((i for i, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), min(len(part), len(whole)))
    return min(same, len(whole) - 1)


def _batches(encoded: list[_Encoded], size: int) -> Iterator[list[_Encoded]]:
    for start in range(0, len(encoded), size):
        yield encoded[start : start + size]


def _hits(model: Any, batch: list[_Encoded]) -> list[bool]:
    longest = max(len(e.context) for e in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask = torch.zeros(len(batch), longest, dtype=torch.long)
    for row, e in enumerate(batch):
        ids[row, longest - len(e.context) :] = torch.tensor(e.context)
        mask[row, longest - len(e.context) :] = 1
    steps = max(len(e.tail) for e in batch)
    tail = torch.zeros(len(batch), steps, dtype=torch.long)  # what a row feeds after its answer changes nothing
    for row, e in enumerate(batch):
        tail[row, : len(e.tail)] = torch.tensor(e.tail)
    place = (mask.cumsum(-1) - 1).clamp_min(0)
    out = _forward(model, ids, mask, place, None)
    guesses = [out.logits[:, -1].argmax(-1).cpu()]
    for step in range(steps - 1):
        mask = torch.cat([mask, torch.ones(len(batch), 1, dtype=torch.long)], dim=1)
        place = place[:, -1:] + 1
        out = _forward(model, tail[:, step : step + 1], mask, place, out.past_key_values)
        guesses.append(out.logits[:, -1].argmax(-1).cpu())
    guessed = torch.stack(guesses, dim=1)  # [B, steps]: what the model says comes at each place of the tail
    right = guessed == tail
    return [bool(right[row, e.answer : len(e.tail)].all()) for row, e in enumerate(batch)]


def _forward(model: Any, ids: Tensor, mask: Tensor, place: Tensor, cache: Any) -> Any:
    device = model.device
    return model(
        input_ids=ids.to(device), attention_mask=mask.to(device), position_ids=place.to(device), past_key_values=cache,
        use_cache=True, logits_to_keep=1,
    )  # fmt: skip
