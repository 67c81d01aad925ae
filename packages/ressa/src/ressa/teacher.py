"""The dense model inside its repaired student: one set of weights is both (section 3 of the paper)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from model_hooks.errors import RequestError
from ressa.layers import SparseLoraLinear
from ressa.masks import weight_at
from ressa.sparselora import SparseLoraModel

MISSING = "dense weights are not available: pass --teacher DIR, --teacher-cache DIR or prune with keep_dense"
KINDS = {"DD": ("vision", "language"), "DS": ("vision",), "SD": ("language",)}


@contextmanager
def dense(model: nn.Module, kind: str = "DD") -> Iterator[None]:
    """Inside, `model` is the dense model, bit for bit: no mask, no adapter in any branch, no dropout, no gradient.

    Args:
        model: What `attach` or `load_adapters` gave, also inside a wrapper such as DDP.
        kind: DD; DS, the dense vision tower before the pruned language model; SD, the other way round. The pruned one
            is without adapters.

    Raises:
        RequestError: the base was pruned already and its dense weights were not kept.
    """
    if kind not in KINDS:
        raise RequestError(f"teacher {kind!r} is not accepted; give DD, DS or SD")
    tuner = next((m for m in model.modules() if isinstance(m, SparseLoraModel)), None)
    if tuner is None:
        raise RequestError(f"{type(model).__name__} has no masked adapters; give what `ressa.attach` returned")
    layers = {path: m for path, m in tuner.model.named_modules() if isinstance(m, SparseLoraLinear)}
    _refuse_pruned(tuner, layers)
    wanted = {path: "dense" if _is_dense(tuner, path, kind) else "pruned" for path in {*layers, *tuner.held}}
    before = {path: layer.mode for path, layer in layers.items()}
    training = [m for m in model.modules() if m.training]
    swapped = {p: w for p, w in tuner.held.items() if wanted[p] == "dense"}
    pruned = {path: weight_at(tuner.model, path).data for path in swapped}
    try:
        model.eval()
        for path, layer in layers.items():
            layer.mode = wanted[path]
        for path, weight in swapped.items():
            weight_at(tuner.model, path).data = weight.to(pruned[path].device)
        with torch.no_grad():
            yield
    finally:
        for path, layer in layers.items():
            layer.mode = before[path]
        for path, weight in pruned.items():
            weight_at(tuner.model, path).data = weight
        for module in training:
            module.training = True


def _is_dense(tuner: Any, path: str, kind: str) -> bool:
    """Connectors are dense with any teacher: they were never pruned, and `pruned` and `dense` are one for them."""
    config = next(iter(tuner.peft_config.values()))
    roots = {"vision": config.vision_path, "language": config.language_path}
    branch = next((name for name, root in roots.items() if path.startswith(f"{root}.")), "")
    return not branch or branch in KINDS[kind]


def _refuse_pruned(tuner: Any, layers: dict[str, SparseLoraLinear]) -> None:
    """Raise where a masked layer has nothing but its zeros."""
    key = "dense_is_available"
    if getattr(tuner, key, None) is None:
        config = next(iter(tuner.peft_config.values()))
        bare = [
            path
            for path, mask in config.masks.items()
            if not bool(mask.all()) and not (layers[path].has_dense if path in layers else path in tuner.held)
        ]
        setattr(tuner, key, not bare)
    if not getattr(tuner, key):
        raise RequestError(MISSING)
