"""Pictures of a table: curves with error bars, bars, heat maps. PNG bytes; no display and no global state."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from .quantity import Quantity
from .report import LABELS, TableReport
from .table import Column, Plot, Row, matches

# Okabe and Ito's colours, which stay apart for colour-blind readers, with a marker each
LOOKS = list(zip(("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555"), "osD^vPX", strict=True))
INK = "#333333"


def draw_all(report: TableReport) -> Iterator[tuple[Plot, str, bytes]]:
    """(plot, scale, PNG) for each plot of the table at each scale with something to draw."""
    for plot in report.table.plots:
        for scale in report.scales:
            png = draw(report, plot, scale)
            if png is not None:
                yield plot, scale, png


def draw(report: TableReport, plot: Plot, scale: str) -> bytes | None:
    """One plot at one scale as PNG; None where nothing of it was measured."""
    found = {"curve": _curve, "bars": _bars, "heatmap": _heatmap}[plot.kind](report, plot, scale)
    return None if found is None else png(found)


def png(figure: Any) -> bytes:
    """A matplotlib figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144, metadata={"Software": None})
    return buffer.getvalue()


def new_figure(title: str, width: float = 6.0, height: float = 3.8) -> tuple[Any, Any]:
    """An empty figure and its axes in the look that all pictures here have; no display is needed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10.5, color=INK, loc="left")
    axes.tick_params(labelsize=9, colors=INK, length=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#999999")
    return figure, axes


def _figure(plot: Plot, scale: str, **size: float) -> tuple[Any, Any]:
    return new_figure(f"{plot.title}  ·  {LABELS[scale]}", **size)


def draw_matrix(figure: Any, axes: Any, numbers: list[list[float]], x: str, y: str, start: float = 0.0) -> None:
    """A heat map of `numbers` (rows from top to bottom, nan stays empty) with the axes named `x` and `y`.

    Columns are counted from `start`, rows from 0; a row that is the only one has no number.
    """
    from matplotlib.ticker import MaxNLocator

    edges = (start - 0.5, start + len(numbers[0]) - 0.5, len(numbers) - 0.5, -0.5)
    image = axes.imshow(numbers, cmap="viridis", aspect="auto", interpolation="nearest", extent=edges)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if len(numbers) == 1:
        axes.set_yticks([])
    axes.set_xlabel(x, fontsize=9.5, color=INK)
    axes.set_ylabel(y, fontsize=9.5, color=INK)
    bar = figure.colorbar(image, ax=axes, shrink=0.9)
    bar.ax.tick_params(labelsize=8.5, colors=INK)
    bar.outline.set_visible(False)


def _axis_title(column: Column) -> str:
    return f"{column.header}{f', {column.better} is better' if column.better else ''}"


def _rows(report: TableReport, plot: Plot, scale: str) -> list[tuple[Row, Quantity]]:
    cells = report.scales[scale].cells
    rows = [r for r in report.table.rows(scale) if not plot.rows or matches(r.id, plot.rows)]
    return [(row, cells[row.id, plot.y]) for row in rows if (row.id, plot.y) in cells]


def _curve(report: TableReport, plot: Plot, scale: str) -> Any:
    lines: dict[str, list[tuple[Any, Quantity]]] = {}
    measured = report.table.columns.get(plot.x)
    for row, quantity in _rows(report, plot, scale):
        x = report.scales[scale].cells.get((row.id, plot.x)) if measured else row.params.get(plot.x)
        if row.id != plot.baseline and x is not None and (not plot.by or plot.by in row.params):
            lines.setdefault(_name(plot.by, row.params.get(plot.by, "")), []).append((x, quantity))
    if not lines:
        return None
    if not measured and len({x for points in lines.values() for x, _ in points}) == 1:  # points above each other
        return _bars(report, replace(plot, rows=plot.rows and (plot.baseline, *plot.rows)), scale)
    figure, axes = _figure(plot, scale)
    if not measured:
        places = _places([x for points in lines.values() for x, _ in points], axes)
        lines = {name: [(Quantity(places[x]), q) for x, q in points] for name, points in lines.items()}
    for (name, points), (colour, marker) in zip(lines.items(), _looks(len(lines)), strict=True):
        points = sorted(points, key=lambda p: p[0].value)
        axes.errorbar(
            [x.value for x, _ in points], [q.value for _, q in points], yerr=[q.se for _, q in points],
            xerr=[x.se for x, _ in points] if measured else None, label=name,
            color=colour, marker=marker, markersize=5, linewidth=1.6, capsize=3, elinewidth=1,
        )  # fmt: skip
    base = report.scales[scale].cells.get((plot.baseline, plot.y)) if plot.baseline else None
    if base is not None:
        title = report.rows.get(plot.baseline, plot.baseline)
        axes.axhline(base.value, color="#777777", linestyle=(0, (4, 3)), linewidth=1.2, label=title)
    axes.set_xlabel(_axis_title(measured) if measured else plot.x.replace("_", " "), fontsize=9.5, color=INK)
    axes.set_ylabel(_axis_title(report.table.columns[plot.y]), fontsize=9.5, color=INK)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.06, y=0.1)
    if len(lines) > 1 or base is not None:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    return figure


def _name(by: str, value: Any) -> str:
    """Of a line; a number does not say what it is of."""
    return f"{by} = {value}" if isinstance(value, int | float) else str(value)


def _looks(count: int) -> list[tuple[str, str]]:
    return [LOOKS[i % len(LOOKS)] for i in range(count)]


def _places(values: list[Any], axes: Any) -> dict[Any, float]:
    """Where each value of x stands: numbers by their size, other values in the order they come."""
    unique = list(dict.fromkeys(values))
    if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in unique):
        places = {v: float(v) for v in unique}
        if len(unique) <= 10:
            axes.set_xticks(sorted(places.values()), [f"{v:g}" for v in sorted(places.values())])
        return places
    axes.set_xticks(range(len(unique)), [str(v) for v in unique])
    return {v: float(i) for i, v in enumerate(unique)}


def _bars(report: TableReport, plot: Plot, scale: str) -> Any:
    rows = _rows(report, plot, scale)
    if not rows:
        return None
    column = report.table.columns[plot.y]
    figure, axes = _figure(plot, scale, height=1.1 + 0.32 * len(rows))
    places = range(len(rows))
    colours = ["#999999" if row.reference else LOOKS[0][0] for row, _ in rows]
    axes.barh(places, [q.value for _, q in rows], xerr=[q.se for _, q in rows], color=colours, height=0.66,
              error_kw={"elinewidth": 1, "capsize": 3, "ecolor": INK})  # fmt: skip
    axes.set_yticks(places, [row.title for row, _ in rows])
    axes.invert_yaxis()
    end = max(q.value + q.se for _, q in rows)
    for place, (_, q) in zip(places, rows, strict=True):
        axes.annotate(format(q.value, column.format), (max(q.value + q.se, 0.0), place), xytext=(4, 0),
                      textcoords="offset points", va="center", fontsize=8.5, color=INK)  # fmt: skip
    if end > 0:
        axes.set_xlim(right=end * 1.14)
    axes.set_xlabel(_axis_title(column), fontsize=9.5, color=INK)
    return figure


def _heatmap(report: TableReport, plot: Plot, scale: str) -> Any:
    matrix = report.scales[scale].artefacts.get((plot.row, plot.artefact))
    if not isinstance(matrix, list) or not matrix:
        return None
    if not isinstance(matrix[0], list):
        matrix = [matrix]
    width = max(len(line) for line in matrix)
    numbers = [
        [math.nan if i >= len(line) or line[i] is None else float(line[i]) for i in range(width)] for line in matrix
    ]
    if all(math.isnan(v) for line in numbers for v in line):
        return None
    figure, axes = _figure(plot, scale, width=5.4, height=max(1.8, min(5.0, 0.9 + 4.0 * len(matrix) / width)))
    draw_matrix(figure, axes, numbers, plot.x, plot.y, plot.start)
    if len(plot.labels) == len(numbers):
        axes.set_yticks(range(len(numbers)), plot.labels)
    return figure
