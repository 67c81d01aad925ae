"""The command as its users see it: real work on a small checkpoint, and one clear line for every wrong request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Command
from loki import Basis
from loki.cli import app

MODEL = "zoo:gpt2"  # GPT-2 has no rotary embedding and every head its own keys: 4 layers, quick
TEXT = ("--documents", "2", "--characters", "600", "--length", "64", "--samples", "2")


COMMAND = Command(app)
call, said, refused = COMMAND.call, COMMAND.said, COMMAND.refused


@pytest.fixture(autouse=True)
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def basis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("basis") / "basis.safetensors"
    result = call("calibrate", MODEL, "--tokens", 1024, "--length", 128, "-o", path)
    assert result.exit_code == 0, result.output
    return path


def test_a_basis_says_where_it_comes_from_and_how_few_dimensions_it_needs(basis: Path) -> None:
    found = Basis.load(basis)
    assert (found.about.model, found.about.text, found.about.tokens) == (MODEL, "zoo:calibration", 1024)
    told = said("analyze", basis, "--plots", "pictures")
    assert [row["layer"] for row in told["layers"]] == list(found.layers)
    assert told["rank_80"] < told["rank_90"] < told["rank_95"] <= told["head_width"]
    assert told["rank_90"] == pytest.approx(float(found.rank(0.9).double().mean()))
    for picture in ("ranks", "variance", "spectra"):
        assert Path(f"pictures/{picture}.png").read_bytes()[:4] == b"\x89PNG"


def test_two_texts_are_compared(basis: Path) -> None:
    said("calibrate", MODEL, "--tokens", 1024, "--length", 128, "--text", "zoo:heldout", "-o", "other.safetensors")
    row = said("analyze", basis, "other.safetensors", basis)["agreement"]
    assert row[1]["overlap"] == pytest.approx(1, abs=1e-5)
    assert row[0]["of_random_spaces"] == 0.25
    assert 0.25 < row[0]["least"] <= row[0]["overlap"] < 1


def test_methods_are_measured_side_by_side(basis: Path) -> None:
    found = said("eval", MODEL, "--basis", basis, "--method", "full,loki,h2o,snapkv", *TEXT, "--pairs", 96, "--needle",
                 96, "--questions", 2, "-o", "figures.json")  # fmt: skip
    rows = {row["figure"]: row for row in found["figures"]}
    assert set(rows) == {"perplexity", "decoding_perplexity", "pairs_96", "needle_96"}
    assert rows["perplexity"]["loki"] != rows["perplexity"]["full"]
    assert "snapkv" not in rows["perplexity"]  # it decides once a prompt
    assert rows["decoding_perplexity"]["snapkv"] != rows["decoding_perplexity"]["full"]
    assert json.loads(Path("figures.json").read_text()) == found
    whole = said("eval", MODEL, "--basis", basis, "--method", "full,loki", "--k", "1.0", "--dtype", "float32", *TEXT)[
        "figures"
    ]
    for row in whole:
        assert row["loki"] == pytest.approx(row["full"], rel=1e-3), row


def test_text_with_everything_read_is_the_text_without(basis: Path) -> None:
    options = ("--basis", basis, "--prompt", "import os\n\ndef main(", "--max-new-tokens", 12)
    found = said("generate", MODEL, *options, "--k", "1.0", "--min-length", 0, "--rounds", 1)
    assert found["new_tokens"] == found["as_without"] == 12
    assert found["speedup"] > 0
    assert found["text"].startswith("import os")
    usual = said("generate", MODEL, *options, "--k", "2", "--sink", 0, "--recent", 0, "--min-k", 0, "--rounds", 1)
    assert usual["min_length"] == 2048  # so few tokens are all read, whatever else is asked for
    assert usual["as_without"] == 12
    assert "selected" not in usual
    few = said("generate", MODEL, *options, "--k", "2", "--sink", 0, "--recent", 0, "--min-k", 0, "--min-length", 0)
    assert few["selected"] < 0.6
    assert 0 < few["captured"] <= 1


def test_bench_prints_what_it_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from loki import bench

    monkeypatch.setattr(bench, "HEADS", 4)
    monkeypatch.setattr(bench, "KV_HEADS", 2)
    found = said("bench", "--context", "256", "--share", "0.25", "--layers", 1, "--rounds", 3, "-o", "bench.json")
    assert found["cache"]["bytes_over_dense"] <= 1.01
    assert found["calibration"]["peak_twice_the_text"] <= 1.05
    assert {row["attention"] for row in found["decoding"]} == {"sdpa", "loki, all", "loki, auto", "loki, 0.25"}
    assert found["attention"][0]["speedup"] > 0
    assert found["machine"]


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("is not a number; give a share such as 0.25", ("--k", "half")),
        ("k=0", ("--k", "0")),
        ("k=1.5", ("--k", "1.5")),
        ("or var:0.9", ("--d", "most")),
        ("a share of the variance lies in (0, 1]", ("--d", "var:2")),
        ("'snapkv', 'loki'", ("--method", "lokki")),
        ("no basis nowhere.safetensors; `loki calibrate", ("--basis", "nowhere.safetensors")),
        ("needs a basis", ()),
        ("select='row'", ("--select", "row")),
        ("block=16 is not read by method 'snapkv'", ("--method", "snapkv", "--block", "16")),
    ],
)
def test_wrong_settings_are_refused(message: str, arguments: tuple[str, ...]) -> None:
    refused(message, "generate", MODEL, *arguments)


def test_other_wrong_requests_are_refused(basis: Path) -> None:
    refused("has [20, 2, 32]; calibrate on this model", "generate", "zoo:llama", "--basis", basis)
    refused("keys are taken 'post' or 'pre'", "calibrate", MODEL, "--rotary", "during", "-o", "b")
    refused("are too few for keys", "calibrate", MODEL, "--tokens", 16, "--length", 16, "-o", "b")
    refused("--pairs 'many'", "eval", MODEL, "--pairs", "many", "--method", "full")
    refused("mass=0.9 is not read by method 'h2o'", "eval", MODEL, "--mass", 0.9, "--method", "full,topk,h2o")
    refused("the model reads 1024", "eval", MODEL, "--needle", "64,1025", "--method", "full")
    refused("give shares in (0, 1]", "bench", "--share", "2")
    refused("dtype 'int8' is not accepted", "bench", "--dtype", "int8")
    refused("cannot be read", "generate", MODEL, "--prompt-file", "nothing.txt")
    refused("exists", "calibrate", MODEL, "-o", basis)
    Path("wrong.safetensors").write_bytes(b"no tensors")
    refused("is not a safetensors file", "analyze", "wrong.safetensors")


def test_a_killed_calibration_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after half of its batches; the same command then reads only the rest and finds the same basis."""
    from loki import calibration

    from model_hooks import watch

    options = ("calibrate", MODEL, "--tokens", 1024, "--length", 128, "--batch-size", 2)
    said(*options, "-o", "whole.safetensors")
    monkeypatch.setattr(watch, "JOURNAL_SECONDS", 0.0)
    ran, forward = [], calibration._run

    def killed(*arguments: Any) -> None:
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(1)
        forward(*arguments)

    monkeypatch.setattr(calibration, "_run", killed)
    assert call(*options, "-o", "b.safetensors").exit_code == 130
    assert Path(".b.safetensors.journal").exists() or list(Path.cwd().glob(".b.safetensors.journal*"))
    ran.clear()
    monkeypatch.setattr(calibration, "_run", lambda *a: (ran.append(1), forward(*a)))
    said(*options, "-o", "b.safetensors")
    assert len(ran) == 2
    assert torch.equal(Basis.load("b.safetensors").components, Basis.load("whole.safetensors").components)
    assert not list(Path.cwd().glob(".b.safetensors.journal*"))
