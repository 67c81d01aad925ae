"""RESSA: prune vision-language models and repair them without losing a zero (arXiv 2404.02424).

branches = find_branches(model)                                   # vision, connector, language
pruned = prune(model, branches, batches, Pruning("wanda", 0.5))   # in place; masks and a report
student = attach(model, pruned.masks, rank=16, alpha=16)          # a PeftModel whose update is masked
with dense(student): teacher = student(**inputs)                  # the dense model in the same weights
merged = merge(student)                                           # an ordinary model with exactly the pruned zeros
"""

from typing import TYPE_CHECKING

from model_hooks.lazy import lazy_names

if TYPE_CHECKING:
    from .adapters import attach, load_adapters
    from .branches import Branches, find_branches
    from .distill import Objective
    from .merging import merge
    from .pruning import Pruned, Pruning, prune
    from .teacher import dense

__all__ = [
    "Branches",
    "Objective",
    "Pruned",
    "Pruning",
    "attach",
    "dense",
    "find_branches",
    "load_adapters",
    "merge",
    "prune",
]

if not TYPE_CHECKING:  # mypy would take any name for one that exists
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "Branches": "branches",
            "Objective": "distill",
            "Pruned": "pruning",
            "Pruning": "pruning",
            "attach": "adapters",
            "dense": "teacher",
            "find_branches": "branches",
            "load_adapters": "adapters",
            "merge": "merging",
            "prune": "pruning",
        },
    )
