"""The tables: every row's parameters are measured as they say, and the files read at every scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mod_router.baselines import by_lot, static
from mod_router.tables import FIGURES, METHODS, PAPER, Row, run
from mod_router.tune import TuneConfig, examples
from routermodels import SMALL

from model_hooks import fingerprint, load
from model_hooks.zoo import tokenizer as zoo_tokenizer
from paper_tables import Context
from paper_tables.errors import TableError

pytest.importorskip("accelerate", reason="needs the extra [train]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    path = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = zoo_tokenizer.load()
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "num_hidden_layers": 6, "pad_token_id": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, **sizes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def cell(folder: Path) -> dict[str, Any]:
    return {
        "model": str(folder), "data": "zoo:calibration", "text": "zoo:heldout", "calibration": "zoo:calibration",
        "samples": 16, "length": 32, "steps": 3, "batch": 4, "heldout": 12, "capacity": 0.5, "layers": "1-4", "seed": 0,
        "method": "ours", "figures": ["loss"], "package": "mod-router", "table": "t", "scale": "quick", "row": "r",
    }  # fmt: skip


@pytest.fixture(scope="module")
def context() -> Context:
    return Context()


def test_every_table_reads_and_names_what_is_known() -> None:
    tables = PAPER.tables()
    assert set(tables) == {"main", "granularity", "training", "curve", "ablation", "usage"}
    for table in tables.values():
        assert {"quick", "tiny", "paper"} <= set(table.scales)
        for scale in table.scales:
            for unit in table.units(scale):
                assert set(unit.cell["figures"]) <= set(FIGURES), f"{table.id}/{scale}"
                assert unit.cell["method"] in METHODS
    assert sum(len(t.claims) for t in tables.values()) >= 12


def test_the_figures_of_the_abstract_are_there_and_no_other() -> None:
    figures = {(t.id, f.row, f.column): (f.value, f.provenance) for t in PAPER.tables().values() for f in t.figures}
    assert figures == {
        ("main", "mindskip", "kept"): (99.8, "abstract"),
        ("main", "mindskip", "decode"): (1.21, "abstract"),
    }


@pytest.fixture(scope="module")
def hub(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the tables name and a test should not fetch or make: local sources of the same kinds."""
    room = tmp_path_factory.mktemp("hub")
    said = [(f"add {n} to x", f"def f(x):\n    return x + {n}\n") for n in range(12)]
    alpaca = [{"instruction": a, "input": "", "output": b, "text": f"{a}\n{b}"} for a, b in said]
    orca = [{"conversations": [{"from": "system", "value": "be short"}, {"from": "human", "value": f"please {a}"},
                               {"from": "gpt", "value": b}]} for a, b in said]  # fmt: skip
    for name, rows in (("alpaca", alpaca), ("orca", orca)):
        (room / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (room / "c4.txt").write_text("".join(b for _, b in said) * 40)
    return {
        "meta-llama/Meta-Llama-3-8B": str(folder), "tatsu-lab/alpaca": str(room / "alpaca.jsonl"),
        "Open-Orca/SlimOrca": str(room / "orca.jsonl"), "allenai/c4:en:validation": str(room / "c4.txt"),
        "zoo:train": "zoo:calibration", "zoo:pairs:train": "zoo:pairs:calibration",  # smaller, of the same kinds
    }  # fmt: skip


def test_a_tune_reads_what_the_cells_of_every_scale_name(
    hub: dict[str, str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mod_router import tables

    class Asked(Exception):
        pass

    def tuned(settings: dict[str, Any]) -> None:
        raise Asked(settings)

    monkeypatch.setattr(tables, "_tune", tuned)
    cells = [u.cell for t in PAPER.tables().values() for scale in t.scales for u in t.units(scale)]
    small = {"samples": 6, "heldout_samples": 3, "length": 128, "layers": "1-4", "model": str(folder)}
    model, tokenizer = load(folder)
    read: set[tuple[str, ...]] = set()
    for cell in cells:
        assert cell["text"] != cell["data"]
        if cell["method"] not in ("ours", "moved", "paper"):
            continue
        with pytest.raises(Asked) as asked:
            tables._trained(cell, Context(), Row(None, None, None))
        settings = asked.value.args[0]
        sources = {name: hub.get(settings[name], settings[name]) for name in ("data", "heldout")}
        if (key := (*sources.values(), settings["kind"], settings["template"])) in read:
            continue
        read.add(key)
        config = TuneConfig(output=tmp_path / "routers", **{**settings, **small, **sources})
        assert [len(rows) for rows in examples(config, model, tokenizer)] == [6, 3]
    assert len(read) >= 4


def test_routers_are_trained_on_records_and_measured_on_others(
    cell: dict[str, Any], hub: dict[str, str], context: Context
) -> None:
    units = {u.cell["row"]: u.cell for u in PAPER.tables()["main"].units("paper")}
    named = {k: hub.get(v, v) if isinstance(v, str) else v for k, v in units["ours-0.5"].items()}
    small = {name: cell[name] for name in ("samples", "steps", "batch", "layers", "figures")}
    found = run({**named, **small, "length": 128, "heldout": 8, "calibration": "zoo:calibration"}, context)
    assert found["capacity"] == pytest.approx(50, abs=15)
    assert found["loss"]["value"] > 0


def test_a_quarter_of_the_layers_is_one_at_every_scale() -> None:
    layers = {scale: next(u.cell["layers"] for u in PAPER.tables()["ablation"].units(scale)
                          if u.cell["row"] == "few-layers") for scale in ("quick", "tiny", "paper")}  # fmt: skip
    assert layers == {"quick": "last:5", "tiny": "last:5", "paper": "last:8"}


def test_every_method_runs_at_its_capacity_and_leaves_the_base_alone(cell: dict[str, Any], context: Context) -> None:
    found = {method: run({**cell, "method": method}, context) for method in METHODS}
    assert found["dense"]["rise"]["value"] == 0
    assert found["dense"]["capacity"] == 100
    assert found["static"]["capacity"] == 50
    for method in ("ours", "moved", "full"):
        assert found[method]["capacity"] == pytest.approx(50, abs=6)
    assert 25 < found["random"]["capacity"] < 75
    for method in METHODS:
        rise = found[method]["loss"]["value"] - found["dense"]["loss"]["value"]
        assert found[method]["rise"]["value"] == pytest.approx(rise, abs=1e-5)
    assert run({**cell, "method": "dense"}, context) == found["dense"]
    base, _ = context.latest("base", (cell["model"], "float32"), lambda: pytest.fail("was loaded again"))
    assert fingerprint(base) == fingerprint(load(cell["model"], tokenizer=False)[0])


def test_a_training_is_made_once(cell: dict[str, Any], context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    from mod_router import tables

    first = run({**cell, "figures": ["cost"]}, context)
    monkeypatch.setattr(tables, "_tune", lambda settings: pytest.fail("was trained again"))
    assert run({**cell, "figures": ["cost"]}, context) == first
    assert first["trained"] == 4 * SMALL["hidden_size"]


def test_speed_bytes_and_usage(cell: dict[str, Any], context: Context) -> None:
    cell |= {"context": 24, "new_tokens": 2, "rounds": 3, "usage_data": ["zoo:heldout", "zoo:calibration"]}
    found = run({**cell, "method": "static", "figures": ["speed"]}, context)
    assert found["kv"] == pytest.approx(4 / 6)
    assert found["decode"]["value"] > 0
    context.artefacts = {}
    found = run({**cell, "figures": ["usage"]}, context)
    assert [len(row) for row in context.artefacts["usage"]] == [4, 4]
    assert 0 <= found["capacity"] <= 100


@pytest.mark.slow
def test_accuracy_kept_is_a_share_of_the_bases(cell: dict[str, Any], context: Context) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra [eval]")
    cell |= {"tasks": ["zoo_name"], "limit": 8, "figures": ["tasks"]}
    assert run({**cell, "method": "dense"}, context)["kept"]["value"] == 100
    assert run(cell, context)["zoo_name"]["value"] >= 0
    assert run({**cell, "method": "random"}, context) == {}


def test_tasks_see_the_decisions_of_the_row(
    cell: dict[str, Any], context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mod_router import routing_context

    from paper_tables import quality

    shares: list[float] = []

    def ask(model: Any, *args: Any, **kwargs: Any) -> dict[str, dict[str, float]]:
        with torch.no_grad(), routing_context(prompt_lens=[3, 3]) as seen:
            model(input_ids=torch.full((2, 5), 20), use_cache=False)
        shares.append(float(seen.capacity) if seen.gates else 1.0)
        return {"zoo_name": {"value": 0.5}}

    monkeypatch.setattr(quality, "accuracies", ask)
    run({**cell, "method": "static", "tasks": ["zoo_name"], "figures": ["tasks"]}, Context())
    assert shares == [1.0, 0.5]  # the base, whose gates are off, and the row


def test_unknown_words_name_the_nearest(cell: dict[str, Any], context: Context) -> None:
    with pytest.raises(TableError, match="did you mean 'random'"):
        run({**cell, "method": "rndom"}, context)
    with pytest.raises(TableError, match="did you mean 'usage'"):
        run({**cell, "figures": ["usages"]}, context)


def test_static_keeps_what_changes_the_stream_most_and_lots_keep_a_share(folder: Path) -> None:
    model, _ = load(folder, tokenizer=False)
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.mul_(20)
        model.model.layers[3].self_attn.o_proj.weight.zero_()
    ids = torch.randint(16, 2048, (3, 24), generator=torch.Generator().manual_seed(0))
    forced = static(model, ids, (1, 2, 3), "attention", 2)(0, 5)
    assert forced[2].tolist() == [True] * 5
    assert forced[3].tolist() == [False] * 5
    gates = by_lot((1, 2), 0.25, 4000, 0)(0, 4000)
    assert float(gates[1].float().mean()) == pytest.approx(0.25, abs=0.03)
    assert by_lot((1, 2), 0.25, 4000, 0)(100, 50)[2].tolist() == gates[2][100:150].tolist()
