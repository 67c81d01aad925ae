"""The kernels go through Triton's compiler for an H100 where no GPU is: the interpreter accepts more than it does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lean_kernels

MODULES = ("cosine", "linear_ce", "loki", "loki_select", "meo", "mod", "sparse24", "sparse_lora")
SHARED_MEMORY = 227 * 1024  # bytes that one program may take on an H100
GRID_SIDE = 65535  # programs along any axis of a grid but the first
SPILLED = 1024  # bytes a thread may keep in memory for want of registers


@pytest.fixture(scope="session")
def cache() -> str:
    """One for all workers: what several tests compile is compiled once."""
    return os.path.join(os.environ["LEANFORMERS_TEST_HOME"], "triton")


def compiled(dtype: str, which: str, tuned: bool, cache: str) -> list[dict[str, Any]]:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"LEAN_KERNELS_AUTOTUNE": str(int(tuned)), "TRITON_CACHE_DIR": cache}
    script = Path(__file__).with_name("compile_kernels.py")
    run = subprocess.run([sys.executable, script, dtype, which], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.slow
def test_every_kernel_compiles_with_every_argument(cache: str) -> None:
    built = compiled("bfloat16", "variants", False, cache)
    sources = Path(lean_kernels.__file__).parent / "triton"
    kernels = {(m, k) for m in MODULES for k in re.findall(r"def (\w+_kernel)\(", (sources / f"{m}.py").read_text())}
    assert {(row["module"], row["kernel"]) for row in built} == kernels
    assert [row for row in built if row["shared"] > SHARED_MEMORY or row["spilled"] > SPILLED] == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_configuration_fits(dtype: str, cache: str) -> None:
    """One that takes more than a GPU has is compiled for nothing, or fails where it is the only one."""
    built = compiled(dtype, "largest", True, cache) + compiled(dtype, "largest", False, cache)
    assert [row for row in built if row["shared"] > SHARED_MEMORY or row["spilled"] > SPILLED] == []
    assert [row for row in built if max(row["grid"][1:], default=1) > GRID_SIDE] == []
