"""ReAlign (arXiv 2402.12219): answers of instruction data, rewritten into the form that their kind of task asks for.

taxonomy = load_taxonomy()                           # 46 tasks, their forms; or a YAML file of your own
LinearClassifier.load().predict("Is it true that ...?")       # ("fact_verification", 0.5)
refuse(Change(question, original, rewritten), PRESETS["alpaca"])      # why a rewritten answer is not used, or None
"""

from typing import TYPE_CHECKING

from model_hooks.lazy import lazy_names

if TYPE_CHECKING:
    from .filters import FILTERS, PRESETS, Change, refuse
    from .linear import LinearClassifier
    from .retrieval import Corpus
    from .rewriting import Outcome, Recipe, Rewriter
    from .taxonomy import load_taxonomy

__all__ = [
    "FILTERS", "PRESETS", "Change", "Corpus", "LinearClassifier", "Outcome", "Recipe", "Rewriter", "load_taxonomy",
    "refuse",
]  # fmt: skip

if not TYPE_CHECKING:  # mypy would take any name for one that exists
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "FILTERS": "filters",
            "PRESETS": "filters",
            "Change": "filters",
            "Corpus": "retrieval",
            "LinearClassifier": "linear",
            "Outcome": "rewriting",
            "Recipe": "rewriting",
            "Rewriter": "rewriting",
            "load_taxonomy": "taxonomy",
            "refuse": "filters",
        },
    )
