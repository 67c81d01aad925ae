"""The tables: every arm is made as it says, what rows share is made once, and the files read at every scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from ressa.arms import ARMS, masks_of, pruning_of, result_of
from ressa.data import BadRow
from ressa.tables import FIGURES, PAPER, run

from model_hooks.errors import RequestError
from paper_tables import Context
from paper_tables.errors import TableError

pytest.importorskip("datasets", reason="needs the extra [train]")

CELL: dict[str, Any] = {
    "model": "zoo:llava", "calibration": "zoo:shapes:calibration", "calibration_samples": 16, "prune": 70,
    "data": "zoo:shapes:train", "samples": 64, "steps": 4, "batch": 16, "rate": 0.005, "full_rate": 0.001,
    "heldout": "zoo:shapes:heldout", "measured": 48, "figures": ["exact", "gained", "kept", "zeros"], "seed": 0,
    "package": "ressa", "table": "t", "scale": "quick", "row": "r",
}  # fmt: skip


@pytest.fixture(scope="module")
def context() -> Context:
    return Context()


def test_every_table_reads_and_names_what_is_known() -> None:
    tables = PAPER.tables()
    assert set(tables) == {"repair", "allocation", "pruning", "ablation"}
    for table in tables.values():
        assert {"quick", "tiny", "paper"} <= set(table.scales)
        for scale in table.scales:
            for unit in table.units(scale):
                assert set(unit.cell["figures"]) <= set(FIGURES), f"{table.id}/{scale}"
                assert unit.cell["arm"] in ARMS
                if unit.cell["arm"] != "dense":
                    assert 0 < pruning_of(unit.cell).sparsity < 1
    assert "features" not in {unit.cell["row"] for unit in tables["ablation"].units("paper")}  # its model has none
    assert sum(len(t.claims) for t in tables.values()) >= 15


def test_published_figures_are_those_of_the_source() -> None:
    tables = PAPER.tables()
    found = {(t.id, f.row): f.value for t in tables.values() for f in t.figures}
    assert found["repair", "none-2-4"] == 55.7
    assert found["repair", "ressa-2-4"] == 66.3
    assert found["allocation", "hundred-50"] == 45.0
    assert {f.provenance for t in tables.values() for f in t.figures} == {"repo", "figure"}


def test_every_arm_is_made_as_it_says(context: Context) -> None:
    dense = result_of({**CELL, "arm": "dense"}, context)
    masks = masks_of(CELL, context)
    before = {path: weight.clone() for path, weight in dense.model.state_dict().items()}
    for arm in ARMS[1:]:
        result = result_of({**CELL, "arm": arm, "rate": 0.05}, context)
        own = {p: result.model.get_submodule(p).weight.detach() for p in masks}
        gone = {p: own[p][~mask] for p, mask in result.masks.items()}
        zero = all(not bool(values.any()) for values in gone.values())
        assert zero == (arm != "lora"), arm
        same = all(torch.equal(result.masks[p], masks[p]) for p in masks)
        assert same == (arm not in ("lora-prune", "lora-kd-prune")), arm
        kept = torch.cat([(own[p] - before[f"{p}.weight"])[masks[p]] for p in masks])
        assert bool((kept != 0).any()) == (arm != "none"), arm
    assert all(torch.equal(w, before[p]) for p, w in dense.model.state_dict().items()), "the shared base was changed"


def test_figures_of_a_row(context: Context) -> None:
    dense = run({**CELL, "arm": "dense"}, context)
    assert dense["exact"]["value"] > 95
    assert dense["kept"]["value"] == 100
    none = run({**CELL, "arm": "none"}, context)
    assert none["exact"]["value"] < 70
    assert none["zeros"] == 100
    assert "gained" not in none
    ressa = run({**CELL, "arm": "ressa"}, context)
    assert ressa["gained"] == pytest.approx(ressa["exact"]["value"] - none["exact"]["value"])
    assert ressa["zeros"] == 100


def test_lora_is_trained_once_for_its_arms(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    from ressa import repairing

    cell = {**CELL, "seed": 7, "steps": 1}
    runs: list[int] = []
    whole = repairing.run
    monkeypatch.setattr(repairing, "run", lambda *a, **k: runs.append(1) or whole(*a, **k))
    for arm in ("lora", "lora-mask", "lora-prune"):
        run({**cell, "arm": arm}, context)
    assert len(runs) == 1
    run({**cell, "arm": "lora", "steps": 2}, context)
    assert len(runs) == 2


def test_sparsegpt_keeps_what_it_moved(context: Context) -> None:
    cell = {**CELL, "arm": "none", "metric": "sparsegpt", "prune": "2-4"}
    dense, found = result_of({**CELL, "arm": "dense"}, context), result_of(cell, context)
    for path, mask in found.masks.items():
        own, was = (r.model.get_submodule(path).weight for r in (found, dense))
        assert not bool(own[~mask].any())
        assert bool((own[mask] != was[mask]).any())


def test_shares_of_a_sum_go_to_the_branches() -> None:
    how = pruning_of({"share": 30, "total": 120})
    assert (how.vision, how.language) == (0.3, 0.9)
    four = pruning_of({"prune": "1-4"})
    assert (four.pattern, four.sparsity) == ("1:4", 0.75)
    assert pruning_of({"prune": 50, "pruned_branches": "vision"}).language == 0


def test_tasks_are_averaged(context: Context) -> None:
    tasks = [{"data": "zoo:shapes:heldout", "samples": 6, "metric": metric} for metric in ("vqa", "exact")]
    found = run({**CELL, "arm": "dense", "figures": ["average"], "tasks": tasks, "measured": 12}, context)
    assert found["average"]["value"] == 100


def test_tasks_of_a_row_that_another_table_has_measured(context: Context) -> None:
    row = {**CELL, "arm": "none", "figures": ["exact", "zeros"], "measured": 6}
    assert set(run(row, context)) == {"exact", "zeros"}
    tasks = [{"data": "zoo:shapes:heldout", "samples": 6, "metric": "exact"}]
    found = run({**row, "figures": ["exact", "average"], "tasks": tasks}, context)
    assert found["average"]["value"] == pytest.approx(found["exact"]["value"])
    three = [{**tasks[0], "samples": 3}]
    assert run({**row, "figures": ["average"], "tasks": three}, context)["average"]["se"] != found["average"]["se"]


def test_what_cannot_be_measured_is_said_before_training(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ressa import tables

    rows(tmp_path, said=["red circle"])
    cell = {**CELL, "arm": "ressa", "figures": ["average"]}
    cell["tasks"] = [{"data": str(tmp_path / "rows.jsonl"), "samples": 1, "metric": "cider"}]
    monkeypatch.setattr(tables, "result_of", lambda *a: pytest.fail("was trained"))
    with pytest.raises(BadRow, match=r"rows.jsonl:1: no answer in it"):
        run(cell, context)
    monkeypatch.setattr(tables, "_measured", lambda *a: {"exact": {"value": 1.0}})
    with pytest.raises(KeyError, match="zeros"):
        run({**cell, "figures": ["exact", "zeros"]}, context)


def test_training_sees_every_caption_and_images_are_not_held(context: Context, tmp_path: Path) -> None:
    from ressa.arms import base_of
    from ressa.repairing import Rows

    rows(tmp_path, annotations_captions=["red circle", "blue cross", "green square"])
    base, data = base_of({**CELL, "arm": "dense"}, context), str(tmp_path / "rows.jsonl")
    examples, inputs = base.encoded(data, 3, train=True)
    assert isinstance(inputs, Rows)
    assert len(examples) == len(inputs) == 3
    assert len({tuple(row["input_ids"][0].tolist()) for row in (inputs[i] for i in range(3))}) == 3
    assert len(base.encoded(data, 1)[0][0].answers) == 3
    with pytest.raises(RequestError, match="gives 3 examples, 4 are asked for"):
        base.encoded(data, 4, train=True)


def rows(folder: Path, **record: Any) -> None:
    """A file of one record, rows.jsonl, with its image."""
    Image.new("RGB", (32, 32)).save(folder / "one.png")
    (folder / "rows.jsonl").write_text(json.dumps({"image": "one.png", **record}))


def test_unknown_words_name_the_nearest(context: Context) -> None:
    with pytest.raises(TableError, match="did you mean 'ressa'"):
        run({**CELL, "arm": "resa"}, context)
    with pytest.raises(TableError, match="did you mean 'zeros'"):
        run({**CELL, "arm": "none", "figures": ["zeroes"]}, context)


def test_bench_says_what_adapters_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    from ressa import bench

    small = bench.probe_llava(32, 64, 1)
    monkeypatch.setattr(bench, "probe_llava", lambda: small)
    found = bench.run(batch_size=2, rounds=3)
    rows = {row["step"]: row for row in found["steps"]}
    more = {"exact, taught", "exact, taught by cache", "lora, taught, checkpointed", "exact, taught, checkpointed"}
    assert set(rows) == {"lora", "exact", "ste", "naive", *more}
    assert rows["lora"]["time_over_lora"] == rows["lora"]["memory_over_lora"] == 1
    assert rows["naive"]["peak_bytes"] > rows["exact"]["peak_bytes"] > 0
    assert not small.training
    assert found["seconds_of_cpu_to_prune_zoo_llava"] > 0
    ratios = {row["ratio"]: row for row in found["ratios"]}
    assert len(ratios) == 10
    assert ratios["time: exact / naive"]["target"] == "at most 0.95"
    assert {f"time: exact / naive, one layer, {tokens} tokens" for tokens in (256, 1024)} <= set(ratios)
    assert all(row["value"] > 0 for row in ratios.values())
    assert ratios["memory: exact / LoRA"]["value"] == rows["exact"]["memory_over_lora"]
    assert rows["exact, taught, checkpointed"]["peak_bytes"] < rows["exact, taught"]["peak_bytes"]
