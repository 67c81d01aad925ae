"""A report in the terminal: a compact table with the paper's figure beside the measured one, and the verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .report import LABELS, TableReport
from .table import Column

COLOURS = {"held": "green", "not held": "red", "not measured": "dim"}
SIGNS = {"held": "✓", "not held": "✗", "not measured": "–"}


def print_report(console: Any, report: TableReport) -> None:
    """Print one table with its claims and notes."""
    from rich.markup import escape

    console.print(f"[bold]{escape(report.paper.name)}/{escape(report.table.id)}[/bold]  {escape(report.table.title)}")
    console.print(f"[dim]{escape(report.table.source)}[/dim]")
    if not report.scales:
        console.print("[dim]nothing measured yet[/dim]\n")
        return
    columns = [(column, source) for column, sources in report.columns() for source in sources]
    if _width(report, columns) <= console.width:
        console.print(_grid(report, columns))
    else:
        for scale in report.scales:
            console.print(_grid(report, [(c, s) for c, s in columns if s in ("published", scale)]))
    print_claims(console, report)
    for note in report.notes():
        console.print(f"[dim]{escape(note)}[/dim]", style="red" if " failed: " in note else "")
    console.print()


def _width(report: TableReport, columns: Sequence[tuple[Column, str]]) -> int:
    """Characters that the table of all columns would take."""
    width = max(len(title) for title in report.rows.values()) + 3
    for column, source in columns:
        texts = [report.cell(row, column, source) for row in report.rows]
        width += max(map(len, [column.header, LABELS[source], *texts])) + 3
    return width


def _grid(report: TableReport, columns: Sequence[tuple[Column, str]]) -> Any:
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
    """Print the claims of a table with the verdict at each scale."""
    from rich.markup import escape
    from rich.padding import Padding

    for claim in report.table.claims:
        marks = []
        for scale, found in report.scales.items():
            status = found.verdicts[claim.id].status
            marks.append(f"[{COLOURS[status]}]{SIGNS[status]} {status}[/] [dim]{LABELS[scale]}[/dim]")
        console.print(f"{'  '.join(marks) or '[dim]– not measured[/dim]'}  {escape(claim.text)}")
        for scale, found in report.scales.items():
            verdict = found.verdicts[claim.id]
            if verdict.status != "held" and verdict.detail:
                console.print(Padding(f"[dim]{LABELS[scale]}: {escape(verdict.detail)}[/dim]", (0, 0, 0, 2)))
