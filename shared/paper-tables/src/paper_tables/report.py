"""What was measured, put together: cells with their errors, the paper's figures, claims and what is missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .claims import HELD, NOT_HELD, NOT_MEASURED, Verdict, judge
from .machine import describe
from .paper import Paper
from .quantity import Quantity, merge
from .store import read_results, results_path
from .table import SCALES, Column, Table
from .version import Code, unit_key

ORDER = ("paper", "tiny", "quick")  # of columns, most telling first
LABELS = {"published": "published", "paper": "paper scale", "tiny": "tiny", "quick": "quick"}


@dataclass
class ScaleReport:
    """One table at one scale."""

    scale: str
    cells: dict[tuple[str, str], Quantity] = field(default_factory=dict)
    artefacts: dict[tuple[str, str], Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    machines: list[str] = field(default_factory=list)
    days: list[str] = field(default_factory=list)
    seeds: int = 0
    units: int = 0
    measured: int = 0
    stale: int = 0

    def cell(self, row: str, column: str) -> Quantity | None:
        return self.cells.get((row, column))

    @property
    def any(self) -> bool:
        return bool(self.measured or self.failed)


@dataclass
class TableReport:
    """One table at every scale that was measured; `scales` in the order of `ORDER`."""

    paper: Paper
    table: Table
    scales: dict[str, ScaleReport]

    @property
    def rows(self) -> dict[str, str]:
        """Id and title of the rows with something to show."""
        shown = {f.row for f in self.table.figures if f.shown}
        for scale in self.scales:
            shown |= {row.id for row in self.table.rows(scale)}
        return {row: title for row, title in self.table.all_rows().items() if row in shown}

    def sources(self, column: str) -> list[str]:
        """What stands side by side under `column`: `published` where the paper's figures are known, then scales."""
        published = ["published"] if any(f.shown and f.column == column for f in self.table.figures) else []
        measured = [s for s, found in self.scales.items() if any(c == column for _, c in found.cells)]
        return published + measured

    def columns(self) -> list[tuple[Column, list[str]]]:
        """The columns with something to show, each with its sources."""
        found = [(column, self.sources(column.id)) for column in self.table.columns.values()]
        return [(column, sources) for column, sources in found if sources]

    def cell(self, row: str, column: Column, source: str) -> str:
        """The text of a cell; empty where there is nothing."""
        if source == "published":
            figure = self.table.figure(row, column.id)
            return "" if figure is None else figure_text(column, figure.value, figure.se or 0.0)
        quantity = self.scales[source].cells.get((row, column.id))
        return "" if quantity is None else figure_text(column, quantity.value, quantity.se)

    def best(self, column: Column, source: str) -> set[str]:
        """The rows with the best measured value of `column` at a scale; none where a single row was measured."""
        if not column.better or source == "published":
            return set()
        reference = {row.id for row in self.table.rows(source) if row.reference}
        values = {
            r: q.value for (r, c), q in self.scales[source].cells.items() if c == column.id and r not in reference
        }
        if len(values) < 2 or len(set(values.values())) == 1:
            return set()
        top = (min if column.better == "lower" else max)(values.values())
        return {row for row, value in values.items() if value == top}

    def notes(self) -> list[str]:
        """Where and when it was measured, and what is missing, stale or failed: a line each."""
        lines = []
        for scale, found in self.scales.items():
            seeds = f"{found.seeds} seed" + ("" if found.seeds == 1 else "s")
            days = " to ".join(dict.fromkeys((found.days[0], found.days[-1]))) if found.days else ""
            where = [" and ".join(found.machines), days] if days else []
            lines.append(", ".join([f"{LABELS[scale]}: {found.measured} of {found.units} units", seeds, *where]))
            if found.stale:
                lines.append(f"{LABELS[scale]}: {found.stale} units were measured by other code or from other inputs "
                             "than there are now; `paper-tables run` measures them again")  # fmt: skip
            lines += [f"{LABELS[scale]}: {unit} failed: {error}" for unit, error in found.failed.items()]
        by_source: dict[str, list[str]] = {}
        for figure in self.table.figures:
            if figure.shown:
                said = f"{figure.provenance}, {figure.source}" if figure.source else figure.provenance
                what = f"{self.table.columns[figure.column].title} of {self.rows[figure.row]}"
                by_source.setdefault(said, []).append(what)
        for said, figures in by_source.items():
            lines.append(f"published ({said}): " + (f"{len(figures)} figures" if figures[3:] else "; ".join(figures)))
        hidden = sum(not f.shown for f in self.table.figures)
        if hidden:
            lines.append(f"{hidden} of the paper's figures, known only from memory, not shown")
        lines += [f"{c.title}: {c.note}" for c in self.table.columns.values() if c.note]
        return lines


def figure_text(column: Column, value: float, error: float = 0.0) -> str:
    """`1.234 ± 0.005` by the column's format; an error too small for it is given to one digit."""
    text = format(value, column.format)
    if not error:
        return text
    shown = format(error, column.format)
    percent = column.format.endswith("%")
    if not any(c in "123456789" for c in shown) or "e" in shown:
        shown = f"{error * 100:.1g}%" if percent else f"{error:.1g}"
    elif column.format.endswith("g"):
        shown = f"{error:.2g}"
    return f"{text} ± {shown}"


def collect(paper: Paper, table: Table, results: Path) -> TableReport:
    """Everything measured of `table`, in `results` and, where nothing newer is there, among the committed results."""
    code = Code(paper)
    scales = {}
    for scale in (s for s in ORDER if s in table.scales):
        found = _scale(paper, table, scale, results, code)
        if found.any:
            found.verdicts = {claim.id: judge(table, claim, scale, found.cell) for claim in table.claims}
            scales[scale] = found
    return TableReport(paper, table, scales)


def _scale(paper: Paper, table: Table, scale: str, results: Path, code: Code) -> ScaleReport:
    fresh = read_results(results_path(results, paper.name, table.id, scale), paper.name, table.id, scale)
    kept = read_results(paper.committed / table.id / f"{scale}.json", paper.name, table.id, scale)
    machines = {**kept.machines, **fresh.machines}
    found = ScaleReport(scale)
    values: dict[tuple[str, str], dict[int, tuple[float, float | None]]] = {}
    used: Counter[str] = Counter()
    for unit in table.units(scale):
        found.units += 1
        key = unit_key(table, unit.cell)
        if "error" in fresh.units.get(unit.id, {}):  # of the last try; there may be figures of an earlier one
            found.failed[unit.id] = str(fresh.units[unit.id]["error"])
        results_of = [r for r in (fresh, kept) if "values" in r.units.get(unit.id, {})]
        if not results_of:
            continue
        valid = next((r for r in results_of if r.fresh(unit.id, key, code)), None)
        record = (valid or results_of[0]).units[unit.id]
        found.measured += 1
        found.stale += valid is None
        used[record["machine"]] += 1
        found.days.append(str(record["measured"])[:10])
        row, seed = unit.cell["row"], unit.cell["seed"]
        for column, figure in record["values"].items():
            if column in table.columns:
                values.setdefault((row, column), {})[seed] = (figure["value"], figure.get("se"))
        for name, matrix in record.get("artefacts", {}).items():
            found.artefacts.setdefault((row, name), matrix)  # of the first seed: matrices have no mean worth a picture
    found.cells = {key: q for key, by_seed in values.items() if (q := merge(by_seed)) is not None}
    found.machines = [describe(machines[m]) if m in machines else m for m, _ in used.most_common()]
    found.days.sort()
    found.seeds = len(table.scales[scale].seeds)
    return found


def as_json(report: TableReport) -> dict[str, Any]:
    """A table's report as plain data."""
    table = report.table
    return {
        "package": report.paper.name,
        "table": table.id,
        "title": table.title,
        "source": table.source,
        "columns": {
            c.id: {"title": c.title, "unit": c.unit, "better": c.better} for c in table.columns.values()
        },
        "rows": report.rows,
        "published": [
            {"row": f.row, "column": f.column, "value": f.value, "se": f.se, "from": f.provenance, "source": f.source}
            for f in table.figures if f.shown
        ],
        "scales": {name: _scale_json(found, table) for name, found in report.scales.items()},
    }  # fmt: skip


def _scale_json(found: ScaleReport, table: Table) -> dict[str, Any]:
    cells: dict[str, dict[str, Any]] = {}
    for (row, column), q in found.cells.items():
        samples = {str(seed): value for seed, value in q.samples.items()}
        cells.setdefault(row, {})[column] = {"value": q.value, "se": q.se, **({"by_seed": samples} if samples else {})}
    verdicts = {
        c.id: {"text": c.text, "holds": c.holds, "verdict": found.verdicts[c.id].status,
               "detail": found.verdicts[c.id].detail}
        for c in table.claims
    }  # fmt: skip
    return {
        "cells": cells, "claims": verdicts, "units": found.units, "measured": found.measured, "stale": found.stale,
        "failed": found.failed, "machines": found.machines,
    }  # fmt: skip


def tally(reports: Iterable[TableReport]) -> dict[str, dict[str, int]]:
    """How many claims were held, not held, not measured, by scale."""
    counts: dict[str, dict[str, int]] = {}
    for report in reports:
        for scale, found in report.scales.items():
            into = counts.setdefault(scale, dict.fromkeys((HELD, NOT_HELD, NOT_MEASURED), 0))
            for verdict in found.verdicts.values():
                into[verdict.status] += 1
    return {scale: counts[scale] for scale in ORDER if scale in counts}


def progress_of(paper: Paper, table: Table, results: Path) -> Mapping[str, str]:
    """For `list`: units measured of all, by scale."""
    code = Code(paper)
    found = {s: _scale(paper, table, s, results, code) for s in SCALES if s in table.scales}
    return {s: f"{r.measured}/{r.units}" for s, r in found.items()}
