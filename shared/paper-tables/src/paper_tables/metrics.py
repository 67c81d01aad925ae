"""What tables measure: language modelling, tasks, and what a model costs. Each figure with its standard error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import TableError, nearest
from .frame import require


@dataclass(frozen=True)
class LanguageScore:
    """Language modelling over some text. `loss` is in nats per token; the errors are standard errors over windows."""

    loss: float
    loss_se: float
    tokens: int
    bytes: int
    windows: int

    @property
    def perplexity(self) -> dict[str, float]:
        """exp(loss); its error by the delta method."""
        value = math.exp(self.loss)
        return {"value": value, "se": value * self.loss_se}

    @property
    def bits_per_byte(self) -> dict[str, float]:
        """loss * tokens / bytes / ln 2: comparable between tokenizers. Its error takes tokens per byte as known."""
        scale = self.tokens / self.bytes / math.log(2)
        return {"value": self.loss * scale, "se": self.loss_se * scale}


@dataclass
class _Sums:
    """Sums over windows, in Python floats (float64): all that is kept of the text."""

    windows: int = 0
    loss: float = 0.0
    tokens: float = 0.0
    loss_loss: float = 0.0
    loss_tokens: float = 0.0
    tokens_tokens: float = 0.0

    def add(self, losses: Tensor, counts: Tensor) -> None:
        for loss, count in zip(losses.tolist(), counts.tolist(), strict=True):
            self.windows += 1
            self.loss += loss
            self.tokens += count
            self.loss_loss += loss * loss
            self.loss_tokens += loss * count
            self.tokens_tokens += count * count

    def error(self) -> float:
        """Standard error of loss / tokens as a ratio estimator over windows."""
        if self.windows < 2:
            return 0.0
        ratio = self.loss / self.tokens
        squares = self.loss_loss - 2 * ratio * self.loss_tokens + ratio * ratio * self.tokens_tokens
        return math.sqrt(max(squares, 0.0) * self.windows / (self.windows - 1)) / self.tokens


def language_score(
    model: Any,
    tokenizer: Any,
    documents: Iterable[str],
    *,
    length: int | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    progress: Callable[[int], Any] | None = None,
) -> LanguageScore:
    """Perplexity and bits per byte of `model` on `documents` (the first `limit` of them), in one streaming pass.

    Documents are tokenized one by one without special tokens and joined by the separator (EOS, else BOS); the stream
    begins with BOS (else EOS). It is cut into windows of `length` tokens (default: the model's context, at most 1,024)
    that overlap by one: a window's first token is context alone, having been predicted as the last of the window
    before. So every token of every document is predicted exactly once, and the bytes are exactly the documents' own.
    Separators are context, their prediction is not counted. With a tokenizer that has neither BOS nor EOS, the first
    token (as many as make a character) is context alone: neither its prediction nor its bytes are counted.
    Memory does not grow with the number of documents. Raises `TableError` where there is no text.
    `progress` is called with the number of tokens done.
    """
    context = _context_length(model)
    length = min(context, 1024) if length is None else length
    if not 2 <= length <= context:
        raise TableError(f"window length {length} is not within 2 and the model's context of {context} tokens")
    sums, text = _Sums(), _Text(tokenizer, documents, limit)
    for batch, real in _batches(_windows(text.stream(), length), batch_size):
        losses = _losses(model, batch) * real[:, 1:]
        sums.add(losses.sum(1, dtype=torch.float64), real[:, 1:].sum(1))
        if progress is not None:
            progress(int(sums.tokens))
    if not sums.tokens:
        raise TableError(f"no text to score: {text.documents} documents, {text.bytes} bytes")
    return LanguageScore(sums.loss / sums.tokens, sums.error(), int(sums.tokens), text.bytes, sums.windows)


def perplexity(model: Any, tokenizer: Any, documents: Iterable[str], **options: Any) -> dict[str, float]:
    """Perplexity as a table's cell, {"value", "se"}; arguments as of `language_score`."""
    return language_score(model, tokenizer, documents, **options).perplexity


def bits_per_byte(model: Any, tokenizer: Any, documents: Iterable[str], **options: Any) -> dict[str, float]:
    """Bits per byte as a table's cell, {"value", "se"}; arguments as of `language_score`."""
    return language_score(model, tokenizer, documents, **options).bits_per_byte


class _Text:
    """The documents as a stream of (token, does its prediction count), and the bytes that count."""

    def __init__(self, tokenizer: Any, documents: Iterable[str], limit: int | None) -> None:
        self.tokenizer, self.source, self.limit = tokenizer, documents, limit
        self.documents = self.bytes = 0

    def stream(self) -> Iterator[tuple[int, bool]]:
        eos, bos = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        first, between = (eos if bos is None else bos), (bos if eos is None else eos)
        if first is not None:
            yield first, False
        for text in self.source:
            if self.limit is not None and self.documents >= self.limit:
                return
            if self.documents and between is not None:
                yield between, False
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            self.bytes += len(text.encode("utf-8", "surrogatepass"))
            self.documents += 1
            context = 0
            if first is None and ids:
                first = ids[0]
                context = self._begin(text, ids)
            for place, token in enumerate(ids):
                yield token, place >= context

    def _begin(self, text: str, ids: list[int]) -> int:
        """How many tokens make the first character or more of `text`; their bytes are taken off the count."""
        for count in range(1, min(len(ids), 4) + 1):  # a character has four bytes at most, so as many tokens
            begun = self.tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False)
            if begun and text.startswith(begun):
                self.bytes -= len(begun.encode())
                return count
        return 1


Window = tuple[list[int], list[bool]]


def _windows(stream: Iterator[tuple[int, bool]], length: int) -> Iterator[Window]:
    """Windows of `length` tokens, each beginning with the last token of the one before; the last may be shorter."""
    ids: list[int] = []
    counts: list[bool] = []
    for token, counted in stream:
        ids.append(token)
        counts.append(counted)
        if len(ids) == length:
            yield ids, counts
            ids, counts = ids[-1:], [False]
    if len(ids) > 1:
        yield ids, counts


def _batches(windows: Iterator[Window], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of equally long windows, so that nothing is padded: ids [B, T] and which tokens count [B, T]."""
    batch: list[Window] = []
    for window in windows:
        if batch and (len(batch) == size or len(batch[0][0]) != len(window[0])):
            yield _stack(batch)
            batch = []
        batch.append(window)
    if batch:
        yield _stack(batch)


def _stack(batch: Sequence[Window]) -> tuple[Tensor, Tensor]:
    return torch.tensor([ids for ids, _ in batch]), torch.tensor([counts for _, counts in batch])


@torch.no_grad()
def _losses(model: Any, ids: Tensor) -> Tensor:
    """Loss of each token after the first, in nats, float32 on the CPU: [B, T] -> [B, T - 1]."""
    ids = ids.to(model.device)
    logits = model(input_ids=ids, use_cache=False).logits
    parts = [  # row by row: the float32 copy of all logits at once would be the largest tensor of all
        torch.nn.functional.cross_entropy(row[:-1].float(), target[1:], reduction="none")
        for row, target in zip(logits, ids, strict=True)
    ]
    return torch.stack(parts).cpu()


def _context_length(model: Any) -> int:
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    found = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return int(found) if found else 1 << 30


@lru_cache(maxsize=4)
def _task_manager(folder: str | None) -> Any:
    from lm_eval.tasks import TaskManager

    if folder is None:
        return TaskManager()
    return TaskManager(include_path=folder, include_defaults=False)  # no walk over lm-eval's thousands of files


def lm_eval_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    folder: str | Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    wrapper: Callable[..., Any] | None = None,
) -> dict[str, dict[str, dict[str, float]]]:
    """Run lm-eval `tasks` on a loaded model: task -> metric -> {"value", "se"?}, metrics by lm-eval's names ("acc").

    `folder`: a folder of task YAML files to take the tasks from, offline (`model_hooks.zoo`'s, for example); without
    it, they are lm-eval's own. `limit`: documents per task; `shots`: overrides the tasks' own. `wrapper`: makes the
    lm-eval model, with the arguments of HFLM, which it is without. The members of a group or tag are among the results
    under their own names. Standard errors are lm-eval's. Raises `TableError` for unknown tasks, `MissingExtra` without
    lm-eval.
    """
    require("lm_eval", extra="eval", package="paper-tables")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    manager = _task_manager(None if folder is None else str(folder))
    if not tasks:
        raise TableError("no lm-eval task was named; name one or more, such as 'hellaswag'")
    for task in tasks:
        if task not in manager.all_tasks:
            raise TableError(f"no lm-eval task {task!r}{nearest(task, manager.all_tasks)}")
    with _quiet():
        found = simple_evaluate(
            model=(wrapper or HFLM)(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks), limit=limit,
            num_fewshot=shots, task_manager=manager, random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed,
            fewshot_random_seed=seed, log_samples=False, bootstrap_iters=200, verbosity="ERROR",
        )  # fmt: skip
    return {str(task): _metrics(metrics) for task, metrics in found["results"].items()}


def _metrics(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """lm-eval's `acc,none` and `acc_stderr,none` as {"acc": {"value", "se"}}; of several filters the first counts."""
    metrics: dict[str, dict[str, float]] = {}
    for key, value in found.items():
        name, _, filtered = key.partition(",")
        if not filtered or name.endswith("_stderr") or name in metrics or not isinstance(value, (int, float)):
            continue
        error = found.get(f"{name}_stderr,{filtered}")
        known = isinstance(error, (int, float)) and math.isfinite(error)
        metrics[name] = {"value": float(value), **({"se": float(error)} if known and error is not None else {})}
    return metrics


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval without its bars and notes, and without its survey of the machine (seconds, and git's complaints)."""
    import logging

    import tqdm
    from lm_eval import evaluator

    logger = logging.getLogger("lm_eval")
    level, original = logger.level, tqdm.tqdm.__init__

    def silent(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "disable": True})

    survey = (evaluator.get_git_commit_hash, evaluator.add_env_info)
    logger.setLevel(logging.ERROR)
    tqdm.tqdm.__init__ = silent
    evaluator.get_git_commit_hash, evaluator.add_env_info = (lambda: None), (lambda results: None)
    try:
        yield
    finally:
        evaluator.get_git_commit_hash, evaluator.add_env_info = survey
        logger.setLevel(level)
        tqdm.tqdm.__init__ = original


def parameters(model: Any) -> int:
    """Number of parameters; shared ones (tied embeddings) once."""
    return sum(p.numel() for p in model.parameters())


def kv_bytes(model: Any, ids: Tensor) -> int:
    """Bytes of keys and values that a forward over `ids` [batch, T] leaves in the model's own cache."""
    from model_hooks.kv import kv_bytes as cache_bytes

    with torch.no_grad():
        out = model(input_ids=ids.to(model.device), use_cache=True, logits_to_keep=1)
    return int(cache_bytes(out.past_key_values))


def flops(model: Any, ids: Tensor) -> int:
    """Floating-point operations of one forward over `ids` [batch, T], by torch's counter (a multiply-add is two).

    Matrix products and attention are counted, elementwise work is not. Attention runs in its plain form here, so that
    it is counted on every device, and in full: the half that a causal mask hides counts too.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(input_ids=ids.to(model.device), use_cache=False)
    return int(counter.get_total_flops())
