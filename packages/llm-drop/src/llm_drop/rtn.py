"""Round-to-nearest weight quantisation, in place: what dropping is combined with in the paper's quantisation table.

Each group of `group` weights of a row gets one scale, s = max|w| / (2^(bits-1) - 1); weights become s * round(w / s).
The result is stored in the model's own dtype: it has the quality of the quantised model, not its size or speed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from model_hooks import RequestError, anatomy


def quantised(weight: Tensor, bits: int, group: int) -> Tensor:
    """`weight` [rows, columns] rounded to `bits` in groups of `group` columns (fewer in a row's last group)."""
    rows, columns = weight.shape
    padded = nn.functional.pad(weight.float(), (0, -columns % group)).view(rows, -1, group)
    scale = (padded.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)).clamp_min(torch.finfo(torch.float32).tiny)
    return ((padded / scale).round() * scale).view(rows, -1)[:, :columns].to(weight.dtype)


@torch.no_grad()
def quantise(model: Any, bits: int = 4, group: int = 32) -> Any:
    """Round every weight matrix of the decoder's blocks, fused experts too, to `bits` bits; embeddings, norms and head
    stay. Returns it."""
    from transformers.pytorch_utils import Conv1D

    if not 2 <= bits <= 8 or group < 1:
        raise RequestError(f"bits {bits} and group {group}: 2 to 8 bits in groups of 1 or more are possible")
    for block in anatomy(model).blocks:
        for module in block.module.modules():
            for name, weight in [(n, p) for n, p in module.named_parameters(recurse=False) if p.dim() > 1]:
                turned = weight.T if isinstance(module, Conv1D) else weight  # rows are outputs, one after another
                rounded = quantised(turned.flatten(0, -2), bits, group).view(turned.shape)
                rounded = rounded.T.contiguous() if isinstance(module, Conv1D) else rounded
                setattr(module, name, nn.Parameter(rounded, requires_grad=False))
    return model
