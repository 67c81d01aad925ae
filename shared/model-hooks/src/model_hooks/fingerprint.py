"""Which weights are these? A short hash that changes whenever a weight or the structure does."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

SAMPLES = 4096


def _update(digest: Any, name: str, tensor: Tensor) -> None:
    flat = tensor.detach().flatten()
    digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
    if flat.numel() == 0 or flat.device.type == "meta":
        return
    words = flat.view(torch.uint8) if flat.element_size() == 1 else flat.view(torch.int16)
    step = max(1, words.numel() // SAMPLES)
    digest.update(words[::step].cpu().numpy().tobytes())
    digest.update(int(words.sum(dtype=torch.int64)).to_bytes(8, "little", signed=True))


def fingerprint_tensors(tensors: dict[str, Tensor]) -> str:
    """16 hex digits over names, shapes, dtypes, a sum over all bits and a sample of the values (seconds at 70B)."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(tensors):
        _update(digest, name, tensors[name])
    return str(digest.hexdigest())


def fingerprint(model: Any) -> str:
    """Fingerprint of a model's weights and of what its config says of its structure."""
    config = model.config.to_dict()
    ignored = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures")
    structure = json.dumps({k: v for k, v in config.items() if k not in ignored}, sort_keys=True, default=str)
    weights = fingerprint_tensors(dict(model.state_dict()))
    return hashlib.blake2b(f"{structure}{weights}".encode(), digest_size=8).hexdigest()
