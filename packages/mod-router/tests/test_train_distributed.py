"""Tuning in two processes (gloo on CPU), plain and under ZeRO-2, ZeRO-3 and FSDP2, gives what one process gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mod_router.tune import TuneConfig, tune
from processes import flags, ranks
from safetensors.torch import load_file

from model_hooks import load

pytest.importorskip("deepspeed", reason="needs the extra [train]")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SETTINGS: dict[str, Any] = {
    "data": "zoo:calibration", "heldout": "zoo:heldout", "samples": 16, "length": 32,
    "heldout_samples": 4, "batch_size": 2, "accumulation": 2, "max_steps": 4, "layers": "last:6", "noise": 0.0,
    "log_every": 1, "target_capacity": 0.5,
}  # fmt: skip
LORA = {"lora_rank": 2, "lora_rate": 1e-3, "repair": "mean"}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "zero2": {"deepspeed": "zero2"},
    "zero3": {"deepspeed": "zero3", **LORA},
    "fsdp": {"fsdp": True, **LORA},
}
# accelerate cuts models over GPUs only; FSDP2 itself runs on a CPU too. This tells accelerate that the CPU is a GPU.
FSDP_ON_CPU = """
import os
os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
from mod_router import tune, tuning
from paper_tables import trainer
trainer.on_cpu = tune.on_cpu = lambda: False
put = tuning.gathered
def gathered(model):
    print("cut by", {type(r.weight).__name__ for r in tuning.routers(model).values()})
    return put(model)
tuning.gathered = gathered
tune.main()
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first eight blocks of zoo:llama: DeepSpeed's ZeRO-3 takes its time for every one."""
    folder = tmp_path_factory.mktemp("base")
    model, tokenizer = load("zoo:llama", dtype=torch.float32)
    model.model.layers = model.model.layers[:8]
    model.config.num_hidden_layers = 8
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alone(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[Path, dict[str, Any]]]:
    """Of one process, without and with LoRA."""
    found = {}
    for lora in (False, True):
        output = tmp_path_factory.mktemp("alone") / "routers"
        options = SETTINGS | {"model": str(base), "batch_size": 4, "output": output} | (LORA if lora else {})
        found[lora] = (output, tune(TuneConfig(**options)))
    return found


@pytest.mark.parametrize("way", WAYS)
def test_two_processes(way: str, base: Path, alone: dict[bool, tuple[Path, dict[str, Any]]], tmp_path: Path) -> None:
    options = SETTINGS | {"model": base} | WAYS[way]
    folder, expected = alone["lora_rank" in options]
    program = ("-c", FSDP_ON_CPU) if way == "fsdp" else ("-m", "mod_router.tune")
    running = ranks(
        *program, "--json", "--output", tmp_path / "routers", *flags(options), log=tmp_path / "log"
    )  # fmt: skip
    result = running.result()
    assert ("cut by {'DTensor'}" in running.said) == (way == "fsdp")
    assert result["steps"] == expected["steps"]
    assert result["trainable"] == expected["trainable"]
    assert (result["trainable"] == 6 * 128) == ("lora_rank" not in options)
    assert result["base_loss"] == pytest.approx(expected["base_loss"], abs=1e-4)
    for name in ("router.safetensors", *(["lora/adapter_model.safetensors"] if "lora_rank" in options else [])):
        one, many = (load_file(f / name) for f in (folder, tmp_path / "routers"))
        assert one.keys() == many.keys()
        for key in one:
            assert float(many[key].abs().max()) > 0
            # Adam's first steps follow signs, so what sums in another order may differ in a few coordinates
            a, b = one[key].flatten(), many[key].flatten()
            assert torch.nn.functional.cosine_similarity(a, b, dim=0).item() > 0.9, key
    logs = [[json.loads(x) for x in (f / "training_log.jsonl").read_text().splitlines()]
            for f in (folder, tmp_path / "routers")]  # fmt: skip
    losses = [[e["loss"] for e in log if "loss" in e] for log in logs]
    assert losses[1][0] == pytest.approx(losses[0][0], abs=1e-3)
    assert len(losses[1]) == 4
