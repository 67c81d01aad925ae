"""LLM-Drop: remove the attention layers, MLPs or blocks that a model uses least (arXiv 2406.15786).

scores = score(model, sequences)                     # one pass; every selection can be made from it
plan = select(scores, attention=8)                   # or mlp=, blocks=, joint=; plan_for_budget for budgets
apply(model, plan)                                   # in place; generate, save, Trainer and PEFT go on working
"""

from typing import TYPE_CHECKING

from model_hooks.lazy import lazy_names

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

if not TYPE_CHECKING:  # mypy would take any name for one that exists
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "Plan": "plan",
            "Scores": "scoring",
            "apply": "repair",
            "draft_of": "speculative",
            "export": "formats",
            "plan_for_budget": "budget",
            "score": "scoring",
            "select": "selection",
            "select_iteratively": "selection",
        },
    )
