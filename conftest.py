"""Settings for every test of the workspace: one torch thread a process, no hub, GPU tests only where a GPU is."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
import time

import pytest

# Before anything imports torch or transformers. An xdist worker inherits what its controller has set.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
# Tests start many processes: the first compiles what it imports, the others read that, however the machine is set.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
if not os.path.exists("/dev/nvidiactl"):  # Triton kernels are then run by its interpreter, which is chosen once
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("LEAN_KERNELS_AUTOTUNE", "0")
if "LEANFORMERS_TEST_HOME" not in os.environ:
    os.environ["LEANFORMERS_TEST_HOME"] = tempfile.mkdtemp(prefix="leanformers-tests-")
os.environ["HF_HOME"] = os.environ["LEANFORMERS_TEST_HOME"]

try:
    from hypothesis import settings
except ImportError:  # `make test-gpu` runs where only pytest is installed
    settings = None  # type: ignore[assignment,misc]
else:
    # A busy machine is no failure, and a failure comes again.
    settings.register_profile("workspace", deadline=None, derandomize=True, max_examples=50)
    settings.load_profile("workspace")

_kept = 0.0  # when the garbage collector was last told what stays, in seconds of the monotonic clock


def pytest_configure(config: pytest.Config) -> None:
    # For a plain pytest, whose plugins may be fewer than those that the options in pyproject.toml are for.
    if not config.pluginmanager.hasplugin("timeout"):
        config.addinivalue_line("markers", "timeout(seconds): the longest that the test may take")


def keep_what_is_there() -> None:
    """What was imported so far stays; a collection that looks through all of it takes a third of a second."""
    global _kept
    gc.collect()
    gc.freeze()
    _kept = time.monotonic()


def pytest_collection_finish() -> None:
    keep_what_is_there()


def pytest_runtest_logfinish() -> None:
    if time.monotonic() - _kept > 20:  # tests import more; between two of them little is alive that will not stay
        keep_what_is_there()


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["LEANFORMERS_TEST_HOME"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; `make test-gpu` on a machine with one runs it")
    for item in on_gpu:
        item.add_marker(skip)
