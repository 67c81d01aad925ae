"""A report in the terminal: a compact table with the paper's figure beside the measured one, and the verdicts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from .claims import HELD, NOT_HELD, NOT_MEASURED
from .report import LABELS, TableReport
from .table import Column

Cell = tuple[Column, str]  # a column and its source: `published` or a scale
COLOURS = {HELD: "green", NOT_HELD: "red", NOT_MEASURED: "dim"}
SIGNS = {HELD: "✓", NOT_HELD: "✗", NOT_MEASURED: "–"}


def print_report(console: Any, report: TableReport) -> None:
    """Print one table with its claims and notes."""
    from rich.markup import escape

    print_heading(console, report)
    console.print(f"[dim]{escape(report.table.source)}[/dim]")
    if not report.scales:
        console.print("[dim]nothing measured yet[/dim]\n")
        return
    columns = [(column, source) for column, sources in report.columns() for source in sources]
    groups = [columns]
    if not _fits(console, report, columns):
        groups = [_of_scale(report, scale) for scale in report.scales]
    for group in groups:
        for part in _parts(console, report, group):
            console.print(_grid(report, part))
    print_claims(console, report)
    for note in report.notes():
        console.print(f"[dim]{escape(note)}[/dim]", style="red" if " failed: " in note else "")
    console.print()


def print_heading(console: Any, report: TableReport) -> None:
    """Print a table's name and title."""
    from rich.markup import escape

    console.print(f"[bold]{escape(report.paper.name)}/{escape(report.table.id)}[/bold]  {escape(report.table.title)}")


def _of_scale(report: TableReport, scale: str) -> list[Cell]:
    """What was measured at `scale`, published figures beside it; those with nothing beside them at the first scale."""
    alone = [next(iter(report.scales))]
    return [
        (column, source)
        for column, sources in report.columns()
        for source in sources
        if source == scale or (source == "published" and scale in (sources[1:] or alone))
    ]


def _fits(console: Any, report: TableReport, columns: Sequence[Cell]) -> bool:
    """Does the table of these columns fit into the terminal unwrapped?"""
    from rich.measure import Measurement

    wide = console.options.update(width=10_000)
    return bool(Measurement.get(console, wide, _grid(report, columns)).maximum <= console.width)


def _parts(console: Any, report: TableReport, columns: Sequence[Cell]) -> list[list[Cell]]:
    """`columns` as tables that fit into the terminal; a column's published and measured figures stay together."""
    parts: list[list[Cell]] = []
    for _, group in itertools.groupby(columns, key=lambda pair: pair[0].id):
        together = list(group)
        if parts and _fits(console, report, [*parts[-1], *together]):
            parts[-1] += together
        else:
            parts.append(together)
    return parts


def _grid(report: TableReport, columns: Sequence[Cell]) -> Any:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    previous = ""
    for column, source in columns:
        title = column.header if column.id != previous else ""
        table.add_column(f"{escape(title)}\n[dim]{LABELS[source]}[/dim]", justify="right")
        previous = column.id
    best = {(c.id, s): report.best(c, s) for c, s in columns}
    for row, title in report.rows.items():
        texts = [(report.cell(row, c, s), row in best[c.id, s], s) for c, s in columns]
        if any(text for text, _, _ in texts):
            table.add_row(escape(title), *(_styled(*text) for text in texts))
    return table


def _styled(text: str, best: bool, source: str) -> str:
    value, plus_minus, error = text.partition(" ± ")
    if not value:
        return "[dim]–[/dim]"
    styled = f"[bold]{value}[/bold]" if best else f"[yellow]{value}[/yellow]" if source == "published" else value
    return f"{styled} [dim]± {error}[/dim]" if plus_minus else styled


def print_claims(console: Any, report: TableReport) -> None:
    """Print the claims of a table with their verdicts, and the scales of each."""
    from rich.markup import escape
    from rich.padding import Padding

    for claim in report.table.claims:
        by_status: dict[str, list[str]] = {}
        for scale, found in report.scales.items():
            by_status.setdefault(found.verdicts[claim.id].status, []).append(LABELS[scale])
        marks = [
            f"[{COLOURS[status]}]{SIGNS[status]} {status}[/] [dim]({', '.join(labels)})[/dim]"
            for status, labels in (by_status or {NOT_MEASURED: ["any scale"]}).items()
        ]
        console.print(f"{'  '.join(marks)}  {escape(claim.text)}")
        for scale, found in report.scales.items():
            verdict = found.verdicts[claim.id]
            if verdict.status != HELD and verdict.detail:
                console.print(Padding(f"[dim]{LABELS[scale]}: {escape(verdict.detail)}[/dim]", (0, 0, 0, 2)))
