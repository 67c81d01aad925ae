"""What dropping is for: bytes that are exactly gone, and time that is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from llm_drop import Plan, apply, bench
from llm_drop.cli import app
from llm_drop.live import peak_tensor_bytes
from llm_drop.speculative import sharing_copy
from typer.testing import CliRunner


@pytest.mark.parametrize("dropped", [(0,), (0, 3, 5), (1, 2, 3, 4, 5)])
def test_static_caches_shrink_by_exactly_what_was_dropped(model: Any, dropped: tuple[int, ...]) -> None:
    share = bench.static_kv_share(model, apply(sharing_copy(model), Plan(6, dropped), check=False))
    assert share == (6 - len(dropped)) / 6


def test_peak_memory_sees_what_work_needs_and_nothing_of_the_work_before() -> None:
    small, large = (bench.peak_memory(lambda n=n: torch.ones(n).sum()) for n in (1 << 20, 1 << 26))
    if not large:
        pytest.skip("this system does not tell the peak")
    assert 0.9 < large / (4 << 26) < 1.3
    assert small < large / 16


def test_live_tensors_are_counted_until_they_are_freed() -> None:
    old = torch.ones(1 << 16)
    one, kept, views = (
        peak_tensor_bytes(work)
        for work in (
            lambda: [old.add(i).sum() for i in range(8)],
            lambda: [old.add(i) for i in range(8)],
            lambda: [old.view(2, -1), old[:5]],
        )
    )
    assert one == (4 << 16) + 4 * 8  # the last sum is made while its summand and the earlier sums live
    assert kept == 8 * (4 << 16)
    assert views == 0


def test_calibration_needs_a_small_part_of_what_storing_would() -> None:
    found = bench.bench_calibration(bench.probe_model(4, 64), samples=4, length=128, batch_size=4, rounds=1)
    assert found["calibration_peak_256_over_16"] <= 1.05
    assert found["calibration_peak_over_stored_64"] <= 0.5


@pytest.mark.slow
def test_the_benchmark_of_a_small_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run whole, on a model small enough to be quick; its speeds are noise, its bytes are not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "probe_model", lambda make=bench.probe_model: make(8, 128))
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
    parent = bench.probe_model()
    half = apply(sharing_copy(parent), Plan(16, tuple(range(7, 15))), check=False)
    found = bench.speed(parent, {"half": half}, context=512, new_tokens=16, rounds=7)["half"]
    assert found["decode"].speedup > 1.05
    assert found["prefill"].speedup > 1.05
