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


def test_a_step_of_finetuning_sees_the_global_batch(
    cell: dict[str, Any], context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe_compress import finetune

    seen: list[Any] = []

    def keep(config: Any) -> None:
        config.output.mkdir()
        seen.append(config)

    monkeypatch.setattr(finetune, "finetune", keep)
    row = {**cell, "tune": True, "steps": 3, "train": "zoo:train", "tune_length": 32}
    settings = ({}, {"batch": 2, "accumulation": 8}, {"batch": 2, "accumulation": 2}, {"rank": 4})
    assert len({folder_of({**row, **own}, context) for own in settings}) == 4
    found = [(c.batch_size, c.accumulation, c.samples, c.max_steps, c.rank, c.alpha) for c in seen]
    assert found == [(4, 1, 12, 3, 16, 32), (2, 8, 48, 3, 16, 32), (2, 2, 12, 3, 16, 32), (4, 1, 12, 3, 4, 8)]
    paper = [unit.cell for unit in PAPER.tables()["finetuning"].units("paper")]
    assert {c["batch"] * c["accumulation"] for c in paper} == {32}  # the authors' global batch


def test_the_bytes_of_a_hub_model_are_those_of_the_files_that_hold_its_tensors(
    cell: dict[str, Any], context: Context, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from moe_compress.workflow import weight_bytes

    from model_hooks import load

    load(folder)[0].save_pretrained(tmp_path / "cached", max_shard_size="300KB")
    shards = list((tmp_path / "cached").glob("*.safetensors"))
    assert len(shards) > 1
    (tmp_path / "cached/consolidated.safetensors").write_bytes(b"the same weights once more")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(tmp_path / "cached"))
    assert weight_bytes("owner/name") == sum(file.stat().st_size for file in shards)


def test_unknown_words_name_the_nearest(cell: dict[str, Any], context: Context) -> None:
    with pytest.raises(TableError, match="did you mean 'layer'"):
        run({**cell, "drop": "layers"}, context)
    with pytest.raises(TableError, match="did you mean 'bytes'"):
        run({**cell, "figures": ["byte"]}, context)
