"""Masks of pruned weights: their patterns, their hashes, and the file that holds them at a bit for each weight."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model_hooks.errors import RequestError

FILE = "masks.safetensors"


class MaskMismatchError(RequestError):
    """Masks that belong to another model's weights."""


def digest(mask: Tensor) -> str:
    """sha256 of a mask's shape and bits."""
    return hashlib.sha256(str(tuple(mask.shape)).encode() + _bytes(_pack(mask))).hexdigest()


def mask_digest(masks: Mapping[str, Tensor]) -> str:
    """sha256 of all masks with their paths."""
    return hashlib.sha256("".join(f"{path} {digest(masks[path])}\n" for path in sorted(masks)).encode()).hexdigest()


def weight_digest(weight: Tensor, mask: Tensor) -> str:
    """sha256 of the weights that a mask keeps, the others as zeros, rounded to bfloat16.

    So the dense and the pruned model have the same, in whatever dtype they are loaded.
    """
    kept = weight.detach().masked_fill(~mask.to(weight.device), 0).to("cpu", torch.bfloat16)
    kept = torch.where(kept == 0, torch.zeros_like(kept), kept)  # -0 as 0
    return hashlib.sha256(_bytes(kept.view(torch.int16))).hexdigest()


def save_masks(path: str | Path, masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Path:
    """Write masks (bool [out, in], True = kept) and the hashes of them and of the weights that they keep.

    path: A file, or a folder that gets `masks.safetensors`.
    """
    hashes = {p: {"mask": digest(m), "weight": weight_digest(weights[p], m)} for p, m in masks.items()}
    return write_masks(path, masks, hashes)


def write_masks(path: str | Path, masks: Mapping[str, Tensor], hashes: Mapping[str, Mapping[str, str]]) -> Path:
    """`save_masks` with hashes that are known already."""
    from safetensors.torch import save_file

    file = _file(path)
    said = {p: {"shape": list(m.shape), **hashes[p]} for p, m in masks.items()}
    save_file({p: _pack(m) for p, m in masks.items()}, file, metadata={"masks": json.dumps(said)})
    return file


def load_masks(path: str | Path) -> dict[str, Tensor]:
    """The masks of a file or folder. Raises `MaskMismatchError` where its bits are not what its hashes say."""
    return read_masks(path)[0]


def read_masks(path: str | Path) -> tuple[dict[str, Tensor], dict[str, dict[str, str]]]:
    """Masks, and for each path the hashes `mask` and `weight`. Raises `RequestError` for a file that is none."""
    from safetensors import SafetensorError, safe_open

    file = _file(path)
    if not file.is_file():
        raise RequestError(f"no file {file}; masks are written by `ressa prune`")
    try:
        with safe_open(file, "pt") as handle:
            said = json.loads((handle.metadata() or {})["masks"])
            masks = {p: _unpack(handle.get_tensor(p), tuple(entry["shape"])) for p, entry in said.items()}
    except (SafetensorError, KeyError, ValueError) as error:
        raise RequestError(f"{file} is not a file of masks ({str(error).splitlines()[0]}); prune again") from None
    for p, mask in masks.items():
        if digest(mask) != said[p]["mask"]:
            raise MaskMismatchError(f"{file}: the mask of {p} has hash {digest(mask)}, the file says {said[p]['mask']}")
    return masks, {p: {"mask": entry["mask"], "weight": entry["weight"]} for p, entry in said.items()}


def verify(model: Any, masks: Mapping[str, Tensor], hashes: Mapping[str, Mapping[str, str]]) -> None:
    """Raise `MaskMismatchError`, naming the first module and both hashes, unless the masks are of these weights."""
    for path, mask in masks.items():
        weight = weight_at(model, path)
        if weight.shape != mask.shape:
            raise MaskMismatchError(f"{path}: the mask is {list(mask.shape)}, the weight {list(weight.shape)}")
        found, expected = weight_digest(weight, mask), hashes[path]["weight"]
        if found != expected:
            raise MaskMismatchError(
                f"{path}: the weights have hash {found}, the masks were made for {expected}; give the model that was "
                "pruned"
            )


def weight_at(model: Any, path: str) -> Tensor:
    """The weight of a linear layer, adapters around it or not. Raises `MaskMismatchError` where there is none."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise MaskMismatchError(f"{path}: masks name this module, which the model does not have") from None
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    weight: Tensor = base.weight
    return weight


def check(masks: Mapping[str, Tensor], pattern: str) -> None:
    """Raise `ValueError`, with the place, unless every mask (or weight) keeps N of every M inputs, at most."""
    if not pattern:
        return
    kept, of = (int(part) for part in pattern.split(":"))
    for path, mask in masks.items():
        over = groups(mask, of) > kept
        if bool(over.any()):
            row, group = over.nonzero()[0].tolist()
            raise ValueError(f"{path}: row {row}, inputs {group * of} to {group * of + of - 1} keep more than {kept}")


def groups(mask: Tensor, of: int) -> Tensor:
    """Nonzeros of every `of` consecutive inputs, [out, in / of]."""
    return (mask.reshape(mask.shape[0], -1, of) != 0).sum(-1)


def pattern_of(weight: Tensor) -> str:
    """What the zeros of a weight fit: "2:4", "4:8", "unstructured", or "" for a dense one."""
    zeros = float((weight == 0).float().mean())
    if zeros < 0.01:
        return ""
    for kept, of in ((2, 4), (4, 8)):
        if weight.shape[1] % of == 0 and bool((groups(weight, of) <= kept).all()):
            return f"{kept}:{of}"
    return "unstructured"


def _file(path: str | Path) -> Path:
    return Path(path) / FILE if Path(path).is_dir() else Path(path)


def _pack(mask: Tensor) -> Tensor:
    """uint8 bits of a mask, row after row."""
    import numpy as np

    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))


def _unpack(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    import numpy as np

    count = shape[0] * shape[1]
    if bits.numel() != -(-count // 8):
        raise ValueError(f"{bits.numel()} bytes for a mask of {shape}")
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count)).bool().view(shape)


def _bytes(values: Tensor) -> bytes:
    return values.contiguous().cpu().numpy().tobytes()
