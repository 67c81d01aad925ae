"""The tables: every row's parameters are measured as they say, and the files read at every scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from moe_compress.tables import FIGURES, PAPER, folder_of, run

from paper_tables import Context
from paper_tables.errors import TableError


@pytest.fixture
def cell(folder: Path) -> dict[str, Any]:
    return {
        "model": str(folder), "calibration": "zoo:calibration", "text": "zoo:heldout", "samples": 4, "length": 48,
        "documents": 1, "characters": 500, "group": 32, "min_tokens": 4, "drop": "none", "slim": "none", "seed": 0,
        "figures": ["bits", "bytes", "parameters", "flops"], "package": "moe-compress", "table": "t", "scale": "quick",
        "row": "r",
    }  # fmt: skip


@pytest.fixture(scope="module")
def context() -> Context:
    return Context()


def test_every_table_reads_and_names_what_is_known() -> None:
    tables = PAPER.tables()
    assert set(tables) == {"slimming", "trimming", "experts", "recipe", "finetuning"}
    for table in tables.values():
        assert {"quick", "tiny", "paper"} <= set(table.scales)
        for scale in table.scales:
            for unit in table.units(scale):
                assert set(unit.cell["figures"]) <= set(FIGURES), f"{table.id}/{scale}"
    assert sum(len(t.claims) for t in tables.values()) >= 12


def test_the_figures_of_the_abstract_are_there_and_no_other() -> None:
    figures = {(t.id, f.row, f.column): (f.value, f.provenance) for t in PAPER.tables().values() for f in t.figures}
    assert figures == {
        ("recipe", "mixtral-8x7b", "speedup"): (6.05, "abstract"),
        ("recipe", "mixtral-8x7b", "gigabytes"): (20.0, "abstract"),
        ("recipe", "mixtral-8x7b", "kept"): (92, "abstract"),
    }


def test_rows_are_made_as_they_say(cell: dict[str, Any], context: Context) -> None:
    dense = run(cell, context)
    assert (dense["bytes"], dense["parameters"], dense["flops"]) == (1, 1, 1)
    six = run({**cell, "drop": "expert", "n": 6}, context)
    assert six["flops"] == pytest.approx(1, abs=0.01)  # but for the router's rows
    assert six["parameters"] == pytest.approx(1 - 4 * 2 * 3 * 32 * 32 / 242_976, abs=0.02)
    layer = run({**cell, "drop": "layer", "n": 1}, context)
    assert layer["flops"] < six["flops"]
    pruned = run({**cell, "slim": "magnitude", "sparsity": 0.5}, context)
    assert pruned["bytes"] == pytest.approx(1, abs=0.02)
    assert pruned["bits"]["value"] != dense["bits"]["value"]
    both = run({**cell, "drop": "layer", "n": 1, "slim": "rtn", "bits": 4}, context)
    assert both["bytes"] < layer["bytes"] - 0.15
    assert run(cell, context) == dense


def test_a_row_is_made_once(cell: dict[str, Any], context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_compress import workflow

    row = {**cell, "drop": "block", "n": 1}
    first = folder_of(row, context)
    monkeypatch.setattr(workflow, "trim_to_folder", lambda *a, **k: pytest.fail("was made again"))
    assert folder_of(row, context) == first
    with pytest.raises(pytest.fail.Exception):
        folder_of({**row, "n": 2}, context)


def test_speed_is_beside_the_base(cell: dict[str, Any], context: Context) -> None:
    cell |= {"context": 16, "new_tokens": 2, "rounds": 3, "figures": ["prefill", "decode"]}
    assert run(cell, context) == {"prefill": 1.0, "decode": 1.0}
    assert run({**cell, "drop": "layer", "n": 2}, context)["decode"]["value"] > 0


@pytest.mark.slow
def test_budget_finetuning_and_tasks(cell: dict[str, Any], context: Context) -> None:
    pytest.importorskip("peft", reason="needs the extra [train]")
    assert run({**cell, "budget": 0.8, "slim": "gptq"}, context)["bytes"] < 0.82
    tuned = {
        **cell,
        "drop": "layer",
        "n": 1,
        "tune": True,
        "steps": 3,
        "rate": 0.01,
        "train": "zoo:calibration",
        "tune_length": 32,
    }
    assert run(tuned, context)["bits"] != run({**cell, "drop": "layer", "n": 1}, context)["bits"]
    pytest.importorskip("lm_eval", reason="needs the extra [eval]")
    found = run({**cell, "tasks": ["zoo_name"], "limit": 8, "figures": ["kept"]}, context)
    assert found["kept"] == {"value": 100, "se": 0.0}


def test_unknown_words_name_the_nearest(cell: dict[str, Any], context: Context) -> None:
    with pytest.raises(TableError, match="did you mean 'layer'"):
        run({**cell, "drop": "layers"}, context)
    with pytest.raises(TableError, match="did you mean 'bytes'"):
        run({**cell, "figures": ["byte"]}, context)
