"""Progress bars on stderr: one display, to which the runner and the work below it add their bars."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class Bar:
    """One bar. `advance(n)` moves it; `bar(done, total)` sets it, so that a bar can be passed as a callback."""

    def __init__(self, display: Any = None, task: Any = None) -> None:
        self._display, self._task = display, task

    def _update(self, **changes: Any) -> None:
        if self._display is not None:
            self._display.update(self._task, **changes)

    def advance(self, steps: float = 1) -> None:
        self._update(advance=steps)

    def describe(self, text: str) -> None:
        self._update(description=text)

    def __call__(self, done: float, total: float | None = None) -> None:
        self._update(completed=done, **({} if total is None else {"total": total}))


class _State:
    quiet = False
    display: Any = None
    open = 0


_state = _State()


def set_quiet(quiet: bool) -> None:
    """Show no bars from now on (or show them again)."""
    _state.quiet = quiet


@contextmanager
def progress(description: str, total: float | None = None) -> Iterator[Bar]:
    """A bar with an estimate of the time left, on stderr; nothing where that is no terminal or `--quiet` was given."""
    if _state.quiet or not sys.stderr.isatty():
        yield Bar()
        return
    if _state.display is None:
        _state.display = _new_display()
        _state.display.start()
    display = _state.display
    task = display.add_task(description, total=total)
    _state.open += 1
    try:
        yield Bar(display, task)
    finally:
        _state.open -= 1
        display.remove_task(task)
        if _state.open == 0:
            display.stop()
            _state.display = None


def track(items: Iterable[T], description: str, total: float | None = None) -> Iterator[T]:
    """`items`, with a bar that moves as they are taken."""
    known = len(items) if total is None and isinstance(items, Sized) else total
    with progress(description, known) as bar:
        for item in items:
            yield item
            bar.advance()


def _new_display() -> Any:
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"), bars.BarColumn(bar_width=30), bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(), bars.TextColumn("left"), bars.TimeRemainingColumn(),
    )  # fmt: skip
    return bars.Progress(*columns, console=Console(stderr=True), transient=True)
