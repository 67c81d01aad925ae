"""A table of a paper, as its YAML file says it. The README describes the file, key by key."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from keyword import iskeyword
from pathlib import Path
from typing import Any

from .errors import nearest
from .yamlfile import Reader, read_yaml

SCALES = ("quick", "tiny", "paper")
PROVENANCE = ("table", "figure", "text", "abstract", "repo", "derived", "recalled")
RESERVED = ("package", "table", "scale", "row", "seed")


@dataclass(frozen=True)
class Column:
    """What is measured: how it is called and printed, and which way is better (`lower`, `higher` or neither)."""

    id: str
    title: str
    unit: str = ""
    format: str = ".4g"
    better: str = ""
    note: str = ""

    @property
    def header(self) -> str:
        return f"{self.title} ({self.unit})" if self.unit else self.title


@dataclass(frozen=True)
class Row:
    """One line of the table at one scale, with the parameters that its measurement is given."""

    id: str
    title: str
    params: Mapping[str, Any]
    seeds: tuple[int, ...]
    reference: bool = False


@dataclass(frozen=True)
class Scale:
    """How large: the seeds, the lists that grids vary over, and the settings that every cell gets."""

    name: str
    seeds: tuple[int, ...]
    vary: Mapping[str, list[Any]]
    settings: Mapping[str, Any]
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class PaperFigure:
    """A figure that the paper prints, and where it was read. `recalled` figures are not shown as the paper's."""

    row: str
    column: str
    value: float
    provenance: str
    se: float | None = None
    source: str = ""

    @property
    def shown(self) -> bool:
        return self.provenance != "recalled"


@dataclass(frozen=True)
class Claim:
    """What the paper says of the table, as a sentence and as an expression over cells."""

    id: str
    text: str
    holds: str
    vary: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    line: int = 0


@dataclass(frozen=True)
class Plot:
    """A picture: `curve`, `bars` or `heatmap`."""

    id: str
    kind: str
    title: str
    x: str = ""
    y: str = ""
    by: str = ""
    baseline: str = ""
    row: str = ""
    artefact: str = ""
    rows: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    start: float = 0.0  # what the first column of a heat map is numbered


@dataclass(frozen=True)
class Unit:
    """The unit of work: a row with a seed. `cell` is what the package's `run` is given."""

    id: str
    cell: Mapping[str, Any]


@dataclass(frozen=True)
class _RowSpec:
    reader: Reader
    id: str
    title: str
    params: Mapping[str, Any]
    grid: Mapping[str, Any]
    seeds: tuple[int, ...] | None
    scales: tuple[str, ...]
    reference: bool = False


@dataclass(frozen=True)
class Table:
    """A table of a paper: columns, rows at each scale, the paper's figures, claims and plots."""

    path: Path
    package: str
    id: str
    title: str
    source: str
    about: str
    columns: Mapping[str, Column]
    scales: Mapping[str, Scale]
    figures: tuple[PaperFigure, ...]
    claims: tuple[Claim, ...]
    plots: tuple[Plot, ...]
    inputs: tuple[str, ...]
    specs: tuple[_RowSpec, ...] = ()

    def rows(self, scale: str) -> list[Row]:
        """The rows at `scale`, grids multiplied out, in the table's order. Raises `TableError` for a double id."""
        settings = self.scales[scale]
        rows: dict[str, Row] = {}
        for spec in self.specs:
            if spec.scales and scale not in spec.scales:
                continue
            for params in _product(spec, settings):
                row = Row(
                    _template(spec, spec.id, params), _template(spec, spec.title, params), params,
                    spec.seeds or settings.seeds, spec.reference,
                )  # fmt: skip
                if row.id in rows:
                    raise spec.reader.fail(f"id {row.id!r} belongs to two rows at scale {scale}", "id")
                if not settings.only or matches(row.id, settings.only):
                    rows[row.id] = row
        return list(rows.values())

    def units(self, scale: str) -> list[Unit]:
        """What is to be measured at `scale`: each row with each of its seeds."""
        found = self.scales[scale]
        return [
            Unit(
                f"{row.id}#{seed}",
                {**found.settings, **row.params, "package": self.package, "table": self.id, "scale": scale,
                 "row": row.id, "seed": seed},
            )
            for row in self.rows(scale) for seed in row.seeds
        ]  # fmt: skip

    def all_rows(self) -> dict[str, str]:
        """Id and title of the rows of all scales together, in the table's order; ascending numbers of a grid ascend."""
        offered = {row.id for scale in self.scales for row in self.rows(scale)}
        titles: dict[str, str] = {}
        for spec in self.specs:
            scales = [s for name, s in self.scales.items() if not spec.scales or name in spec.scales]
            for params in _product(spec, *scales):
                row = _template(spec, spec.id, params)
                if row in offered:
                    titles.setdefault(row, _template(spec, spec.title, params))
        return titles

    def figure(self, row: str, column: str) -> PaperFigure | None:
        """The paper's figure of a cell, if it may be shown."""
        return next((f for f in self.figures if (f.row, f.column) == (row, column) and f.shown), None)


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Is `name` one of `patterns` (`*` and `?` as in file names)?"""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def expand(value: Any, vary: Mapping[str, list[Any]], reader: Reader, key: str) -> list[Any]:
    """The values of an axis: a list as it is, `$name` as the scale's list of that name, anything else as one value."""
    if isinstance(value, str) and value.startswith("$"):
        if value[1:] not in vary:
            raise reader.fail(f"{key}: no scale list {value!r}{nearest(value[1:], vary)}", key)
        return list(vary[value[1:]])
    return list(value) if isinstance(value, list) else [value]


def _product(spec: _RowSpec, *scales: Scale) -> list[dict[str, Any]]:
    """The parameters of a row, or of each row of a grid, with all values that its axes take at `scales`."""
    if not scales:
        return []
    axes = {}
    for name, values in spec.grid.items():
        lists = [expand(values, scale.vary, spec.reader, "grid") for scale in scales]
        found = list(itertools.chain.from_iterable(lists))
        unique = [v for i, v in enumerate(found) if v not in found[:i]]
        numbers = all(isinstance(v, (int, float)) for v in unique)
        axes[name] = sorted(unique) if numbers and all(own == sorted(own) for own in lists) else unique
    return [{**spec.params, **dict(zip(axes, point, strict=True))} for point in itertools.product(*axes.values())]


def _template(spec: _RowSpec, text: str, params: Mapping[str, Any]) -> str:
    try:
        return text.format(**params)
    except KeyError as error:
        raise spec.reader.fail(f"{text!r} names {error.args[0]!r}{nearest(error.args[0], params)}", "id") from None
    except (ValueError, IndexError, AttributeError) as error:
        raise spec.reader.fail(f"{text!r} is not a template ({error})", "id") from None


def read_table(path: Path, package: str) -> Table:
    """Read and check one table file. Raises `TableError` with file, line and the nearest right name."""
    from .checks import check_table

    reader = Reader(path, read_yaml(path), "table")
    reader.only(
        ("id", "title", "source", "about", "columns", "rows", "settings", "inputs", "scales", "paper", "claims",
         "plots"),
        ("id", "title", "source", "columns", "rows", "scales"),
    )  # fmt: skip
    if reader.text("id") != path.stem:
        raise reader.fail(f"id {reader.text('id')!r} must be the file's name, {path.stem!r}", "id")
    table = Table(
        path=path,
        package=package,
        id=reader.text("id"),
        title=reader.text("title"),
        source=reader.text("source"),
        about=reader.text("about"),
        columns={key: _column(reader.inner("columns", "columns"), key) for key in reader.mapping("columns")},
        scales={key: _scale(reader, key) for key in reader.mapping("scales")},
        figures=tuple(_figure(path, item, reader) for item in reader.items("paper")),
        claims=tuple(_claim(path, item, reader) for item in reader.items("claims")),
        plots=tuple(_plot(path, item, reader) for item in reader.items("plots")),
        inputs=reader.words("inputs") or ("model", "data"),
        specs=tuple(_row(path, item, reader) for item in reader.items("rows")),
    )
    check_table(table, reader)
    return table


def _column(parent: Reader, key: str) -> Column:
    if not key.isidentifier() or iskeyword(key):
        raise parent.fail(f"{key!r} must be a Python name", key)
    reader = parent.inner(key, f"column {key}")
    reader.only(("title", "unit", "format", "better", "note"), ("title",))
    form = reader.text("format", ".4g")
    try:
        format(1.5, form)
    except ValueError:
        raise reader.fail(f"format {form!r} is not one for numbers, like '.3f'", "format") from None
    better = reader.choice("better", ("lower", "higher"))
    return Column(key, reader.text("title"), reader.text("unit"), form, better, reader.text("note"))


def _scale(parent: Reader, key: str) -> Scale:
    if key not in SCALES:
        raise parent.inner("scales", "scales").fail(f"unknown scale {key!r}{nearest(key, SCALES)}", key)
    reader = parent.inner("scales", "scales").inner(key, f"scale {key}")
    reader.only(("seeds", "vary", "settings", "only"))
    vary = reader.mapping("vary")
    for name, values in vary.items():
        if not isinstance(values, list) or not values:
            raise reader.fail(f"vary: {name!r} must be a list of values, found {values!r}", "vary")
    settings = {**parent.mapping("settings"), **reader.mapping("settings")}
    _not_reserved(reader, settings, "settings")
    return Scale(key, reader.seeds("seeds") or (0,), vary, settings, reader.words("only"))


def _row(path: Path, item: Any, parent: Reader) -> _RowSpec:
    reader = Reader(path, item, "row", parent.line("rows"))
    reader.only(("id", "title", "set", "grid", "seeds", "scales", "reference"), ("id",))
    params, grid = reader.mapping("set"), reader.mapping("grid")
    _not_reserved(reader, {**params, **grid}, "set" if "set" in reader.map else "grid")
    both = set(params) & set(grid)
    if both:
        raise reader.fail(f"{min(both)!r} is both in 'set' and in 'grid'", "grid")
    scales = reader.words("scales")
    for scale in scales:
        if scale not in SCALES:
            raise reader.fail(f"unknown scale {scale!r}{nearest(scale, SCALES)}", "scales")
    title = reader.text("title", reader.text("id"))
    reference = reader.map.get("reference", False)
    if not isinstance(reference, bool):
        raise reader.fail(f"'reference' must be true or false, found {reference!r}", "reference")
    return _RowSpec(reader, reader.text("id"), title, params, grid, reader.seeds("seeds"), scales, reference)


def _not_reserved(reader: Reader, params: Mapping[str, Any], key: str) -> None:
    taken = [name for name in params if name in RESERVED]
    if taken:
        raise reader.fail(f"{taken[0]!r} is set by the runner; name the parameter otherwise", key)


def _figure(path: Path, item: Any, parent: Reader) -> PaperFigure:
    reader = Reader(path, item, "paper's figure", parent.line("paper"))
    reader.only(("row", "column", "value", "se", "from", "source"), ("row", "column", "value", "from"))
    value = reader.number("value")
    if value is None:
        raise reader.fail("'value' must be a number", "value")
    provenance = reader.choice("from", PROVENANCE)
    return PaperFigure(
        reader.text("row"), reader.text("column"), value, provenance, reader.number("se"), reader.text("source")
    )


def _claim(path: Path, item: Any, parent: Reader) -> Claim:
    reader = Reader(path, item, "claim", parent.line("claims"))
    reader.only(("id", "text", "holds", "for", "source"), ("id", "text", "holds"))
    return Claim(
        reader.text("id"), reader.text("text"), reader.text("holds"), reader.mapping("for"), reader.text("source"),
        reader.line("holds"),
    )  # fmt: skip


NEEDED = {"curve": ("x", "y"), "bars": ("y",), "heatmap": ("row", "artefact")}
OPTIONAL = {"curve": ("by", "baseline", "rows"), "bars": ("rows",), "heatmap": ("x", "y", "labels", "start")}


def _plot(path: Path, item: Any, parent: Reader) -> Plot:
    reader = Reader(path, item, "plot", parent.line("plots"))
    kind = reader.choice("kind", NEEDED)
    if not kind:
        raise reader.fail(f"'kind' is missing{nearest('', NEEDED)}")
    needed = ("id", "kind", *NEEDED[kind])
    reader.only((*needed, "title", *OPTIONAL[kind]), needed)
    names = ("x", "y", "by", "baseline", "row", "artefact")
    texts = {name: reader.text(name) for name in names}
    rows, labels = reader.words("rows"), reader.words("labels")
    title, start = reader.text("title", reader.text("id")), reader.number("start") or 0.0
    return Plot(reader.text("id"), kind, title, rows=rows, labels=labels, start=start, **texts)
