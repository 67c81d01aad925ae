"""Reflection-Tuning (arXiv 2310.11716) and Selective Reflection-Tuning (arXiv 2402.10110): a teacher rewrites
instruction data, and the student that will be trained on it accepts or refuses each change.

parse(reply, INSTRUCTION)                            # what a teacher's reply holds: all of it, or `ParseError`
PRESETS["v2-paper"].decide({"ori": ..., "Q": ...})   # which version of a record the student keeps
"""

from typing import TYPE_CHECKING

from model_hooks.lazy import lazy_names

if TYPE_CHECKING:
    from .parsing import INSTRUCTION, RESPONSE, parse
    from .policy import PRESETS, Ratios, Rule, SelectionPolicy, load_policy
    from .reflecting import Recipe, Reflector

__all__ = [
    "INSTRUCTION", "PRESETS", "RESPONSE", "Ratios", "Recipe", "Reflector", "Rule", "SelectionPolicy", "load_policy",
    "parse",
]  # fmt: skip

if not TYPE_CHECKING:  # mypy would take any name for one that exists
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "INSTRUCTION": "parsing",
            "PRESETS": "policy",
            "RESPONSE": "parsing",
            "Ratios": "policy",
            "Recipe": "reflecting",
            "Reflector": "reflecting",
            "Rule": "policy",
            "SelectionPolicy": "policy",
            "load_policy": "policy",
            "parse": "parsing",
        },
    )
