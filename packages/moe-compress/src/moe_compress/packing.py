"""Quantised weights as compressed-tensors files ("pack-quantized"), and back: what vLLM and transformers read.

Every quantised matrix NAME is stored as NAME_packed (int32), NAME_scale, NAME_shape and, where codes are asymmetric,
NAME_zero_point, under its per-expert name; config.json says which matrices these are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model_hooks.errors import RequestError
from model_hooks.layer_stream import LayerStream
from moe_compress.quantising import Codes, Grid, codes, from_codes

PARTS = ("_packed", "_scale", "_shape")
ZERO = "_zero_point"


def packed(weight: Tensor, grid: Grid, how: Codes) -> dict[str, Tensor]:
    """The tensors, by suffix, of a matrix [rows, d_in] that was rounded on `grid`."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    integers = codes(weight, grid, how)
    again = from_codes(integers, grid, how)
    if not torch.equal(again, weight):
        worst = float((again - weight).abs().max())
        raise RuntimeError(f"a packed matrix stands for other weights than it was rounded to (off by {worst:.1e})")
    parts = dict(zip(PARTS, (pack_to_int32(integers, how.bits), grid.scale, torch.tensor(weight.shape)), strict=True))
    if grid.zero is not None:
        parts[ZERO] = pack_to_int32(grid.zero, how.bits, packed_dim=0)
    return {suffix: part.contiguous() for suffix, part in parts.items()}


def unpacked(parts: Mapping[str, Tensor], how: Codes) -> Tensor:
    """The matrix again, in its scales' dtype."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    shape = torch.Size(parts["_shape"].tolist())
    integers, zero = unpack_from_int32(parts["_packed"], how.bits, shape), None
    if not how.symmetric:
        zero = unpack_from_int32(parts[ZERO], how.bits, parts["_scale"].shape, packed_dim=0)
    return from_codes(integers, Grid(parts["_scale"], zero), how)


def quantization_config(
    quantised: Mapping[str, int], dense: Iterable[str], group: int, symmetric: bool = True
) -> dict[str, Any]:
    """The section of config.json. `quantised`: matrix -> its bits; `dense`: matrices that stay as they are."""
    groups: dict[str, Any] = {}
    for bits in sorted(set(quantised.values())):
        names = [name for name, own in quantised.items() if own == bits]
        weights = {
            "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group,
            "dynamic": False, "actorder": None, "observer": "minmax",
        }  # fmt: skip
        groups[f"group_{len(groups)}"] = {
            "targets": _targets(names, alone=len(names) == len(quantised)), "weights": weights,
            "format": "pack-quantized", "input_activations": None, "output_activations": None,
        }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": groups, "ignore": sorted(dense), "kv_cache_scheme": None, "global_compression_ratio": None,
    }  # fmt: skip


def _targets(names: list[str], *, alone: bool) -> list[str]:
    """ "Linear" where all have the same bits, less what is ignored; else one expression for all matrices of a module
    list (the experts of a layer), whose numbers it leaves open."""
    if alone:
        return ["Linear"]
    return sorted({"re:" + re.sub(r"experts\\\.\d+", r"experts\\.\\d+", re.escape(name)) + "$" for name in names})


def is_packed(folder: Path) -> bool:
    """Whether a checkpoint folder's weights are quantised."""
    file = folder / "config.json"
    return file.is_file() and "quantization_config" in json.loads(file.read_text())


class PackedStream(LayerStream):
    """A checkpoint that `moe-compress slim` quantised, as if its weights were dense."""

    def __init__(self, source: str | Path, **how: Any) -> None:
        folder = Path(source)
        try:
            record = json.loads((folder / "slimming.json").read_text())
            self.bits, self.group = dict(record["quantised"]), int(record["settings"]["group"])
            self.symmetric = bool(record["settings"].get("symmetric", True))
        except (OSError, ValueError, KeyError):
            raise RequestError(
                f"{source} is quantised, but not by moe-compress (it has no slimming.json); give its base"
            ) from None
        super().__init__(source, **how)
        del self.model.config.quantization_config

    def find_files(self) -> dict[str, Path]:
        """Packed matrices under the name that they have as dense ones."""
        found = {}
        for name, file in super().find_files().items():
            matrix, dot, suffix = name.rpartition(".weight")
            if not dot or suffix not in (*PARTS, ZERO):
                found[name] = file
            elif suffix == "_packed":
                found[f"{matrix}.weight"] = file
        return found

    def read(self, keys: list[str]) -> dict[str, Tensor]:
        """Tensors as floats."""
        from safetensors import safe_open

        found = {}
        for file in dict.fromkeys(self.files[key] for key in keys):
            with safe_open(file, framework="pt") as opened:
                for key in (k for k in keys if self.files[k] == file):
                    if (matrix := key.removesuffix(".weight")) in self.bits:
                        suffixes = PARTS if self.symmetric else (*PARTS, ZERO)
                        parts = {suffix: opened.get_tensor(f"{key}{suffix}") for suffix in suffixes}
                        found[key] = unpacked(parts, Codes(self.bits[matrix], self.group, self.symmetric))
                    else:
                        found[key] = opened.get_tensor(key)
        return found


def load(source: str | Path, dtype: str = "auto", device_map: str = "") -> tuple[Any, Any]:
    """(model, tokenizer) of any checkpoint; one that `slim` quantised comes with its weights as floats."""
    from model_hooks.loading import load_placed, load_tokenizer

    if not is_packed(Path(source)):
        return load_placed(source, dtype, device_map)
    import torch

    wanted = None if dtype == "auto" else getattr(torch, dtype)
    return PackedStream(source, dtype=wanted).whole(), load_tokenizer(source)
