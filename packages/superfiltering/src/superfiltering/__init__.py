"""Superfiltering (arXiv 2402.00530): a small language model selects the instruction data for a large one."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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

_LAZY = {  # public name: its module, imported when the name is first used, so that commands start fast
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
}


if not TYPE_CHECKING:  # mypy would take any name for one that exists

    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
