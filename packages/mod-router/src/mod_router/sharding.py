"""Parameters that ZeRO-3 or FSDP has cut over the processes, seen whole."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def by_fsdp(asked: bool) -> bool:
    """Whether FSDP cuts the model: this run was `asked` to, or `accelerate launch` was."""
    return asked or os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"


def whole(found: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    """Copies in float32 on the CPU. Every process must call it, since all hold a part."""
    if any(hasattr(tensor, "ds_id") for tensor in found.values()):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(found.values())):
            return {name: tensor.detach().float().cpu().clone() for name, tensor in found.items()}
    return {name: _full(tensor.detach()).float().cpu().clone() for name, tensor in found.items()}


def _full(tensor: Tensor) -> Tensor:
    gather = getattr(tensor, "full_tensor", None)  # of a DTensor
    return tensor if gather is None else gather()


@torch.no_grad()
def put(parameter: Tensor, value: Tensor) -> None:
    """Write `value` into a parameter, into this process's part of it where FSDP has cut it."""
    if hasattr(parameter, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        where: Any = parameter
        value = distribute_tensor(value.to(where.device), where.device_mesh, where.placements)
    parameter.copy_(value)
