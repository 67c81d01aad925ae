"""What of a table only shows when its parts are put together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from .claims import check_claim
from .errors import nearest
from .table import Plot, Table, matches
from .yamlfile import Reader


def check_table(table: Table, reader: Reader) -> None:
    """Every name that a figure, a claim, a plot or a pattern uses exists. Raises `TableError` with file and line."""
    if not table.columns or not table.scales or not table.specs:
        empty = "columns" if not table.columns else "scales" if not table.scales else "rows"
        raise reader.fail(f"{empty!r} is empty", empty)
    _check_patterns(table, reader)
    rows = table.all_rows()
    _check_figures(table, reader, rows)
    for kind, ids in (("claim", [c.id for c in table.claims]), ("plot", [p.id for p in table.plots])):
        for twice in {i for i in ids if ids.count(i) > 1}:
            raise reader.fail(f"id {twice!r} belongs to two {kind}s", f"{kind}s")
    for claim in table.claims:
        check_claim(table, claim)
    for plot, item in zip(table.plots, reader.items("plots"), strict=True):
        for key, name, known in _plot_names(table, plot, rows):
            if name and name not in known:
                raise Reader(table.path, item, "plot").fail(f"{key}: no {name!r}{nearest(name, known)}", key)


def _check_figures(table: Table, reader: Reader, rows: Mapping[str, str]) -> None:
    seen = set()
    for figure, item in zip(table.figures, reader.items("paper"), strict=True):
        here = Reader(table.path, item, "paper's figure")
        for name, known, key in ((figure.row, rows, "row"), (figure.column, table.columns, "column")):
            if name not in known:
                raise here.fail(f"no {key} {name!r}{nearest(name, known)}", key)
        if (figure.row, figure.column) in seen:
            raise here.fail(f"{figure.column} of {figure.row!r} is given twice", "row")
        seen.add((figure.row, figure.column))


def _check_patterns(table: Table, reader: Reader) -> None:
    """Every scale that a row names is offered, and every pattern of row ids meets a row."""
    for spec in table.specs:
        for scale in spec.scales:
            if scale not in table.scales:
                raise spec.reader.fail(f"the table offers no scale {scale!r}{nearest(scale, table.scales)}", "scales")
    for name, settings in table.scales.items():
        rows = [row.id for row in replace(table, scales={name: replace(settings, only=())}).rows(name)]
        _meet(settings.only, rows, reader.inner("scales", "scales").inner(name, f"scale {name}"), "only")
    for plot, item in zip(table.plots, reader.items("plots"), strict=True):
        _meet(plot.rows, list(table.all_rows()), Reader(table.path, item, "plot"), "rows")


def _meet(patterns: tuple[str, ...], rows: list[str], reader: Reader, key: str) -> None:
    for pattern in patterns:
        if not any(matches(row, (pattern,)) for row in rows):
            raise reader.fail(f"{key}: no row {pattern!r}{nearest(pattern, rows)}", key)


def _plot_names(table: Table, plot: Plot, rows: Mapping[str, str]) -> Iterator[tuple[str, str, Any]]:
    params = {name for spec in table.specs for name in (*spec.params, *spec.grid)}
    if plot.kind == "heatmap":
        yield "row", plot.row, rows
        return
    yield "y", plot.y, table.columns
    yield "x", plot.x, {*params, *table.columns}
    yield "by", plot.by, params
    yield "baseline", plot.baseline, rows
