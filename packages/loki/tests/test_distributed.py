"""Two processes (gloo on CPU): a model sharded by ZeRO-3 decodes as a whole one, and calibration adds up its shares."""

from __future__ import annotations

import json
from pathlib import Path

import loki
import pytest
import torch
from loki import Basis
from processes import ranks

import model_hooks
from model_hooks.text import load_sequences

pytest.importorskip("deepspeed", reason="needs deepspeed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CONFIG = Path(__file__).parents[1] / "configs" / "deepspeed" / "zero3-inference.json"
SCRIPT = """
import json, sys
import deepspeed, torch
import loki, model_hooks
from loki import Basis
from model_hooks.errors import RequestError

sequences, prompt, config = torch.load("inputs.pt"), torch.load("prompt.pt"), json.load(open(sys.argv[1]))
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled for half a minute, to do what gloo does
deepspeed.init_distributed("gloo")
rank = torch.distributed.get_rank()
model, _ = model_hooks.load("zoo:gpt2", dtype="float32")
loki.calibrate(model, sequences).save(f"together{rank}.safetensors")
config["bf16"]["enabled"] = False  # compared closely
del config["zero_optimization"]["offload_param"]  # the CPU's memory is where the weights are already
engine = deepspeed.initialize(model=model, config=config)[0]
held = sum(p.numel() for p in engine.module.parameters())
with loki.session(engine.module, Basis.load("basis.safetensors"), k=0.25, min_length=0, sink=0, recent=0, min_k=0):
    text = engine.module.generate(prompt, max_new_tokens=12, do_sample=False, synced_gpus=True, pad_token_id=1)
loki.calibrate(engine.module, sequences).save(f"sharded{rank}.safetensors")
try:
    loki.calibrate(engine.module, sequences[:5])
    refused = ""
except RequestError as error:
    refused = str(error)
torch.save({"text": text, "held": held, "refused": refused}, f"found{rank}.pt")
"""


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    model, tokenizer = model_hooks.load("zoo:gpt2", dtype="float32")
    sequences = load_sequences(tokenizer, "zoo:calibration", samples=6, length=128)
    prompt = tokenizer("import os\n\ndef main(", return_tensors="pt")["input_ids"]
    basis = loki.calibrate(model, sequences)
    basis.save(tmp_path / "basis.safetensors")
    torch.save(sequences, tmp_path / "inputs.pt")
    torch.save(prompt, tmp_path / "prompt.pt")
    ranks("-c", SCRIPT, CONFIG, log=tmp_path / "log", cwd=tmp_path).finish()
    with loki.session(model, basis, k=0.25, min_length=0, sink=0, recent=0, min_k=0):
        text = model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=1)
    for rank in range(2):
        found = torch.load(tmp_path / f"found{rank}.pt")
        assert found["held"] == 0  # a process holds its part of the weights, and gathers a layer when it runs
        assert torch.equal(found["text"], text)
        assert "5 sequences cannot be shared evenly by 2 processes" in found["refused"]
        for way in ("together", "sharded"):
            other = Basis.load(tmp_path / f"{way}{rank}.safetensors")
            assert other.about.tokens == basis.about.tokens == 6 * 128
            torch.testing.assert_close(other.eigenvalues, basis.eigenvalues, rtol=1e-4, atol=1e-5)


def test_the_shipped_configuration_is_one_that_deepspeed_knows() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    settings = json.loads(CONFIG.read_text())["zero_optimization"]
    assert DeepSpeedZeroConfig(**settings).offload_param is not None
