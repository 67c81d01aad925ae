"""Runtimes and storage for sparse weights: torch's 2:4 kernels, and a lossless bit-mask format on disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model_hooks.errors import RequestError

SUFFIX = ".bitmask.safetensors"
LEAST_SPARSE = 0.1  # below this share of zeros the mask costs more than it saves
CAPABILITY = (8, 0)
MULTIPLES = (32, 64)  # what torch's 2:4 kernels want of [out, in] in half precision


def accelerate_24(model: Any) -> dict[str, Any]:
    """Change 2:4 sparse layers of a model on a GPU to torch's semi-structured weights, in place.

    Faster for many tokens at a time, such as prompts and large batches; not for single tokens.

    Returns:
        converted: paths; left: path -> reason; notice: why nothing was changed, or "". On a CPU, on an old GPU and in
        float32 the model stays as it is.
    """
    from torch import nn
    from torch.sparse import to_sparse_semi_structured

    found = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    converted: list[str] = []
    left: dict[str, str] = {}
    notice = _notice(next(model.parameters()))
    for path, layer in found.items():
        reason = notice or _reason(layer.weight)
        if reason:
            left[path] = reason
            continue
        layer.weight = nn.Parameter(to_sparse_semi_structured(layer.weight.detach().contiguous()), requires_grad=False)
        converted.append(path)
    return {"converted": converted, "left": left, "notice": notice}


def _notice(weight: Tensor) -> str:
    if not weight.is_cuda:
        return "torch's 2:4 kernels need a CUDA device; the model stays dense in memory, its results are the same"
    if torch.cuda.get_device_capability(weight.device) < CAPABILITY:
        return "torch's 2:4 kernels need a GPU of compute capability 8.0 or newer; the model stays dense in memory"
    return ""


def _reason(weight: Tensor) -> str:
    from ressa.masks import groups

    rows, columns = weight.shape
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"it is {weight.dtype}; float16 or bfloat16 is needed"
    if rows % MULTIPLES[0] or columns % MULTIPLES[1]:
        return f"[{rows}, {columns}] is not a multiple of {list(MULTIPLES)}"
    return "" if bool((groups(weight, 4) <= 2).all()) else "it is not 2:4 sparse"


def compress(folder: str | Path, output: str | Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Write a checkpoint folder with its sparse matrices as one bit for each weight and the values that are not zero.

    `decompress` gives the same tensors back, bit for bit. No other program reads this format.

    Returns:
        output, matrices, dense_bytes and bytes of the weights.

    Raises:
        RequestError: no checkpoint there, or the output exists.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    from model_hooks.files import atomic_folder

    counts = {"matrices": 0, "dense_bytes": 0, "bytes": 0}
    with atomic_folder(output, overwrite, folder) as part:
        for file in _weights(Path(folder), ".safetensors"):
            packed: dict[str, Tensor] = {}
            shapes: dict[str, list[int]] = {}
            with safe_open(file, "pt") as handle:
                metadata = handle.metadata() or {}
                for name in handle.keys():  # noqa: SIM118 - no mapping
                    weight = handle.get_tensor(name)
                    counts["dense_bytes"] += weight.nbytes
                    packed |= _packed(name, weight, shapes)
            counts["matrices"] += len(shapes)
            counts["bytes"] += sum(tensor.nbytes for tensor in packed.values())
            about = {**metadata, "bitmask": json.dumps(shapes)}
            save_file(packed, part / (file.name.removesuffix(".safetensors") + SUFFIX), metadata=about)
        _copy_rest(Path(folder), part, ".safetensors")
    return {"output": str(output), **counts}


def decompress(folder: str | Path, output: str | Path, *, overwrite: bool = False) -> Path:
    """The ordinary checkpoint folder that `compress` was given. Raises `RequestError` for another folder."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    from model_hooks.files import atomic_folder

    with atomic_folder(output, overwrite, folder) as part:
        for file in _weights(Path(folder), SUFFIX):
            with safe_open(file, "pt") as handle:
                metadata = dict(handle.metadata())
                shapes = json.loads(metadata.pop("bitmask"))
                names = [n for n in handle.keys() if not n.endswith((":mask", ":values"))]  # noqa: SIM118
                tensors = {name: handle.get_tensor(name) for name in names}
                for name, shape in shapes.items():
                    tensors[name] = _unpacked(
                        handle.get_tensor(f"{name}:mask"), handle.get_tensor(f"{name}:values"), shape
                    )
            save_file(tensors, part / (file.name.removesuffix(SUFFIX) + ".safetensors"), metadata=metadata)
        _copy_rest(Path(folder), part, SUFFIX)
    return Path(output)


def _weights(folder: Path, suffix: str) -> list[Path]:
    found = [f for f in sorted(folder.glob(f"*{suffix}")) if f.name.startswith("model")]
    if not found:
        raise RequestError(f"{folder} holds no model*{suffix}; give a folder that {_writer(suffix)} wrote")
    return found


def _writer(suffix: str) -> str:
    return "`ressa export --format compress`" if suffix == SUFFIX else "`ressa prune` or `ressa merge`"


def _copy_rest(folder: Path, part: Path, suffix: str) -> None:
    for file in folder.iterdir():
        if file.is_file() and not (file.name.startswith("model") and file.name.endswith(suffix)):
            shutil.copyfile(file, part / file.name)


def _packed(name: str, weight: Tensor, shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """A tensor as it is, or as its mask and values; what is not all zero bits (such as -0) counts as a value."""
    import numpy as np

    if weight.dim() != 2 or not weight.is_floating_point():
        return {name: weight}
    kept = _bits(weight) != 0
    if float(kept.float().mean()) > 1 - LEAST_SPARSE:
        return {name: weight}
    shapes[name] = list(weight.shape)
    mask = torch.from_numpy(np.packbits(kept.numpy().reshape(-1)))
    return {f"{name}:mask": mask, f"{name}:values": weight[kept]}


def _unpacked(mask: Tensor, values: Tensor, shape: list[int]) -> Tensor:
    import numpy as np

    kept = torch.from_numpy(np.unpackbits(mask.numpy(), count=shape[0] * shape[1])).bool().view(shape)
    weight = torch.zeros(shape, dtype=values.dtype)
    weight[kept] = values
    return weight


def _bits(weight: Tensor) -> Tensor:
    return weight.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()])
