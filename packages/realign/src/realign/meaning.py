"""How near two texts are in meaning: the cosine of their sentence embeddings, by an encoder on this machine."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

LEAST = 0.5  # cosine of an answer and one that says the same in another form; of answers to other questions below 0.3


@lru_cache(1)
def encoder() -> Any:
    """all-MiniLM-L6-v2, loaded once. Raises `RequestError` where neither the extra [embed] nor the hub has it."""
    from instruct_data.embedding import load_encoder

    return load_encoder()


def similarity(one: str, other: str) -> float:
    """From -1 to 1."""
    from instruct_data.embedding import embed

    first, second = embed([one, other], encoder())
    return float(first @ second)
