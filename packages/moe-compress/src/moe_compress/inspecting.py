"""What a checkpoint is, without running it: experts of each layer, bytes by part, and what can load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from model_hooks.errors import RequestError


def inspect(source: str) -> dict[str, Any]:
    """Layers, experts, bytes and forms of a checkpoint, from its config and the headers of its files."""
    from model_hooks.experts import moe_layers
    from model_hooks.layer_stream import LayerStream
    from model_hooks.lean import needs_lean
    from model_hooks.loading import resolve
    from moe_compress.packing import PackedStream, is_packed

    where = Path(resolve(source))
    if not where.is_dir():
        raise RequestError(f"{source} is no checkpoint folder and no zoo model; download it first")
    packed = is_packed(where)
    stream = PackedStream(where) if packed else LayerStream(where)
    parts = stream.anatomy()
    layers = {layer.block: layer for layer in moe_layers(parts)}
    sizes = _sizes(where)
    lean = getattr(stream.model.config, "lean", None)
    rows = []
    for block in parts.blocks:
        layer = layers.get(block.index)
        keys = [k for k in stream.keys(block.name) if layer and stream.names[k].startswith(f"{layer.name}.")]
        rows.append(
            {
                "block": parts.original_index[block.index],
                "experts": layer.num_experts if layer else 0,
                "top_k": layer.top_k if layer else 0,
                "shared": len(layer.shared) if layer else 0,
                "mixture_bytes": sum(_of(sizes, key) for key in keys),
            }
        )
    stock = not needs_lean(lean)
    return {
        "model": type(stream.model).__name__, "parameters": sum(p.numel() for p in stream.model.parameters()),
        "bytes": sum(sizes.values()), "dropped_moe_layers": list(parts.dropped_mlp) if lean else [],
        "dropped_blocks": sorted(set(range(parts.num_original_layers)) - set(parts.original_index)),
        "form": "compressed-tensors" if packed else "dense", "loads_with": _loaders(stock, packed, where),
        "layers": rows,
    }  # fmt: skip


def _of(sizes: dict[str, int], key: str) -> int:
    """Bytes of a tensor, or of the packed ones that stand for it."""
    from moe_compress.packing import PARTS, ZERO

    return sizes.get(key, 0) or sum(sizes.get(f"{key}{suffix}", 0) for suffix in (*PARTS, ZERO))


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every tensor, from the headers."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as handle:
            header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                found[name] = end - start
    return found


def _loaders(stock: bool, packed: bool, folder: Path) -> str:
    """Who reads this. vLLM has neither a layer without its mixture nor numbers of experts by layer."""
    if not stock:
        return "moe-compress" if packed else "transformers after `import model_hooks`"
    if not packed:
        return "transformers; engines that know the model type"
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]
    if not all(group["weights"]["symmetric"] for group in groups.values()):
        return "moe-compress (transformers reads no zero points of experts)"
    if len(groups) > 1 or groups["group_0"]["targets"] != ["Linear"]:
        return "moe-compress; engines that read several groups of compressed-tensors (not tried)"
    return "transformers; engines that read compressed-tensors (vLLM: not tried here)"


def export_dense(source: str, folder: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """A checkpoint that `slim` quantised, with its weights as floats: for what reads no packed weights."""
    import torch

    from model_hooks import Card, save
    from model_hooks.loading import load_tokenizer
    from moe_compress.packing import PackedStream, is_packed

    if not is_packed(Path(source)):
        raise RequestError(f"{source} is dense already; only quantised checkpoints are exported")
    with torch.no_grad():
        model = PackedStream(source).whole()
    card = Card(source, "moe-compress: quantised weights as floats")
    save(model, folder, load_tokenizer(source), card=card, overwrite=overwrite, source=source)
    return {"folder": folder, "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors"))}
