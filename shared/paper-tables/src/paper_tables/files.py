"""Write a report's files: report.json, report.md, report.html and the pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import markdown, page
from .report import LABELS, TableReport, as_json, tally
from .store import write


def write_report(reports: Sequence[TableReport], problems: Mapping[str, str], folder: Path) -> dict[str, Path]:
    """Write everything below `folder`, each file whole or not at all; returns where the three pages are."""
    from .plots import draw_all

    paths: dict[tuple[str, str], list[str]] = {}
    pictures: dict[tuple[str, str], list[tuple[str, bytes]]] = {}
    for report in reports:
        key = (report.paper.name, report.table.id)
        for plot, scale, png in draw_all(report):
            name = f"plots/{key[0]}-{key[1]}-{plot.id}-{scale}.png"
            write(folder / name, png)
            paths.setdefault(key, []).append(name)
            pictures.setdefault(key, []).append((f"{plot.title}, {LABELS[scale]}", png))
    data = {"claims": tally(reports), "problems": dict(problems), "tables": [as_json(report) for report in reports]}
    files = {"html": folder / "report.html", "markdown": folder / "report.md", "json": folder / "report.json"}
    write(files["html"], page.page(reports, problems, pictures))
    write(files["markdown"], markdown.page(reports, problems, paths))
    write(files["json"], json.dumps(data, indent=1, allow_nan=False) + "\n")
    return files
