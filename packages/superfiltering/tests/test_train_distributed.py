"""Fine-tuning in two processes (gloo on CPU) under ZeRO-2 and ZeRO-3 gives what one process gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
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


def launch(output: Path, options: dict[str, Any]) -> subprocess.Popen[bytes]:
    """Two processes; what they say goes to `<output>.log`, since a pipe that nobody reads would stop them."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "-m", "superfiltering.train", "--json", "--output", str(output)]  # fmt: skip
    for name, value in options.items():
        line += [f"--{name.replace('_', '-')}", str(value)]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    with said_file(output).open("wb") as said:
        return subprocess.Popen(line, stdout=said, stderr=said, env=environment | {"OMP_NUM_THREADS": "1"})


def said_file(output: Path) -> Path:
    return output.with_name(f"{output.name}.log")


def finish(process: subprocess.Popen[bytes], output: Path) -> dict[str, Any]:
    code, said = process.wait(), said_file(output).read_text()
    assert code == 0, said[-4000:]
    assert said.count('{\n "output"') == 1  # one process tells the result
    return dict(json.JSONDecoder().raw_decode(said[said.index('{\n "output"') :])[0])


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the launcher and its workers at one blow, as when a machine loses power."""
    for each in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
        each.kill()
    process.wait()


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
    result = finish(launch(output, SETTINGS | inputs | {"deepspeed": "zero2"}), output)
    check_same(output, tmp_path / "one", result, expected)


def test_zero3_goes_on_after_a_kill(inputs: dict[str, Any], tmp_path: Path) -> None:
    expected = train(TrainConfig(output=tmp_path / "one", **ONE_PROCESS, **inputs))
    output, work = tmp_path / "many", tmp_path / "many.training"
    first = launch(output, SETTINGS | inputs | {"deepspeed": "zero3"})
    while not (work / "checkpoint-2" / "trainer_state.json").is_file():
        assert first.poll() is None, said_file(output).read_text()[-4000:]
        time.sleep(0.01)
    kill(first)
    assert not output.exists()
    result = finish(launch(output, SETTINGS | inputs | {"deepspeed": "zero3"}), output)
    check_same(output, tmp_path / "one", result, expected)
