"""A report as one HTML page that needs nothing beside itself: styles inside, pictures embedded."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

from .report import LABELS, TableReport, tally

STYLE = """
:root { --ink: #1f2328; --soft: #667; --line: #dde1e6; --wash: #f6f7f9; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  color: var(--ink); margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 1180px; }
h1 { font-size: 1.6rem; margin: 0 0 .4rem; } h2 { font-size: 1.3rem; margin: 3rem 0 .2rem; }
h3 { font-size: 1.08rem; margin: 2.2rem 0 .1rem; } p { margin: .35rem 0; max-width: 75ch; }
a { color: #0b57a4; text-decoration: none; } a:hover { text-decoration: underline; }
nav { columns: 2; margin: 1rem 0; font-size: .93rem; } nav a { display: block; break-inside: avoid; }
.soft, .notes { color: var(--soft); font-size: .88rem; }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; }
th { font-weight: 600; } thead th { border-bottom: 1px solid var(--line); }
thead tr:first-child th { text-align: center; border-bottom: none; padding-bottom: 0; }
thead tr:last-child th { font-weight: 400; color: var(--soft); font-size: .83rem; border-bottom: 2px solid #8a929c; }
tbody th { text-align: left; font-weight: 400; } tbody tr:nth-child(even) { background: var(--wash); }
tbody tr.reference th, tbody tr.reference td { font-style: italic; border-bottom: 1px solid var(--line); }
tbody tr:last-child > * { border-bottom: 1px solid #8a929c; }
.first { border-left: 1px solid var(--line); } .published { background: #fff8e6; }
.se { color: var(--soft); font-size: .85em; } .best { font-weight: 700; } .none { color: #b6bcc4; }
.claims td, .claims th { text-align: left; white-space: normal; vertical-align: top; }
.claims td.verdict { min-width: 13rem; max-width: 24rem; } .claims tbody th { max-width: 34rem; }
.claims thead tr:first-child th { text-align: left; padding-bottom: .3rem; }
.mark { display: inline-block; padding: 0 .55rem; border-radius: 1rem; font-size: .83rem; font-weight: 600; }
.held { background: #dcf3e3; color: #14612f; } .not-held { background: #fde3e0; color: #96201a; }
.not-measured { background: #eceef1; color: #56606b; }
.detail { color: var(--soft); font-size: .8rem; font-family: ui-monospace, Menlo, Consolas, monospace; }
code { font-size: .84em; color: var(--soft); }
.plots { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 1rem; margin: 1rem 0; }
.plots img { width: 540px; max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: 6px; }
.notes { margin: .4rem 0 0; padding-left: 1.1rem; } .wrong { color: #96201a; }
@media print { body { max-width: none; padding: 0; } h3 { break-after: avoid; } .plots { break-inside: avoid; } }
"""


def page(
    reports: Sequence[TableReport],
    problems: Mapping[str, str],
    plots: Mapping[tuple[str, str], list[tuple[str, bytes]]],
) -> str:
    """All tables. `plots`: (package, table) -> (description, PNG) of its pictures."""
    parts = ["<!doctype html>", '<html lang="en"><head><meta charset="utf-8">', "<title>Tables</title>",
             '<meta name="viewport" content="width=device-width, initial-scale=1">',
             f"<style>{STYLE}</style></head><body>", "<h1>Tables, measured</h1>"]  # fmt: skip
    if any("published" in sources for r in reports for _, sources in r.columns()):
        parts.append(
            '<p class="soft">Figures of the papers stand beside those measured, on <span class="published">&nbsp;this '
            "ground&nbsp;</span>; ± is a standard error; the best measured figure of a column is bold.</p>"
        )
    else:
        parts.append('<p class="soft">± is a standard error; the best measured figure of a column is bold.</p>')
    parts += [_tally(scale, counts) for scale, counts in tally(reports).items()]
    parts += [f'<p class="wrong"><b>{escape(n)}</b> could not be read: {escape(w)}</p>' for n, w in problems.items()]
    if len(reports) > 1:
        links = (f'<a href="#{_anchor(r)}">{escape(r.paper.name)}: {escape(r.table.title)}</a>' for r in reports)
        parts.append(f"<nav>{''.join(links)}</nav>")
    package = ""
    for report in reports:
        if report.paper.name != package:
            package = report.paper.name
            parts.append(f"<h2>{escape(package)}</h2>")
            parts.append(f"<p>{escape(report.paper.title)}</p>" if report.paper.title else "")
        parts += _table(report, plots.get((package, report.table.id), []))
    return "\n".join(part for part in [*parts, "</body></html>"] if part) + "\n"


def _anchor(report: TableReport) -> str:
    return escape(f"{report.paper.name}-{report.table.id}")


def _tally(scale: str, counts: Mapping[str, int]) -> str:
    marks = " ".join(f"{_mark(status, f'{n} {status}')}" for status, n in counts.items() if n)
    return f"<p>Claims, {escape(LABELS[scale])}: {marks}</p>" if marks else ""


def _mark(status: str, text: str) -> str:
    return f'<span class="mark {status.replace(" ", "-")}">{escape(text)}</span>'


def _table(report: TableReport, plots: Sequence[tuple[str, bytes]]) -> list[str]:
    table = report.table
    parts = [f'<h3 id="{_anchor(report)}">{escape(table.title)}</h3>', f'<p class="soft">{escape(table.source)}</p>',
             f"<p>{escape(table.about.strip())}</p>" if table.about.strip() else ""]  # fmt: skip
    if not report.scales:
        parts.append('<p class="soft">Nothing of this table was measured yet.</p>')
    if report.columns():
        parts.append(f'<div class="wide">{_grid(report)}</div>')
    if table.claims and report.scales:
        parts.append(f'<div class="wide">{_claims(report)}</div>')
    if plots:
        images = (f'<img alt="{escape(text)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
                  for text, png in plots)  # fmt: skip
        parts.append(f'<div class="plots">{"".join(images)}</div>')
    notes = "".join(f"<li{_wrong(n)}>{escape(n)}</li>" for n in report.notes())
    return [*parts, f'<ul class="notes">{notes}</ul>' if notes else ""]


def _wrong(note: str) -> str:
    return ' class="wrong"' if " failed: " in note else ""


def _grid(report: TableReport) -> str:
    columns = report.columns()
    arrows = {"lower": " ↓", "higher": " ↑", "": ""}
    top = "".join(f'<th class="first" colspan="{len(s)}">{escape(c.header)}{arrows[c.better]}</th>' for c, s in columns)
    below = "".join(f"<th{_classes(s, s == sources[0])}>{escape(LABELS[s])}</th>"
                    for _, sources in columns for s in sources)  # fmt: skip
    reference = {row.id for scale in report.scales for row in report.table.rows(scale) if row.reference}
    best = {(c.id, s): report.best(c, s) for c, sources in columns for s in sources}
    body = []
    for row, title in report.rows.items():
        cells = []
        for column, sources in columns:
            for source in sources:
                marks = _classes(source, source == sources[0], row in best[column.id, source])
                cells.append(f"<td{marks}>{_cell(report.cell(row, column, source))}</td>")
        mark = ' class="reference"' if row in reference else ""
        body.append(f"<tr{mark}><th>{escape(title)}</th>{''.join(cells)}</tr>")
    return (f"<table><thead><tr><th></th>{top}</tr><tr><th></th>{below}</tr></thead>"
            f"<tbody>{''.join(body)}</tbody></table>")  # fmt: skip


def _classes(source: str, first: bool, best: bool = False) -> str:
    names = {"first": first, "published": source == "published", "best": best}
    given = " ".join(name for name, wanted in names.items() if wanted)
    return f' class="{given}"' if given else ""


def _cell(text: str) -> str:
    if not text:
        return '<span class="none">–</span>'
    value, _, error = text.partition(" ± ")
    return escape(value) + (f' <span class="se">± {escape(error)}</span>' if error else "")


def _claims(report: TableReport) -> str:
    head = "".join(f"<th>{escape(LABELS[s])}</th>" for s in report.scales)
    body = []
    for claim in report.table.claims:
        cells = []
        for found in report.scales.values():
            verdict = found.verdicts[claim.id]
            detail = f'<div class="detail">{escape(verdict.detail)}</div>' if verdict.detail else ""
            cells.append(f'<td class="verdict">{_mark(verdict.status, verdict.status)}{detail}</td>')
        source = f' <span class="soft">({escape(claim.source)})</span>' if claim.source else ""
        text = f"{escape(claim.text)}{source}<br><code>{escape(claim.holds)}</code>"
        body.append(f"<tr><th>{text}</th>{''.join(cells)}</tr>")
    return (f'<table class="claims"><thead><tr><th>Claim</th>{head}</tr></thead>'
            f"<tbody>{''.join(body)}</tbody></table>")  # fmt: skip
