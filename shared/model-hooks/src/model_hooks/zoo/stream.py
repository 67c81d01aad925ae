"""Training batches: packed windows of the corpus, some replaced by synthetic recall."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from model_hooks.zoo import synthetic

WINDOW = 1024  # tokens; a shorter length divides it
Tokens = npt.NDArray[np.uint16]


class Stream:
    """Endless batches from documents joined by the end token, every window once an epoch in a new order.

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
    ) -> None:
        self.documents = [np.asarray([end, *d], dtype=np.uint16) for d in documents]
        self.encode, self.end, self.recall_share, self.seed = encode, end, recall_share, seed
        self.cursor = 0
        self.windows = sum(len(d) for d in self.documents) // WINDOW - 1
        self._epoch = -1
        self._joined: Tokens = np.empty(0, dtype=np.uint16)
        self._order: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def _start(self, epoch: int) -> None:
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.documents))
        self._joined = np.concatenate([self.documents[i] for i in order])[int(rng.integers(WINDOW)) :]
        self._order = rng.permutation(self.windows)
        self._epoch = epoch

    def _window(self, length: int) -> Tokens:
        epoch, index = divmod(self.cursor, self.windows)
        if epoch != self._epoch:
            self._start(epoch)
        rng = random.Random(f"{self.seed}/{self.cursor}")
        self.cursor += 1
        if rng.random() < self.recall_share:
            return np.concatenate([self.recall_row(rng, length) for _ in range(WINDOW // length)])
        start = int(self._order[index]) * WINDOW
        return self._joined[start : start + WINDOW]

    def recall_row(self, rng: random.Random, length: int) -> Tokens:
        """A row of ``length`` tokens of recall documents, the table of the longest filling half of it."""
        row: list[int] = []
        while len(row) < length:
            room = length - len(row)
            target = min(room, int(64 * (length / 64) ** rng.random()))
            pairs = max(2, target // 30)  # a pair and its query cost about 30 tokens together
            row += [self.end, *self.encode(synthetic.recall(rng, pairs, pairs).text())]
        return np.asarray(row[:length], dtype=np.uint16)

    def batch(self, windows: int, length: int) -> npt.NDArray[np.int64]:
        """The next ``windows`` windows as rows: [windows * 1024 / length, length]."""
        rows = np.concatenate([self._window(length) for _ in range(windows)])
        return rows.reshape(-1, length).astype(np.int64)
