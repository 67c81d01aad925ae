"""What the tests of all kernels share: the device, the specification's tolerances, the comparison with an oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# On a GPU the same tests run compiled; `make test-gpu` picks them by this mark.
ON_DEVICE = [pytest.mark.gpu] if DEVICE == "cuda" else []
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALVES)

# kind -> dtype -> (atol, share of the oracle's largest magnitude)
_TOLERANCES = {
    "output": {torch.float32: (2e-6, 2e-6), torch.float16: (1e-3, 1e-3), torch.bfloat16: (8e-3, 8e-3)},
    "long": {torch.float32: (1e-5, 1e-5), torch.float16: (1e-3, 1e-3), torch.bfloat16: (8e-3, 8e-3)},
    "reduction": {torch.float32: (1e-5, 0.0), torch.float16: (1e-4, 0.0), torch.bfloat16: (1e-4, 0.0)},
    "gradient": {torch.float32: (1e-5, 1e-5), torch.float16: (2e-3, 2e-3), torch.bfloat16: (1.6e-2, 1.6e-2)},
}


def tolerance(dtype: torch.dtype, kind: str = "output") -> tuple[float, float]:
    """Absolute tolerance and the share of the oracle's largest magnitude; `long` is for dots longer than 256."""
    return (1e-12, 1e-12) if dtype == torch.float64 else _TOLERANCES[kind][dtype]


def assert_close_to_oracle(
    actual: Tensor, oracle: Tensor, kind: str = "output", torch_result: Tensor | None = None, dtype: Any = None
) -> None:
    """Compare with a float64 oracle; with `torch_result` also demand at most twice the error of plain torch.

    Args:
        torch_result: what torch makes of the same inputs in the same dtype.
        dtype: of the inputs, where the result has another one.
    """
    dtype = dtype or actual.dtype
    assert actual.shape == oracle.shape, f"{list(actual.shape)} is not {list(oracle.shape)}"
    wanted = oracle.double().cpu()
    error = (actual.double().cpu() - wanted).abs().max().item() if wanted.numel() else 0.0
    largest = wanted.abs().max().item() if wanted.numel() else 0.0
    atol, share = tolerance(dtype, kind)
    assert error <= atol + share * largest, f"error {error:.3g}, allowed {atol:.3g} + {share:.3g} x {largest:.3g}"
    if torch_result is not None:
        plain = (torch_result.double().cpu() - wanted).abs().max().item()
        floor = torch.finfo(actual.dtype).eps * largest  # one unit in the last place: the interpreter's stores
        assert error <= 2 * plain + floor, f"error {error:.3g}, plain torch has {plain:.3g}"


def with_gradients(
    run: Callable[..., Tensor], tensors: dict[str, Tensor], seed: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    """The result of run(**tensors) and the gradients of its floating tensors for one random cotangent."""
    leaves = {
        name: t.detach().clone(memory_format=torch.preserve_format).requires_grad_(t.is_floating_point())
        for name, t in tensors.items()
    }
    out = run(**leaves)
    wanted = {name: t for name, t in leaves.items() if t.requires_grad}
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = torch.autograd.grad(out, list(wanted.values()), cotangent.to(out.dtype).to(out.device))
    return out.detach(), dict(zip(wanted, found))
