"""`paper-tables list | run | report | claims`, and the `reproduce` verb of the packages."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import TableError, WorkFailed
from .frame import App, Shown, make_app
from .paper import Paper, check_scale, choose, installed
from .readme import refresh
from .table import Table

app = make_app("paper-tables", help="Run the papers' tables, check their claims, and report what was measured.")

Targets = Annotated[list[str] | None, typer.Argument(metavar="[PACKAGE[/TABLE]]...", help="What to take.")]
Results = Annotated[Path, typer.Option(help="Folder of the results.")]
ScaleName = Annotated[str, typer.Option(help="quick, tiny or paper.")]
Chosen = list[tuple[Paper, Table]]


def _chosen(targets: Sequence[str]) -> tuple[Chosen, dict[str, str]]:
    """The tables meant, and a line for each package that could not be read. What was asked for by name must exist."""
    papers, problems = installed()
    for target in targets:
        name = target.partition("/")[0]
        if name in problems:
            raise TableError(f"the tables of {name} cannot be loaded: {problems[name]}")
    if targets:
        return choose(papers.values(), targets), {}  # what else is installed is not the question
    chosen: Chosen = []
    for name, paper in papers.items():
        try:
            chosen += choose([paper])
        except TableError as error:
            problems[name] = str(error)
    return chosen, problems


def _warn(problems: dict[str, str]) -> None:
    for name, why in problems.items():
        print(f"warning: the tables of {name} cannot be loaded: {why}", file=sys.stderr)


@app.command("list")
def list_tables(targets: Targets = None, results: Results = Path("results")) -> dict[str, Any]:
    """What tables there are, and how much of each was measured."""
    from .report import progress_of

    chosen, problems = _chosen(targets or [])
    _warn(problems)
    rows = [
        {"table": f"{paper.name}/{table.id}", "title": table.title, **progress_of(paper, table, results)}
        for paper, table in chosen
    ]
    return {"measured_units": rows} if rows else {"tables": "none: no installed package offers any"}


@app.command()
def run(
    targets: Targets = None,
    all_tables: Annotated[bool, typer.Option("--all", help="All tables of all packages.")] = False,
    scale: ScaleName = "quick",
    results: Results = Path("results"),
    force: Annotated[bool, typer.Option("--force", help="Measure again what was measured already.")] = False,
    publish: Annotated[
        bool, typer.Option("--publish", help="Copy the results into the packages' folders, to be committed.")
    ] = False,
) -> dict[str, Any]:
    """Measure what was not measured yet. A stopped run goes on where it was."""
    if not targets and not all_tables:
        known = ", ".join(installed()[0]) or "none"
        raise TableError(f"name a PACKAGE or PACKAGE/TABLE, or give --all; packages with tables: {known}")
    if targets and all_tables:
        raise TableError(f"--all and {' '.join(targets)} exclude each other; give one of them")
    chosen, problems = _chosen(targets or [])
    _warn(problems)
    return run_chosen(chosen, scale, results, force=force, publish=publish, problems=problems)


def run_chosen(
    chosen: Chosen, scale: str, results: Path, *, force: bool = False, publish: bool = False,
    problems: dict[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run tables and say what was done. Raises `WorkFailed` (exit 1) at the end if a unit or a package failed."""
    from . import runner

    summary = runner.run_tables(
        chosen, scale=check_scale(scale), results=results, force=force,
        report=lambda line: print(f"failed: {line}", file=sys.stderr),
    )  # fmt: skip
    said: dict[str, Any] = {"scale": scale, "measured": summary.measured, "cached": summary.cached,
                            "failed": len(summary.failed), "seconds": round(summary.seconds, 1),
                            "results": results}  # fmt: skip
    if summary.skipped:
        said["not offered at this scale"] = summary.skipped
    if publish:
        said["published"] = runner.publish(chosen, scale, results)
        papers = {paper.name: paper for paper, _ in chosen}
        said["written"] = [str(file) for file in map(refresh, papers.values()) if file]
    if summary.failed or problems:
        said["failures"] = [{"unit": unit, "error": error} for unit, error in summary.failed.items()]
        units = summary.measured + summary.cached + len(summary.failed)
        parts = [f"{len(summary.failed)} of {units} units failed"] if summary.failed else []
        parts += [f"{name} cannot be loaded" for name in problems or {}]
        raise WorkFailed("; ".join(parts) + "; the next run tries again", said)
    return said


def report_chosen(chosen: Chosen, problems: dict[str, str], results: Path, output: Path | None) -> dict[str, Any]:
    """Print the tables and write the report's files; returns where they are."""
    from rich.console import Console

    from .files import write_report
    from .report import collect, tally
    from .terminal import print_report

    reports = [collect(paper, table, results) for paper, table in chosen]
    console = Console(highlight=False)
    for report in reports:
        print_report(console, report)
    files = write_report(reports, problems, output or results / "report")
    counts = {f"claims, {scale}": ", ".join(f"{n} {s}" for s, n in c.items()) for scale, c in tally(reports).items()}
    return {**counts, **files}


@app.command()
def report(
    targets: Targets = None,
    results: Results = Path("results"),
    output: Annotated[Path | None, typer.Option(help="Folder of the report (default: RESULTS/report).")] = None,
) -> dict[str, Any]:
    """Print the tables, the paper's figures beside the measured ones; write HTML, Markdown, JSON and plots."""
    chosen, problems = _chosen(targets or [])
    _warn(problems)
    return report_chosen(chosen, problems, results, output)


@app.command()
def claims(targets: Targets = None, results: Results = Path("results")) -> dict[str, Any]:
    """The papers' claims: held, not held or not measured, at each scale."""
    from rich.console import Console

    from .report import collect, tally
    from .terminal import print_claims, print_heading

    chosen, problems = _chosen(targets or [])
    _warn(problems)
    reports = [collect(paper, table, results) for paper, table in chosen]
    console = Console(highlight=False)
    for found in reports:
        if found.table.claims:
            print_heading(console, found)
            print_claims(console, found)
            console.print()
    for scale, counts in tally(reports).items():
        console.print(f"{scale}: {', '.join(f'{n} {status}' for status, n in counts.items())}")
    rows = [
        {"table": f"{r.paper.name}/{r.table.id}", "claim": claim, "scale": scale, "verdict": v.status,
         "detail": v.detail}
        for r in reports for scale, found in r.scales.items() for claim, v in found.verdicts.items()
    ]  # fmt: skip
    return Shown(count=tally(reports), claims=rows)


def add_reproduce(application: App, paper: Callable[[], Paper]) -> None:
    """Give a package's command the verb `reproduce [TABLE]...`: run its own tables, then report them."""

    @application.command("reproduce")
    def reproduce(
        tables: Annotated[
            list[str] | None, typer.Argument(metavar="[TABLE]...", help="All where none is named.")
        ] = None,
        scale: ScaleName = "quick",
        results: Results = Path("results"),
        force: Annotated[bool, typer.Option("--force", help="Measure again what was measured already.")] = False,
    ) -> dict[str, Any]:
        """Measure the paper's tables and print them beside the paper's figures."""
        found = paper()
        chosen = choose([found], [f"{found.name}/{t}" for t in tables or []] or [found.name])
        failure: WorkFailed | None = None
        try:
            said = run_chosen(chosen, scale, results, force=force)
        except WorkFailed as error:  # the report shows what there is, failures among it
            failure, said = error, error.result or {}
        said = {**said, **report_chosen(chosen, {}, results, None)}
        if failure is not None:
            raise WorkFailed(str(failure), said)
        return said


def main() -> None:
    """The console command."""
    app()
