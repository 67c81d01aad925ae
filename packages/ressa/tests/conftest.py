"""The narrow LLaVA of the zoo, pruned once for all tests that need one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ressa.cli import app
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))  # for vlmodels.py


@pytest.fixture(scope="session")
def command() -> Callable[..., Any]:
    """Runs `ressa ARGUMENTS...` in this process."""

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, [str(a) for a in arguments])

    return run


@pytest.fixture(scope="session")
def pruned(tmp_path_factory: pytest.TempPathFactory, command: Callable[..., Any]) -> Path:
    """70 % of the weights pruned, the dense weights kept beside the masks."""
    folder = tmp_path_factory.mktemp("pruned") / "dense"
    done = command("prune", "zoo:llava", "--sparsity", 0.7, "--samples", 32, "--batch-size", 16, "--keep-dense",
                   "--dtype", "float32", "-o", folder)  # fmt: skip
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture(scope="session")
def sparse(tmp_path_factory: pytest.TempPathFactory, command: Callable[..., Any]) -> Path:
    """The same with its zeros."""
    folder = tmp_path_factory.mktemp("pruned") / "sparse"
    done = command("prune", "zoo:llava", "--sparsity", 0.7, "--samples", 32, "--batch-size", 16, "--dtype", "float32",
                   "-o", folder)  # fmt: skip
    assert done.exit_code == 0, done.output
    return folder
