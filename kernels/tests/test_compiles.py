"""The kernels go through Triton's compiler for an H100 where no GPU is: the interpreter accepts more than it does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lean_kernels

MODULES = ("cosine", "linear_ce", "loki", "loki_select", "meo", "mod", "sparse24", "sparse_lora")
SHARED_MEMORY = 227 * 1024  # bytes that one program may take on an H100


@pytest.mark.slow
def test_every_kernel_compiles_and_fits(tmp_path):
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"LEAN_KERNELS_AUTOTUNE": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("compile_kernels.py")
    run = subprocess.run([sys.executable, script, "bfloat16"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    built = [json.loads(line) for line in run.stdout.splitlines()]
    sources = Path(lean_kernels.__file__).parent / "triton"
    kernels = {(m, k) for m in MODULES for k in re.findall(r"def (\w+_kernel)\(", (sources / f"{m}.py").read_text())}
    assert {(row["module"], row["kernel"]) for row in built} == kernels
    assert all(row["ptx"] and row["shared"] <= SHARED_MEMORY for row in built)
