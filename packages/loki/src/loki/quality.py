"""What a method of attention costs in quality: perplexity of whole texts and of decoding, tasks, retrieval by length.

All functions measure the model as it attends at the time, so a caller puts them within `loki.session(...)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from model_hooks.errors import RequestError

from .retrieval import Question, hits

Figure = dict[str, float]
Progress = Callable[[int, int], Any]


@torch.no_grad()
def decoding_perplexity(
    model: Any, sequences: Tensor, prompt: int, *, batch_size: int = 8, progress: Progress | None = None
) -> Figure:
    """Perplexity of the tokens after the first `prompt` of each sequence, fed one by one through the cache.

    What a user of `generate` gets: the prompt attends as the method lets it, all later tokens through the method. The
    standard error is that over sequences. Raises `RequestError` where no token is left to decode.

    Args:
        sequences: token ids [n, T], T > prompt + 1.
    """
    length = sequences.shape[1]
    if not 0 < prompt < length - 1:
        raise RequestError(f"prompt of {prompt} of {length} tokens: it must leave at least 2 tokens to decode")
    losses: list[Tensor] = []
    for batch in sequences.split(batch_size):
        batch = batch.to(model.device)
        out = model(input_ids=batch[:, :prompt], use_cache=True, logits_to_keep=1)
        total = torch.zeros(len(batch), dtype=torch.float64)
        for place in range(prompt, length - 1):  # what the prompt itself predicts is not counted
            out = model(input_ids=batch[:, place : place + 1], past_key_values=out.past_key_values, use_cache=True)
            loss = torch.nn.functional.cross_entropy(out.logits[:, -1].float(), batch[:, place + 1], reduction="none")
            total += loss.double().cpu()
        losses.append(total / (length - 1 - prompt))
        if progress is not None:
            progress(sum(map(len, losses)), len(sequences))
    each = torch.cat(losses)
    value = math.exp(float(each.mean()))
    spread = float(each.std()) / math.sqrt(len(each)) if len(each) > 1 else 0.0
    return {"value": value, "se": value * spread}


def perplexity(model: Any, tokenizer: Any, texts: Iterable[str], *, length: int, batch_size: int = 8) -> Figure:
    """Perplexity over windows of `length` tokens; with prefill="masked" every query reads what it would decoding."""
    from paper_tables.quality import language

    return language(model, tokenizer, texts, length=length, batch_size=batch_size)["perplexity"]


def recall(
    model: Any, tokenizer: Any, questions: list[Question], *, batch_size: int = 8, progress: Progress | None = None
) -> Figure:
    """Share of questions that are answered, in percent, with its binomial standard error."""
    found = hits(model, tokenizer, questions, batch_size=batch_size, progress=progress)
    share = sum(found) / len(found)
    return {"value": 100 * share, "se": 100 * math.sqrt(share * (1 - share) / len(found))}
