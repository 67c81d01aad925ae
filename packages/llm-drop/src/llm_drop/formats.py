"""Write a dropped model in the form that its users can load. Every result is read back and compared before it is kept.

`hf`            a checkpoint for transformers with `import model_hooks`; whole-block results need no import at all
`hf-remote`     the same and one generic modelling file: loads with `trust_remote_code=True` and nothing of ours
`zeroed`        the stock architecture with the dropped sublayers' weights zero: the same outputs in any engine that
                runs the base model, but neither faster nor smaller in memory
`nemotron-nas`  Llama layouts: no-op sublayers as NVIDIA's Nemotron-NAS models (DeciLM) have them; checked by names and
                shapes alone, since transformers has no such architecture, and tried in no engine
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model_hooks import Card, RequestError, anatomy, save
from model_hooks.files import atomic_folder

NO_GAIN = "zeroed: same outputs as the dropped model, but no gain in speed or memory; use it where nothing else loads"
REMOTE_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this folder", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("this folder", trust_remote_code=True)
```"""
NAS_USE = """transformers has no such architecture. Load it with an engine that runs `DeciLMForCausalLM`, such as vLLM,
which reads `config.json` through NVIDIA's `configuration_decilm.py`. Names and shapes of the tensors were checked here,
no engine's outputs."""


def export(
    model: Any, tokenizer: Any, folder: str | Path, to: str, *, card: Card | None = None, overwrite: bool = False,
    source: str | Path | None = None,
) -> Path:  # fmt: skip
    """Write `model` to `folder` in the form `to`.

    Raises:
        RequestError: unknown form, a model that the form cannot express, or a folder that exists. Nothing is written.
        RuntimeError: what was written reads back with other logits.
    """
    if to not in FORMATS:
        raise RequestError(f"unknown format {to!r}; there are {', '.join(FORMATS)}")
    card = card or Card(base=getattr(model, "name_or_path", "") or type(model).__name__, method=f"exported as {to}")
    return FORMATS[to](model, tokenizer, Path(folder), card, overwrite, source)


def _hf(model: Any, tokenizer: Any, folder: Path, card: Card, overwrite: bool, source: Any) -> Path:
    return save(model, folder, tokenizer, card=card, overwrite=overwrite, source=source)


def _hf_remote(model: Any, tokenizer: Any, folder: Path, card: Card, overwrite: bool, source: Any) -> Path:
    if not _edits(model):
        raise RequestError("hf-remote: this model is a stock one (only whole blocks are gone, if anything); use hf")
    if anatomy(model).vision_tower:
        raise RequestError("hf-remote: its modelling file is for language models; use hf for a vision-language model")
    with atomic_folder(folder, overwrite, source) as part:
        save(model, part / "model", tokenizer, card=replace(card, use=REMOTE_USE))
        for file in (part / "model").iterdir():
            file.rename(part / file.name)
        (part / "model").rmdir()
        code = files("llm_drop.remote").joinpath("modeling_llm_drop.py").read_text(encoding="utf-8")
        (part / "modeling_llm_drop.py").write_text(code, encoding="utf-8")
        config = json.loads((part / "config.json").read_text())
        config["auto_map"] = {
            "AutoConfig": "modeling_llm_drop.LLMDropConfig",
            "AutoModelForCausalLM": "modeling_llm_drop.LLMDropForCausalLM",
        }
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        _same_in_fresh_process(part)
    return folder


_PROBE = """
import sys, torch
from transformers import AutoModelForCausalLM
folder, ids, logits, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
assert "model_hooks" not in sys.modules and "llm_drop" not in sys.modules
with torch.no_grad():
    torch.save(model(input_ids=torch.load(ids), use_cache=False).logits, logits)
"""


@torch.no_grad()
def _same_in_fresh_process(folder: Path) -> None:
    """A process that knows nothing of this package must get from the folder the logits that this one gets.

    `save` has compared what this one gets with the model, wherever that runs. Here both sides read the same files, on
    the CPU and with as many threads, so that nothing but the modelling file can make them differ.
    """
    import os
    import tempfile

    from model_hooks import load
    from model_hooks.trace import small_input

    again, _ = load(folder, tokenizer=False)
    tokens = small_input(again)
    want = again(input_ids=tokens, use_cache=False).logits
    del again
    with tempfile.TemporaryDirectory() as scratch:
        ids, logits = Path(scratch) / "ids.pt", Path(scratch) / "logits.pt"
        torch.save(tokens, ids)
        given = (str(folder.resolve()), str(ids), str(logits), str(torch.get_num_threads()))
        cache = {"HF_MODULES_CACHE": str(Path(scratch) / "modules"), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", _PROBE, *given], capture_output=True, text=True, env={**os.environ, **cache}
        )
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise RuntimeError(f"hf-remote: the folder does not load by itself: {said[-1]}")
        got = torch.load(logits)
    error = float((want - got).abs().max())
    if not error <= 4 * torch.finfo(want.dtype).eps * float(want.abs().max()):  # NaN is an error too
        raise RuntimeError(f"hf-remote: what was written gives other logits (off by {error:.2e}); nothing was kept")


def _zeroed(model: Any, tokenizer: Any, folder: Path, card: Card, overwrite: bool, source: Any) -> Path:
    if any(edit["bias"] for edit in _edits(model)):
        raise RequestError("zeroed: the stock architecture has no place for repair constants; drop without --repair")
    note = replace(card, method=f"{card.method}. {NO_GAIN}")
    return save(_with_zeros(model), folder, tokenizer, card=note, overwrite=overwrite, source=source, like=model)


def _with_zeros(model: Any) -> Any:
    """The stock model, to be saved: what was dropped is there again, with zero weights.

    A sublayer whose weights are all zero adds zero in every layout: a norm of zeros is zero too.
    """
    with torch.device("meta"):
        stock = getattr(type(model), "lean_base", type(model))(_stock_config(model))
    own = model.state_dict()
    _refuse_offloaded("zeroed", own)
    left_over = sorted(own.keys() - stock.state_dict().keys())
    if left_over:
        raise RequestError(f"zeroed: the stock architecture has no place for {left_over[0]}")
    state = {
        k: own[k].cpu() if k in own else torch.zeros(v.shape, dtype=model.dtype) for k, v in stock.state_dict().items()
    }
    stock.load_state_dict(state, assign=True)
    stock.tie_weights()
    stock.name_or_path, stock.generation_config = model.name_or_path, model.generation_config
    return stock


def _refuse_offloaded(to: str, state: Mapping[str, Tensor]) -> None:
    name = next((name for name, tensor in state.items() if tensor.device.type == "meta"), None)
    if name:
        raise RequestError(f"{to}: {name} is kept outside memory; drop without --device-map")


def _stock_config(model: Any) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = model.config.to_dict()
    lean = values.pop("lean", None) or {}
    base = lean.get("base_model_type", model.config.model_type)
    for key in ("model_type", "architectures", "auto_map", "transformers_version"):
        values.pop(key, None)
    return CONFIG_MAPPING[base].from_dict(values)


def _nemotron_nas(model: Any, tokenizer: Any, folder: Path, card: Card, overwrite: bool, source: Any) -> Path:
    from safetensors.torch import save_file

    config = nemotron_nas_config(model)
    _refuse_offloaded("nemotron-nas", model.state_dict())
    with atomic_folder(folder, overwrite, source) as part:
        state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
        if config["tie_word_embeddings"]:
            state.pop("lm_head.weight", None)
        save_file(state, part / "model.safetensors", metadata={"format": "pt"})
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        model.generation_config.save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        (part / "README.md").write_text(replace(card, use=NAS_USE, library="vllm").markdown(model))
        check_nemotron_nas(part)
    return folder


def nemotron_nas_config(model: Any) -> dict[str, Any]:
    """`config.json` of the nemotron-nas (DeciLM) architecture for a Llama model with dropped sublayers.

    Raises:
        RequestError: the model is not a Llama, has biases or constants, or an intermediate size that the format's
            `ffn_mult` cannot express (it rounds up to multiples of 256).
    """
    values = _stock_config(model).to_dict()
    if (values.get("model_type") or "") != "llama":
        raise RequestError(f"nemotron-nas: only Llama layouts can be expressed, this is {values.get('model_type')}")
    if values.get("attention_bias") or values.get("mlp_bias") or any(e["bias"] for e in _edits(model)):
        raise RequestError("nemotron-nas: biases and repair constants cannot be expressed; use hf or hf-remote")
    width, inner = values["hidden_size"], values["intermediate_size"]
    if inner % 256:
        raise RequestError(f"nemotron-nas: intermediate_size {inner} is not a multiple of 256; use hf or hf-remote")
    gone = {(e["block"], "attention" if e["kept"]["kind"] == "mlp" else "mlp") for e in _edits(model)}
    group = values["num_attention_heads"] // values["num_key_value_heads"]
    values["block_configs"] = [
        {
            "attention": _part((i, "attention") in gone, "n_heads_in_group", group),
            "ffn": _part((i, "mlp") in gone, "ffn_mult", 1.5 * inner / width),
        }
        for i in range(values["num_hidden_layers"])
    ]
    return values | {
        "model_type": "nemotron-nas",
        "architectures": ["DeciLMForCausalLM"],
        "num_key_value_heads": None,
        "intermediate_size": None,
        "torch_dtype": str(model.dtype).removeprefix("torch."),
    }


def _part(no_op: bool, key: str, value: float) -> dict[str, Any]:
    return {"no_op": no_op, "replace_with_linear": False, key: None if no_op else value}


def check_nemotron_nas(folder: Path) -> None:
    """The tensors in `folder` must be those, of those shapes, that its block configs describe."""
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text())
    width, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or width // heads
    expected = {"model.embed_tokens.weight": [config["vocab_size"], width], "model.norm.weight": [width]}
    if not config["tie_word_embeddings"]:
        expected["lm_head.weight"] = [config["vocab_size"], width]
    for i, block in enumerate(config["block_configs"]):
        at = f"model.layers.{i}."
        if not block["attention"]["no_op"]:
            kv = heads // block["attention"]["n_heads_in_group"] * head
            expected |= {f"{at}input_layernorm.weight": [width], f"{at}self_attn.q_proj.weight": [heads * head, width],
                         f"{at}self_attn.k_proj.weight": [kv, width], f"{at}self_attn.v_proj.weight": [kv, width],
                         f"{at}self_attn.o_proj.weight": [width, heads * head]}  # fmt: skip
        if not block["ffn"]["no_op"]:
            inner = -(-int(2 * block["ffn"]["ffn_mult"] * width / 3) // 256) * 256  # as vLLM's decilm.py computes it
            expected |= {
                f"{at}post_attention_layernorm.weight": [width],
                f"{at}mlp.down_proj.weight": [width, inner],
                f"{at}mlp.gate_proj.weight": [inner, width],
                f"{at}mlp.up_proj.weight": [inner, width],
            }
    with safe_open(folder / "model.safetensors", "pt") as handle:
        found = {name: handle.get_slice(name).get_shape() for name in handle.keys()}  # noqa: SIM118
    wrong = sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
    if wrong:
        raise RuntimeError(f"nemotron-nas: {wrong[0]} is {found.get(wrong[0])}, described as {expected.get(wrong[0])}")


def _edits(model: Any) -> list[dict[str, Any]]:
    return list((getattr(model.config, "lean", None) or {}).get("edits", ()))


FORMATS: dict[str, Callable[..., Path]] = {
    "hf": _hf, "hf-remote": _hf_remote, "zeroed": _zeroed, "nemotron-nas": _nemotron_nas,
}  # fmt: skip
