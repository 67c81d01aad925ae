"""What all operations share: the choice of a backend, the interpreter, tuning, guards on shapes.

A call names its backend: `auto` takes Triton for CUDA tensors and plain torch for all others; `triton` on CPU tensors
works in Triton's interpreter only. `LEAN_KERNELS_BACKEND` overrides `auto`, `LEAN_KERNELS_AUTOTUNE=0` takes every
kernel's fallback configuration, so that runs repeat bit for bit. `LEAN_KERNELS_DEBUG=1` checks indices on a GPU too,
which costs a synchronisation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

Backend = Literal["auto", "torch", "triton"]
BACKENDS = ("auto", "torch", "triton")
MIN_DOT = 16  # rows, columns and depth that tl.dot needs at least
H100_SHARED = 227 * 1024  # bytes of shared memory that a program may take
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# Triton decides between compiler and interpreter when a kernel is decorated, so later changes would be half-hearted
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"


def choose(backend: str, *tensors: Tensor) -> Literal["torch", "triton"]:
    """The backend that runs a call on these tensors. Raises ValueError, TypeError or RuntimeError if it cannot."""
    if backend == "auto":
        backend = os.environ.get("LEAN_KERNELS_BACKEND", "auto")
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; it is one of {', '.join(BACKENDS)}")
    on_gpu = tensors[0].is_cuda
    if backend == "auto":
        usable = on_gpu and find_spec("triton") is not None and tensors[0].dtype != torch.float64
        return "triton" if usable else "torch"
    if backend == "torch":
        return "torch"
    if find_spec("triton") is None:
        raise RuntimeError("backend 'triton' needs the package triton, which is not installed; use backend 'torch'")
    if tensors[0].dtype == torch.float64:
        raise TypeError("the Triton kernels take float32, float16 and bfloat16, not float64; use backend 'torch'")
    if not on_gpu and not INTERPRET:
        raise RuntimeError(
            "backend 'triton' was given CPU tensors; move them to a GPU, use backend 'torch', or set "
            "TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's (slow) interpreter"
        )
    return "triton"


def kernels(name: str) -> ModuleType:
    """The module `lean_kernels.triton.NAME`, imported when first asked for."""
    return import_module(f"lean_kernels.triton.{name}")


def same_device(**tensors: Tensor | None) -> None:
    """Raise RuntimeError naming the first tensor that is not where the first one is."""
    given = [(name, t) for name, t in tensors.items() if t is not None]
    first, expected = given[0][0], given[0][1].device
    for name, t in given[1:]:
        if t.device != expected:
            raise RuntimeError(f"{name} is on {t.device}, but {first} is on {expected}; move them to one device")


def checks_indices(indices: Tensor) -> bool:
    """Whether index values are looked at: always on a CPU, on a GPU only with LEAN_KERNELS_DEBUG=1."""
    return not indices.is_cuda or os.environ.get("LEAN_KERNELS_DEBUG", "0") == "1"


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype to multiply matrices in: x's own, but float32 for float16 on a CPU, up to 50 times faster there."""
    return torch.float32 if x.dtype == torch.float16 and x.device.type == "cpu" else x.dtype


def sum_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums in plain torch: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def bucket(n: int) -> int:
    """The next power of two, at least 16: what a tuning key holds of a length that grows while decoding."""
    return max(MIN_DOT, 1 << (max(1, n) - 1).bit_length())


def launcher(launch: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorator for what launches kernels: Triton does it on the current GPU, which need not be the tensors'."""

    @wraps(launch)
    def on_device(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        if not first.is_cuda:
            return launch(*args, **kwargs)
        with torch.cuda.device(first.device):
            return launch(*args, **kwargs)

    return on_device


def shared_memory(tensor: Tensor) -> int:
    """Bytes of shared memory that one program may take on the tensor's GPU; an H100's for other tensors."""
    if not tensor.is_cuda:
        return H100_SHARED
    properties: Any = torch.cuda.get_device_properties(tensor.device)  # torch's stubs lack the field
    return int(properties.shared_memory_per_block_optin)


def tune(
    configs: Sequence[Any],
    *,
    key: Sequence[str],
    fallback: Any,
    fits: Callable[[Mapping[str, Any], int, int], bool] | None = None,
) -> Callable[[Any], Any]:
    """Decorator for a `triton.jit` kernel: `triton.autotune` over at most 12 `configs`, its choices kept on disk.

    The interpreter, which has no timer, and LEAN_KERNELS_AUTOTUNE=0 take the single `fallback`. `fits` is asked which
    configurations are worth compiling for a call, with all arguments of the kernel by name, warps and stages.
    """
    assert len(configs) <= 12, "prune the list: every configuration is compiled and timed for every key"
    import triton

    fixed = INTERPRET or os.environ.get("LEAN_KERNELS_AUTOTUNE", "1") == "0"
    chosen = [fallback] if fixed else list(configs)

    def prune(configs: Sequence[Any], named: Mapping[str, Any], **given: Any) -> list[Any]:
        assert fits is not None
        kept = [c for c in configs if fits({**named, **given, **c.kwargs}, c.num_warps, c.num_stages)]
        return kept or [fallback]

    decorate: Callable[[Any], Any] = triton.autotune(
        configs=chosen,
        key=list(key),
        prune_configs_by=None if fits is None else {"early_config_prune": prune},
        cache_results=not fixed,
    )
    return decorate
