"""Instruction records in every usual format, a journal that survives kill -9, and losses of answers under any model."""

from .journal import Journal
from .records import BadRecord, Example, Record, Records, read
from .viewer import write_page
from .writing import write

__all__ = ["BadRecord", "Example", "Journal", "Record", "Records", "read", "write", "write_page"]
