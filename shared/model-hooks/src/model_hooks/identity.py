"""Which weights are these? A short hash that changes whenever a weight or the structure does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SAMPLES = 4096


def tensor_digest(tensor: Tensor) -> str:
    """Hash of a tensor's shape, dtype, a sum over all its bits and a sample of its values.

    Weights that bfloat16 or else float16 holds exactly count as that, so a checkpoint is the same one in whatever
    precision above its own it is loaded.
    """
    if tensor.is_floating_point() and tensor.element_size() > 1 and tensor.device.type != "meta":
        narrow = (tensor.to(dtype) for dtype in (torch.bfloat16, torch.float16))
        tensor = next((n for n in narrow if torch.equal(n.to(tensor.dtype), tensor)), tensor)
    digest = hashlib.blake2b(f"{tuple(tensor.shape)}{tensor.dtype}".encode(), digest_size=8)
    flat = tensor.detach().flatten()
    if flat.numel() and flat.device.type != "meta":
        words = flat.view(torch.uint8) if flat.element_size() == 1 else flat.view(torch.int16)
        step = max(1, words.numel() // SAMPLES)
        digest.update(words[::step].cpu().numpy().tobytes())
        digest.update(int(words.sum(dtype=torch.int64)).to_bytes(8, "little", signed=True))
    return digest.hexdigest()


def _structure(settings: Any) -> Any:
    """What a config says beside where, in which precision and by which version it was loaded; so of its sub-configs."""
    if not isinstance(settings, dict):
        return settings
    ignored = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures")
    return {k: _structure(v) for k, v in settings.items() if k not in ignored}


def combined(config: Any, digests: Mapping[str, str]) -> str:
    """Fingerprint, 16 hex digits, of a config and the `tensor_digest` of every tensor of the state dict."""
    text = json.dumps([_structure(config.to_dict()), sorted(digests.items())], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def fingerprint(model: Any) -> str:
    """Fingerprint of a model's weights and of what its config says of its structure (seconds at 70B)."""
    return combined(model.config, {name: tensor_digest(tensor) for name, tensor in model.state_dict().items()})
