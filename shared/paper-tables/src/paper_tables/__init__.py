"""A paper's tables as data: run their cells, check their claims, report them beside the paper's figures."""

from .errors import MissingExtra, TableError, WorkFailed
from .paper import Context, Paper, installed, tables_folder
from .progress import Bar, progress, track
from .quantity import Quantity
from .table import Table, read_table

__all__ = [
    "Bar",
    "Context",
    "MissingExtra",
    "Paper",
    "Quantity",
    "Table",
    "TableError",
    "WorkFailed",
    "installed",
    "progress",
    "read_table",
    "tables_folder",
    "track",
]
