"""Fine-tuning in two processes (gloo on CPU) under ZeRO-2 and ZeRO-3 gives what one process gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from processes import Running, flags, ranks
from safetensors.torch import load_file
from superfiltering.train import TrainConfig, train

from model_hooks.zoo import tokenizer

pytest.importorskip("deepspeed", reason="needs the extra [train]")
pytest.importorskip("trl", reason="needs the extra [train]")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SETTINGS: dict[str, Any] = {
    "template": "none", "max_length": 64, "batch_size": 2, "accumulation": 2, "epochs": 2.0, "learning_rate": 1e-3,
    "save_every": 2, "log_every": 1,
}  # fmt: skip
ONE_PROCESS = SETTINGS | {"batch_size": 4}


@pytest.fixture
def inputs(tmp_path: Path, model_of: Any, alpaca: Any, lines: Any) -> dict[str, Any]:
    """A model without dropout, whose chance is another in each process. The answers are not of equal length."""
    model_of(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0).save_pretrained(tmp_path / "model")
    tokenizer.load().save_pretrained(tmp_path / "model")
    return {"model": str(tmp_path / "model"), "data": lines(tmp_path / "data.jsonl", alpaca(24))}


def launch(output: Path, options: dict[str, Any]) -> Running:
    """Two processes; what they say goes to `<output>.log`."""
    program = ("-m", "superfiltering.train", "--json", "--output", output, *flags(options))
    return ranks(*program, log=output.with_name(f"{output.name}.log"))


def losses(folder: Path) -> list[tuple[int, float]]:
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]


def check_same(many: Path, one: Path, result: dict[str, Any], expected: dict[str, Any]) -> None:
    """Losses and weights agree; differences are those of summing in another order."""
    assert (result["records"], result["steps"]) == (expected["records"], expected["steps"]) == (24, 6)
    assert losses(many) == [(step, pytest.approx(loss, abs=2e-3)) for step, loss in losses(one)]
    assert [step for step, _ in losses(many)] == list(range(1, 7))
    a, b = load_file(many / "model.safetensors"), load_file(one / "model.safetensors")
    assert a.keys() == b.keys()
    assert max(float((a[k] - b[k]).abs().max()) for k in a) < 2e-3
    assert not many.with_name(f"{many.name}.training").exists()


def test_zero2(inputs: dict[str, Any], tmp_path: Path) -> None:
    expected = train(TrainConfig(output=tmp_path / "one", **ONE_PROCESS, **inputs))
    output = tmp_path / "many"
    result = launch(output, SETTINGS | inputs | {"deepspeed": "zero2"}).result()
    check_same(output, tmp_path / "one", result, expected)


def test_zero3_goes_on_after_a_kill(inputs: dict[str, Any], tmp_path: Path) -> None:
    expected = train(TrainConfig(output=tmp_path / "one", **ONE_PROCESS, **inputs))
    output, work = tmp_path / "many", tmp_path / "many.training"
    with launch(output, SETTINGS | inputs | {"deepspeed": "zero3"}) as first:
        first.wait_for(work / "checkpoint-2" / "trainer_state.json")
    assert not output.exists()
    result = launch(output, SETTINGS | inputs | {"deepspeed": "zero3"}).result()
    check_same(output, tmp_path / "one", result, expected)
