"""The tests' models are in moemodels.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for moemodels.py
from moemodels import build, save_with_tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Mixtral as a checkpoint with the zoo's tokenizer. Not to be written to."""
    return save_with_tokenizer(build(), tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def sequences() -> torch.Tensor:
    return torch.randint(16, 2048, (8, 32), generator=torch.Generator().manual_seed(1))
