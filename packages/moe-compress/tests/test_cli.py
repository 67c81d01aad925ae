"""The command as its users see it, on a tiny checkpoint."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import Command
from moe_compress.cli import app
from moemodels import build, logits, save_with_tokenizer

from model_hooks import anatomy, load
from model_hooks.experts import moe_layers

DATA = ("--samples", 6, "--length", 48)
COMMAND = Command(app)
call, said, refused = COMMAND.call, COMMAND.said, COMMAND.refused


@pytest.fixture(autouse=True)
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def scores(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("scores") / "scores.json"
    said("score", folder, *DATA, "-o", file)
    return file


def test_score_in_memory_and_layer_by_layer(folder: Path, scores: Path) -> None:
    found = said("score", folder, *DATA, "--layerwise", "--buffer", "states", "-o", "s.json")
    assert found["tokens"] == 6 * 48
    assert [row["experts"] for row in found["layers"]] == [8, 8, 8, 8]
    ours, theirs = json.loads(Path("s.json").read_text()), json.loads(scores.read_text())
    assert ours["experts"]["2"]["count"] == theirs["experts"]["2"]["count"]
    assert (ours["gaps"], len(theirs["gaps"])) == ([], 4)
    assert list(Path("states").iterdir()) == []


def test_trim_by_scores_plan_and_repair(folder: Path, scores: Path) -> None:
    found = said(
        "trim", folder, "--scores", scores, "--experts", 6, "-o", "e", "--layout", "stock", "--repair-router", *DATA
    )
    assert found["stock"]
    report = json.loads(Path("e/trimming.json").read_text())
    assert report["experts"] == dict.fromkeys("0123", 6)
    assert report["calibration"]["tokens"] == 288
    assert all(e["after"] <= e["before"] for e in report["routers"].values())
    assert report["after"]["parameters"] < report["before"]["parameters"]
    assert report["bytes"] < sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    said("trim", folder, "--scores", scores, "--blocks", 2, "--consecutive", "--plan-only", "plan.json")
    assert said("trim", folder, "--plan", "plan.json", "-o", "b", "--measure", "")["stock"]
    model, _ = load("b", tokenizer=False)
    assert len(anatomy(model).blocks) == 2
    text = Path("b/README.md").read_text()
    assert "blocks" in text
    assert "import model_hooks" not in text


def test_trim_then_slim_then_eval_inspect_and_export(folder: Path, scores: Path) -> None:
    said("trim", folder, "--scores", scores, "--layers", 1, "-o", "l", "--measure", "")
    found = said("slim", "l", "--method", "awq", "--group", 32, "--min-tokens", 8, *DATA, "-o", "q")
    assert found["quantised"] == 3 * 8 * 3
    looked = said("inspect", "q")
    assert (looked["form"], looked["loads_with"]) == ("compressed-tensors", "moe-compress")
    assert [row["experts"] for row in looked["layers"]].count(0) == 1
    assert len(looked["dropped_moe_layers"]) == 1
    assert looked["bytes"] < 0.75 * said("inspect", folder)["bytes"]
    said("export", "q", "-o", "d")
    rows = said("eval", "q", "--baseline", "d", "--documents", 1, "--characters", 600, "-o", "eval.json")["figures"]
    ratio = {row["figure"]: row["ratio"] for row in rows}
    assert ratio["bits_per_byte"] == pytest.approx(1, abs=1e-4)
    assert ratio["weight_bytes"] < 0.75
    dense, _ = load("d", tokenizer=False)
    assert all(layer.num_experts == 8 for layer in moe_layers(anatomy(dense)))
    assert logits(dense).isfinite().all()


def test_reports_tell_what_was_lost_and_are_the_same_again(folder: Path, scores: Path) -> None:
    rows = said("slim", folder, "--method", "rtn", "--group", 32, "-o", "s", "--measure", "zoo:heldout")["measured"]
    report = json.loads(Path("s/slimming.json").read_text())
    assert rows == [{"": "bits_per_byte", "before": report["before"]["bits_per_byte"],
                     "after": report["after"]["bits_per_byte"]}]  # fmt: skip
    assert report["before"] != report["after"]
    for out in ("a", "b"):
        said("trim", folder, "--scores", scores, "--experts", 6, "--repair-router", *DATA, "-o", out)
    first = Path("a/trimming.json").read_text()
    assert first == Path("b/trimming.json").read_text()
    found = json.loads(first)
    assert found["before"]["bits_per_byte"] != found["after"]["bits_per_byte"]
    gate = json.loads(scores.read_text())["experts"]["2"]["gate"]
    assert found["calibration"]["routing_scores"]["2"] == pytest.approx([g / 288 for g in gate])
    assert len(found["calibration"]["similarity_of_blocks"]) == 4


def test_four_bits_are_little_more_than_a_quarter_of_sixteen() -> None:
    save_with_tokenizer(build(hidden_size=128, intermediate_size=128).bfloat16(), Path("m"))
    said("slim", "m", "--method", "rtn", "-o", "q")
    looked = said("inspect", "q", "--verify")
    assert looked["verified"] == {"quantised": 4 * 8 * 3, "bits": [4], "dense": 4 * 5 + 2}
    for before, after in zip(said("inspect", "m")["layers"], looked["layers"], strict=True):
        assert after["mixture_bytes"] <= 0.28 * before["mixture_bytes"]
    assert said("slim", "m", "--method", "rtn", "--asymmetric", "-o", "z")["quantised"] == 96
    looked = said("inspect", "z", "--verify")
    assert looked["loads_with"].startswith("moe-compress (transformers reads no zero points")
    assert looked["layers"][0]["mixture_bytes"] > said("inspect", "q")["layers"][0]["mixture_bytes"]


def test_slim_prunes_with_the_papers_flags(folder: Path) -> None:
    found = said(
        "slim", folder, "--method", "wanda", "--sparsity-ratio", 0.5, "--sparsity-type", "2:4", *DATA, "-o", "s",
        "--min-tokens", 8,
    )  # fmt: skip
    assert found["quantised"] == 0
    model, _ = load("s", tokenizer=False)
    bank = model.model.layers[1].mlp.experts.down_proj
    assert ((bank.view(-1, 4) == 0).sum(-1) == 2).all()
    assert torch.equal(
        model.model.layers[1].mlp.gate.weight, load(folder, tokenizer=False)[0].model.layers[1].mlp.gate.weight
    )


@pytest.mark.slow
def test_recipes_from_a_file_and_by_target(folder: Path) -> None:
    Path("r.yaml").write_text(
        f"model: {folder}\ncalibration: {{data: 'zoo:calibration', samples: 4, length: 48}}\n"
        "steps:\n  - block_drop: {n: 1}\n  - quantize: {method: rtn, group: 32}\n"
    )
    found = said("recipe", "r.yaml", "-o", "a", "--measure", "")
    assert [row["step"] for row in found["steps"]] == ["start", "block_drop", "quantize"]
    size = found["steps"][0]["bytes"]
    target = said(
        "recipe", "--model", folder, "--target-bytes", size * 0.8, "--group", 32, *DATA, "-o", "t", "--measure", ""
    )
    assert target["steps"][-1]["bytes"] < size * 0.82


@pytest.mark.slow
def test_bench_times_both_sides(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On few samples: its ratios are noise here, and half a minute of the full size says no more."""
    from moe_compress import bench

    monkeypatch.setattr(bench, "bench_stats", partial(bench.bench_stats, samples=2, length=64))
    found = said("bench", folder, "--context", 16, "--new-tokens", 2, "--rounds", 3, "-o", "bench.json")
    assert [row["model"] for row in found["speed"]] == ["6 of 8 experts", "1 MoE layers dropped", "1 blocks dropped"]
    assert all(row["parameters"] < 1 < 100 * row["decode"] for row in found["speed"])
    assert [row["target"] for row in found["scoring"]] == ["at most 2", *["at least 3"] * 6]
    assert all(row["ratio"] > 0 for row in found["scoring"])


def test_experts_as_linears_are_the_same_function_and_are_seen() -> None:
    from moe_compress.bench import LinearExperts, probe_mixtral

    layer = moe_layers(anatomy(probe_mixtral(1, 64, 6)))[0]
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    _, weights, chosen = layer.router(x)
    split = LinearExperts(layer.bank)
    with torch.no_grad():
        assert torch.allclose(split(x, chosen, weights), layer.bank(x, chosen, weights), atol=1e-6)
    for number, (gate, _, down) in enumerate(split.experts):
        mine = x[(chosen == number).any(-1)].double()
        assert torch.allclose(split.sums[gate][0], mine.square().sum(0))
        assert split.sums[down][1] > 0


def test_what_is_wrong_is_one_line_and_leaves_nothing(folder: Path, scores: Path) -> None:
    trim = ("trim", folder, "--scores", scores)
    refused("cannot keep 9 of the 8 experts", *trim, "--experts", 9)
    refused("fewer than a token uses (top-2)", *trim, "--experts", 1)
    refused("cannot drop 8 of 4 MoE layers", *trim, "--layers", 8)
    refused("give one of --experts, --layers, --blocks", *trim)
    refused(
        "--preserve-gate leaves routers as they are", *trim, "--experts", 6, "--preserve-gate", "--repair-router", *DATA
    )
    refused("needs --scores", "trim", folder, "--experts", 4)
    refused("stock transformers cannot express this", *trim, "--layers", 1, "--layout", "stock", "--measure", "")
    refused("no MoE layers found in LlamaForCausalLM", "score", "zoo:llama", *DATA)
    refused("no MoE layers found in LlamaForCausalLM", "slim", "zoo:llama", "--method", "rtn")
    refused("group 128 does not divide the 32 inputs", "slim", folder, "--method", "rtn")
    refused("sparsity 1.5", "slim", folder, "--method", "wanda", "--sparsity", 1.5)
    refused("means sparsity 0.5, not 0.6", "slim", folder, "--method", "wanda", "--pattern", "2:4", "--sparsity", 0.6)
    refused("give a recipe file, or --model", "recipe")
    refused("are asked for; ask fewer", "score", folder, "--samples", 100000, "--length", 256)
    refused("--to gptq is not accepted", "export", folder, "--to", "gptq")
    refused("is dense already", "export", folder)


def test_empty_data_and_other_models_are_refused(folder: Path, scores: Path) -> None:
    Path("empty.txt").write_text("")
    refused("holds no text", "score", folder, "--data", "empty.txt", *DATA)
    refused("holds no text", "slim", folder, "--data", "empty.txt", "--group", 32, *DATA)
    shutil.copytree(folder, "other")
    model, _ = load(folder, tokenizer=False)
    with torch.no_grad():
        model.lm_head.weight[0] += 1
    model.save_pretrained("other")
    refused("the plan was made for", "trim", "other", "--scores", scores, "--experts", 6)
    Path("out").mkdir()
    refused("out exists already", "slim", folder, "--method", "rtn", "--group", 32, "-o", "out")
    said("slim", folder, "--method", "rtn", "--group", 32, "-o", "q")
    refused("q is quantised already; trim before", "score", "q", *DATA)
    refused("is quantised already", "slim", "q", "--method", "rtn", "--group", 32)
    refused("was slimmed by rtn, which training would undo", "finetune", "--model", "q", "--output", "t")
