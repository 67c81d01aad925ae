"""Runs the GPU tests with the Python it is started with; installs nothing and needs nothing of ours installed.

That Python has torch, triton, transformers and pytest, and PYTHONPATH names our source folders (`make test-gpu` does
that). A file is picked by its text, before anything imports it, so that the files that need more stay out. Benchmarks
are GPU tests that print: all output is shown. Exits 0 with a reason where there is nothing to run on.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("torch", "transformers", "pytest")


def reason_to_skip() -> str | None:
    """Why the GPU tests cannot run here, or None when they can."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return f"{sys.executable} has no {', '.join(missing)}"
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} of {sys.executable} sees no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return f"{sys.executable} has no triton"
    return None


def gpu_test_files() -> list[Path]:
    folders = [ROOT / name for name in ("shared", "kernels", "packages")]
    files = [file for folder in folders for file in folder.glob("**/tests/test_*.py")]
    return sorted(file for file in files if "mark.gpu" in file.read_text())


def main() -> int:
    if reason := reason_to_skip():
        print(f"GPU tests skipped: {reason}")
        return 0
    files = gpu_test_files()
    if not files:
        print("GPU tests skipped: no test is marked gpu yet")
        return 0
    import torch

    print(f"GPU tests on {torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    return subprocess.run([sys.executable, "-m", "pytest", "-s", "-m", "gpu", *map(str, files)], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
