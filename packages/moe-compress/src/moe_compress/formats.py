"""Is a quantised folder what its config.json says, by compressed-tensors' own rules? What vLLM loads is defined there.

Nothing of ours is asked: which matrices are quantised follows from the config's targets and `ignore`, as its library
matches them, and what stands for one in the files is what its compressor writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model_hooks.errors import RequestError
from moe_compress.packing import is_packed

OF_EXPERT = re.compile(r"(?P<bank>.+\.experts)\.\d+\.\w+")


class WrongFormat(RuntimeError):
    """A checkpoint's files are not what its config.json says."""


def check(folder: str | Path) -> dict[str, Any]:
    """Check every key of a quantised checkpoint; how many matrices are quantised, with what bits, and how many are not.

    Raises `WrongFormat`, naming what is wrong; `RequestError` where nothing is quantised.
    """
    folder = Path(folder)
    if not is_packed(folder):
        raise RequestError(f"{folder} is not quantised; --verify checks quantised checkpoints")
    bits = [scheme.weights.num_bits for _, _, scheme in decompressed(folder)]
    dense = [k for k, shape in _shapes(_files(folder)).items() if k.endswith(".weight") and len(shape) == 2]
    return {"quantised": len(bits), "bits": sorted(set(bits)), "dense": len(dense)}


def decompressed(folder: Path) -> Iterator[tuple[str, Tensor, Any]]:
    """(name, weight, scheme) of every quantised matrix, by compressed-tensors' own decompression; each is checked."""
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])
    files = _files(folder)
    shapes, schemes = _shapes(files), {}
    parts: dict[str, set[str]] = {}
    for key in files:
        name, _, part = key.rpartition(".")
        if part.startswith("weight"):
            parts.setdefault(name, set()).add(part)
    for name, found in sorted(parts.items()):
        linear = found != {"weight"} or len(shapes[f"{name}.weight"]) == 2
        scheme = _scheme(config, name) if linear else None
        wanted = {"weight"} if scheme is None else set(_compressor(scheme).compression_param_names(scheme))
        if found != wanted:
            raise WrongFormat(f"{name} has {sorted(found)} where config.json asks for {sorted(wanted)}")
        if scheme is not None:
            schemes[name] = scheme
    _refuse_mixed_banks(schemes)
    for name, scheme in schemes.items():
        yield name, _decompress(files, name, parts[name], scheme), scheme


def _scheme(config: Any, name: str) -> Any:
    """The group of config.json whose targets match a Linear of this name; None for one that stays dense."""
    from compressed_tensors.utils import is_match

    with torch.device("meta"):
        linear = torch.nn.Linear(1, 1)
    groups = [s for s in config.config_groups.values() if is_match(name, linear, s.targets, config.ignore)]
    if len(groups) > 1:
        raise WrongFormat(f"{name} is in {len(groups)} groups of config.json")
    return groups[0] if groups else None


def _compressor(scheme: Any) -> Any:
    from compressed_tensors.compressors import BaseCompressor

    return BaseCompressor.get_value_from_registry(scheme.format)


def _refuse_mixed_banks(schemes: dict[str, Any]) -> None:
    """Engines fuse the experts of a layer, so these must all be alike."""
    banks: dict[str, Any] = {}
    for name, scheme in schemes.items():
        found = OF_EXPERT.fullmatch(name)
        if found and banks.setdefault(found["bank"], scheme) != scheme:
            raise WrongFormat(f"{found['bank']} has experts of several schemes")


def _decompress(files: dict[str, Path], name: str, wanted: set[str], scheme: Any) -> Tensor:
    """The weight; what the compressor makes of it must be the parts again, bit by bit."""
    compressor = _compressor(scheme)
    parts = {part: _read(files, f"{name}.{part}") for part in wanted}
    try:
        found: dict[str, Tensor] = compressor.decompress(dict(parts), scheme)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise WrongFormat(f"{name} cannot be decompressed by compressed-tensors ({reason})") from error
    weight = found["weight"]
    exact = {key: value.float() if value.is_floating_point() else value for key, value in found.items()}
    again = compressor.compress({key: exact[key] for key in exact if key != "weight_shape"}, scheme)
    for part, value in parts.items():
        if again[part].shape != value.shape or not torch.equal(again[part].to(value.dtype), value):
            raise WrongFormat(f"{name}.{part} is not what compressed-tensors writes")
        if not value.is_floating_point() and again[part].dtype != value.dtype:
            raise WrongFormat(f"{name}.{part} is {value.dtype}, {again[part].dtype} is written")
    return weight


def _files(folder: Path) -> dict[str, Path]:
    """Key -> file, as the index says; it must say what is in the files, no more and no less."""
    from safetensors import safe_open

    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= dict.fromkeys(opened.keys(), file)
    index = folder / "model.safetensors.index.json"
    said = {key: folder / name for key, name in json.loads(index.read_text())["weight_map"].items()}
    if said != found:
        raise WrongFormat(f"{index.name} does not say what is in the files: {sorted(said.keys() ^ found.keys())[:3]}")
    return found


def _shapes(files: dict[str, Path]) -> dict[str, list[int]]:
    from safetensors import safe_open

    found: dict[str, list[int]] = {}
    for file in dict.fromkeys(files.values()):
        with safe_open(file, framework="pt") as opened:
            found |= {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118
    return found


def _read(files: dict[str, Path], key: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(files[key], framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(key)
        return tensor
