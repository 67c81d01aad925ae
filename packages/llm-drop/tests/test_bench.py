"""What dropping is for: bytes that are exactly gone, and time that is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from llm_drop import Plan, apply, bench
from llm_drop.cli import app
from llm_drop.speculative import sharing_copy
from typer.testing import CliRunner

from paper_tables import probe


@pytest.mark.parametrize("dropped", [(0,), (0, 3, 5), (1, 2, 3, 4, 5)])
def test_static_caches_shrink_by_exactly_what_was_dropped(model: Any, dropped: tuple[int, ...]) -> None:
    share = bench.static_kv_share(model, apply(sharing_copy(model), Plan(6, dropped), check=False))
    assert share == (6 - len(dropped)) / 6


def test_calibration_needs_a_small_part_of_what_storing_would() -> None:
    found = bench.bench_calibration(probe.probe_model(4, 64), samples=4, length=128, batch_size=4, rounds=1)
    assert found["calibration_peak_256_over_16"] <= 1.05
    assert found["calibration_peak_over_stored_64"] <= 0.5


@pytest.mark.slow
def test_the_benchmark_of_a_small_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run whole, on a model small enough to be quick; its speeds are noise, its bytes are not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probe, "probe_model", lambda make=probe.probe_model: make(8, 128))
    options = ["bench", "--context", "64", "--new-tokens", "4", "--rounds", "3", "-o", "bench.json", "--json"]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    found = json.loads(Path("bench.json").read_text())
    assert json.loads(result.stdout) == found
    assert [row["kv_bytes"] for row in found["speed"]] == [0.75, 0.5]
    assert found["static_kv"] == 0.5
    assert found["calibration_peak_256_over_16"] <= 1.05
    assert found["calibration_peak_over_stored_64"] < 1
    assert found["machine"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_half_of_the_attention_of_the_probe_decodes_faster() -> None:
    """At least 1.2x on an idle machine (bench/ has the measured figure); here others may be busy."""
    parent = probe.probe_model()
    half = apply(sharing_copy(parent), Plan(16, tuple(range(7, 15))), check=False)
    found = probe.speed(parent, {"half": half}, context=512, new_tokens=8, rounds=5)["half"]
    assert found["decode"].speedup > 1.05
    assert found["prefill"].speedup > 1.05
