"""Training batches: packed windows of the corpus, some replaced by synthetic recall or mixed with it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from model_hooks.zoo import synthetic

WINDOW = 1024  # tokens
ANSWER_WEIGHT = 4.0  # of an answer, against 1 of a token of text: answers are few
NEEDLES = 8  # pair lines hidden in a row of text, at most
Tokens = npt.NDArray[np.uint16]
Weights = npt.NDArray[np.float32]


class Batch(NamedTuple):
    """Rows of token ids [rows, length] and how much each token counts in the loss when it is predicted."""

    tokens: npt.NDArray[np.int64]
    weights: Weights


class Stream:
    """Endless batches from documents joined by the end token, every window once an epoch in a new order.

    A ``window`` is what is drawn at once, in tokens; the length of a row divides it. The shares are those of the
    windows that are not plain text, as in ``Recipe``.

    What a batch holds depends only on ``seed`` and ``cursor`` (windows taken so far), so a stopped run goes on
    exactly where it was, and a change of length keeps the order.
    """

    def __init__(
        self,
        documents: Sequence[Sequence[int]],
        encode: Callable[[str], list[int]],
        end: int,
        recall_share: float,
        seed: int,
        *,
        lookup_share: float = 0.0,
        needle_share: float = 0.0,
        window: int = WINDOW,
    ) -> None:
        self.documents = [np.asarray([end, *d], dtype=np.uint16) for d in documents]
        self.encode, self.end, self.seed, self.window = encode, end, seed, window
        self.shares = (recall_share, lookup_share, needle_share)
        self.cursor = 0
        self.windows = sum(len(d) for d in self.documents) // window - 1
        self._epoch = -1
        self._joined: Tokens = np.empty(0, dtype=np.uint16)
        self._order: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def _start(self, epoch: int) -> None:
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.documents))
        self._joined = np.concatenate([self.documents[i] for i in order])[int(rng.integers(self.window)) :]
        self._order = rng.permutation(self.windows)
        self._epoch = epoch

    def _window(self, length: int) -> tuple[Tokens, Weights]:
        epoch, index = divmod(self.cursor, self.windows)
        if epoch != self._epoch:
            self._start(epoch)
        rng = random.Random(f"{self.seed}/{self.cursor}")
        self.cursor += 1
        kind, rows = rng.random(), self.window // length
        recall, lookup, needle = self.shares
        if kind < recall:
            tokens = np.concatenate([self.recall_row(rng, length) for _ in range(rows)])
            return tokens, np.ones(self.window, dtype=np.float32)
        if kind < recall + lookup:
            return _join([self.lookup_row(rng, length) for _ in range(rows)])
        start = int(self._order[index]) * self.window
        text = self._joined[start : start + self.window]
        if kind < recall + lookup + needle:
            return _join([self.needle_row(rng, row) for row in text.reshape(rows, length)])
        return text, np.ones(self.window, dtype=np.float32)

    def recall_row(self, rng: random.Random, length: int) -> Tokens:
        """A row of ``length`` tokens of recall documents, the table of the longest filling half of it."""
        row: list[int] = []
        while len(row) < length:
            room = length - len(row)
            target = min(room, int(64 * (length / 64) ** rng.random()))
            pairs = max(2, target // 30)  # a pair and its query cost about 30 tokens together
            row += [self.end, *self.encode(synthetic.recall(rng, pairs))]
        return np.asarray(row[:length], dtype=np.uint16)

    def _line(self, line: synthetic.Line) -> tuple[list[int], list[float]]:
        prompt, answer = self.encode(line.prompt), self.encode(line.answer)
        return prompt + answer, [0.0] * len(prompt) + [ANSWER_WEIGHT * line.asked] * len(answer)

    def lookup_row(self, rng: random.Random, length: int) -> tuple[Tokens, Weights]:
        """A row of one table whose lines ask for earlier lines; only answers count. Half begin with the end token."""
        row, weights = ([self.end], [0.0]) if rng.random() < 0.5 else ([], [])
        for line in synthetic.table(rng, length // 4):  # a line is four tokens
            tokens, counts = self._line(line)
            row += tokens
            weights += counts
        missing = max(0, length - len(row))
        return (
            np.asarray((row + [self.end] * missing)[:length], dtype=np.uint16),
            np.asarray((weights + [0.0] * missing)[:length], dtype=np.float32),
        )

    def needle_row(self, rng: random.Random, text: Tokens) -> tuple[Tokens, Weights]:
        """A row of text with a few pair lines hidden in it, which its end asks for in another order."""
        length = len(text)
        hidden = synthetic.pairs(rng, rng.randint(1, max(1, min(NEEDLES, length // 32))))
        asked = [self._line(line._replace(asked=True)) for line in rng.sample(hidden, len(hidden))]
        room = length - 2 * sum(len(tokens) for tokens, _ in asked)
        places = sorted(rng.randint(0, room) for _ in hidden)
        row: list[int] = []
        weights: list[float] = []
        for start, stop, line in zip([0, *places], [*places, room], [*hidden, None], strict=True):
            row += text[start:stop].tolist()
            weights += [1.0] * (stop - start)
            for tokens, counts in [self._line(line)] if line else asked:
                row += tokens
                weights += counts
        return np.asarray(row, dtype=np.uint16), np.asarray(weights, dtype=np.float32)

    def weighted_batch(self, windows: int, length: int) -> Batch:
        """The next ``windows`` windows as rows: [windows * window / length, length]."""
        tokens, weights = _join([self._window(length) for _ in range(windows)])
        return Batch(tokens.reshape(-1, length).astype(np.int64), weights.reshape(-1, length))

    def batch(self, windows: int, length: int) -> npt.NDArray[np.int64]:
        """The tokens of ``weighted_batch``."""
        return self.weighted_batch(windows, length).tokens


def _join(parts: Sequence[tuple[Tokens, Weights]]) -> tuple[Tokens, Weights]:
    return np.concatenate([tokens for tokens, _ in parts]), np.concatenate([weights for _, weights in parts])
