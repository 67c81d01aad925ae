"""Loki decode in C for CPUs: several times quicker than torch's gathers and products.

The source beside this file is compiled by the machine's C compiler when first asked for, into the user's cache folder
(`LEAN_KERNELS_CACHE`, or `lean_kernels` in `XDG_CACHE_HOME`), one file for each source, compiler and processor. Without
a compiler, or with `LEAN_KERNELS_NATIVE=0`, plain torch does the work, with a warning in the first case.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("loki.c")
BASE = ("-O3", "-std=gnu11", "-fPIC", "-shared")
# the first set that the compiler takes
FLAGS = (("-march=native", "-fopenmp"), ("-march=native",), ())
DTYPES = (torch.float32, torch.bfloat16)
PAGE, LARGE, MADV_HUGEPAGE = 1 << 12, 16 << 20, 14
MAX_GROUP = 64  # query heads of a KV head: HEADS in loki.c


class _Plane(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("b", c_int64), ("h", c_int64), ("s", c_int64)]

    @classmethod
    def of(cls, cache: Tensor) -> _Plane:
        size = cache.element_size()
        return cls(cache.data_ptr(), *(size * step for step in cache.stride()[:3]))


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("batch", "heads", "kv_heads", "queries", "width", "low", "sink", "recent")),
        *((name, c_int32) for name in ("bfloat16", "by_head", "by_max", "threads")),
        ("scale", c_float),
        ("softcap", c_float),
    ]


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `loki_decode` here can do it: rows of one dtype, float32 or bfloat16, on a CPU, in one piece each."""
    fits = q.device.type == "cpu" and q.shape[-1] % 8 == 0 and q.shape[1] <= MAX_GROUP * k.shape[1]
    alike = q.dtype in DTYPES and q.dtype == k.dtype == v.dtype
    return fits and alike and k.stride(-1) == v.stride(-1) == 1 and library() is not None


def loki_decode(
    q: Tensor, k: Tensor, v: Tensor, lens: Tensor, *, d: int, topk: int | Tensor, scale: float, select: str = "group",
    reduce: str = "softmax_mean", sink: int = 0, recent: int = 0, start: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and log-sum-exp as `lean_kernels.loki_decode` gives them, for what `takes` says yes to."""
    built = library()
    assert built is not None
    rows, heads, queries, width = q.shape
    out = torch.zeros(q.shape, dtype=torch.float32)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float32)
    threads = min(torch.get_num_threads(), rows * k.shape[1])
    shape = _Shape(
        rows, heads, k.shape[1], queries, width, d, sink, recent, k.dtype == torch.bfloat16, select == "head",
        reduce == "max", threads, scale, softcap or 0.0,
    )  # fmt: skip
    floats = q.to(torch.float32).contiguous()
    planes = [ctypes.byref(_Plane.of(plane)) for plane in (k, v)]
    counts = topk.tolist() if isinstance(topk, Tensor) and topk.ndim else [int(topk)] * rows
    starts = [0] * rows if start is None else start.tolist()
    numbers = [(c_int64 * rows)(*given) for given in (starts, lens.tolist(), counts)]
    failed = built.loki_decode(
        ctypes.byref(shape), c_void_p(floats.data_ptr()), *planes, *numbers, c_void_p(out.data_ptr()),
        c_void_p(lse.data_ptr()),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory to attend to {int(lens.max())} tokens with {threads} threads")
    return out.to(q.dtype), lse


def huge_pages(fresh: Tensor) -> Tensor:
    """Ask Linux, which may refuse, to back new memory with pages of 2 MB: reading it is then up to a third quicker.

    Small tensors and other systems are left as they are.
    """
    if fresh.device.type == "cpu" and fresh.nbytes >= LARGE and sys.platform == "linux":
        begin = -(-fresh.data_ptr() // PAGE) * PAGE
        end = (fresh.data_ptr() + fresh.nbytes) // PAGE * PAGE
        ctypes.CDLL(None).madvise(
            c_void_p(begin), ctypes.c_size_t(end - begin), MADV_HUGEPAGE
        )  # a wish: may be refused
    return fresh


@lru_cache(1)
def library() -> ctypes.CDLL | None:
    """The compiled source, made if need be; None where it cannot be had."""
    if os.environ.get("LEAN_KERNELS_NATIVE", "1") == "0":
        return None
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        warnings.warn(
            "no C compiler was found (CC, cc, gcc, clang): Loki decodes in plain torch, which is slower", stacklevel=2
        )
        return None
    try:
        return ctypes.CDLL(str(_build(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        warnings.warn(
            f"{compiler} made no library of {SOURCE.name}, so Loki decodes in plain torch: {said[-500:]}", stacklevel=2
        )
        return None


def _build(compiler: str) -> Path:
    """The library's file. Raises CalledProcessError or OSError with what the compiler said."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256(
        "\0".join((SOURCE.read_text(), version, _processor(), str((BASE, FLAGS)))).encode()
    ).hexdigest()
    folder = _folder()
    path = folder / f"loki-{key[:16]}.so"
    if path.exists():
        return path
    handle, made = tempfile.mkstemp(suffix=".so", dir=folder)  # several processes may build at once
    os.close(handle)
    try:
        for flags in FLAGS:
            command = [compiler, *BASE, *flags, str(SOURCE), "-o", made, "-lm"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                os.replace(made, path)
                return path
        done.check_returncode()
        raise AssertionError
    finally:
        Path(made).unlink(missing_ok=True)


def _folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("LEAN_KERNELS_CACHE") or Path(cache) / "lean_kernels")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="lean_kernels-"))  # of this process alone


def _processor() -> str:
    """What tells machines apart for which code is not compiled alike."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
