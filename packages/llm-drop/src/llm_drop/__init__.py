"""LLM-Drop: remove the attention layers, MLPs or blocks that a model uses least (arXiv 2406.15786).

scores = score(model, sequences)                     # one pass; every selection can be made from it
plan = select(scores, attention=8)                   # or mlp=, blocks=, joint=; plan_for_budget for budgets
apply(model, plan)                                   # in place; generate, save, Trainer and PEFT go on working
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .budget import plan_for_budget
    from .formats import export
    from .plan import Plan
    from .repair import apply
    from .scoring import Scores, score
    from .selection import select, select_iteratively
    from .speculative import draft_of

__all__ = [
    "Plan",
    "Scores",
    "apply",
    "draft_of",
    "export",
    "plan_for_budget",
    "score",
    "select",
    "select_iteratively",
]

_LAZY = {  # public name: its module, imported when the name is first used, so that commands start fast
    "Plan": "plan",
    "Scores": "scoring",
    "apply": "repair",
    "draft_of": "speculative",
    "export": "formats",
    "plan_for_budget": "budget",
    "score": "scoring",
    "select": "selection",
    "select_iteratively": "selection",
}


if not TYPE_CHECKING:  # mypy would take any name for one that exists

    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
