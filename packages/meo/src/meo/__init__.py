"""MEO: many experts merged into one matrix before it is used, at the price of one (arXiv 2310.09832).

model = convert(model, experts=8, k=4)        # each feed-forward linear becomes a bank; the same function at first
... train it (`meo train`, or any loop with `gating`)
save(model, "folder"); model, tokenizer = load("folder")
bake(model, "sst2")                           # a task-level model as a plain dense one of its stock class
"""

from typing import TYPE_CHECKING, Any

from model_hooks.lazy import lazy_names
from model_hooks.registration import add_family

if TYPE_CHECKING:
    from .balancing import move_biases
    from .bank import MergedLinear
    from .checkpoint import load, save
    from .config import MeoConfig
    from .context import gating
    from .converting import convert
    from .deploy import bake
    from .pretrained import merge_pretrained

__all__ = ["MeoConfig", "MergedLinear", "bake", "convert", "gating", "load", "merge_pretrained", "move_biases", "save"]

if not TYPE_CHECKING:  # mypy would take any name for one that exists
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "MeoConfig": "config",
            "MergedLinear": "bank",
            "bake": "deploy",
            "convert": "converting",
            "gating": "context",
            "load": "checkpoint",
            "merge_pretrained": "pretrained",
            "move_biases": "balancing",
            "save": "checkpoint",
        },
    )


def _make(base_model_type: str) -> Any:
    from .classes import make_classes

    return make_classes(base_model_type)


add_family("meo_", _make)
