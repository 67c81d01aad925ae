"""Questions that only the context can answer, of any length and depth: to see what a cache still holds.

    for question in lookups(tokens=1024, count=50, seed=0):       # a table of pairs, one of them asked for
        question.prompt, question.answer, question.depth
    needle(tokens=1024, depth=0.5, seed=0)                         # one pair hidden in held-out text

An answer is one token of the zoo's tokenizer, so the most likely next token is the whole answer. `zoo:recall` is
trained to answer both (`evaluate.exact_match` counts), at any length up to its context; `zoo:gpt2` and `zoo:mixtral`
have seen some of either while they were trained, `zoo:llama` none.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from typing import Any

from model_hooks.zoo import corpus, synthetic

LINE_TOKENS = 4  # of a pair: line break and indentation, key, colon, value
ASKING_TOKENS = LINE_TOKENS - 1
FEWEST = 4  # pairs of a table


@dataclass(frozen=True)
class Lookup:
    """``answer`` (with its leading space) is the one token that continues ``prompt``.

    ``depth`` says where the asked pair stands: 0 at the start of the prompt, 1 directly before the question. ``others``
    are the different values of the other pairs, in the order of the table.
    """

    prompt: str
    answer: str
    depth: float
    others: tuple[str, ...] = ()


def lookups(tokens: int, count: int, seed: int = 0) -> tuple[Lookup, ...]:
    """``count`` tables of ``tokens`` tokens (up to 3 fewer), each asked for one pair, at any depth alike.

    ``ValueError`` for a length that holds fewer than four pairs or needs more keys than there are.
    """
    room = (tokens - ASKING_TOKENS) // LINE_TOKENS
    most = len(synthetic.words()[0])
    if not FEWEST <= room <= most:
        shortest, longest = (pairs * LINE_TOKENS + ASKING_TOKENS for pairs in (FEWEST, most))
        raise ValueError(f"a lookup of {tokens} tokens: give {shortest} to {longest} tokens ({most} keys exist)")
    rng = random.Random(f"lookups/{tokens}/{seed}")
    return tuple(_lookup(rng, room) for _ in range(count))


def _lookup(rng: random.Random, pairs: int) -> Lookup:
    table = synthetic.pairs(rng, pairs)
    at = rng.randrange(pairs)
    asked = table[at]
    others = dict.fromkeys(line.answer for line in table if line.answer != asked.answer)
    text = "".join(line.prompt + line.answer for line in table)
    return Lookup(text + asked.prompt, asked.answer, at / (pairs - 1), tuple(others))


@cache
def _documents() -> tuple[tuple[str, list[tuple[int, int]]], ...]:
    """The held-out documents with the (start, end) characters of their tokens."""
    from model_hooks.zoo import tokenizer

    encode: Any = tokenizer.load().backend_tokenizer.encode
    return tuple((text, encode(text, add_special_tokens=False).offsets) for _, text in corpus.text("heldout"))


def needle(tokens: int, depth: float, seed: int = 0) -> Lookup:
    """Held-out text of one module with a pair line at ``depth`` (0 to 1) and asked for at its end.

    The prompt is ``tokens`` tokens long, a few more or fewer where the line moves to a line break of the text.
    ``ValueError`` for a depth outside 0 to 1 and for a length no held-out module reaches.
    """
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"a needle at depth {depth}: give 0 (start of the text) to 1 (its end)")
    room = tokens - LINE_TOKENS - ASKING_TOKENS
    long = [document for document in _documents() if len(document[1]) > room]
    if room < FEWEST * LINE_TOKENS or not long:
        longest = max(len(places) for _, places in _documents()) + LINE_TOKENS + ASKING_TOKENS - 1
        shortest = FEWEST * LINE_TOKENS + LINE_TOKENS + ASKING_TOKENS
        raise ValueError(f"a needle in {tokens} tokens: give {shortest} to {longest} tokens")
    rng = random.Random(f"needle/{tokens}/{depth}/{seed}")
    text, places = rng.choices(long, [len(places) - room for _, places in long])[0]
    first = rng.randrange(len(places) - room)
    hay = text[places[first][0] : places[first + room - 1][1]]
    breaks = [0, *(i for i, c in enumerate(hay) if c == "\n"), len(hay)]
    at = min(breaks, key=lambda i: abs(i - depth * len(hay)))
    line = synthetic.pairs(rng, 1)[0]
    return Lookup(hay[:at] + line.prompt + line.answer + hay[at:] + line.prompt, line.answer, at / len(hay))
