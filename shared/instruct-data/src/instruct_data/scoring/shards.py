"""Static shares of the pairs for many processes: each finds its own by reading all texts, none waits for another."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from model_hooks.errors import RequestError

from .pairs import Pair

WINDOW = 4096  # pairs that are shared out together; a merge holds as many in memory
BYTES_PER_TOKEN = 4  # of English under a usual tokenizer; only ratios of costs matter


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of a pair's two segments, estimated from the bytes of its texts, per parameter of the blocks.

    A token costs 1 in the blocks, `tokens / (6 hidden_size)` of attention, and `head` where its logits are wanted.
    """

    hidden_size: int
    head: float
    max_length: int

    def __call__(self, prompt_bytes: int, response_bytes: int) -> float:
        prompt = min(prompt_bytes / BYTES_PER_TOKEN, self.max_length)
        response = min(response_bytes / BYTES_PER_TOKEN, self.max_length - prompt)
        return self.segment(prompt + response, response) + self.segment(response, response)

    def segment(self, tokens: float, targets: float) -> float:
        return tokens * (1 + tokens / (6 * self.hidden_size)) + targets * self.head


def cost_of(model: Any, max_length: int) -> Cost:
    config = model.config.get_text_config(decoder=True)
    hidden = int(getattr(config, "hidden_size", 0) or model.get_output_embeddings().weight.shape[-1])
    head = model.get_output_embeddings().weight.numel()
    tied = model.get_input_embeddings().weight.numel()
    total = sum(p.numel() for p in model.parameters())
    shared = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    blocks = total - tied - (0 if shared else head)
    return Cost(hidden, head / max(1, blocks), max_length)


def ranks(rank: int | None, world: int | None) -> tuple[int, int]:
    """(rank, world) as given, or from RANK and WORLD_SIZE, which accelerate launch and torchrun set, or (0, 1)."""
    if (rank is None) != (world is None):
        raise RequestError("give rank and world together, or neither")
    if rank is None or world is None:
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not 0 <= rank < world:
        raise RequestError(f"rank {rank} of {world} does not exist; ranks are 0 to world - 1")
    return rank, world


def share_out(costs: Sequence[float], loads: list[float]) -> list[int]:
    """A rank for each cost, longest processing time first; `loads` (one a rank) are what they had, and are added to."""
    given = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        given[i] = min(range(len(loads)), key=loads.__getitem__)
        loads[given[i]] += costs[i]
    return given


class Shard:
    """Iterable over (index, pair) of the pairs that are this rank's, one window of the input at a time.

    After iterating, `total` is the number of all pairs, `digest` a hash of all their texts (the same on every rank)
    and `loads` the cost given to each rank.
    """

    def __init__(self, pairs: Iterable[Pair], rank: int, world: int, cost: Cost) -> None:
        self._pairs, self.rank, self.cost = pairs, rank, cost
        self.loads = [0.0] * world
        self.total = 0
        self._hash = hashlib.blake2b(digest_size=16)

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def __iter__(self) -> Iterator[tuple[int, Pair]]:
        pairs = iter(self._pairs)
        while window := list(islice(pairs, WINDOW)):
            owners = share_out([self._read(pair) for pair in window], self.loads)
            yield from ((self.total + i, p) for i, p in enumerate(window) if owners[i] == self.rank)
            self.total += len(window)

    def _read(self, pair: Pair) -> float:
        texts = [text.encode("utf-8", "surrogatepass") for text in pair]
        for text in texts:
            self._hash.update(len(text).to_bytes(8, "little") + text)
        return self.cost(len(texts[1]), len(texts[2]))
