"""Mean repair: what a skipped unit adds is the mean of what it adds elsewhere, in every way of computing it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mod_router import RouterConfig, attach, load, routing_context, save
from mod_router.data import Example
from mod_router.merged import merge
from mod_router.repair import means_of, measure_means, set_means
from routermodels import build, ids, left_padded, randomise

from model_hooks import RequestError, UnsupportedArchitectureError

LAYERS = (1, 2)
EXAMPLES = [Example(ids(length, seed=length), 2) for length in (9, 4, 7, 6)]


def config(unit: Any = "attention", **changes: Any) -> RouterConfig:
    return RouterConfig(layers=LAYERS, unit=unit, repair="mean", **changes)


def repaired(name: str = "llama", unit: Any = "attention", **changes: Any) -> Any:
    settings = config(unit, **changes)
    means = measure_means(build(name), settings, EXAMPLES)
    model = attach(build(name), settings)
    set_means(model, means)
    return model


@pytest.mark.parametrize("unit", ["attention", "mlp"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2"])
def test_means_are_those_of_the_modules_outputs(name: str, unit: str) -> None:
    model = repaired(name, unit)
    sums = {layer: [torch.zeros(32, dtype=torch.float64), 0] for layer in LAYERS}
    handles = []
    for layer in LAYERS:

        def see(module: Any, args: Any, output: Any, layer: int = layer) -> None:
            y = output if isinstance(output, torch.Tensor) else output[0]
            sums[layer][0] += y[0].double().sum(0)
            sums[layer][1] += y.shape[1]

        spec = model._mod_router.specs[LAYERS.index(layer)]
        handles.append(model.get_submodule(spec.module).register_forward_hook(see))
    with torch.no_grad(), routing_context(off=True):
        for example in EXAMPLES:
            model(input_ids=example.ids[None], use_cache=False)
    for layer, found in means_of(model).items():
        want = sums[layer][0] / sums[layer][1]
        torch.testing.assert_close(found.double(), want, atol=1e-5, rtol=1e-4)
        assert float(want.abs().max()) > 1e-2


def test_closed_layers_add_the_mean_and_nothing_else() -> None:
    model, x = repaired(), ids(3, 8)
    with torch.no_grad(), routing_context(forced={i: torch.zeros(3, dtype=torch.bool) for i in LAYERS}):
        found = model(input_ids=x, use_cache=False).logits
    plain = build()
    for layer, mean in means_of(model).items():
        attention = plain.model.layers[layer].self_attn
        torch.nn.init.zeros_(attention.o_proj.weight)
        attention.o_proj.bias = torch.nn.Parameter(mean)
    torch.testing.assert_close(found, plain(input_ids=x).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("unit", ["attention", "mlp", "block"])
@pytest.mark.parametrize("level", ["sequence", "token"])
def test_cached_is_uncached_and_is_what_training_computes(unit: str, level: Any) -> None:
    model = randomise(repaired(unit=unit, level=level), scale=1.0)
    x, mask = left_padded([9, 4, 7, 2])
    how: dict[str, Any] = {"input_ids": x, "attention_mask": mask, "do_sample": False, "max_new_tokens": 5}
    assert torch.equal(model.generate(**how), model.generate(**how, use_cache=False))
    with torch.no_grad(), routing_context() as seen:
        want = model(input_ids=x, attention_mask=mask, use_cache=False).logits
    assert 0 < float(seen.capacity) < 1
    for cheap in (False, True) if level == "sequence" else (False,):
        runtime = model._mod_router
        runtime.config = config(unit, level=level, cheap_train=cheap)
        with torch.no_grad(), routing_context(train=True):
            found = model(input_ids=x, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(found[mask.bool()], want[mask.bool()], atol=2e-4, rtol=1e-4)


def test_means_are_saved_with_the_routers(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    model, x = randomise(repaired(), scale=0.3), ids(5, 9)
    want = model(input_ids=x, use_cache=False).logits
    folder = save(model, tmp_path / "routers")
    assert torch.equal(load(build(), folder)(input_ids=x, use_cache=False).logits, want)
    merged = AutoModelForCausalLM.from_pretrained(merge(model, tmp_path / "merged"))
    assert torch.equal(merged(input_ids=x, use_cache=False).logits, want)
    kept = {k: v for k, v in load_file(folder / "router.safetensors").items() if "delta" not in k}
    save_file(kept, folder / "router.safetensors")
    with pytest.raises(RequestError, match=r"layers\.1\.delta does not fit"):
        load(build(), folder)


def test_a_norm_behind_the_unit_is_refused() -> None:
    with pytest.raises(UnsupportedArchitectureError, match="would change the mean"):
        attach(build("gemma2"), config())
    attach(build("gemma2"), config("block"))
    with pytest.raises(RequestError, match="it is one of none, mean"):
        attach(build(), layers=(1,), repair="median")
