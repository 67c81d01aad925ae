"""A tiny model with the zoo's tokenizer, in memory and as a folder, for every test of the package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from llm_drop import Scores, score
from transformers import LlamaForCausalLM

from model_hooks.zoo import tokenizer

sys.path.insert(0, str(Path(__file__).parent))  # for tiny.py
from tiny import build


@pytest.fixture
def model() -> LlamaForCausalLM:
    return build()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a checkpoint. Not to be written to."""
    path = tmp_path_factory.mktemp("tiny") / "model"
    build().save_pretrained(path)
    tokenizer.load().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def sequences() -> torch.Tensor:
    return torch.randint(16, 2048, (12, 48), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def scores(sequences: torch.Tensor) -> Scores:
    return score(build(), sequences, name="tiny", data="random")
