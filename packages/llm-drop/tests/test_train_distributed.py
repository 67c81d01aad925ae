"""Healing in two processes (gloo on CPU) under ZeRO-2, ZeRO-3 and FSDP2 gives what one process gives."""

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
import torch
from llm_drop.plan import Plan
from llm_drop.train import TrainConfig, train
from safetensors.torch import load_file

from model_hooks import anatomy, load, save
from model_hooks.checkpoint import Card

pytest.importorskip("deepspeed", reason="needs the extra [train]")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# accelerate cuts models over GPUs only; FSDP2 itself runs on a CPU too. This tells accelerate that the CPU is a GPU.
FSDP_ON_CPU = """
import os
os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
from llm_drop import healing, train
from paper_tables import trainer
trainer.on_cpu = train.on_cpu = lambda: False
make = healing.Healer.create_optimizer
def create_optimizer(self, model=None):
    print("sharded by", self.accelerator.distributed_type, self.accelerator.is_fsdp2)
    return make(self, model)
healing.Healer.create_optimizer = create_optimizer
train.main()
"""
SETTINGS: dict[str, Any] = {
    "data": "zoo:calibration", "samples": 16, "length": 64, "heldout_samples": 8, "batch_size": 2, "accumulation": 2,
    "epochs": 2.0, "learning_rate": 1e-3, "save_every": 2, "log_every": 1,
}  # fmt: skip
ONE_PROCESS = SETTINGS | {"batch_size": 4}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The first six blocks of zoo:llama in float32, so that runs can be compared closely, and a plan."""
    folder = tmp_path_factory.mktemp("inputs")
    whole, tokenizer = load("zoo:llama", dtype=torch.float32)
    model = type(whole)(type(whole.config)(**whole.config.to_dict() | {"num_hidden_layers": 6})).eval()
    assert not model.load_state_dict(whole.state_dict(), strict=False).missing_keys
    save(model, folder / "model", tokenizer, card=Card("zoo:llama", "in float32"), verify=False)
    layers = len(anatomy(model).blocks)
    Plan(layers, attention=(0, layers // 2), mlp=(layers // 2 + 1,)).save(folder / "plan.json")
    return {"model": str(folder / "model"), "plan": folder / "plan.json"}


def launch(output: Path, options: dict[str, Any], script: Path | None = None) -> subprocess.Popen[bytes]:
    """Two processes; what they say goes to `<output>.log`, since a pipe that nobody reads would stop them."""
    program = ["-m", "llm_drop.train"] if script is None else [str(script)]
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program, "--json"]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        line += [flag] if value is True else [flag, str(value)]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    with said_file(output).open("wb") as said:
        return subprocess.Popen(
            [*line, "--output", str(output)], stdout=said, stderr=said, env=environment | {"OMP_NUM_THREADS": "1"}
        )


def said_file(output: Path) -> Path:
    return output.with_name(f"{output.name}.log")


def finish(process: subprocess.Popen[bytes], output: Path) -> tuple[dict[str, Any], str]:
    code, said = process.wait(), said_file(output).read_text()
    assert code == 0, said[-4000:]
    return json.JSONDecoder().raw_decode(said[said.index('{\n "output"') :])[0], said


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the launcher and its workers at one blow, as when a machine loses power."""
    for each in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
        each.kill()
    process.wait()


def check_same(many: Path, one: Path, result: dict[str, Any], expected: dict[str, Any]) -> None:
    """Losses, weights and logits agree; differences are those of summing in another order."""
    for key in ("steps", "tokens", "parameters", "trainable"):
        assert result[key] == expected[key]
    assert result["loss_before"] == pytest.approx(expected["loss_before"], abs=1e-5)
    assert result["loss_after"] == pytest.approx(expected["loss_after"], abs=1e-3)
    assert result["loss_after"] < result["loss_before"] - 0.01
    logs = [[json.loads(x) for x in (f / "training_log.jsonl").read_text().splitlines()] for f in (many, one)]
    losses, wanted = ([(e["step"], e["loss"]) for e in log if "loss" in e] for log in logs)
    assert losses == [(step, pytest.approx(loss, abs=1e-3)) for step, loss in wanted]
    assert [step for step, _ in losses] == list(range(1, result["steps"] + 1))
    a, b = load_file(many / "model.safetensors"), load_file(one / "model.safetensors")
    assert a.keys() == b.keys()
    assert max(float((a[k] - b[k]).abs().max()) for k in a) < 2e-3
    ids = torch.arange(24).view(1, 24) * 5 + 16
    with torch.no_grad():
        left, right = (load(folder, tokenizer=False)[0](input_ids=ids).logits for folder in (many, one))
    torch.testing.assert_close(left, right, atol=2e-2, rtol=0)
    assert not many.with_name(f"{many.name}.training").exists()


def test_zero2_lora_distilled(inputs: dict[str, Any], tmp_path: Path) -> None:
    options, output = {"distill": 0.5, **inputs}, tmp_path / "many"
    expected = train(TrainConfig(output=tmp_path / "one", **ONE_PROCESS, **options))
    result, _ = finish(launch(output, SETTINGS | options | {"deepspeed": "zero2"}), output)
    check_same(output, tmp_path / "one", result, expected)


def test_zero3_full_distilled_goes_on_after_kill(inputs: dict[str, Any], tmp_path: Path) -> None:
    options = {"method": "full", "distill": 0.5, **inputs}
    expected = train(TrainConfig(output=tmp_path / "one", **ONE_PROCESS, **options))
    output, work = tmp_path / "many", tmp_path / "many.training"
    first = launch(output, SETTINGS | options | {"deepspeed": "zero3"})
    while not (work / "checkpoint-2" / "trainer_state.json").is_file():
        assert first.poll() is None, said_file(output).read_text()[-4000:]
        time.sleep(0.01)
    kill(first)
    assert not output.exists()
    result, _ = finish(launch(output, SETTINGS | options | {"deepspeed": "zero3"}), output)
    check_same(output, tmp_path / "one", result, expected)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_fsdp2(method: str, inputs: dict[str, Any], tmp_path: Path) -> None:
    script = tmp_path / "fsdp_on_cpu.py"
    script.write_text(FSDP_ON_CPU)
    expected = train(TrainConfig(output=tmp_path / "one", **ONE_PROCESS, **inputs, method=method))
    options, output = SETTINGS | inputs | {"fsdp": True, "method": method}, tmp_path / "many"
    result, said = finish(launch(output, options, script), output)
    assert "sharded by DistributedType.FSDP True" in said
    check_same(output, tmp_path / "one", result, expected)
