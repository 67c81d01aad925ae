"""How good a model is at what it was trained for: each figure with its standard error."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from paper_tables.progress import progress

from .data import IGNORED, Row, collate, pad_id, padded

Figure = dict[str, float]


def evaluate(
    model: Any, tokenizer: Any, rows: Sequence[Row], kind: str, *, batch_size: int = 8, target_length: int = 64,
    min_target_length: int = 0, beams: int = 1, no_repeat_ngram_size: int = 0,
) -> dict[str, Figure]:  # fmt: skip
    """Figures by kind, shares in percent.

    classification: accuracy, f1 (of class 1) and mcc for two classes, loss; or, where labels are scores, pearson,
    spearman and loss (the mean square of the differences); clm, mlm: loss (nats a token), perplexity;
    qa: exact_match, f1; summarization: rouge1, rouge2, rougeL. The settings after `batch_size` are those of
    answers that are generated.
    """
    if kind in ("qa", "summarization"):
        how = {"max_new_tokens": target_length, "num_beams": beams, "no_repeat_ngram_size": no_repeat_ngram_size}
        how |= {"min_new_tokens": min_target_length} if min_target_length else {}
        texts = generated(model, tokenizer, rows, batch_size, how)
        return _answers(texts, rows) if kind == "qa" else _summaries(texts, rows)
    losses: list[float] = []  # sums over a row's tokens
    counts: list[int] = []
    predicted: list[Any] = []
    scores = kind == "classification" and model.config.num_labels == 1
    with progress("rows scored") as bar:
        for batch in batches(model, tokenizer, rows, kind, batch_size):
            logits = _logits(model, batch)
            labels = batch["labels"]
            if scores:
                predicted += logits.squeeze(-1).tolist()
                loss, count = (logits.squeeze(-1) - labels).square(), torch.ones_like(labels)
            elif kind == "classification":
                predicted += logits.argmax(-1).tolist()
                loss, count = (
                    torch.nn.functional.cross_entropy(logits, labels, reduction="none"),
                    torch.ones_like(labels),
                )
            else:
                loss, count = _token_losses(logits, labels, shift=kind == "clm")
            losses += loss.tolist()
            counts += count.tolist()
            bar(len(losses), len(rows))
    if scores:
        return {**_correlations(predicted, [r["labels"] for r in rows]), "loss": mean(losses)}
    if kind == "classification":
        return {**_classes(predicted, [r["labels"] for r in rows]), "loss": mean(losses)}
    return _language(losses, counts)


def mean(values: Sequence[float], scale: float = 1.0) -> Figure:
    """Mean and its standard error."""
    value = sum(values) / len(values)
    spread = sum((v - value) ** 2 for v in values) / max(1, len(values) - 1)
    return {"value": scale * value, "se": scale * math.sqrt(spread / len(values))}


def batches(model: Any, tokenizer: Any, rows: Sequence[Row], kind: str, size: int) -> Iterator[dict[str, Tensor]]:
    """Rows as `collate` joins them, `size` at a time, where the model is."""
    generator = torch.Generator().manual_seed(0)  # the same tokens are masked for every model
    for start in range(0, len(rows), size):
        batch = collate(rows[start : start + size], kind, tokenizer, generator)
        yield {name: tensor.to(model.device) for name, tensor in batch.items()}


@torch.no_grad()
def _logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    given = {name: tensor for name, tensor in batch.items() if name != "labels" and _takes(model, name)}
    logits: Tensor = model(**given).logits.float()
    return logits


def _takes(model: Any, name: str) -> bool:
    from .classes import is_merged

    return name != "task_ids" or is_merged(model)


def _token_losses(logits: Tensor, labels: Tensor, shift: bool) -> tuple[Tensor, Tensor]:
    """Sum of each row's losses [B], and how many tokens were scored [B]."""
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits.mT, labels, ignore_index=IGNORED, reduction="none")
    return loss.sum(1), (labels != IGNORED).sum(1)


def _language(losses: Sequence[float], counts: Sequence[int]) -> dict[str, Figure]:
    """Loss per token as a ratio estimator over rows; perplexity by the delta method."""
    total = sum(counts)
    loss = sum(losses) / max(1, total)
    n = len(losses)
    squares = sum((a - loss * c) ** 2 for a, c in zip(losses, counts))
    se = math.sqrt(squares * n / max(1, n - 1)) / max(1, total)
    perplexity = math.exp(loss)
    return {"loss": {"value": loss, "se": se}, "perplexity": {"value": perplexity, "se": perplexity * se}}


def _classes(predicted: Sequence[int], labels: Sequence[int]) -> dict[str, Figure]:
    found = {"accuracy": mean([float(p == t) for p, t in zip(predicted, labels)], 100)}
    if set(labels) | set(predicted) <= {0, 1}:
        tally = Counter(zip(predicted, labels))
        tp, fp, fn, tn = tally[1, 1], tally[1, 0], tally[0, 1], tally[0, 0]
        product = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        found["f1"] = {"value": 100 * 2 * tp / max(1, 2 * tp + fp + fn)}
        found["mcc"] = {"value": 100 * (tp * tn - fp * fn) / product if product else 0.0}
    return found


def _correlations(predicted: Sequence[float], labels: Sequence[float]) -> dict[str, Figure]:
    """Pearson's and Spearman's, times 100; 0 where one side is constant."""
    return {
        "pearson": {"value": 100 * _pearson(predicted, labels)},
        "spearman": {"value": 100 * _pearson(_ranks(predicted), _ranks(labels))},
    }


def _pearson(a: Sequence[float], b: Sequence[float]) -> float:
    x, y = (torch.tensor(v, dtype=torch.float64) for v in (a, b))
    x, y = x - x.mean(), y - y.mean()
    size = float(x.norm() * y.norm())
    return float(x @ y) / size if size else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    """Place of each value in order; equal ones share the mean of their places."""
    ordered = sorted(values)
    count = Counter(ordered)
    first = {v: i for i, v in reversed(list(enumerate(ordered)))}
    return [first[v] + (count[v] - 1) / 2 for v in values]


@torch.no_grad()
def generated(model: Any, tokenizer: Any, rows: Sequence[Row], batch_size: int, how: dict[str, Any]) -> list[str]:
    """The model's answer to each row's prompt; `how` goes to `generate`."""
    from .context import with_options

    decoder_only = not model.config.is_encoder_decoder
    pad = pad_id(tokenizer)
    texts: list[str] = []
    with progress("answers generated") as bar:
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            prompts = [r["prompt"] for r in part]
            ids = padded(prompts, pad, left=decoder_only)
            mask = padded([[1] * len(p) for p in prompts], 0, left=decoder_only)
            tasks = torch.tensor([r["task_ids"] for r in part]) if "task_ids" in part[0] else None
            with with_options(task_ids=tasks):
                out = model.generate(
                    input_ids=ids.to(model.device), attention_mask=mask.to(model.device), do_sample=False,
                    pad_token_id=pad, **how,
                )  # fmt: skip
            own = out[:, ids.shape[1] :] if decoder_only else out
            texts += tokenizer.batch_decode(own, skip_special_tokens=True)
            bar(len(texts), len(rows))
    return texts


def words(text: str) -> list[str]:
    """A text's words as SQuAD compares them: lower case, without punctuation and articles."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def overlap(a: Sequence[Any], b: Sequence[Any]) -> float:
    """F1 of two bags."""
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b)) if common else float(not a and not b)


def _answers(texts: Sequence[str], rows: Sequence[Row]) -> dict[str, Figure]:
    exact = [float(any(words(t) == words(a) for a in r["answers"])) for t, r in zip(texts, rows)]
    f1 = [max(overlap(words(t), words(a)) for a in r["answers"]) for t, r in zip(texts, rows)]
    return {"exact_match": mean(exact, 100), "f1": mean(f1, 100)}


def rouge(text: str, reference: str) -> dict[str, float]:
    """F1 of single words, of pairs of words, and of the longest common subsequence (Lin 2004; no stemming)."""
    a, b = (re.findall(r"[a-z0-9]+", t.lower()) for t in (text, reference))
    longest = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            longest[i + 1][j + 1] = longest[i][j] + 1 if x == y else max(longest[i][j + 1], longest[i + 1][j])
    pairs = (list(pairwise(t)) for t in (a, b))
    return {
        "rouge1": overlap(a, b), "rouge2": overlap(*pairs),
        "rougeL": 2 * longest[-1][-1] / (len(a) + len(b)) if a or b else 1.0,
    }  # fmt: skip


def _summaries(texts: Sequence[str], rows: Sequence[Row]) -> dict[str, Figure]:
    found = [rouge(t, r["answers"][0]) for t, r in zip(texts, rows)]
    return {name: mean([f[name] for f in found], 100) for name in ("rouge1", "rouge2", "rougeL")}
