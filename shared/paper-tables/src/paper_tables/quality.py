"""How good and how large is a model, as all `eval` commands say it: text, lm-eval tasks, parameters, cache bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import TableError

Figure = dict[str, float]


def excerpts(source: str, documents: int | None = None, characters: int | None = None) -> Iterator[str]:
    """The first `documents` documents of a text source, each cut after `characters`: a small held-out set."""
    from model_hooks.text import read_documents

    for number, text in enumerate(read_documents(source)):
        if number == documents:
            return
        yield text[:characters]


def language(
    model: Any, tokenizer: Any, texts: Iterable[str], *, length: int | None = None, batch_size: int = 8
) -> dict[str, Figure]:
    """`bits_per_byte` and `perplexity` of `model` on `texts`, with their standard errors."""
    from . import metrics
    from .progress import progress

    with progress("tokens scored") as bar:
        found = metrics.language_score(
            model, tokenizer, texts, length=length, batch_size=batch_size, progress=lambda done: bar(done)
        )
    return {"bits_per_byte": found.bits_per_byte, "perplexity": found.perplexity}


def accuracies(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 8,
    wrapper: Callable[..., Any] | None = None,
) -> dict[str, Figure]:
    """Main figure of each lm-eval task as {"value", "se"}: accuracy, or the first metric that the task has.

    Tasks that begin with `zoo_` are the zoo's, built offline; `folder` holds task files of the user's own.
    `wrapper`: as of `metrics.lm_eval_tasks`.
    """
    from model_hooks import zoo

    from . import metrics

    ours = [task for task in tasks if task.startswith("zoo_")]
    others = [task for task in tasks if task not in ours]
    found: dict[str, dict[str, Figure]] = {}
    for names, where in ((ours, zoo.tasks_dir()), (others, folder)):
        if names:
            found |= metrics.lm_eval_tasks(
                model, tokenizer, names, folder=where, limit=limit, shots=shots, batch_size=batch_size, wrapper=wrapper
            )
    return {task: _main_figure(task, found[task]) for task in tasks}


def _main_figure(task: str, metrics: dict[str, Figure]) -> Figure:
    for name in ("acc", "exact_match"):
        if name in metrics:
            return metrics[name]
    if not metrics:
        raise TableError(f"lm-eval gave no figure for task {task!r}")
    return next(iter(metrics.values()))


def size(model: Any, context: int = 64) -> dict[str, int]:
    """`parameters`, and the `kv_bytes` that a forward over `context` tokens (batch 1) leaves in the cache."""
    import torch

    from . import metrics

    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(context) * 7 + 3).remainder(vocabulary).unsqueeze(0)
    return {"parameters": metrics.parameters(model), "kv_bytes": metrics.kv_bytes(model, ids)}


def figures(
    model: Any,
    tokenizer: Any,
    *,
    data: str = "",
    documents: int | None = None,
    characters: int | None = None,
    tasks: Sequence[str] = (),
    folder: Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 8,
) -> dict[str, Figure]:
    """What an `eval` command tells of a model: text where `data` is named, lm-eval `tasks`, parameters, cache bytes."""
    texts = excerpts(data, documents, characters)
    found = language(model, tokenizer, texts, batch_size=batch_size) if data else {}
    if tasks:
        found |= accuracies(
            model, tokenizer, tasks, folder=folder, limit=limit, shots=shots, batch_size=batch_size
        )  # fmt: skip
    return found | {key: {"value": float(value)} for key, value in size(model).items()}


def compare(columns: Mapping[str, Mapping[str, Figure]]) -> list[dict[str, Any]]:
    """A row for each figure of "model", beside that of "baseline" and their ratio where that is given."""
    return [_row(key, columns) for key in columns["model"]]


def _row(key: str, columns: Mapping[str, Mapping[str, Figure]]) -> dict[str, Any]:
    row: dict[str, Any] = {"figure": key}
    for column, found in columns.items():
        row[column] = found[key]["value"]
        if "se" in found[key]:
            row[f"{column}_se"] = found[key]["se"]
    if row.get("baseline"):
        row["ratio"] = row["model"] / row["baseline"]
    return row
