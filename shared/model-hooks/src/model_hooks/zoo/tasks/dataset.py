"""The questions as ``datasets`` splits, for the YAML files beside this one (lm-eval's ``custom_dataset``)."""

from __future__ import annotations

from typing import Any

from model_hooks.zoo.tasks import questions


def _dataset(task: str, seed: int = 0) -> dict[str, Any]:
    from datasets import Dataset

    rows = [{"context": q.context, "choices": list(q.choices), "answer": q.answer} for q in questions(task, seed)]
    return {"test": Dataset.from_list(rows)}


def next_line(seed: int = 0, **_: Any) -> dict[str, Any]:
    return _dataset("zoo_next_line", seed)


def recall(seed: int = 0, **_: Any) -> dict[str, Any]:
    return _dataset("zoo_recall", seed)


def bracket(seed: int = 0, **_: Any) -> dict[str, Any]:
    return _dataset("zoo_bracket", seed)


def name(seed: int = 0, **_: Any) -> dict[str, Any]:
    return _dataset("zoo_name", seed)


def lookup(seed: int = 0, **_: Any) -> dict[str, Any]:
    return _dataset("zoo_lookup", seed)
