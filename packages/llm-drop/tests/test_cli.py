"""The command as its users see it: real work on a tiny checkpoint, and one clear line for every wrong request."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Command
from llm_drop import budget
from llm_drop.cli import app
from llm_drop.plan import Plan
from llm_drop.scoring import Scores
from processes import started
from transformers import AutoModelForCausalLM

SCORE = ("--data", "zoo:calibration", "--samples", "4", "--length", "64")


COMMAND = Command(app)
call, said, refused = COMMAND.call, COMMAND.said, COMMAND.refused


@pytest.fixture(autouse=True)
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def scored(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scored") / "scores.json"
    assert call("score", folder, *SCORE, "-o", path).exit_code == 0
    return path


def test_from_scores_to_a_checkpoint_that_is_better_than_chance_at_nothing(folder: Path, scored: Path) -> None:
    assert said("plan", scored, "--attention", 2)["plan"] == "plan.json"
    plan = Plan.load("plan.json")
    assert len(plan.attention) == 2
    found = said("drop", folder, "plan.json", "-o", "out")
    rows = {row[""]: (row["before"], row["after"]) for row in found["measured"]}
    assert rows["kv_bytes"][1] / rows["kv_bytes"][0] == pytest.approx(4 / 6)
    assert rows["parameters"][1] < rows["parameters"][0]
    model = AutoModelForCausalLM.from_pretrained("out")
    assert tuple(model.config.lean["dropped_attention"]) == plan.attention
    card = Path("out/README.md").read_text()
    assert "llm-drop: attention of blocks" in card
    assert "| bits_per_byte, before |" in card

    figures = {
        r["figure"]: r
        for r in said("eval", "out", "--baseline", folder, "--documents", 2, "--characters", 500)["figures"]
    }
    assert figures["kv_bytes"]["ratio"] == pytest.approx(4 / 6)
    assert figures["bits_per_byte"]["model"] > 0
    same = {
        r["figure"]: r
        for r in said("eval", folder, "--plan", "plan.json", "--documents", 2, "--characters", 500)["figures"]
    }
    assert same["bits_per_byte"]["model"] == pytest.approx(figures["bits_per_byte"]["model"], rel=1e-6)
    assert same["bits_per_byte"]["baseline"] == pytest.approx(figures["bits_per_byte"]["baseline"], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "attention", "mlp"),
    [
        (("--mlp", 2), 0, 2), (("--blocks", 2, "--consecutive"), 2, 2), (("--attention", 1, "--mlp", 2), 1, 2),
        (("--attention", 2, "--iterative"), 2, 0), (("--kv-budget", 0.5), 3, 0),
        (("--attention", 1, "--stability"), 1, 0), (("--attention", 2, "--objective", "norm"), 2, 0),
    ],
)  # fmt: skip
def test_plans_of_every_kind(scored: Path, options: Any, attention: int, mlp: int) -> None:
    said("plan", scored, *options)
    plan = Plan.load("plan.json")
    assert (len(plan.attention), len(plan.mlp)) == (attention, mlp)
    assert plan.fingerprint == Scores.load(scored).fingerprint


def test_layer_by_layer_scores_are_the_same(folder: Path, scored: Path, room: Path) -> None:
    said("score", folder, *SCORE, "--layerwise", "--buffer", room / "states")
    whole, layered = Scores.load(scored), Scores.load("scores.json")
    for kind in ("attention", "mlp", "block"):
        assert getattr(layered, kind) == pytest.approx(getattr(whole, kind), abs=1e-6)
    assert layered.fingerprint == whole.fingerprint
    assert layered.data_fingerprint == whole.data_fingerprint
    said("plan", "scores.json", "--attention", 2)
    said("drop", folder, "plan.json", "-o", "out", "--measure", "")
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    half.save_pretrained("half")
    shutil.copy(folder / "tokenizer.json", "half")
    said("score", "half", *SCORE, "--layerwise", "--dtype", "float32", "-o", "wide.json")
    assert Scores.load("wide.json").dtype == "float32"
    refused("score again with gaps", "plan", "scores.json", "--blocks", 2, "--consecutive", "-o", "p")


def test_joint_and_latency_plans(scored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    units = {(kind, i): 0.1 for kind in ("attention", "mlp") for i in range(4)}
    monkeypatch.setattr(budget, "latency_costs", lambda *_, **__: budget.Costs(1.0, units))  # a busy clock may say all
    said("plan", scored, "--joint", 5)
    plan = Plan.load("plan.json")
    assert len(plan.attention) + len(plan.mlp) == 5
    said("plan", scored, "--latency-budget", 0.9, "--context", 64, "-o", "fast.json")
    assert Plan.load("fast.json").units


def test_repair_and_generation(folder: Path, scored: Path) -> None:
    call("plan", scored, "--attention", 2)
    said("drop", folder, "plan.json", "--repair", scored, "-o", "repaired", "--measure", "")
    assert all(edit["bias"] for edit in AutoModelForCausalLM.from_pretrained("repaired").config.lean["edits"])
    found = said("generate", folder, "plan.json", "--prompt", "import os", "--max-new-tokens", 8)
    assert found["text"].startswith("import os")
    assert 0 <= found["acceptance"] <= 1


def test_the_papers_lists_are_imported(folder: Path) -> None:
    Path("config.json").write_text(json.dumps({"num_hidden_layers": 6, "drop_attn_list": [1, 4], "drop_mlp_list": []}))
    assert "attention of blocks 1, 4" in said("import", "config.json")["drops"]
    said("drop", folder, "plan.json", "-o", "out", "--measure", "")
    assert AutoModelForCausalLM.from_pretrained("out").config.lean["dropped_attention"] == [1, 4]


def test_options_come_from_a_file_and_the_line_wins(scored: Path) -> None:
    Path("plan.yaml").write_text("attention: 1\nobjective: norm\n")
    assert "by norm" in Plan.load(said("plan", scored, "--config", "plan.yaml")["plan"]).how
    said("plan", scored, "--config", "plan.yaml", "--attention", 3, "-o", "other.json")
    assert len(Plan.load("other.json").attention) == 3
    Path("wrong.yaml").write_text("atention: 1\n")
    refused("did you mean 'attention'?", "plan", scored, "--config", "wrong.yaml")


def test_wrong_requests(folder: Path, scored: Path) -> None:
    Path("bad.json").write_text("{")
    Path("empty.txt").write_text("")
    Path("latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    Path("broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    Path("short.txt").write_text("a few words")
    for plan, name in ((Plan(6, (1,)), "plan.json"), (Plan(9, (1,)), "nine.json")):
        plan.save(name)
    refused(
        "attention 6 is out of range; allowed: 1..5; at least one attention",
        "plan",
        scored,
        "--attention",
        6,
        "-o",
        "p",
    )
    refused("asked for nothing", "plan", scored, "-o", "p")
    refused("attention 0 is out of range; allowed: 1..", "plan", scored, "--attention", 0, "--mlp", 1, "-o", "p")
    refused("kv budget 0.0 is out of range", "plan", scored, "--kv-budget", 0, "-o", "p")
    refused("exclude each other", "plan", scored, "--blocks", 2, "--consecutive", "--iterative", "-o", "p")
    refused("leave out --device-map", "score", folder, *SCORE, "--layerwise", "--device-map", "auto")
    refused("give --layerwise with it", "score", folder, *SCORE, "--buffer", "states")
    refused("dtype 'int3' is not accepted", "score", folder, *SCORE, "--layerwise", "--dtype", "int3")
    refused("exclude each other", "plan", scored, "--attention", 1, "--kv-budget", 0.5, "-o", "p")
    refused("bad.json: not a scores file", "plan", "bad.json", "--attention", 1, "-o", "p")
    refused("missing.json: no such file", "plan", "missing.json", "--attention", 1, "-o", "p")
    refused("plan is for 9 layers, the model has 6", "drop", folder, "nine.json", "-o", "out")
    refused("unknown format 'gguf'", "drop", folder, "plan.json", "-o", "out", "--to", "gguf")
    refused("dtype 'int3' is not accepted", "score", folder, *SCORE, "--dtype", "int3")
    refused("no folder ./nowhere", "score", "./nowhere", *SCORE)
    refused("unknown zoo model", "score", "zoo:lama", *SCORE)
    refused("empty.txt holds no text", "score", folder, "--data", "empty.txt")
    refused("latin.txt:1: not UTF-8", "score", folder, "--data", "latin.txt")
    refused("broken.jsonl:2: not JSON", "score", folder, "--data", "broken.jsonl")
    refused("tokens found, 256 are needed", "score", folder, "--data", "short.txt")
    refused("plan.json exists", "plan", scored, "--attention", 1)
    refused("No such option: --atention", "plan", scored, "--atention", 1)
    refused("no lm-eval task 'zoo_nam'", "eval", folder, "--tasks", "zoo_nam", "--documents", 1, "--characters", 99)
    refused("leave out --baseline", "eval", folder, "--plan", "plan.json", "--baseline", folder)


def test_a_scores_file_of_another_model_is_refused(folder: Path, scored: Path) -> None:
    shutil.copytree(folder, "other")
    model = AutoModelForCausalLM.from_pretrained("other")
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    model.save_pretrained("other")
    refused("the scores are of another model", "plan", scored, "--kv-budget", 0.5, "--model", "other", "-o", "p")
    call("plan", scored, "--attention", 1)
    refused("the plan was made from", "drop", "other", "plan.json", "-o", "out")


def test_what_exists_is_kept(folder: Path, scored: Path) -> None:
    call("plan", scored, "--attention", 1)
    Path("out").mkdir()
    Path("out/precious").write_text("x")
    Path("scores.json").write_text("mine")
    refused("--overwrite", "drop", folder, "plan.json", "-o", "out")
    refused("--overwrite", "score", folder, *SCORE)
    Path("model.safetensors").write_text("mine")
    refused("--overwrite", "score", folder, *SCORE, "-o", "model.json")  # whose mean changes would be in that file
    assert Path("model.safetensors").read_text() == "mine"
    shutil.copy(scored.with_suffix(".safetensors"), "killed.safetensors")  # a kill left it, before the scores
    assert call("score", folder, *SCORE, "-o", "killed.json").exit_code == 0
    assert Scores.load("killed.json").deltas
    assert Path("scores.json").read_text() == "mine"
    assert call("drop", folder, "plan.json", "-o", "out", "--overwrite", "--measure", "").exit_code == 0
    assert not Path("out/precious").exists()


def test_a_broken_checkpoint_is_one_line(folder: Path) -> None:
    shutil.copytree(folder, "cut")
    with open("cut/model.safetensors", "r+b") as file:
        file.truncate(Path("cut/model.safetensors").stat().st_size - 100)
    refused("is truncated", "score", "cut", *SCORE)
    shutil.copytree(folder, "wide")
    config = json.loads(Path("wide/config.json").read_text())
    Path("wide/config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    refused("config and weights do not match", "score", "wide", *SCORE)


@pytest.mark.slow
def test_files_that_may_not_grow_lose_nothing(folder: Path, scored: Path, room: Path) -> None:
    """As a full disk, where nothing can be mounted: files end at 1 kB (EFBIG)."""
    call("plan", scored, "--attention", 1)
    before = sorted(room.iterdir())
    limited = (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "from llm_drop.cli import main; main()\n"
    )
    for words in (("score", folder, *SCORE), ("drop", folder, "plan.json", "--measure", "")):
        running = started("-c", limited, *words, log=room / "log")
        assert running.wait() == 1, running.said
        assert "error: no space left on the disk" in running.said
        assert "Traceback" not in running.said
        (room / "log").unlink()
        assert [p for p in sorted(room.iterdir()) if "journal" not in p.name] == before
    said("score", folder, *SCORE)
    assert Scores.load("scores.json") == Scores.load(scored)


@pytest.mark.slow
def test_a_killed_scoring_goes_on(folder: Path, room: Path) -> None:
    """kill -9 in the middle; the same command then gives what an uninterrupted run gives, from where it was."""
    slow = (
        "import sys, time, model_hooks.similarity as s\n"
        "see = s.ResidualSimilarity.see\n"
        "def slower(*a, **k): time.sleep(0.01); return see(*a, **k)\n"
        "s.ResidualSimilarity.see = slower\n"
        "import model_hooks.watch as w; w.JOURNAL_SECONDS = 0.2\n"
        "from llm_drop.cli import main; main()\n"
    )
    options = [
        "score",
        str(folder),
        "--data",
        "zoo:calibration",
        "--samples",
        "60",
        "--length",
        "64",
        "--batch-size",
        "1",
    ]
    with started("-c", slow, *options, log=room / "log") as scoring:
        while not list(room.glob(".scores.json.journal*")) and scoring.poll() is None:
            time.sleep(0.01)
    assert list(room.glob(".scores.json.journal*")), "the run ended before it kept anything"
    assert not Path("scores.json").exists()
    assert call(*options).exit_code == 0
    assert call(*options, "-o", "whole.json").exit_code == 0
    resumed, whole = Scores.load("scores.json"), Scores.load("whole.json")
    assert resumed == whole
    assert not list(room.glob(".scores.json.journal*"))
