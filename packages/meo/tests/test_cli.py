"""The command: every verb does what it says, and wrong requests are one line with exit 2 and nothing written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Command
from meo import load
from meo.cli import app
from meo.converting import banks
from mergedmodels import GPT2, write

meo = Command(app)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("models") / "gpt2", "GPT2LMHeadModel", "GPT2Config", GPT2)


@pytest.fixture(autouse=True)
def _room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_convert_inspect_eval(gpt2: Path) -> None:
    linears = meo.said("inspect", gpt2)["linears"]
    assert [row["linear"] for row in linears[:2]] == ["transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"]
    found = meo.said("convert", "--model", gpt2, "-o", "m", "--level", "chunk", "--chunk", "8", "--experts", "4")
    assert found["banks"] == 4
    assert found["levels"] == ["chunk"]
    shown = meo.said("inspect", "m")
    assert shown["experts"] == 4
    assert [row["bank"] for row in shown["banks"]] == [row["linear"] for row in linears]
    how = ("--kind", "clm", "--data", "zoo:heldout", "--samples", "4", "--length", "24")
    dense, converted = (meo.said("eval", m, *how)["figures"] for m in (gpt2, "m"))
    assert {row["figure"] for row in dense} == {"loss", "perplexity"}
    assert converted[0]["value"] == pytest.approx(dense[0]["value"], rel=1e-5)
    gates = meo.said("eval", "m", *how, "--gates", "-o", "e.json")["gates"]
    assert len(gates) == 4
    assert gates[0]["coverage"] == 0.5  # untrained gates select the first k
    assert json.loads(Path("e.json").read_text())["gates"][0]["bank"] == "transformer.h.0.mlp.c_fc"


def test_merge_bakes_a_task(gpt2: Path) -> None:
    meo.said("convert", "--model", gpt2, "-o", "m", "--level", "task", "--tasks", "a,b", "--kind", "classification")
    found = meo.said("merge", "m", "--task", "b", "-o", "plain")
    assert found["class"] == "GPT2ForSequenceClassification"
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained("plain")
    assert model(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.shape == (1, 2)
    meo.refused("unknown task 'c'; it is one of a, b", "merge", "m", "--task", "c", "-o", "x")
    how = ("--data", "zoo:glue:order", "--samples", "6", "--length", "24")
    assert meo.said("eval", "m", *how, "--task", "a")["rows"] == 6
    meo.refused("unknown task 'order'", "eval", "m", *how)


def test_export_writes_adapters(gpt2: Path) -> None:
    meo.said("convert", "--model", gpt2, "-o", "m", "--level", "chunk", "--experts", "3")
    found = meo.said("export", "m", "--rank", "4", "-o", "out")
    assert 0 < found["largest_error"] < 1
    assert sorted(p.name for p in Path("out").iterdir()) == ["dense", "expert-0", "expert-1", "expert-2"]
    assert not banks_of("out/dense")


def banks_of(folder: str) -> list[str]:
    model, _ = load(folder)
    try:
        return list(banks(model))
    except ValueError:
        return []


def test_flops_are_the_papers() -> None:
    rows = {row["k"]: row for row in meo.said("flops", "base")["flops"]}
    assert rows[4]["dense"] == pytest.approx(28.50, abs=0.01)
    assert rows[4]["moe"] == pytest.approx(71.99, abs=0.01)
    assert rows[4]["meo"] == pytest.approx(28.73, abs=0.01)
    assert rows[4]["meo with additions"] == pytest.approx(28.90, abs=0.01)
    assert meo.said("flops", "zoo:gpt2", "--k", "2", "--tokens", "64", "--groups", "1")["flops"][0]["moe"] > 0


def test_bench_prints_ratios() -> None:
    found = meo.said("bench", "--hidden", "32", "--inner", "64", "--batch", "4", "--tokens", "8", "--rounds", "3")
    assert len(found["speed"]) == 9
    assert all(row["ratio"] > 0 for row in [*found["speed"], *found["memory"]])
    by_operations = {row["times faster"]: row["by operations"] for row in found["speed"]}
    assert by_operations["forward: MEO / MoE, k = 4"] == pytest.approx(4 * 2 * 8 / (2 * 8 + 4))


def test_train_takes_the_originals_flags(gpt2: Path) -> None:
    pytest.importorskip("accelerate", reason="needs the extra [train]")
    found = meo.said(
        "train", "--model_name_or_path", gpt2, "--output_dir", "out", "--train_file", "zoo:glue:order:calibration",
        "--use_moe", "MEO", "--moe_level", "sequence", "--n_experts", "4", "--k", "2", "--max_steps", "2",
        "--max_seq_length", "24", "--samples", "24", "--heldout-samples", "8", "--description_size", "128",
    )  # fmt: skip
    assert found["steps"] == 2
    assert len(banks_of("out")) == 4


def test_pretrained_mixtures_are_reported_on(tmp_path: Path) -> None:
    from mergedmodels import SMALL

    from model_hooks.zoo import tokenizer as zoo_tokenizer

    values: dict[str, Any] = {**SMALL, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    write(tmp_path / "mixtral", "MixtralForCausalLM", "MixtralConfig", values)
    zoo_tokenizer.load().save_pretrained(tmp_path / "mixtral")
    how = ("convert", "--model", "mixtral", "--pretrained", "--samples", "2", "--length", "16", "-o", "report.json")
    found = meo.said(*how, "--threshold", "99")
    assert found["merged"] == found["of"] == 2
    assert all(row["error"] > 0 for row in json.loads(Path("report.json").read_text())["layers"])
    meo.refused("exists already", *how)


@pytest.mark.parametrize(("message", "arguments"), [
    ("k is 9", ["convert", "-o", "x", "--k", "9"]), ("k is 0", ["convert", "-o", "x", "--k", "0"]),
    ("at least 2", ["convert", "-o", "x", "--experts", "1", "--k", "1"]),
    ("did you mean 'sequence'", ["convert", "-o", "x", "--level", "sentence"]),
    ("future tokens; use prefix, chunk or task", ["convert", "-o", "x", "--level", "sequence"]),
    ("matches no linear", ["convert", "-o", "x", "--targets", "nothing"]),
    ("is a LayerNorm", ["convert", "-o", "x", "--targets", "ln_1"]),
    ("no file none.json", ["convert", "-o", "x", "--level", "task", "--tasks", "none.json"]),
    ("converts nothing; give meo or moe", ["convert", "-o", "x", "--method", "none"]),
    ("no fused experts", ["convert", "-o", "x", "--pretrained"]),
])  # fmt: skip
def test_wrong_conversions(message: str, arguments: list[str], gpt2: Path) -> None:
    meo.refused(message, *arguments, "--model", gpt2)


def test_other_wrong_requests(gpt2: Path) -> None:
    meo.said("convert", "--model", gpt2, "-o", "m", "--level", "chunk")
    meo.refused("converted already", "convert", "--model", "m", "-o", "n")
    meo.refused("gated by chunk, not by task", "merge", "m", "--task", "a", "-o", "n")
    meo.refused("no banks", "merge", gpt2, "--task", "a", "-o", "n")
    meo.refused("no banks", "export", gpt2, "-o", "n")
    meo.refused("overlaps the input", "export", "m", "-o", "m/inside")
    meo.refused("exists already", "convert", "--model", gpt2, "-o", "m")
    meo.refused("did you mean 'base'", "flops", "bas")
    meo.refused("numbers from 1 on", "flops", "base", "--k", "0")
    meo.refused("unknown kind 'cls'", "eval", "m", "--kind", "cls")
    meo.refused("no folder", "inspect", "./none")
    meo.refused("unknown task zoo:glue:orders; did you mean 'order'", "eval", "m", "--kind", "classification", "--data",
                "zoo:glue:orders")  # fmt: skip
