"""Every form that a dropped model is written in gives the same logits, or says why it cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from llm_drop import Plan, apply, export, formats
from llm_drop.formats import check_nemotron_nas
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import build
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GenerationConfig,
    GPT2Config,
    LlamaForCausalLM,
    MixtralConfig,
    PhiConfig,
)

from model_hooks import RequestError, checkpoint, load
from model_hooks.zoo import tokenizer

PLAN = Plan(6, (0, 3), (3, 5))  # the first attention, a whole block, an MLP
IDS = torch.arange(30, 42).unsqueeze(0)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.fixture
def dropped() -> Any:
    return apply(build(intermediate_size=256), PLAN, check=False)


def test_zeroed_is_a_stock_model_with_the_same_outputs(dropped: Any, tmp_path: Path) -> None:
    folder = export(dropped, None, tmp_path / "zeroed", "zeroed")
    stock, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(stock) is LlamaForCausalLM
    assert not info["missing_keys"]
    assert len(stock.model.layers) == 5  # the whole block is gone in every form
    assert torch.allclose(logits(stock.eval()), logits(dropped), atol=1e-5)
    assert not stock.model.layers[0].self_attn.o_proj.weight.any()
    assert "no gain" in (folder / "README.md").read_text()


@pytest.mark.slow
def test_hf_remote_loads_where_nothing_of_ours_is_known_as_its_card_says(dropped: Any, tmp_path: Path) -> None:
    folder = export(dropped, tokenizer.load(), tmp_path / "remote", "hf-remote")
    use = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    code = (
        use.replace("this folder", str(folder))
        + "import sys, torch\n"
        + "assert not any(n.startswith(('model_hooks', 'llm_drop')) for n in sys.modules)\n"
        + "ids = torch.arange(30, 42).unsqueeze(0)\n"
        + "text = model.generate(ids, do_sample=False, max_new_tokens=8)\n"
        + "torch.save((model(ids, use_cache=False).logits, text, tokenizer('import os').input_ids), sys.argv[1])\n"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", code, str(tmp_path / "out.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found, text, words = torch.load(tmp_path / "out.pt")
    assert torch.equal(found, logits(dropped))
    assert torch.equal(text, dropped.generate(IDS, do_sample=False, max_new_tokens=8))
    assert words == tokenizer.load()("import os").input_ids


@pytest.mark.parametrize(
    ("to", "family"),
    [
        *(("zeroed", family) for family in (GPT2Config, Gemma2Config, PhiConfig, MixtralConfig)),
        *(pytest.param("hf-remote", family, marks=pytest.mark.slow) for family in (PhiConfig, MixtralConfig)),
    ],
)
def test_forms_of_other_families(to: str, family: Any, tmp_path: Path) -> None:
    """Conv1D, norms on both sides, parallel halves, experts that are stored otherwise than they are held."""
    size: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "pad_token_id": 0,
        "max_position_embeddings": 128,
    }  # fmt: skip
    size |= {} if family is GPT2Config else {"intermediate_size": 64, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family(**size)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.15)
    whole = logits(model)
    apply(model, Plan(4, (0, 2), (2, 3)), check=False)
    again, _ = load(export(model, None, tmp_path / "out", to), tokenizer=False)
    assert not torch.allclose(logits(model), whole, atol=0.1)
    torch.testing.assert_close(logits(again), logits(model))


@pytest.mark.slow
@pytest.mark.parametrize("to", ["hf-remote", "zeroed"])
def test_a_model_in_half_precision(to: str, dropped: Any, tmp_path: Path) -> None:
    dropped.to(torch.bfloat16).save_pretrained(tmp_path / "bfloat16")
    model, _ = load(tmp_path / "bfloat16", tokenizer=False)
    again, _ = load(export(model, None, tmp_path / "out", to), tokenizer=False)
    assert again.dtype == torch.bfloat16
    torch.testing.assert_close(logits(again), logits(model))


@pytest.mark.slow
@pytest.mark.parametrize("to", ["hf-remote", "zeroed"])
def test_what_is_read_back_runs_where_the_model_does(
    to: str, dropped: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that rounds otherwise than the CPU: a model there is compared with a model there."""

    def elsewhere(model: Any) -> Any:
        model.register_forward_hook(lambda module, args, output: setattr(output, "logits", output.logits * 1.05))
        return model

    monkeypatch.setattr(checkpoint, "load", lambda *args, **how: (elsewhere(load(*args, **how)[0]), None))
    cast = dropped.to(torch.bfloat16)  # rotary frequencies too, which no folder holds
    assert load(export(elsewhere(cast), None, tmp_path / "out", to), tokenizer=False)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("to", ["hf-remote", "zeroed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_altered_after_writing_are_found(
    to: str, dtype: torch.dtype, dropped: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alter(model: Any, folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        state["model.layers.2.mlp.down_proj.weight"] *= 1.1
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(checkpoint, "_check_structure", alter)
    with pytest.raises(RuntimeError, match="other logits"):
        export(dropped.to(dtype), None, tmp_path / "out", to)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("was", "now"),
    [
        ('stack[edit["block"]]', 'stack[edit["block"] - 1]'),  # another layer is taken out
        ('for edit in lean["edits"]:', "for edit in ():"),  # none is: what the folder lacks is drawn at random
    ],
)
def test_a_wrong_modelling_file_is_found(
    was: str, now: str, dropped: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (formats.files("llm_drop.remote") / "modeling_llm_drop.py").read_text()
    assert was in code
    (tmp_path / "modeling_llm_drop.py").write_text(code.replace(was, now))
    monkeypatch.setattr(formats, "files", lambda package: tmp_path)
    with pytest.raises(RuntimeError, match="hf-remote: what was written gives other logits"):
        export(dropped.to(torch.bfloat16), None, tmp_path / "out", "hf-remote")
    assert not (tmp_path / "out").exists()


def test_each_form_says_how_it_is_loaded(dropped: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_same_in_fresh_process", lambda folder: None)
    text = {
        to: (export(dropped, None, tmp_path / to, to) / "README.md").read_text().partition("## Use")[2]
        for to in formats.FORMATS
    }
    assert "import model_hooks" in text["hf"]
    assert "trust_remote_code=True" in text["hf-remote"]
    assert "AutoModelForCausalLM.from_pretrained" in text["zeroed"]
    assert "DeciLMForCausalLM" in text["nemotron-nas"]
    assert [to for to, use in text.items() if "model_hooks" in use] == ["hf"]
    assert [to for to, use in text.items() if "from_pretrained" not in use] == ["nemotron-nas"]


def test_nemotron_nas_describes_every_tensor(tmp_path: Path) -> None:
    model = apply(build(intermediate_size=256), PLAN, check=False)
    folder = export(model, None, tmp_path / "nas", "nemotron-nas")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert [b["attention"]["no_op"] for b in config["block_configs"]] == [True, False, False, False, False]
    assert [b["ffn"]["no_op"] for b in config["block_configs"]] == [False, False, False, False, True]
    with safe_open(folder / "model.safetensors", "pt") as handle:
        names = set(handle.keys())
    assert not any(name.startswith("model.layers.0.self_attn") for name in names)

    state = load_file(folder / "model.safetensors")
    state.pop("model.layers.1.self_attn.k_proj.weight")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"layers\.1\.self_attn\.k_proj"):
        check_nemotron_nas(folder)


@pytest.mark.parametrize(
    ("to", "changes", "plan", "message"),
    [
        ("gguf", {}, PLAN, "unknown format 'gguf'; there are hf, hf-remote, zeroed, nemotron-nas"),
        ("nemotron-nas", {"intermediate_size": 64}, PLAN, "not a multiple of 256"),
        ("nemotron-nas", {"intermediate_size": 256, "attention_bias": True}, PLAN, "biases"),
        ("hf-remote", {}, Plan(6, (2,), (2,)), "use hf"),
    ],
)
def test_what_a_form_cannot_express_is_refused(
    to: str, changes: dict[str, Any], plan: Plan, message: str, tmp_path: Path
) -> None:
    model = apply(build(**changes), plan, check=False)
    with pytest.raises(RequestError, match=message):
        export(model, None, tmp_path / "out", to)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["zeroed", "nemotron-nas"])
def test_weights_that_are_not_in_memory_are_refused(to: str, dropped: Any, tmp_path: Path) -> None:
    """As `--device-map auto` leaves those that fit on no GPU."""
    cpu_offload(dropped, execution_device=torch.device("cpu"))
    with pytest.raises(RequestError, match=r"is kept outside memory; drop without --device-map"):
        export(dropped, None, tmp_path / "out", to)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["hf", "zeroed", "nemotron-nas"])
def test_how_the_model_generates_goes_with_it(to: str, dropped: Any, tmp_path: Path) -> None:
    dropped.generation_config.update(do_sample=True, temperature=0.25, eos_token_id=[1, 7])
    again = GenerationConfig.from_pretrained(export(dropped, None, tmp_path / "out", to))
    assert (again.temperature, again.eos_token_id) == (0.25, [1, 7])


def test_constants_have_no_place_in_the_stock_forms(model: Any, scores: Any, tmp_path: Path) -> None:
    repaired = apply(model, PLAN, repair=scores, check=False)
    with pytest.raises(RequestError, match="no place for repair constants"):
        export(repaired, None, tmp_path / "out", "zeroed")
    export(repaired, None, tmp_path / "hf", "hf")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert torch.equal(logits(again), logits(repaired))


def test_an_existing_folder_is_kept(dropped: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    for to in ("hf", "hf-remote", "zeroed", "nemotron-nas"):
        with pytest.raises(RequestError, match="--overwrite"):
            export(dropped, None, tmp_path / "out", to)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["precious"]


def test_a_modelling_file_for_images_is_refused(tmp_path: Path) -> None:
    model, tokenizer = load("zoo:llava")
    apply(model, Plan(len(model.model.language_model.layers), (1,)), check=False)
    with pytest.raises(RequestError, match="use hf for a vision-language model"):
        export(model, tokenizer, tmp_path / "out", "hf-remote")
    assert not (tmp_path / "out").exists()
