"""Towards Efficient Mixture of Experts: slim and trim any mixture-of-experts model, by budget (arXiv 2406.02500).

scores = score(model, sequences)                          # one pass for all ways to trim
apply(model, select_experts(scores, keep=6))              # in place: an ordinary model with fewer experts
slim("folder", "slimmed", sequences, Slimming("gptq"))    # prune or quantise, one layer in memory at a time
"""

from typing import TYPE_CHECKING

from model_hooks.lazy import lazy_names

if TYPE_CHECKING:
    from .scores import Scores, score
    from .selection import Plan, select_blocks, select_experts, select_layers
    from .trimming import apply, repair_routers

__all__ = [
    "Plan",
    "Scores",
    "apply",
    "repair_routers",
    "score",
    "select_blocks",
    "select_experts",
    "select_layers",
]

if not TYPE_CHECKING:  # mypy would take any name for one that exists
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "Plan": "selection",
            "Scores": "scores",
            "apply": "trimming",
            "repair_routers": "trimming",
            "score": "scores",
            "select_blocks": "selection",
            "select_experts": "selection",
            "select_layers": "selection",
        },
    )
