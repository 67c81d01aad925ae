"""Trained routers as an adapter folder (router.safetensors, router_config.json): kilobytes, for the base they know."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model_hooks.errors import RequestError
from model_hooks.files import atomic_folder
from paper_tables.frame import require

from .attaching import attach, base_of, routers
from .config import RouterConfig
from .errors import IncompatibleRouterError
from .gate import ROUTER, runtime_of
from .repair import means_of, set_means

FORMAT = "mod-router adapter 1"
WEIGHTS, CONFIG, LORA = "router.safetensors", "router_config.json", "lora"


def save(
    model: Any, folder: str | Path, *, base: str = "", measured: dict[str, Any] | None = None, overwrite: bool = False
) -> Path:
    """Write the routers of `model` to `folder`, whole or not at all.

    Args:
        base: name of the base model, for the card and the record.
        measured: figures for the record.

    Raises:
        RequestError: no routers are attached, or `folder` exists.
    """
    runtime = runtime_of(model)
    weights = {i: router.weight for i, router in routers(model).items()}
    record = {"name": base, **identity(model)}
    return write(folder, runtime.config, weights, record, measured or {}, overwrite, means=means_of(model))


def write(
    folder: str | Path, config: RouterConfig, weights: dict[int, Tensor], base: dict[str, Any],
    measured: dict[str, Any], overwrite: bool = False, means: dict[int, Tensor] | None = None,
    lora: Path | None = None,
) -> Path:  # fmt: skip
    """`save` for weights [1, H] by layer that were gathered elsewhere.

    Args:
        base: its name and its `identity`.
        means: what skipped units add, [H] by layer. lora: folder of a PEFT adapter that was trained along.
    """
    from safetensors.torch import save_file

    record = {
        "format": FORMAT,
        "base": base,
        "config": {**config.to_dict(), "layers": sorted(weights), "scores": ""},
        "measured": measured,
        "versions": _versions(),
    }
    with atomic_folder(folder, overwrite) as part:
        flat = {f"layers.{i}.weight": w for i, w in weights.items()}
        flat |= {f"layers.{i}.delta": delta for i, delta in (means or {}).items()}
        save_file({name: tensor.detach().float().cpu().contiguous() for name, tensor in flat.items()}, part / WEIGHTS)
        if lora is not None:
            shutil.copytree(lora, part / LORA)
        (part / CONFIG).write_text(json.dumps(record, indent=1) + "\n")
        (part / "README.md").write_text(_card(record))
    return Path(folder)


def identity(model: Any) -> dict[str, Any]:
    """What a base is known by: sizes, type and a fingerprint of its own weights, with no router and no LoRA counted."""
    from model_hooks.identity import combined

    target = base_of(model)
    config = target.config.get_text_config(decoder=True)
    return {
        "fingerprint": combined(target.config, weight_digests(target)),
        "hidden_size": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "model_type": target.config.model_type,
    }


def weight_digests(model: Any) -> dict[str, str]:
    """name -> digest of each tensor of the base itself, routers and LoRA left out."""
    from model_hooks.identity import tensor_digest

    return {
        name.replace(".base_layer.", "."): tensor_digest(tensor)
        for name, tensor in base_of(model).state_dict().items()
        if ROUTER not in name and ".lora_" not in name
    }


def read_record(folder: str | Path) -> dict[str, Any]:
    """router_config.json of an adapter folder. Raises `RequestError` for anything else."""
    file = Path(folder) / CONFIG
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise RequestError(f"{folder} has no {CONFIG}; give a folder that `mod-router tune` wrote") from None
    except ValueError as error:
        raise RequestError(f"{file}: not JSON ({error}); copy the folder again") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise RequestError(f"{file}: not routers of this version ({FORMAT!r}); tune again")
    return record


def load(model: Any, folder: str | Path, *, allow_mismatch: bool = False, **changes: Any) -> Any:
    """Attach the routers of an adapter folder to their base, in place, and return it: where LoRA was trained along,
    as the PeftModel that holds the adapter too.

    Args:
        allow_mismatch: take a base of the same sizes with other weights, such as a later fine-tune.
        changes: settings to change, such as tau=0.52.

    Raises:
        IncompatibleRouterError: they were trained on another base; the model was left as it was.
        RequestError: no such folder, broken files, routers attached already.
    """
    from safetensors.torch import load_file

    from model_hooks.loading import check_safetensors

    record = read_record(folder)
    _check_base(model, record["base"], folder, allow_mismatch)
    file = Path(folder) / WEIGHTS
    if not file.is_file():
        raise RequestError(f"{folder} lacks {WEIGHTS}; the copy is incomplete")
    check_safetensors(file)
    weights = load_file(file)
    known = {f.name for f in fields(RouterConfig)}
    settings = {k: v for k, v in record["config"].items() if k in known}
    config = RouterConfig(**{**settings, "layers": tuple(settings["layers"])})
    _check_weights(config, weights, record["base"]["hidden_size"], file)
    lora = Path(folder) / LORA
    if lora.is_dir() and base_of(model) is not model:
        raise RequestError(f"{folder} holds a LoRA adapter, and this model has one already; merge that first")
    attach(model, config, **changes)
    set_weights(model, {layer: weights[f"layers.{layer}.weight"] for layer in config.layers})  # type: ignore[misc]
    set_means(model, {layer: weights.get(f"layers.{layer}.delta") for layer in config.layers})  # type: ignore[misc]
    if not lora.is_dir():
        return model
    return require("peft", extra="train", package="mod-router").PeftModel.from_pretrained(model, lora).eval()


@torch.no_grad()
def set_weights(model: Any, weights: dict[int, Tensor]) -> None:
    for layer, router in routers(model).items():
        router.weight.copy_(weights[layer])


def _check_base(model: Any, base: dict[str, Any], folder: str | Path, allow_mismatch: bool) -> None:
    mine = identity(model)
    for key in ("model_type", "hidden_size", "num_layers", "fingerprint"):
        if mine[key] != base[key] and not (key == "fingerprint" and allow_mismatch):
            hint = "; allow_mismatch=True takes other weights of this size" if key == "fingerprint" else ""
            raise IncompatibleRouterError(
                f"the routers in {folder} belong to {base['name'] or 'another model'} ({key} {base[key]}), this model "
                f"has {key} {mine[key]}: give their base{hint}"
            )


def _check_weights(config: RouterConfig, weights: dict[str, Tensor], width: int, file: Path) -> None:
    want: dict[str, tuple[int, ...]] = {f"layers.{layer}.weight": (1, width) for layer in config.layers}
    if config.repair == "mean":
        want |= {f"layers.{layer}.delta": (width,) for layer in config.layers}
    wrong = [k for k, v in weights.items() if tuple(v.shape) != want.get(k)] or sorted(want.keys() - weights.keys())
    if wrong:
        raise IncompatibleRouterError(f"{file}: {wrong[0]} does not fit {CONFIG}; copy the folder again")


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("mod-router", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _card(record: dict[str, Any]) -> str:
    config, base = record["config"], record["base"]
    layers = ", ".join(map(str, config["layers"]))
    measured = [f"| {k} | {f'{v:.6g}' if isinstance(v, float) else v} |" for k, v in record["measured"].items()]
    table = ["| | |", "|---|---|", *measured, ""] if measured else []
    return "\n".join(
        [
            f"# Routers for {base['name'] or 'a model'}",
            "",
            f"Routers on the {config['unit']} of layers {layers} decide for each {config['level']} whether it runs "
            "(MindSkip, arXiv 2410.13184). They belong to the base with fingerprint "
            f"{base['fingerprint']} and do nothing without it.",
            "",
            *table,
            "```python",
            "import model_hooks, mod_router",
            "",
            f"model, tokenizer = model_hooks.load({base['name']!r})",
            'mod_router.load(model, "this folder")',
            "```",
            "",
        ]
    )
