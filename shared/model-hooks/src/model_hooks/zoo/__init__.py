"""Tiny, really trained models with their text, tokenizer and tasks, all in the package: nothing needs a download.

    folder = zoo.resolve("zoo:llama")                       # a plain folder any Hugging Face tool takes
    documents = zoo.text("calibration")                     # [(module name, text)]
    records = zoo.pairs("calibration")                      # [(docstring, function source)]
    questions = zoo.questions("zoo_recall")                 # four choices each; lm-eval reads zoo.tasks_dir()
    lookups = zoo.lookups(tokens=1024, count=50)            # a table and a question of any length, for zoo:recall
    shapes.items("calibration", 128)                        # drawn images with questions, for zoo:llava (zoo.shapes)
    zoo.needle(tokens=1024, depth=0.5)                      # one pair hidden in held-out text

Each checkpoint's README.md, written by the script that exported it, states what it is and what it scored.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from model_hooks.zoo.corpus import pairs, text
from model_hooks.zoo.retrieval import Lookup, lookups, needle

if TYPE_CHECKING:
    from model_hooks.zoo.tasks import Question

PREFIX = "zoo:"
CHECKPOINTS = Path(__file__).parent / "checkpoints"

__all__ = ["Lookup", "lookups", "names", "needle", "pairs", "questions", "resolve", "tasks_dir", "text"]


def names() -> list[str]:
    """The models that are shipped, as ``zoo:NAME``."""
    return sorted(PREFIX + folder.parent.name for folder in CHECKPOINTS.glob("*/config.json"))


def resolve(name: str) -> Path:
    """The checkpoint folder of a name such as ``zoo:llama``; an unknown name is a ``ValueError``."""
    if name not in names():
        raise ValueError(f"unknown zoo model {name!r}; the zoo has {', '.join(names())}")
    return CHECKPOINTS / name.removeprefix(PREFIX)


def tasks_dir() -> Path:
    """The folder to give lm-eval as ``include_path``; it holds a YAML file for each of ``tasks.TASKS``."""
    return Path(__file__).parent / "tasks"


def questions(task: str, seed: int = 0) -> tuple[Question, ...]:
    """The 200 questions of a task: a context, four continuations and the index of the true one."""
    from model_hooks.zoo.tasks import questions as build

    return build(task, seed)
