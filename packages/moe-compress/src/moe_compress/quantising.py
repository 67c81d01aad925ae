"""Quantise one weight matrix to integers, a scale for every group of inputs: round-to-nearest, GPTQ, AWQ's clipping.

Symmetric codes are what compressed-tensors calls W4A16 (or W8A16), the form in which transformers and vLLM read the
experts of a mixture; asymmetric ones have a zero point for each group, too. GPTQ (arXiv 2210.17323) is llm-compressor's
function on a single matrix.
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
class Codes:
    """How a matrix is written as integers: `bits` of each, `group` inputs that share a scale, zero points or none."""

    bits: int
    group: int
    symmetric: bool = True

    def arguments(self) -> Any:
        """compressed-tensors' description of the weights."""
        from compressed_tensors.quantization import QuantizationArgs

        return QuantizationArgs(
            num_bits=self.bits, type="int", symmetric=self.symmetric, strategy="group", group_size=self.group
        )


@dataclass(frozen=True)
class Grid:
    """Where the integers of a matrix [.., rows, d_in] stand: it is (integer - zero) * scale. `scale` [.., rows,
    d_in / group] has the matrix's dtype, `zero` is int8 of the same shape, or None for symmetric codes."""

    scale: Tensor
    zero: Tensor | None = None

    def rows(self, rows: Any) -> Grid:
        """The grid of some rows, of all experts' in one."""
        scale = self.scale.flatten(0, -2)[rows]
        return Grid(scale, None if self.zero is None else self.zero.flatten(0, -2)[rows])


@dataclass(frozen=True)
class Quantised:
    """A matrix [rows, d_in] as it acts (`weight`, in its own dtype) and the grid behind it."""

    weight: Tensor
    grid: Grid

    @property
    def scale(self) -> Tensor:
        return self.grid.scale


def grid_of(weight: Tensor, how: Codes, clip: Tensor | float = 1.0) -> Grid:
    """The grid of a matrix [rows, d_in]; `clip` (one, or for each group) shrinks its range."""
    from compressed_tensors.quantization.utils import calculate_qparams

    groups = weight.view(weight.shape[0], -1, how.group)
    scale, zero = calculate_qparams(groups.amin(-1) * clip, groups.amax(-1) * clip, how.arguments())
    return Grid(scale.to(weight.dtype), None if how.symmetric else zero.to(torch.int8))


def codes(weight: Tensor, grid: Grid, how: Codes) -> Tensor:
    """Integers [rows, d_in], int8. Computed in float32: a bfloat16 division could miss an 8-bit integer by one."""
    from compressed_tensors.quantization.lifecycle.forward import quantize

    found: Tensor = quantize(weight.float(), grid.scale.float(), grid.zero, how.arguments(), dtype=torch.int8)
    return found


def rounded(weight: Tensor, grid: Grid, how: Codes) -> Tensor:
    """The matrix that `codes` stand for, in the scales' dtype."""
    return from_codes(codes(weight, grid, how), grid, how)


def from_codes(integers: Tensor, grid: Grid, how: Codes) -> Tensor:
    """(integer - zero) * scale, [rows, d_in], as whatever loads the checkpoint computes it."""
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    found: Tensor = dequantize(integers, grid.scale, grid.zero, how.arguments())
    return found


def rtn(weight: Tensor, how: Codes) -> Quantised:
    """Round to nearest."""
    grid = grid_of(weight, how)
    return Quantised(rounded(weight, grid, how), grid)


def gptq(weight: Tensor, hessian: Tensor, how: Codes, *, block: int = 128, damping: float = 0.01) -> Quantised:
    """Round column by column and let later columns make up for the error.

    `hessian` [d_in, d_in] float32 = 2/N sum x x^T is overwritten: it is as large as the matrix, or larger.
    """
    grid = grid_of(weight, how)
    zero = torch.zeros_like(grid.scale, dtype=torch.int8) if grid.zero is None else grid.zero
    found, _, _ = llm_compressor("gptq.gptq_quantize", "quantize_weight")(
        weight.to(torch.float32, copy=True)[None], hessian[None], grid.scale.float()[None], zero[None], None,
        how.arguments(), block, damping,
    )  # fmt: skip
    return Quantised(rounded(found[0], grid, how), grid)


def clipped(weight: Tensor, inputs: Tensor, how: Codes, tokens: int = 256) -> Quantised:
    """Round to nearest with, for each group, the range that keeps its part of the output on `inputs` [N, d_in] closest
    (AWQ's clipping, arXiv 2306.00978, section 3.2)."""
    x = inputs[:tokens].float().view(len(inputs[:tokens]), -1, how.group)  # [N, G, group]
    moment = torch.einsum("ngi,ngj->gij", x, x)  # [G, group, group]
    best = torch.ones(weight.shape[0], weight.shape[1] // how.group, device=weight.device)
    least = torch.full_like(best, float("inf"))
    for clip in CLIPS:
        wrong = (rounded(weight, grid_of(weight, how, clip), how) - weight).float()
        wrong = wrong.view(weight.shape[0], -1, how.group)  # [rows, G, group]
        error = torch.einsum("rgi,gij,rgj->rg", wrong, moment, wrong)
        better = error < least
        best, least = torch.where(better, clip, best), torch.where(better, error, least)
    grid = grid_of(weight, how, best.to(weight.dtype))
    return Quantised(rounded(weight, grid, how), grid)
