"""A paper that does not exist, for the tests: figures by formula, no model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paper_tables import Context, Paper

MAIN = """\
id: main
title: Dropping layers of a model that does not exist
source: arXiv 0000.00000, Table 1
about: Layers are dropped by a formula.
columns:
  bits: {title: bits per byte, format: ".3f", better: lower}
  accuracy: {title: next line, unit: "%", format: ".1f", better: higher}
  kv: {title: KV share, format: ".3f", better: lower, note: keys and values in bytes}
rows:
  - {id: baseline, title: Baseline, set: {method: none, n: 0}, reference: true}
  - {id: "{method}-{n}", title: "{method}, {n} dropped", grid: {method: [attention, mlp], n: $n}}
  - {id: huge, title: A huge model, set: {method: attention, n: 40}, scales: [paper]}
settings: {layers: 16}
scales:
  quick: {seeds: [0], vary: {n: [2, 4]}, settings: {model: none}}
  tiny: {seeds: [0, 1, 2], vary: {n: [2, 4, 6]}, settings: {model: none}}
  paper: {vary: {n: [8]}, settings: {model: owner/huge, layers: 80}}
paper:
  - {row: huge, column: accuracy, value: 97.6, from: abstract, source: second sentence}
  - {row: attention-8, column: accuracy, value: 98.7654, from: recalled}
claims:
  - id: cheaper
    text: Dropping attention costs less than dropping MLPs at every count.
    for: {n: $n}
    holds: bits["attention-{n}"] < bits["mlp-{n}"]
  - id: proportion
    text: KV memory falls in proportion.
    for: {n: $n}
    holds: abs(kv["attention-{n}"] - (1 - n / layers)) < 1e-9
  - id: free
    text: Dropping costs nothing.
    holds: accuracy["mlp-4"] >= accuracy["baseline"] - 2 * se(accuracy["mlp-4"] - accuracy["baseline"])
  - {id: large, text: The huge model keeps 95 %., holds: 'accuracy["huge"] > 95'}
plots:
  - {id: curve, kind: curve, title: Loss over the number dropped, x: n, y: bits, by: method, baseline: baseline}
  - {id: bars, kind: bars, title: Accuracy, y: accuracy}
  - {id: similarity, kind: heatmap, title: Similarity, row: baseline, artefact: similarity, x: gap, y: layer}
"""


def run(cell: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Figures by formula; the seed moves them a little."""
    n, cost = cell["n"], {"none": 0.0, "attention": 0.02, "mlp": 0.05}[cell["method"]]
    wobble = 0.004 * math.sin(1.7 * cell["seed"] + n)
    if cell["method"] == "none":
        context.artefact("similarity", [[math.exp(-0.1 * g - 0.05 * abs(8 - i)) for g in range(8)] for i in range(16)])
    kept = 1 - n / cell["layers"] if cell["method"] == "attention" else 1.0
    return {
        "bits": 1.2 + cost * n + wobble,
        "accuracy": {"value": 60 - 100 * cost * n + 50 * wobble, "se": 2.5},
        "kv": kept,
    }


def make_paper(folder: Path, run: Any = run, text: str = MAIN, name: str = "demo") -> Paper:
    """The demo paper with its table written into `folder`."""
    tables = folder / "tables"
    tables.mkdir(parents=True, exist_ok=True)
    (tables / "main.yaml").write_text(text)
    return Paper(name, tables, run, title="A Paper That Does Not Exist", code=())
