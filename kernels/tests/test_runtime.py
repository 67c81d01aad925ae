"""The choice of a backend, and what importing the package must not do."""

import subprocess
import sys

import pytest
import torch

from lean_kernels import _rt

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import lean_kernels, torch
h, head, target = torch.randn(3, 16), torch.randn(20, 16), torch.tensor([1, 2, 3])
assert lean_kernels.linear_ce(h, head, target).loss.isfinite().all()
assert not torch.cuda.is_initialized()
import importlib.util
importlib.util.find_spec = lambda name, *rest: None
try:
    lean_kernels.linear_ce(h, head, target, backend="triton")
except RuntimeError as error:
    print(error)
"""


def test_without_triton_the_torch_path_works_and_triton_is_named() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "needs the package triton" in done.stdout


def test_an_unknown_backend_and_float64_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1)
    with pytest.raises(ValueError, match="auto, torch, triton"):
        _rt.choose("cuda", x)
    with pytest.raises(TypeError, match="float64"):
        _rt.choose("triton", x.double())
    monkeypatch.setattr(_rt, "INTERPRET", False)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
            _rt.choose("triton", x)
    monkeypatch.setenv("LEAN_KERNELS_BACKEND", "torch")
    assert _rt.choose("auto", x) == "torch"


@pytest.mark.parametrize(("n", "expected"), [(0, 16), (1, 16), (17, 32), (1024, 1024), (1025, 2048)])
def test_buckets_are_powers_of_two(n: int, expected: int) -> None:
    assert _rt.bucket(n) == expected
