"""Memory that work needs at its peak: tensors counted where they are made, or what the system says of the process."""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class _LiveBytes(TorchDispatchMode):
    """While it is on, follows every storage that an operation returns until it is freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live, self.peak = 0, 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):  # made before, or followed already
            self._seen.add(tensor.untyped_storage())
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            self._follow(tensor.untyped_storage())
        return out

    def _follow(self, storage: Any) -> None:
        if storage in self._seen or storage.device.type == "meta":
            return
        self._seen.add(storage)
        size = storage.nbytes()
        weakref.finalize(storage, self._free, size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _free(self, size: int) -> None:
        self.live -= size


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in an operation's arguments or results; torch's own walk takes longer than most operations."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def peak_tensor_bytes(work: Callable[[], Any]) -> int:
    """The most bytes of tensors made by `work()` that were alive at once; what existed before is not counted.

    Exact, where a process's resident set is heap noise.
    """
    with _LiveBytes() as mode:
        work()
    peak: int = mode.peak
    return peak


def peak_memory(work: Callable[[], Any]) -> float:
    """Bytes that `work` needs at its peak beyond what was in use; 0 where the system cannot tell."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return float(torch.cuda.max_memory_allocated() - before)
    if sys.platform != "linux":
        return 0.0
    ctypes.CDLL(None).malloc_trim(0)  # give back what earlier work left in the heap
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
    except OSError:
        return 0.0
    before = _resident("VmRSS")
    work()
    return max(float(_resident("VmHWM") - before), 1.0)


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
