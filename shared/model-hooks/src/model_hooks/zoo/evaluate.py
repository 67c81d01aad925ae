"""Measures of a zoo model: bits per byte of held-out text, accuracy on tasks, exact answers, and a unigram's bits."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_hooks.zoo.retrieval import Lookup
from model_hooks.zoo.tasks import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from model_hooks.zoo.corpus import Document

BATCH_TOKENS = 2_048  # of one forward pass, padding included: more no longer fits the caches of a CPU


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _batches(rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices of rows of like length, each batch padded to at most ``BATCH_TOKENS``."""
    batch: list[int] = []
    for index in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        if batch and (len(batch) + 1) * len(rows[index]) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.inference_mode()
def log_likelihoods(model: nn.Module, rows: Sequence[Sequence[int]], scored: Sequence[int]) -> list[float]:
    """Summed log-likelihood in nats of the last ``scored[i]`` tokens of each row of token ids."""
    device = next(model.parameters()).device
    result = [0.0] * len(rows)
    for batch in _batches(rows):
        ids = torch.zeros(len(batch), max(len(rows[i]) for i in batch), dtype=torch.long)
        keep = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            ids[row, : len(rows[i])] = torch.tensor(rows[i])
            keep[row, len(rows[i]) - scored[i] : len(rows[i])] = 1
        logits: Tensor = model(input_ids=ids.to(device), use_cache=False).logits[:, :-1]  # padding is to the right
        nll = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten().to(device), reduction="none")
        sums = (-nll.cpu().view(len(batch), -1).double() * keep[:, 1:]).sum(1).tolist()
        for i, total in zip(batch, sums, strict=True):
            result[i] = total
    return result


def bits_per_byte(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], length: int = 1024
) -> float:
    """Mean bits the model needs for a byte of UTF-8 text, in windows of ``length`` tokens that share no context."""
    rows = []
    for _, text in documents:
        ids = [tokenizer.bos_token_id, *_ids(tokenizer, text)]
        rows += [ids[start : start + length] for start in range(0, len(ids) - 1, length - 1)]
    nats = -sum(log_likelihoods(model, rows, [len(row) - 1 for row in rows]))
    return nats / math.log(2) / sum(len(text.encode()) for _, text in documents)


def unigram_bits_per_byte(
    tokenizer: PreTrainedTokenizerBase, counted: Sequence[Document], documents: Sequence[Document]
) -> float:
    """Bits per byte of ``documents`` under the token frequencies of ``counted``, every token counted once more."""
    counts = Counter(token for _, text in counted for token in _ids(tokenizer, text))
    total = sum(counts.values()) + len(tokenizer)
    needed = Counter(token for _, text in documents for token in _ids(tokenizer, text))
    bits = sum(n * -math.log2((counts[token] + 1) / total) for token, n in needed.items())
    return bits / sum(len(text.encode()) for _, text in documents)


def accuracy(model: nn.Module, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> float:
    """Share of questions whose true continuation is the most likely one, as lm-eval's ``acc`` of the same task."""
    rows, scored = [], []
    for question in questions:
        context = len(_ids(tokenizer, question.context))
        for choice in question.choices:
            rows.append(_ids(tokenizer, question.context + choice))
            scored.append(len(rows[-1]) - context)
    scores = torch.tensor(log_likelihoods(model, rows, scored)).view(len(questions), -1)
    answers = torch.tensor([question.answer for question in questions])
    return (scores.argmax(1) == answers).float().mean().item()


@torch.inference_mode()
def exact_match(model: nn.Module, tokenizer: PreTrainedTokenizerBase, lookups: Sequence[Lookup]) -> float:
    """Share of lookups or needles whose answer is the most likely next token."""
    device = next(model.parameters()).device
    found = 0
    for lookup in lookups:
        ids = torch.tensor([_ids(tokenizer, lookup.prompt)], device=device)
        logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        found += [int(logits[0, -1].argmax())] == _ids(tokenizer, lookup.answer)
    return found / len(lookups)
