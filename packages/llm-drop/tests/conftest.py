"""A tiny model with the zoo's tokenizer, in memory and as a folder, for every test of the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from llm_drop import Scores, score
from transformers import LlamaConfig, LlamaForCausalLM

from model_hooks.zoo import tokenizer


def build(layers: int = 6, **changes: Any) -> LlamaForCausalLM:
    """A random Llama whose sublayers turn the residual stream enough to tell them apart."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": 2048, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
            "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, **changes,
        }
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model


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
