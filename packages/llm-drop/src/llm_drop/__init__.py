"""LLM-Drop: remove the attention layers, MLPs or blocks that a model uses least (arXiv 2406.15786).

scores = score(model, sequences)                     # one pass; every selection can be made from it
plan = select(scores, attention=8)                   # or mlp=, blocks=, joint=; plan_for_budget for budgets
apply(model, plan)                                   # in place; generate, save, Trainer and PEFT go on working
"""

from .budget import plan_for_budget
from .export import export
from .plan import Plan
from .repair import apply
from .score import Scores, score
from .select import select, select_iteratively
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
