"""Run what has not been measured yet, unit by unit; what was measured stays, whatever happens to the process."""

from __future__ import annotations

import gc
import math
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from model_hooks.files import FULL

from .errors import TableError, nearest, one_line
from .frame import plain
from .machine import describe, machine
from .paper import Context, Paper, check_scale
from .progress import Bar, progress
from .store import Results, locked, read_results, results_path, write
from .table import Table, Unit
from .version import Code, digest, settle, unit_key


@dataclass
class Summary:
    """What a run did: counts of units, and the failed ones with their errors."""

    measured: int = 0
    cached: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class _Job:
    paper: Paper
    table: Table
    path: Path
    results: Results
    code: Code
    units: list[tuple[Unit, dict[str, Any]]]  # to be measured, each with its key


def run_tables(
    tables: Iterable[tuple[Paper, Table]],
    *,
    scale: str = "quick",
    results: Path = Path("results"),
    force: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Summary:
    """Measure what is missing of `tables` at `scale` into `results`.

    A unit whose record has the same key (cell, inputs, code) is not run again unless `force`; a failed one always is.
    Where a unit fails that was measured before, the error is added to its record, which stays.
    `report` is told of failures as they happen. KeyboardInterrupt passes through; what was measured is on disk.
    Raises `TableError` if another run is at work on one of the tables.
    """
    check_scale(scale)
    summary, begun = Summary(), time.monotonic()
    with ExitStack() as locks:
        jobs = []
        for paper, table in tables:
            if scale not in table.scales:
                summary.skipped.append(f"{paper.name}/{table.id}")
                continue
            path = results_path(results, paper.name, table.id, scale)
            locks.enter_context(locked(path))  # before the results are read: nobody else may write them from here on
            jobs.append(_plan(paper, table, scale, path, force))
        summary.cached = sum(len(job.table.units(scale)) - len(job.units) for job in jobs)
        with progress("tables", sum(len(job.units) for job in jobs)) as bar:
            _run_jobs(jobs, bar, summary, report)
    summary.seconds = time.monotonic() - begun
    return summary


def _plan(paper: Paper, table: Table, scale: str, path: Path, force: bool) -> _Job:
    """What is to be measured. Inputs are looked at now, before any unit loads one: a result never gets the key of
    content that came later."""
    code = Code(paper)
    found = read_results(path, paper.name, table.id, scale)
    keyed = [(unit, unit_key(table, unit.cell)) for unit in table.units(scale)]
    done = {u.id for u, key in keyed if "error" not in found.units.get(u.id, {}) and found.fresh(u.id, key, code)}
    return _Job(paper, table, path, found, code, [pair for pair in keyed if force or pair[0].id not in done])


def _run_jobs(jobs: Iterable[_Job], bar: Bar, summary: Summary, report: Callable[[str], None]) -> None:
    context, owner = Context(), ""
    for job in jobs:
        if job.paper.name != owner:  # the models of one paper go before those of the next come
            context, owner = Context(), job.paper.name
        for unit, key in job.units:
            name = f"{job.paper.name}/{job.table.id} {unit.id}"
            bar.describe(name)
            failure = _run_unit(job, unit, key, context)
            bar.advance()
            if failure is None:
                summary.measured += 1
            else:
                summary.failed[name] = failure
                report(f"{name}: {failure}")


def _run_unit(job: _Job, unit: Unit, key: dict[str, Any], context: Context) -> str | None:
    """Measure one unit and write it down. Returns the error's line where it failed."""
    context.artefacts = {}
    begun = time.monotonic()
    outcome: dict[str, Any]
    failure: str | None = None
    try:
        values = check_values(job.paper.run(dict(unit.cell), context), job.table)
        artefacts = {name: _artefact(name, value) for name, value in context.artefacts.items()}
        outcome = {"values": values, **({"artefacts": artefacts} if artefacts else {})}
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise  # every further unit would fail in the same way
        failure = one_line(error)
        outcome = {"error": failure, "where": _where(error)}
        del error
        gc.collect()  # a failure may hold what the next unit needs the memory for
    before = job.results.units.get(unit.id, {})
    if failure is not None and "values" in before:
        job.results.units[unit.id] = {**before, **outcome}
    else:
        job.results.units[unit.id] = _record(job, unit, key, outcome, round(time.monotonic() - begun, 3))
    job.results.keep(u.id for u in job.table.units(job.results.scale))  # rows that the table no longer has go
    write(job.path, job.results.text())
    return failure


def _record(job: _Job, unit: Unit, key: dict[str, Any], outcome: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """What is kept of a unit's `outcome`; the machine and the code that it names are added to the job's results."""
    here = machine()  # after the work: that has imported torch, if it uses it
    name = describe(here)
    job.results.machines[name] = here
    used = job.code.used()
    job.results.code[digest(used)] = used
    return {
        "key": settle(key, unit_key(job.table, unit.cell)),  # a hub model may have its revision only now
        "code": digest(used),
        "cell": {k: v for k, v in unit.cell.items() if k not in ("package", "table", "scale")},
        **outcome,
        "seconds": seconds,
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": name,
    }


def _where(error: BaseException) -> str:
    """File name and line of the innermost frame: enough to find it, without the folders of this machine."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


def check_values(values: Any, table: Table) -> dict[str, dict[str, float]]:
    """What `run` returned, as column -> {"value", "se"?}. Raises `TableError` for anything but finite numbers."""
    if not isinstance(values, Mapping):
        raise TableError(f"run returned {type(values).__name__}, a mapping of columns to figures is expected")
    checked = {}
    for column, figure in values.items():
        if column not in table.columns:
            raise TableError(f"run returned {column!r}, which is no column{nearest(column, table.columns)}")
        parts = dict(figure) if isinstance(figure, Mapping) else {"value": figure}
        try:
            numbers = {k: float(v) for k, v in parts.items() if v is not None}
        except (TypeError, ValueError):
            numbers = {}
        if not numbers or "value" not in parts or set(parts) - {"value", "se"}:
            raise TableError(f"column {column}: a number or {{'value', 'se'}} is expected, found {figure!r}")
        if "value" not in numbers or not all(math.isfinite(v) for v in numbers.values()) or numbers.get("se", 0) < 0:
            raise TableError(f"column {column} is {figure!r}, not a finite number; leave it out if it was not measured")
        checked[str(column)] = numbers
    return checked


def _artefact(name: str, value: Any) -> Any:
    """An artefact as JSON can hold it: nested lists of numbers (not finite: None), text or mappings."""

    def refuse(part: Any) -> Any:
        raise TableError(f"artefact {name!r} holds {type(part).__name__}; lists of numbers are expected")

    return plain(value, refuse)


def publish(tables: Iterable[tuple[Paper, Table]], scale: str, results: Path) -> list[Path]:
    """Copy the results at `scale` into the packages' own folders, to be committed; returns the files written.

    What is there of a unit that failed, or was not measured here, stays.
    """
    written = []
    for paper, table in tables:
        found = read_results(results_path(results, paper.name, table.id, scale), paper.name, table.id, scale)
        new = {name: record for name, record in found.units.items() if "error" not in record}
        if new and scale in table.scales:
            target = paper.committed / table.id / f"{scale}.json"
            merged = read_results(target, paper.name, table.id, scale)
            merged.units |= new
            merged.machines |= found.machines
            merged.code |= found.code
            merged.keep(unit.id for unit in table.units(scale))
            write(target, merged.text())
            written.append(target)
    return written
