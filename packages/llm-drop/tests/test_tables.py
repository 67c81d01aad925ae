"""The tables: every row's parameters are measured as they say, and the files read at every scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from llm_drop import select
from llm_drop.stages import pretrain
from llm_drop.tables import FIGURES, PAPER, plan_of_cell, run, scores_of_cell

from model_hooks import fingerprint
from paper_tables import Context
from paper_tables.claims import judge
from paper_tables.errors import TableError
from paper_tables.quantity import Quantity


@pytest.fixture
def cell(folder: Path) -> dict[str, Any]:
    return {
        "model": str(folder), "calibration": "zoo:calibration", "samples": 6, "length": 64, "text": "zoo:heldout",
        "documents": 2, "characters": 600, "seed": 0, "method": "attention", "n": 2, "figures": ["language", "cost"],
        "package": "llm-drop", "table": "t", "scale": "quick", "row": "r",
    }  # fmt: skip


@pytest.fixture(scope="module")
def context() -> Context:
    return Context()


def test_every_table_reads_and_names_known_figures() -> None:
    tables = PAPER.tables()
    assert set(tables) == {
        "main", "half", "joint", "speed", "quantised", "calibration", "stages", "healing", "similarity",
    }  # fmt: skip
    for table in tables.values():
        for scale in table.scales:
            for unit in table.units(scale):
                assert set(unit.cell["figures"]) <= set(FIGURES), f"{table.id}/{scale}"
                tasks = unit.cell["tasks"] if "tasks" in unit.cell["figures"] else []
                assert set(tasks) <= set(table.columns), f"{table.id}/{scale}"
    assert all("quick" in t.scales and "tiny" in t.scales for t in tables.values())
    assert sum(len(t.claims) for t in tables.values()) >= 20


def test_the_figures_of_the_abstract_are_there_and_no_other() -> None:
    figures = {(t.id, f.row, f.column): (f.value, f.provenance) for t in PAPER.tables().values() for f in t.figures}
    assert figures == {
        ("half", "llama-2-70b-half", "kept"): (97.6, "abstract"),
        ("half", "llama-2-70b-half", "decode"): (1.484, "abstract"),
        ("joint", "joint-31", "kept"): (90, "abstract"),
    }


def rows_of(table: str) -> dict[str, dict[str, Any]]:
    return {row.id: dict(row.params) for row in PAPER.tables()[table].rows("paper")}


def test_scale_paper_has_the_rows_of_the_papers_tables() -> None:
    kinds, main, joint, healing = ("attention", "mlp", "block"), rows_of("main"), rows_of("joint"), rows_of("healing")
    for n in (4, 8):
        assert {f"{model}{kind}-{n}" for model in ("", "llama-2-13b-") for kind in kinds} <= set(main)
    assert {row["model"] for name, row in main.items() if "llama" in name} == {"meta-llama/Llama-2-13b-hf"}
    counts = {kind: [row["n"] for row in joint.values() if row["method"] == kind] for kind in (*kinds, "joint")}
    assert counts["attention"] == counts["mlp"] == counts["joint"]
    assert {8, 31} <= set(counts["joint"])
    lengths = [(row["context"], row["new_tokens"]) for row in rows_of("speed").values() if "context" in row]
    assert list(dict.fromkeys(lengths)) == [(n, n) for n in (32, 64, 128, 256, 512)]
    for model in ("llama-2-7b-math", "mistral-7b-math"):
        rows = {name.removeprefix(model): row for name, row in healing.items() if name.startswith(model)}
        assert list(rows) == ["", "-attention-8", "-attention-12", "-attention-8-lora", "-attention-12-lora"]
        assert [(r["method"], r.get("n"), r["heal"]) for r in rows.values()] == [
            ("none", None, "none"), ("attention", 8, "none"), ("attention", 12, "none"), ("attention", 8, "lora"),
            ("attention", 12, "lora"),
        ]  # fmt: skip


def test_the_claims_of_the_main_table_ask_for_both_models() -> None:
    table = PAPER.tables()["main"]
    claims = {claim.id: claim for claim in table.claims}
    figures = {"attention": 1.1, "mlp": 1.2, "block": 1.3}

    def judged(claim: str, worse: str = "") -> str:
        def lookup(row: str, column: str) -> Quantity:
            return Quantity(9.0 if row == worse else figures[row.split("-")[-2]])

        return judge(table, claims[claim], "paper", lookup).status

    for claim in ("attention-under-mlp", "attention-under-block"):
        assert judged(claim) == "held"
        assert judged(claim, "attention-8") == judged(claim, "llama-2-13b-attention-8") == "not held"


def test_a_row_drops_what_it_says(cell: dict[str, Any], context: Context) -> None:
    found = run(cell, context)
    assert found["kv"] == pytest.approx(4 / 6)
    base = run({**cell, "method": "none"}, context)
    assert base["kv"] == base["parameters"] == 1
    assert found["bits"]["value"] != base["bits"]["value"]
    again = run({**cell, "method": "none"}, context)
    assert again["bits"] == base["bits"]  # the parent was left as it was


@pytest.mark.parametrize("method", ["attention", "mlp", "block", "joint"])
def test_plans_are_those_of_the_selection(cell: dict[str, Any], context: Context, method: str) -> None:
    cell["method"] = method
    plan = plan_of_cell(cell, context)
    keyword = {"block": "blocks"}.get(method, method)
    assert plan == select(scores_of_cell(cell, context), **{keyword: 2})


def test_shares_seeds_and_other_ways_to_choose(cell: dict[str, Any], context: Context) -> None:
    del cell["n"]
    half = plan_of_cell({**cell, "share": 0.5}, context)
    assert half is not None
    assert len(half.attention) == 3
    lots = {plan_of_cell({**cell, "share": 0.5, "selection": "random", "seed": s}, context).units for s in range(6)}  # type: ignore[union-attr]
    assert len(lots) > 1
    assert all(len(units) == 3 for units in lots)
    other = scores_of_cell({**cell, "seed": 1}, context)
    assert other.data_fingerprint != scores_of_cell(cell, context).data_fingerprint
    iterative = plan_of_cell({**cell, "n": 2, "selection": "iterative"}, context)
    assert iterative is not None
    assert "iterative" in iterative.how
    norm = plan_of_cell({**cell, "n": 2, "objective": "norm"}, context)
    assert norm == select(scores_of_cell(cell, context), attention=2, objective="norm")


def test_overlap_speed_similarity_and_quality_kept(cell: dict[str, Any], context: Context) -> None:
    cell |= {"reference": {"samples": 6, "calibration": "zoo:calibration"}, "context": 32, "new_tokens": 2, "rounds": 3}
    same = run({**cell, "figures": ["choice", "speed"]}, context)
    assert same["overlap"] == 100
    assert same["decode"]["value"] > 0
    other = run({**cell, "figures": ["choice"], "selection": "random", "seed": 3}, context)
    assert 0 <= other["overlap"] <= 100
    context.artefacts = {}
    found = run({**cell, "method": "none", "figures": ["similarity"]}, context)
    assert found["attention_similarity"] == pytest.approx(sum(scores_of_cell(cell, context).attention.values()) / 6)
    assert [len(row) for row in context.artefacts["similarity"]] == [6, 6, 6]
    assert [len(row) for row in context.artefacts["gaps"]] == [6, 5, 4, 3, 2, 1]


@pytest.mark.slow
def test_quality_kept_is_a_share_of_the_parents(cell: dict[str, Any], context: Context) -> None:
    cell |= {"tasks": ["zoo_name"], "limit": 8, "figures": ["kept", "tasks"]}
    whole = run({**cell, "method": "none"}, context)
    assert whole["kept"]["value"] == 100
    found = run(cell, context)
    assert found["kept"]["value"] == pytest.approx(100 * found["accuracy"]["value"] / whole["accuracy"]["value"])


def test_few_bits_and_repair_change_the_row(cell: dict[str, Any], context: Context) -> None:
    plain, small = run(cell, context)["bits"], run({**cell, "bits": 3}, context)["bits"]
    repaired = run({**cell, "repair": True}, context)["bits"]
    assert len({plain["value"], small["value"], repaired["value"]}) == 3


def test_unknown_words_name_the_nearest(cell: dict[str, Any], context: Context) -> None:
    with pytest.raises(TableError, match="did you mean 'attention'"):
        run({**cell, "method": "atention"}, context)
    with pytest.raises(TableError, match="did you mean 'language'"):
        run({**cell, "figures": ["langage"]}, context)


def test_stages_are_points_of_one_run(cell: dict[str, Any], context: Context) -> None:
    cell |= {"pretrain": {"steps": [1, 3], "layers": 2}, "model": "zoo:llama", "method": "none", "length": 32}
    cell["figures"] = ["similarity"]
    early, late = run({**cell, "step": 1}, context), run({**cell, "step": 3}, context)
    assert early["attention_similarity"] > late["attention_similarity"]  # what blocks add starts at zero
    (short,) = pretrain([1], layers=2, every=256).values()
    assert fingerprint(short) == fingerprint(pretrain([1, 3], layers=2, every=256)[1])
    with pytest.raises(ValueError, match="ascending"):
        pretrain([3, 1], layers=2)
