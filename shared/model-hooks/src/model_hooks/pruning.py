"""Prune one weight matrix: magnitude, Wanda, SparseGPT. Tensors in, tensors out.

Wanda (arXiv 2306.11695) and SparseGPT (arXiv 2301.00774) are llm-compressor's functions on a single matrix; its own
pipeline wants the whole model in memory.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .errors import RequestError


def parse_pattern(pattern: str, sparsity: float) -> tuple[int, int]:
    """(zeros, of) of an N:M pattern such as "2:4": N of every M consecutive inputs are kept; (0, 0) for "".

    Raises `RequestError` for a sparsity outside (0, 1), or another one than the pattern has.
    """
    if not 0 < sparsity < 1:
        raise RequestError(f"sparsity {sparsity} is not accepted; give a share between 0 and 1, such as 0.5")
    if not pattern:
        return 0, 0
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    if not found or not 0 < int(found[1]) < int(found[2]):
        raise RequestError(f"pattern {pattern!r} is not accepted; give 2:4, 4:8 or none")
    kept, of = int(found[1]), int(found[2])
    if abs(sparsity - (of - kept) / of) > 1e-9:
        raise RequestError(f"pattern {pattern} means sparsity {(of - kept) / of:g}, not {sparsity:g}; give that")
    return of - kept, of


def magnitude(weight: Tensor, sparsity: float, zeros: int, of: int) -> Tensor:
    """`weight` [rows, d_in] without its smallest entries: of the whole matrix, or `zeros` of every `of` in a row."""
    if of:
        groups = weight.abs().view(weight.shape[0], -1, of)
        lowest = groups.topk(zeros, dim=-1, largest=False).indices
        gone = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, lowest, True).view_as(weight)
    else:
        lowest = weight.abs().flatten().argsort(stable=True)[: int(weight.numel() * sparsity)]
        gone = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
        gone = gone.index_fill_(0, lowest, True).view_as(weight)
    return weight.masked_fill(gone, 0.0)


def wanda(weight: Tensor, square_norms: Tensor, sparsity: float, zeros: int, of: int) -> Tensor:
    """Zero, in each row, what has least |W_ij| * |X_j|; `square_norms` [d_in]: mean square of each input."""
    module = _linear(weight)
    sparsify_weight = llm_compressor("pruning.wanda.wanda_sparsify", "sparsify_weight")
    pruned: Tensor = sparsify_weight(module, {module: square_norms.float()}, sparsity, zeros, of)
    return pruned


def sparsegpt(
    weight: Tensor, hessian: Tensor, sparsity: float, zeros: int, of: int, *, block: int = 128, damping: float = 0.01
) -> Tensor:
    """Zero entries and let the rest of their row make up for them; `hessian` [d_in, d_in] = 2/N sum x x^T."""
    module = _linear(weight)
    sparsify_weight = llm_compressor("pruning.sparsegpt.sgpt_sparsify", "sparsify_weight")
    hessians = {module: hessian.float().clone()}
    pruned: Tensor = sparsify_weight(module, hessians, sparsity, zeros, of, block, damping, False)[1]
    return pruned


def llm_compressor(module: str, name: str) -> Any:
    """A function of one of llm-compressor's modifiers, whose log (that there is no GPU) is turned off."""
    from loguru import logger

    for package in ("llmcompressor", "compressed_tensors"):
        logger.disable(package)
    return getattr(import_module(f"llmcompressor.modifiers.{module}"), name)


def _linear(weight: Tensor) -> Any:
    """The matrix as the Linear that llm-compressor's functions take."""
    with torch.device("meta"):
        module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return module
