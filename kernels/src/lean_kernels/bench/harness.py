"""Times of an operation and of what torch offers instead, beside the least time that its bytes and products need.

A file of this folder has a function `bench_OP(bench)` that gives its rows by `bench.row`. On a GPU triton's timer
flushes the second cache before each run; on a CPU the candidates take turns, so that a change of load meets all, and
other memory is read before each.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
Run = Callable[[], object]

LOSS_ALLOWED = 0.10  # of a stored row's speed
COPIED = {"cpu": 1 << 28, "cuda": 1 << 31}  # bytes of the tensor that the copy ceiling copies
READ = 1 << 28  # bytes read before each run on a CPU
SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices of the matmul ceiling


class BusyMachine(RuntimeError):
    """More work waits than there are cores: a ratio of times would say nothing."""


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches: bytes a second, read and written, of a copy; operations a second of a product."""

    copy: float
    matmul: float


@dataclass
class Bench:
    """How to measure, and the rows so far.

    `shapes` names a preset ("small" or "h200"); `backend` goes to the operation; `force` measures on a busy machine.
    """

    shapes: str = "small"
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    backend: str = "auto"
    rounds: int = 9
    force: bool = False
    rows: list[Row] = field(default_factory=list)
    _ceilings: Ceilings | None = None

    @property
    def ceilings(self) -> Ceilings:
        """Measured once, before the first row."""
        if self._ceilings is None:
            self._ceilings = ceilings(self.device, self.dtype, self.rounds)
        return self._ceilings

    def row(
        self,
        op: str,
        shape: Mapping[str, int | float],
        run: Run,
        *,
        bytes: int,
        flops: int,
        baselines: Mapping[str, Run],
    ) -> Row:
        """Time `run` and the baselines and add a row. `bytes` and `flops` are the least that the operation needs."""
        if self.device == "cpu":
            self._refuse_if_busy()
        floor = max(bytes / self.ceilings.copy, flops / self.ceilings.matmul) * 1e3
        times = timings({"": run, **baselines}, self.device, self.rounds)
        ms = times[""]["ms"]
        others = {name: times[name]["ms"] for name in baselines}
        row: Row = {
            "op": op,
            "shape": dict(shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "backend": self.backend,
            **times[""],
            "bytes": bytes,
            "flops": flops,
            "gb_s": round(bytes / ms / 1e6, 2),
            "tflop_s": round(flops / ms / 1e9, 3),
            "floor_ms": round(floor, 5),
            "ratio_to_floor": round(ms / floor, 3),
            "baselines": others,
            "ratio_to_best_baseline": round(min(others.values()) / ms, 3) if others else None,
            **machine(self.device),
        }
        self.rows.append(row)
        return row

    def _refuse_if_busy(self) -> None:
        load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
        if load > (os.cpu_count() or cores) and not self.force:
            raise BusyMachine(
                f"the load average is {load:.1f} on {os.cpu_count()} cores: wait until the machine is idle, "
                "or measure all the same with --force"
            )


def timings(runs: Mapping[str, Run], device: str, rounds: int) -> dict[str, dict[str, float]]:
    """Median `ms` of each run, with the least (CPU) or the 20th and 80th percentile (GPU)."""
    return {name: _gpu(run) for name, run in runs.items()} if device == "cuda" else _cpu(runs, rounds)


def _gpu(run: Run) -> dict[str, float]:
    from triton.testing import do_bench

    middle, low, high = do_bench(run, warmup=50, rep=200, quantiles=[0.5, 0.2, 0.8])
    return {"ms": middle, "p20_ms": low, "p80_ms": high}


def _cpu(runs: Mapping[str, Run], rounds: int) -> dict[str, dict[str, float]]:
    taken: dict[str, list[float]] = {name: [] for name in runs}
    flush = reader("cpu")
    for run in runs.values():  # the first call allocates and chooses
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            flush()
            begin = time.perf_counter()
            run()
            taken[name].append((time.perf_counter() - begin) * 1e3)
    return {name: {"ms": statistics.median(ms), "min_ms": min(ms)} for name, ms in taken.items()}


def reader(device: str) -> Run:
    """A function that reads 256 MB, as a model's weights are between two calls: caches then hold nothing else."""
    return torch.ones(READ, dtype=torch.uint8, device=device).view(torch.float32).sum


def ceilings(device: str, dtype: torch.dtype, rounds: int) -> Ceilings:
    """Measure the copy and matmul ceilings of a device."""
    source = torch.zeros(COPIED[device] // dtype.itemsize, dtype=dtype, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(SIDE[device], SIDE[device], device=device).to(dtype) for _ in range(2))
    found = timings({"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}, device, rounds)
    seconds = {name: times["ms"] / 1e3 for name, times in found.items()}
    return Ceilings(2 * COPIED[device] / seconds["copy"], 2 * SIDE[device] ** 3 / seconds["matmul"])


def machine(device: str) -> Row:
    """Versions and the device that a row was measured on."""
    row: Row = {"torch": torch.__version__}
    try:
        import triton

        row["triton"] = triton.__version__
    except ImportError:
        row["triton"] = None
    if device == "cuda":
        return {**row, "device": torch.cuda.get_device_name(), "clock_mhz": _clock()}
    return {
        **row,
        "device": f"cpu, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
    }


def _clock() -> int | None:
    try:
        return int(torch.cuda.clock_rate())
    except (RuntimeError, ImportError):  # needs nvidia-ml-py
        return None


def write(rows: Sequence[Row], file: Path) -> None:
    """Append rows to a file, one JSON object a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)


def slower(rows: Sequence[Row], file: Path) -> list[str]:
    """What of `rows` takes over 10 % longer than the last stored row of the same case on the same device."""
    stored = {_case(row): row for row in map(json.loads, file.read_text().splitlines())}
    lost = []
    for row in rows:
        before = stored.get(_case(row))
        if before is not None and row["ms"] > before["ms"] * (1 + LOSS_ALLOWED):
            lost.append(f"{row['op']} {row['shape']}: {row['ms']:.3f} ms, stored {before['ms']:.3f} ms")
    return lost


def _case(row: Row) -> str:
    return json.dumps([row[name] for name in ("op", "shape", "dtype", "backend", "device")], sort_keys=True)


def line(row: Row) -> str:
    """A row for people."""
    shape = " ".join(f"{name}={value}" for name, value in row["shape"].items())
    others = ", ".join(f"{name} {ms:.3f}" for name, ms in row["baselines"].items())
    best = row["ratio_to_best_baseline"]
    against = f"; {best:.2f}x the best of: {others} ms" if best is not None else ""
    return (
        f"{row['op']} {shape} {row['dtype']}: {row['ms']:.3f} ms, {row['ratio_to_floor']:.2f}x its floor "
        f"of {row['floor_ms']:.3f} ms{against}"
    )
