"""Measures of a vision-language model on examples: exact answers, perplexity, VQA accuracy, CIDEr, retrieval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model_hooks.errors import RequestError
from paper_tables.errors import nearest
from ressa import scores
from ressa.data import Example
from ressa.encoding import IGNORED, Encoder, collate, encode_all

METRICS = ("exact", "perplexity", "vqa", "cider", "recall")
TAUGHT = ("exact", "perplexity")  # by one forward pass that is told the answer
CUTOFFS = (1, 5)  # of recall


def evaluate(
    model: Any,
    encoder: Encoder,
    examples: Sequence[Example],
    metrics: Sequence[str] = TAUGHT,
    *,
    batch_size: int = 32,
    new_tokens: int = 32,
    rows: Sequence[dict[str, Tensor]] | None = None,
) -> dict[str, Any]:
    """metric -> {"value", "se", "n"}; of `exact` by kind of question too, where examples have one.

    exact: share of whole answers right under teacher forcing, which equals greedy decoding. perplexity: of the answers'
    tokens. vqa, cider: of greedy answers. recall: recall@1 and @5 of the right answer among all, by its likelihood.
    rows: the examples encoded already.

    Raises `RequestError` for another metric.
    """
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise RequestError(f"metric {unknown[0] if unknown else ''!r} is not accepted{nearest(str(unknown), METRICS)}")
    found: dict[str, Any] = {}
    if set(metrics) & set(TAUGHT):
        rows = encode_all(encoder, examples) if rows is None else rows
        right, nats, tokens = taught(model, rows, encoder, batch_size)
        if "exact" in metrics:
            found["exact"] = scores.mean_and_error(right)
            for kind in sorted({one.kind for one in examples} - {""}):
                own = [value for value, one in zip(right, examples, strict=True) if one.kind == kind]
                found[f"exact, {kind}"] = scores.mean_and_error(own)
        if "perplexity" in metrics:
            found["perplexity"] = _perplexity(nats, tokens)
    if set(metrics) & {"vqa", "cider"}:
        said = generate(model, encoder, examples, batch_size, new_tokens)
        if "vqa" in metrics:
            each = [scores.vqa_accuracy(a, one.answers) for a, one in zip(said, examples, strict=True)]
            found["vqa"] = scores.mean_and_error(each)
        if "cider" in metrics:
            found["cider"] = scores.mean_and_error(scores.cider(said, [one.answers for one in examples]))
    if "recall" in metrics:
        found |= retrieval(model, encoder, examples, batch_size)
    return found


def _perplexity(nats: list[float], tokens: list[int]) -> dict[str, float]:
    """With the error of the mean of examples, by the delta method."""
    mean = sum(nats) / sum(tokens)
    spread = [n - mean * t for n, t in zip(nats, tokens, strict=True)]
    error = math.sqrt(sum(s * s for s in spread)) / sum(tokens)
    return {"value": math.exp(mean), "se": math.exp(mean) * error, "n": len(nats)}


@torch.inference_mode()
def taught(
    model: Any, rows: Sequence[dict[str, Tensor]], encoder: Encoder, batch_size: int
) -> tuple[list[float], list[float], list[int]]:
    """Of each row: 1 if its whole answer is the most likely one else 0, the answer's nats, and its tokens."""
    right: list[float] = []
    nats: list[float] = []
    tokens: list[int] = []
    for start in range(0, len(rows), batch_size):
        batch = _on(model, collate(rows[start : start + batch_size], encoder.pad))
        if encoder.encoder_decoder:
            labels = batch["labels"]
            logits = model(**batch, use_cache=False).logits
        else:
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch, use_cache=False).logits[:, :-1]
        counted = labels != IGNORED
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none").view_as(labels)
        right += ((logits.argmax(-1) == labels) | ~counted).all(1).float().tolist()
        nats += (loss.double() * counted).sum(1).tolist()
        tokens += counted.sum(1).tolist()
    return right, nats, tokens


def _on(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch on the model's device, what is no index in the model's dtype."""
    device, dtype = model.device, model.dtype
    return {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in batch.items()}


@torch.inference_mode()
def generate(model: Any, encoder: Encoder, examples: Sequence[Example], batch_size: int, new_tokens: int) -> list[str]:
    """Greedy answers."""
    said: list[str] = []
    for start in range(0, len(examples), batch_size):
        rows = [encoder.prompt(one) for one in examples[start : start + batch_size]]
        batch = _on(model, collate(rows, encoder.pad, side="left"))
        out = model.generate(**batch, max_new_tokens=new_tokens, do_sample=False, pad_token_id=encoder.pad)
        width = batch["input_ids"].shape[1]
        repeated = out.shape[1] >= width and torch.equal(out[:, :width], batch["input_ids"])
        new = out[:, width:] if repeated else out  # encoder-decoders return only what is new
        said += [text.strip() for text in encoder.tokenizer.batch_decode(new, skip_special_tokens=True)]
    return said


def retrieval(model: Any, encoder: Encoder, examples: Sequence[Example], batch_size: int) -> dict[str, Any]:
    """recall@1 and recall@5: among all answers to an image's question, is its own the most likely, a token?

    Takes as many forward passes as the square of the examples; examples of another question are no candidates.
    """
    right: dict[int, list[float]] = {k: [] for k in CUTOFFS}
    for one in examples:
        same = [other for other in examples if other.messages[:-1] == one.messages[:-1]]
        answers = list(dict.fromkeys(other.answer for other in same))
        rows = encode_all(encoder, [one.answered(answer) for answer in answers])
        _, nats, tokens = taught(model, rows, encoder, batch_size)
        likely = [-n / t for n, t in zip(nats, tokens, strict=True)]
        for k in CUTOFFS:
            right[k].append(scores.recall_at(k, [likely], [answers.index(one.answer)]))
    return {f"recall@{k}": scores.mean_and_error(values) for k, values in right.items()}
