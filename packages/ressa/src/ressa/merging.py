"""Merge masked adapters into an ordinary model with exactly the pruned zeros, and write an ordinary checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model_hooks.errors import RequestError
from ressa import masks as mask_files

SPARSITY = "sparsity.json"


@torch.no_grad()
def merge(model: Any, *, lose_zeros: bool = False) -> Any:
    """The base model with its adapters merged: no PEFT left, and zeros where the masks have them, which is checked.

    lose_zeros: Merge a dense update all the same; the result is not sparse.

    Raises `RequestError` for another model, or a dense update without `lose_zeros`.
    """
    from ressa.layers import SparseLoraLinear
    from ressa.sparselora import SparseLoraModel

    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, SparseLoraModel):
        raise RequestError(f"{type(model).__name__} has no masked adapters; give what `ressa.attach` returned")
    masks = next(iter(tuner.peft_config.values())).masks
    layers = [m for m in tuner.modules() if isinstance(m, SparseLoraLinear)]
    _refuse(model, layers, lose_zeros)
    for layer in layers:
        layer.lose_zeros = lose_zeros
    sparse = all(layer.update == "masked" for layer in layers)
    merged = model.merge_and_unload()
    _freeze(merged)
    if sparse:
        check_zeros(merged, masks)
    return merged


def _refuse(model: nn.Module, layers: Sequence[Any], lose_zeros: bool) -> None:
    """Before the first weight is written: what each layer would refuse in its turn."""
    if not lose_zeros:
        for layer in layers:
            layer.refuse_dense_update()
    for name, parameter in model.named_parameters():
        if "lora_" in name and not bool(torch.isfinite(parameter).all()):
            raise RequestError(f"{name} is NaN or infinite; the adapter is broken, nothing was merged")


def _freeze(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def check_zeros(model: Any, masks: Mapping[str, Tensor]) -> None:
    """Raise RuntimeError, with the module, unless every weight outside the masks is +0, and all are numbers."""
    for path, mask in masks.items():
        weight = mask_files.weight_at(model, path).detach()
        gone = weight[~mask.to(weight.device)]
        if bool((gone != 0).any()) or bool(torch.signbit(gone).any()):
            raise RuntimeError(f"{path} has lost zeros of its mask; please report it")
        if not bool(torch.isfinite(weight).all()):
            raise RuntimeError(f"{path} holds NaN or infinite weights; nothing was written")


def sparsity_of(model: Any, paths: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What `sparsity.json` says of each matrix: pattern, zeros, numel and the hash of where it is not zero."""
    rows = {}
    for path in paths:
        weight = mask_files.weight_at(model, path).detach().cpu()
        rows[path] = {"pattern": mask_files.pattern_of(weight), "zeros": int((weight == 0).sum()),
                      "numel": weight.numel(), "mask": mask_files.digest(weight != 0)}  # fmt: skip
    return rows


def save(
    model: Any, folder: str | Path, processor: Any = None, *, masks: Mapping[str, Tensor] | None = None,
    verify: bool = True,
) -> Path:  # fmt: skip
    """Write an ordinary checkpoint with `sparsity.json`; any transformers loads it, without this package.

    Args:
        folder: New or empty.
        masks: The matrices that `sparsity.json` is about; default: all of the vision and the language branch.
        verify: Load it again and compare every tensor bit for bit (the model's memory a second time).

    Raises:
        RequestError: the folder is not empty.
        RuntimeError: it reads back otherwise than it was.
    """
    from model_hooks.loading import quiet
    from ressa.branches import find_branches

    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise RequestError(f"{folder} is not empty; give another folder or --overwrite")
    if masks is None:
        branches = find_branches(model)
        paths = [path for name in ("vision", "language") for path in branches.linears(name)]
    else:
        paths = list(masks)
    with quiet():
        model.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)
    rows = sparsity_of(model, paths)
    zeros, numel = (sum(row[key] for row in rows.values()) for key in ("zeros", "numel"))
    about = {"sparsity": zeros / max(1, numel), "modules": rows}
    (folder / SPARSITY).write_text(json.dumps(about, indent=1) + "\n")
    if verify:
        _verify(model, folder)
    return folder


def _verify(model: Any, folder: Path) -> None:
    from model_hooks.loading import quiet

    with quiet():
        again = type(model).from_pretrained(folder, dtype=model.dtype)
    ours, theirs = model.state_dict(), again.state_dict()
    wrong = sorted(ours.keys() ^ theirs.keys()) or [
        n for n, w in ours.items() if not torch.equal(w.cpu(), theirs[n].cpu())
    ]
    if wrong:
        raise RuntimeError(f"{folder} reads back with another {wrong[0]} than was written; please report it")
