"""Quantise one weight matrix to integers, a scale for every group of inputs: round-to-nearest, GPTQ, AWQ's clipping.

Symmetric, without zero points: what compressed-tensors calls W4A16 (or W8A16), the form in which transformers and vLLM
read the experts of a mixture. GPTQ (arXiv 2210.17323) is llm-compressor's function on a single matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model_hooks.pruning import llm_compressor

BITS = (2, 3, 4, 5, 6, 7, 8)
CLIPS = tuple(1 - 0.05 * step for step in range(11))  # AWQ shrinks a group's range to half at most


@dataclass(frozen=True)
class Quantised:
    """A matrix [rows, d_in] as it acts (`weight`, in its own dtype) and the scales [rows, d_in / group] behind it."""

    weight: Tensor
    scale: Tensor


def arguments(bits: int, group: int) -> Any:
    """compressed-tensors' description of the weights."""
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=group)


def scales(weight: Tensor, bits: int, group: int, clip: Tensor | float = 1.0) -> Tensor:
    """Scale of each group, [rows, d_in / group] in the weight's dtype; `clip` (one, or for each) shrinks its range."""
    from compressed_tensors.quantization.utils import calculate_qparams

    groups = weight.view(weight.shape[0], -1, group)
    found, _ = calculate_qparams(groups.amin(-1) * clip, groups.amax(-1) * clip, arguments(bits, group))
    return found.to(weight.dtype)


def codes(weight: Tensor, scale: Tensor, bits: int, group: int) -> Tensor:
    """Integers [rows, d_in], int8. Computed in float32: a bfloat16 division could miss an 8-bit integer by one."""
    from compressed_tensors.quantization.lifecycle.forward import quantize

    found: Tensor = quantize(weight.float(), scale.float(), None, arguments(bits, group), dtype=torch.int8)
    return found


def rounded(weight: Tensor, scale: Tensor, bits: int, group: int) -> Tensor:
    """The matrix that `codes` stand for, in the scales' dtype."""
    return from_codes(codes(weight, scale, bits, group), scale, bits, group)


def from_codes(integers: Tensor, scale: Tensor, bits: int, group: int) -> Tensor:
    """integer * scale, [rows, d_in], as whatever loads the checkpoint computes it."""
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    found: Tensor = dequantize(integers, scale, None, arguments(bits, group))
    return found


def rtn(weight: Tensor, bits: int, group: int) -> Quantised:
    """Round to nearest."""
    scale = scales(weight, bits, group)
    return Quantised(rounded(weight, scale, bits, group), scale)


def gptq(
    weight: Tensor, hessian: Tensor, bits: int, group: int, *, block: int = 128, damping: float = 0.01
) -> Quantised:
    """Round column by column and let later columns make up for the error; `hessian` [d_in, d_in] = 2/N sum x x^T."""
    scale = scales(weight, bits, group)
    found, _, _ = llm_compressor("gptq.gptq_quantize", "quantize_weight")(
        weight.float()[None].clone(), hessian.float()[None].clone(), scale.float()[None],
        torch.zeros_like(scale, dtype=torch.int8)[None], None, arguments(bits, group), block, damping,
    )  # fmt: skip
    return Quantised(rounded(found[0], scale, bits, group), scale)


def clipped(weight: Tensor, inputs: Tensor, bits: int, group: int, tokens: int = 256) -> Quantised:
    """Round to nearest with, for each group, the range that keeps its part of the output on `inputs` [N, d_in] closest
    (AWQ's clipping, arXiv 2306.00978, section 3.2)."""
    x = inputs[:tokens].float().view(len(inputs[:tokens]), -1, group)  # [N, G, group]
    moment = torch.einsum("ngi,ngj->gij", x, x)  # [G, group, group]
    best = torch.ones(weight.shape[0], weight.shape[1] // group, device=weight.device)
    least = torch.full_like(best, float("inf"))
    for clip in CLIPS:
        wrong = (rounded(weight, scales(weight, bits, group, clip), bits, group) - weight).float()
        wrong = wrong.view(weight.shape[0], -1, group)  # [rows, G, group]
        error = torch.einsum("rgi,gij,rgj->rg", wrong, moment, wrong)
        better = error < least
        best, least = torch.where(better, clip, best), torch.where(better, error, least)
    scale = scales(weight, bits, group, best.to(weight.dtype))
    return Quantised(rounded(weight, scale, bits, group), scale)
