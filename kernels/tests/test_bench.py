"""The benchmark command: rows of every operation, stored rows, a busy machine, wrong requests."""

from __future__ import annotations

import json
import os
from importlib import import_module

import pytest
import torch

from lean_kernels.bench import __main__ as command
from lean_kernels.bench import harness
from lean_kernels.bench import linear_ce as of_linear_ce
from lean_kernels.bench import loki as of_loki

TINY = {
    "loki": (of_loki, [of_loki.Shape(1, 4, 2, 256)]),
    "linear_ce": (of_linear_ce, [of_linear_ce.Shape(8, 16, 50)]),
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(harness, "COPIED", {"cpu": 1 << 16})
    monkeypatch.setattr(harness, "SIDE", {"cpu": 16})
    monkeypatch.setattr(harness, "READ", 1 << 16)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    for module, shapes in TINY.values():
        monkeypatch.setattr(module, "PRESETS", {"small": shapes})


@pytest.mark.parametrize("op", TINY)
def test_rows_hold_what_was_measured(op, tmp_path, capsys):
    file = tmp_path / "rows" / "of.json"
    for _ in range(2):
        assert command.main([op, "--rounds", "2", "--json", str(file)]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) % 2 == 0  # the second run's rows are appended
    row = rows[0]
    assert {"op", "shape", "dtype", "backend", "ms", "min_ms", "bytes", "flops", "floor_ms", "torch"} <= row.keys()
    assert row["dtype"] == "float32"
    assert row["ratio_to_floor"] == pytest.approx(row["ms"] / row["floor_ms"], rel=0.05)
    assert row["ratio_to_best_baseline"] == pytest.approx(min(row["baselines"].values()) / row["ms"], rel=0.05)
    printed = capsys.readouterr().out
    assert "ceilings: copy" in printed
    assert printed.count(row["op"]) == len(rows)


def test_every_operation_has_its_function():
    assert {"loki", "linear_ce"} <= set(command.operations())
    for op in command.operations():
        assert callable(getattr(import_module(f"lean_kernels.bench.{op}"), f"bench_{op}"))


def test_a_lost_tenth_fails_the_check(tmp_path, monkeypatch, capsys):
    file = tmp_path / "rows.json"
    assert command.main(["linear_ce", "--rounds", "1", "--json", str(file)]) == 0
    stored = [json.loads(line) for line in file.read_text().splitlines()]
    for factor, code in ((1e3, 0), (1e-3, 1)):  # stored times far above and far below those that follow
        file.write_text("".join(json.dumps({**row, "ms": row["ms"] * factor}) + "\n" for row in stored))
        assert command.main(["linear_ce", "--rounds", "1", "--check", str(file)]) == code
    assert "slower: linear_ce" in capsys.readouterr().err
    other = [{**row, "device": "another"} for row in stored]
    assert harness.slower(other, file) == []


def test_a_busy_machine_is_refused_unless_forced(monkeypatch, capsys):
    monkeypatch.setattr(os, "getloadavg", lambda: (1000.0, 0.0, 0.0))
    assert command.main(["linear_ce", "--rounds", "1"]) == 1
    assert "--force" in capsys.readouterr().err
    assert command.main(["linear_ce", "--rounds", "1", "--force"]) == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["attention"], "invalid choice"),
        (["loki", "--device", "cuda"], "--device cuda needs a CUDA device"),
        (["loki", "--rounds", "0"], "--rounds is 0"),
        (["loki", "--check", "nowhere.json"], "there is no such file"),
    ],
)
def test_wrong_requests_exit_with_2(arguments, text, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert text in capsys.readouterr().err


def test_candidates_take_turns():
    order: list[str] = []
    found = harness.timings({name: lambda name=name: order.append(name) for name in "ab"}, "cpu", 3)
    assert order == ["a", "b"] * 4
    assert found["a"]["min_ms"] <= found["a"]["ms"]
