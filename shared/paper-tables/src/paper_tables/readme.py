"""The results block of a package's README, written from its committed results so that it cannot drift from them.

A README that has the two markers gets the figures of scale tiny between them by `paper-tables run PACKAGE --publish`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from . import markdown
from .claims import NOT_MEASURED
from .paper import Paper
from .report import TableReport, collect
from .store import write

BEGIN, END = "<!-- results -->", "<!-- end of results -->"
SCALE = "tiny"


def readme_of(paper: Paper) -> Path | None:
    """The README beside the paper's tables, if it has a place for results (in a wheel there is none)."""
    path = paper.tables_folder.parent / "README.md"
    return path if path.is_file() and BEGIN in path.read_text() and END in path.read_text() else None


def block(paper: Paper) -> str:
    """What stands between the markers: for every table its figures at scale tiny and its claims, `main` first."""
    tables = sorted(paper.tables().values(), key=lambda table: table.id != "main")
    reports = [_only(collect(paper, table, Path("no results but the committed"))) for table in tables]
    measured = [report for report in reports if report.scales]
    machines = dict.fromkeys(m for report in measured for m in report.scales[SCALE].machines)
    lines = [f"Measured with `{paper.name} reproduce --scale {SCALE}` on {' and '.join(machines)}.", ""]
    for report in measured:
        lines += [f"### {report.table.title}", "", *markdown.grid(report), "", *_claims(report), ""]
    return "\n".join(lines).rstrip() + "\n" if measured else "Nothing was measured yet.\n"


def with_block(text: str, content: str) -> str:
    """`text` with `content` between its markers."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{content}{END}{after}"


def refresh(paper: Paper) -> Path | None:
    """Write the block into the README of `paper`; returns the file, None where there is no place for it."""
    path = readme_of(paper)
    if path is not None:
        write(path, with_block(path.read_text(), block(paper)))
    return path


def _only(report: TableReport) -> TableReport:
    return TableReport(report.paper, report.table, {s: r for s, r in report.scales.items() if s == SCALE})


def _claims(report: TableReport) -> Iterator[str]:
    for claim in report.table.claims:
        verdict = report.scales[SCALE].verdicts[claim.id]
        why = f" ({verdict.detail})" if verdict.detail and verdict.status != NOT_MEASURED else ""
        yield f"- {markdown.SIGNS[verdict.status]}: {claim.text}{why}"
