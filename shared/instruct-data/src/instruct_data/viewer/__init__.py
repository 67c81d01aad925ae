"""A result as one HTML page that opens from a file: histogram, sort, filter, search, record detail, word diff."""

from .page import write_page

__all__ = ["write_page"]
