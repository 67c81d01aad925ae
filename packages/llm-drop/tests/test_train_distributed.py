"""Healing in two processes (gloo on CPU) under ZeRO-2, ZeRO-3 and FSDP2 gives what one process gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from llm_drop.plan import Plan
from llm_drop.train import TrainConfig, train
from processes import Running, flags, ranks
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


def launch(output: Path, options: dict[str, Any], *program: str) -> Running:
    """Two processes; what they say goes to `<output>.log`."""
    program = program or ("-m", "llm_drop.train")
    return ranks(*program, "--json", "--output", output, *flags(options), log=output.with_name(f"{output.name}.log"))


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
    result = launch(output, SETTINGS | options | {"deepspeed": "zero2"}).result()
    check_same(output, tmp_path / "one", result, expected)


def test_zero3_full_distilled_goes_on_after_kill(inputs: dict[str, Any], tmp_path: Path) -> None:
    options = {"method": "full", "distill": 0.5, **inputs}
    expected = train(TrainConfig(output=tmp_path / "one", **ONE_PROCESS, **options))
    output, work = tmp_path / "many", tmp_path / "many.training"
    with launch(output, SETTINGS | options | {"deepspeed": "zero3"}) as first:
        first.wait_for(work / "checkpoint-2" / "trainer_state.json")
    assert not output.exists()
    result = launch(output, SETTINGS | options | {"deepspeed": "zero3"}).result()
    check_same(output, tmp_path / "one", result, expected)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_fsdp2(method: str, inputs: dict[str, Any], tmp_path: Path) -> None:
    expected = train(TrainConfig(output=tmp_path / "one", **ONE_PROCESS, **inputs, method=method))
    options, output = SETTINGS | inputs | {"fsdp": True, "method": method}, tmp_path / "many"
    many = launch(output, options, "-c", FSDP_ON_CPU)
    result = many.result()
    assert "sharded by DistributedType.FSDP True" in many.said
    check_same(output, tmp_path / "one", result, expected)
