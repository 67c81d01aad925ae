"""Saved routers come back bit for bit, in the same process and in a fresh one, with LoRA and without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mod_router
import pytest
import torch
from mod_router import IncompatibleRouterError, attach, decide, detach, load, save
from mod_router.attaching import routers
from mod_router.merged import merge
from processes import run
from routermodels import build, ids, randomise
from torch import Tensor

import model_hooks
from model_hooks import RequestError

LAYERS = (1, 2)


def routed(name: str = "llama") -> Any:
    return randomise(attach(build(name), layers=LAYERS, tau=0.4), scale=0.3)


@torch.no_grad()
def logits(model: Any, x: Tensor) -> Tensor:
    return model(input_ids=x, use_cache=False).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral"])
def test_an_adapter_folder(name: str, tmp_path: Path) -> None:
    model, x = routed(name), ids(5, 9)
    folder = save(model, tmp_path / "routers", base="a base", measured={"capacity": 0.5})
    again = load(build(name), folder)
    assert torch.equal(logits(again, x), logits(model, x))
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 4 * 2 * 32 + 65536
    assert "a base" in (folder / "README.md").read_text()
    closer = load(build(name), folder, tau=0.999)
    assert not any(gate.any() for gate in decide(closer, x).values())
    with pytest.raises(RequestError, match="exists already"):
        save(model, folder)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_a_merged_folder_is_one_checkpoint(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, x = routed(name), ids(5, 9)
    want = logits(model, x)
    folder = merge(model, tmp_path / "merged", base="a base")
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert again.config.model_type == f"routed_{build(name).config.model_type}"
    assert torch.equal(logits(again, x), want)
    use = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    assert use.startswith("import mod_router")
    exec(use.replace("this folder", str(folder)), names := {})
    assert torch.equal(logits(names["model"], x), want)
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {r.weight.dtype for r in routers(half).values()} == {torch.float32}
    assert half.dtype == torch.bfloat16
    stock = detach(again)
    assert type(stock).__name__ == type(build(name)).__name__
    assert torch.equal(logits(stock, x), logits(build(name), x))
    stock.save_pretrained(tmp_path / "stock")
    assert json.loads((tmp_path / "stock" / "config.json").read_text())["model_type"] == build(name).config.model_type


FRESH = """
import sys, torch
import mod_router
from safetensors.torch import load_file
if sys.argv[2] == "merged":
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
else:
    import model_hooks
    model = mod_router.load(model_hooks.load(sys.argv[3], tokenizer=False)[0], sys.argv[1])
known = load_file(sys.argv[4])
with torch.no_grad():
    found = model.eval()(input_ids=known["ids"], use_cache=False).logits
assert torch.equal(found, known["logits"]), float((found - known["logits"]).abs().max())
"""


@pytest.mark.slow
def test_in_a_fresh_process(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    build().save_pretrained(tmp_path / "base")
    model, x = randomise(attach(model_hooks.load(tmp_path / "base", tokenizer=False)[0], layers=LAYERS)), ids(5, 9)
    save(model, tmp_path / "adapter")
    save_file({"ids": x, "logits": logits(model, x)}, tmp_path / "known.safetensors")
    merge(model, tmp_path / "merged")
    for kind in ("adapter", "merged"):
        where = (tmp_path / kind, kind, tmp_path / "base", tmp_path / "known.safetensors")
        run("-c", FRESH, *where, log=tmp_path / "log")


@pytest.mark.parametrize("first", ["lora", "routers"])
def test_with_lora_in_either_order(first: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder = save(routed(), tmp_path / "routers")

    def with_lora(model: Any) -> Any:
        torch.manual_seed(3)
        settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
        return peft.get_peft_model(model, settings).eval()

    if first == "lora":
        model = load(with_lora(build()), folder)
    else:
        model = with_lora(load(build(), folder))
    assert any("layers.1.self_attn.q_proj.lora_A" in name for name, _ in model.named_parameters())
    other = load(with_lora(build()), folder)
    x = ids(5, 9)
    assert torch.equal(logits(model, x), logits(other, x))
    assert not torch.equal(logits(model, x), logits(routed(), x))
    ran = model.generate(input_ids=x, max_new_tokens=4, do_sample=False)
    assert torch.equal(ran, model.generate(input_ids=x, max_new_tokens=4, do_sample=False, use_cache=False))
    again = save(model, tmp_path / "again")  # the base's fingerprint is that of the base without LoRA
    assert torch.equal(logits(load(build(), again), x), logits(routed(), x))
    detach(model)
    assert torch.equal(logits(model, x), logits(with_lora(build()), x))


def test_the_wrong_base_is_refused_and_left_alone(tmp_path: Path) -> None:
    folder = save(routed(), tmp_path / "routers", base="the right one")
    tuned = build()
    tuned.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    for other, message in ((build("qwen2"), "model_type llama"), (tuned, "fingerprint")):
        with pytest.raises(IncompatibleRouterError, match=message):
            load(other, folder)
        with pytest.raises(RequestError, match="no routers"):
            mod_router.RoutedCache(other)
    load(tuned, folder, allow_mismatch=True)
    record = json.loads((folder / "router_config.json").read_text())
    for change, message in (({"num_layers": 5}, "num_layers 5"), ({"hidden_size": 64}, "hidden_size 64")):
        (folder / "router_config.json").write_text(json.dumps({**record, "base": {**record["base"], **change}}))
        with pytest.raises(IncompatibleRouterError, match=message):
            load(build(), folder)


def test_broken_folders(tmp_path: Path) -> None:
    folder = save(routed(), tmp_path / "routers")
    with pytest.raises(RequestError, match=r"has no router_config\.json"):
        load(build(), tmp_path)
    weights = (folder / "router.safetensors").read_bytes()
    (folder / "router.safetensors").write_bytes(weights[:-8])
    with pytest.raises(RequestError, match="truncated"):
        load(build(), folder)
    (folder / "router.safetensors").unlink()
    with pytest.raises(RequestError, match="incomplete"):
        load(build(), folder)
    (folder / "router_config.json").write_text('{"format": "other"}')
    with pytest.raises(RequestError, match="tune again"):
        load(build(), folder)


def test_dropped_models_keep_their_adapter_beside_them(tmp_path: Path) -> None:
    from model_hooks import drop

    model, x = attach(drop(build(), attention=(0,)), layers=LAYERS), ids(3, 7)
    randomise(model)
    folder = save(model, tmp_path / "routers")
    again = load(drop(build(), attention=(0,)), folder)
    assert torch.equal(logits(again, x), logits(model, x))
    ran = again.generate(input_ids=x, max_new_tokens=4, do_sample=False)
    assert torch.equal(ran, again.generate(input_ids=x, max_new_tokens=4, do_sample=False, use_cache=False))
    with pytest.raises(RequestError, match="keep the adapter folder"):
        merge(model, tmp_path / "merged")
