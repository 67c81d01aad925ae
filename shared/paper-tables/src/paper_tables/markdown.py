"""A report as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .claims import HELD, NOT_HELD, NOT_MEASURED
from .report import LABELS, TableReport, tally

SIGNS = {HELD: "✓ held", NOT_HELD: "✗ not held", NOT_MEASURED: "– not measured"}


def page(
    reports: Sequence[TableReport], problems: Mapping[str, str], plots: Mapping[tuple[str, str], list[str]]
) -> str:
    """All tables. `plots`: (package, table) -> paths of its pictures, relative to the page."""
    lines = ["# Tables", ""]
    for scale, counts in tally(reports).items():
        lines += [f"Claims at scale {scale}: " + ", ".join(f"{n} {status}" for status, n in counts.items()) + ".", ""]
    lines += [line for name, why in problems.items() for line in (f"**{name}** could not be read: {why}", "")]
    for report in reports:
        lines += table(report, plots.get((report.paper.name, report.table.id), []))
    return "\n".join(lines).rstrip() + "\n"


def table(report: TableReport, plots: Sequence[str] = ()) -> list[str]:
    """One table: heading, figures, claims, notes and pictures."""
    lines = [f"## {report.paper.name}: {report.table.title}", "", f"{report.table.source}."]
    lines += ["", report.table.about.strip()] if report.table.about.strip() else []
    lines.append("")
    if not report.scales:
        lines += ["Nothing of this table was measured yet.", ""]
    if report.columns():
        lines += [*grid(report), ""]
    if report.table.claims and report.scales:
        lines += [*claims(report), ""]
    for path in plots:
        lines += [f"![{path.rsplit('/', 1)[-1].removesuffix('.png')}]({path})", ""]
    notes = report.notes()
    return lines + [f"- {_escape(note)}" for note in notes] + ([""] if notes else [])


def grid(report: TableReport) -> list[str]:
    """The figures alone, as a Markdown table: a column for each measured column and source."""
    columns = [(column, source) for column, sources in report.columns() for source in sources]
    head = ["", *(f"{c.header}, {LABELS[s]}" for c, s in columns)]
    lines = [_line(head), _line(["---", *("---:" for _ in columns)])]
    best = {(c.id, s): report.best(c, s) for c, s in columns}
    for row, title in report.rows.items():
        cells = [report.cell(row, c, s) for c, s in columns]
        marked = [f"**{t}**" if t and row in best[c.id, s] else t for t, (c, s) in zip(cells, columns, strict=True)]
        lines.append(_line([title, *marked]))
    return lines


def claims(report: TableReport) -> list[str]:
    """The claims as a Markdown table: a column for each scale."""
    lines = [_line(["claim", *(LABELS[s] for s in report.scales)]), _line(["---", *("---" for _ in report.scales)])]
    for claim in report.table.claims:
        verdicts = [found.verdicts[claim.id] for found in report.scales.values()]
        cells = [SIGNS[v.status] + (f" ({v.detail})" if v.detail else "") for v in verdicts]
        lines.append(_line([claim.text, *cells]))
    return lines


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_escape(cell) for cell in cells) + " |"


def _escape(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
