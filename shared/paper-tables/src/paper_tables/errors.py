"""What a user can get wrong, said in one line."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class TableError(ValueError):
    """The request or a table file is wrong. The command line shows it as one line and exits with 2."""

    exit_code = 2


class MissingExtra(ImportError):
    """An optional dependency is not installed."""

    exit_code = 2


class WorkFailed(RuntimeError):
    """The work was begun and failed; `result`, if any, is what there is to show of it. Exit code 1."""

    exit_code = 1

    def __init__(self, message: str, result: dict[str, object] | None = None) -> None:
        super().__init__(message)
        self.result = result


def nearest(name: object, known: Iterable[object]) -> str:
    """`; did you mean 'x'?` for the known name nearest to `name`, or the list of them all where none is near."""
    names = sorted({str(k) for k in known})
    close = get_close_matches(str(name), names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"; known: {shown}" if names else ""


def one_line(error: BaseException) -> str:
    """An exception as one line: its type, unless the message stands by itself, and the message's first line."""
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if getattr(error, "exit_code", None) == 2 and message:
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
