"""Training in two processes (gloo on CPU), plain, under ZeRO-2, ZeRO-3 and FSDP2, gives what one process gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from meo import load
from meo.converting import banks
from meo.train import TrainConfig, train
from mergedmodels import GPT2, write
from processes import Running, flags, ranks

pytest.importorskip("deepspeed", reason="needs the extra [train]")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# accelerate cuts models over GPUs only; FSDP2 itself runs on a CPU too. This tells accelerate that the CPU is a GPU.
FSDP_ON_CPU = """
import os
os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
from accelerate.state import PartialState
from accelerate.utils import DistributedType
PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
from meo import train, tuning
from paper_tables import trainer
trainer.on_cpu = train.on_cpu = lambda: False
make = tuning.BalancedTrainer.create_optimizer
def create_optimizer(self, model=None):
    print("sharded by", self.accelerator.distributed_type, self.accelerator.is_fsdp2)
    return make(self, model)
tuning.BalancedTrainer.create_optimizer = create_optimizer
train.main()
"""
SETTINGS: dict[str, Any] = {
    "kind": "clm", "data": "zoo:calibration", "heldout": "zoo:heldout", "samples": 32, "length": 32,
    "heldout_samples": 8, "batch_size": 4, "max_steps": 3, "gate": "topk", "level": "chunk", "chunk": 8,
    "experts": 4, "k": 2, "learning_rate": 1e-2, "log_every": 1, "warmup": 0.0,
    "bias_rate": 0.01,
}  # fmt: skip


def losses(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return [entry for entry in lines if "loss" in entry]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    room = tmp_path_factory.mktemp("alone")
    base = write(room / "base", "GPT2LMHeadModel", "GPT2Config", {**GPT2, "attn_pdrop": 0.0, "embd_pdrop": 0.0,
                                                                  "resid_pdrop": 0.0})  # fmt: skip
    train(TrainConfig(**SETTINGS | {"batch_size": 8, "model": str(base), "output": room / "out"}))
    return base, room / "out"


def launch(base: Path, output: Path, *program: str, **more: Any) -> Running:
    """Two processes; what they say goes to `<output>.log`."""
    options = flags({**SETTINGS, "model": base, "output": output, **more})
    return ranks(*(program or ("-m", "meo.train")), *options, log=output.with_suffix(".log"))


def check_same(one: Path, many: Path, tolerance: float) -> None:
    """Losses, balance and all weights, those of the gates too."""
    expected, found = losses(one), losses(many)
    assert len(found) == len(expected) == 3
    for a, b in zip(expected, found):
        assert b["balance"] == pytest.approx(a["balance"], rel=tolerance)
        assert b["loss"] == pytest.approx(a["loss"], rel=tolerance)
    (first, _), (second, _) = load(one), load(many)
    state = second.state_dict()
    assert first.state_dict().keys() == state.keys()
    for name, tensor in first.state_dict().items():
        # Adam's first steps follow signs, so what sums in another order may differ in a few coordinates
        difference = (tensor - state[name]).float().abs().mean() / tensor.float().abs().mean().clamp_min(1e-12)
        assert float(difference) < (0.02 if "w_gate" not in name and name[-5:] != "first" else 0.25), name
    assert all(float(bank.w_gate.abs().max()) > 0 for bank in banks(second).values())
    assert all(bool(bank.moves.any()) for bank in banks(second).values())
    assert not many.with_name(f"{many.name}.training").exists()


def test_two_processes(alone: tuple[Path, Path], tmp_path: Path) -> None:
    base, one = alone
    launch(base, tmp_path / "out").finish()
    check_same(one, tmp_path / "out", 1e-4)


def test_zero2(alone: tuple[Path, Path], tmp_path: Path) -> None:
    base, one = alone
    launch(base, tmp_path / "out", deepspeed="zero2").finish()
    check_same(one, tmp_path / "out", 1e-4)


def test_zero3_with_layers_run_again_goes_on_after_kill(alone: tuple[Path, Path], tmp_path: Path) -> None:
    base, one = alone
    how = {"deepspeed": "zero3", "gradient_checkpointing": True, "save_every": 2}
    with launch(base, tmp_path / "out", **how) as first:
        first.wait_for(tmp_path / "out.training" / "checkpoint-2" / "trainer_state.json")
    assert not (tmp_path / "out").exists()
    launch(base, tmp_path / "out", **how).finish()
    check_same(one, tmp_path / "out", 1e-4)


def test_fsdp2(alone: tuple[Path, Path], tmp_path: Path) -> None:
    base, one = alone
    many = launch(base, tmp_path / "out", "-c", FSDP_ON_CPU, fsdp=True)
    assert "sharded by DistributedType.FSDP True" in many.finish()
    check_same(one, tmp_path / "out", 1e-4)
