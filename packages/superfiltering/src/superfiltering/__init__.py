"""Superfiltering (arXiv 2402.00530): a small language model selects the instruction data for a large one."""

from typing import TYPE_CHECKING

from model_hooks.lazy import lazy_names

if TYPE_CHECKING:
    from .agreement import compare
    from .api import superfilter
    from .facility import coverage, facility_location
    from .scores import read_scores, score_records
    from .selection import aggregate, original_selection, select
    from .summary import stats

__all__ = [
    "aggregate",
    "compare",
    "coverage",
    "facility_location",
    "original_selection",
    "read_scores",
    "score_records",
    "select",
    "stats",
    "superfilter",
]

if not TYPE_CHECKING:  # mypy would take any name for one that exists
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "aggregate": "selection",
            "compare": "agreement",
            "coverage": "facility",
            "facility_location": "facility",
            "original_selection": "selection",
            "read_scores": "scores",
            "score_records": "scores",
            "select": "selection",
            "stats": "summary",
            "superfilter": "api",
        },
    )
