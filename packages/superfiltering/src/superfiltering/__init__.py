"""Superfiltering (arXiv 2402.00530): a small language model selects the instruction data for a large one."""

from .api import superfilter
from .compare import compare
from .facility import coverage, facility_location
from .scores import read_scores, score_records
from .select import aggregate, original_selection, select
from .stats import stats

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
