"""Routers and LoRA trained together: these and nothing else, in either order, and what is written loads again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mod_router import attach, detach, routing_context
from mod_router import load as load_routers
from mod_router.attaching import base_of, routers
from mod_router.data import read_examples
from mod_router.measuring import measure
from mod_router.tune import TuneConfig, tune
from routermodels import build, ids, left_padded, randomise
from torch import Tensor

from model_hooks import RequestError, load

peft = pytest.importorskip("peft", reason="needs the extra [train]")
pytest.importorskip("accelerate", reason="needs the extra [train]")
from mod_router import tuning  # noqa: E402

SETTINGS: dict[str, Any] = {
    "samples": 48, "length": 32, "heldout_samples": 24, "batch_size": 8, "layers": "1-4", "log_every": 1,
    "max_steps": 4, "lora_rank": 2, "lora_rate": 3e-3, "save_every": 2, "target_capacity": 0.5, "repair": "mean",
}  # fmt: skip


def lora_of(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" in name}


@pytest.fixture(scope="module")
def trained(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TuneConfig, dict[str, Any]]:
    output = tmp_path_factory.mktemp("lora") / "routers"
    config = TuneConfig(model=str(tiny), data=str(text), output=output, **SETTINGS)
    states: dict[str, Any] = {}
    step = tuning.RouterTrainer.train

    def watched(self: Any, **kwargs: Any) -> Any:
        result = step(self, **kwargs)
        states["bytes"] = sum(t.numel() * 4 for v in self.optimizer.state.values() for t in v.values() if t.dim())
        states["rates"] = [group["initial_lr"] for group in self.optimizer.param_groups]
        states["lora"] = sum(p.numel() for p in lora_of(self.model).values())
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning.RouterTrainer, "train", watched)
        return config, tune(config) | states


def test_the_optimizer_holds_routers_and_lora_and_nothing_else(trained: tuple[TuneConfig, dict[str, Any]]) -> None:
    _, found = trained
    assert found["lora"] > 0
    assert found["trainable"] == 4 * 32 + found["lora"]
    assert found["bytes"] == 2 * 4 * (4 * 32 + found["lora"])  # two moments, float32
    assert found["rates"] == [2e-2, 3e-3]


def test_what_is_written_loads_as_it_was_measured(
    trained: tuple[TuneConfig, dict[str, Any]], tiny: Path, text: Path
) -> None:
    config, found = trained
    model = load_routers(load(tiny, tokenizer=False)[0], config.output)
    assert isinstance(model, peft.PeftModel)
    assert not any(p.requires_grad for p in model.parameters() if p.dim() < 2)
    assert min(float(p.abs().max()) for n, p in lora_of(model).items() if "lora_B" in n) > 0
    assert min(float(r.weight.detach().abs().max()) for r in routers(model).values()) > 0
    examples = read_examples(str(text), load(tiny)[1], samples=72, length=32)
    assert (len(examples), config.heldout_samples) == (72, 24)
    measured = measure(model, examples[48:])
    assert float(measured.loss.mean()) == pytest.approx(found["loss"], rel=1e-5)
    assert measured.base is not None
    assert float(measured.base.mean()) == pytest.approx(found["base_loss"], rel=1e-6)  # the base: LoRA is off too
    assert measured.capacity == pytest.approx(found["capacity"])
    with pytest.raises(RequestError, match="merge that first"):
        load_routers(model, config.output)


def test_a_merged_folder_holds_both(trained: tuple[TuneConfig, dict[str, Any]], tiny: Path, tmp_path: Path) -> None:
    from mod_router import workflow
    from mod_router.merged import merge
    from transformers import AutoModelForCausalLM

    model = load_routers(load(tiny, tokenizer=False)[0], trained[0].output)
    x = ids(4, 12)
    with torch.no_grad():
        want = model(input_ids=x, use_cache=False).logits
        merged = AutoModelForCausalLM.from_pretrained(merge(model.merge_and_unload(), tmp_path / "merged"))
        torch.testing.assert_close(merged(input_ids=x, use_cache=False).logits, want, atol=1e-4, rtol=1e-4)
    assert workflow.inspect(str(trained[0].output))["lora"]


def test_a_stopped_run_goes_on_to_the_same_weights(
    trained: tuple[TuneConfig, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from safetensors.torch import load_file

    step, calls = tuning.RouterTrainer.training_step, iter(range(100))

    def stop(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(calls) == 3:  # after checkpoint-2
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(tuning.RouterTrainer, "training_step", stop)
    config = replace(trained[0], output=tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        tune(config)
    monkeypatch.setattr(tuning.RouterTrainer, "training_step", step)
    tune(config)
    for name in ("router.safetensors", "lora/adapter_model.safetensors"):
        a, b = load_file(trained[0].output / name), load_file(config.output / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def both(first: str) -> Any:
    model = build()
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    if first == "routers":
        attach(model, layers=(1, 2))
    torch.manual_seed(3)
    model = peft.get_peft_model(model, settings)
    if first == "lora":
        attach(model, layers=(1, 2))
    randomise(model, scale=0.3)
    tuning.only_routers(model)
    return model


def test_either_order_trains_alike() -> None:
    x, mask = left_padded([6, 4, 5, 6])
    found = []
    for first in ("lora", "routers"):
        model = both(first)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(2):
            with routing_context(train=True) as seen:
                logits = model(input_ids=x, attention_mask=mask, use_cache=False).logits
            (logits[mask.bool()].square().mean() + seen.capacity).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights = lora_of(model) | {str(k): r.weight.detach() for k, r in routers(model).items()}
        found.append(weights)
        model._mod_router.last = None
        detach(model)
        frozen = {n.replace(".base_layer", ""): p for n, p in base_of(model).named_parameters() if ".lora_" not in n}
        assert all(torch.equal(p, frozen[n]) for n, p in build().named_parameters())
    assert found[0].keys() == found[1].keys()
    for name, weight in found[0].items():
        torch.testing.assert_close(weight, found[1][name], atol=1e-6, rtol=1e-5)
