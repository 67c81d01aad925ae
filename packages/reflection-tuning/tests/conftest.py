"""A server that reflects, and a small random student with a tokenizer that adds a BOS, as LLaMA's does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from llm_server import Server, in_a_room

sys.path.insert(0, str(Path(__file__).parent))  # for teachers.py

from teachers import lines, some_records, teaching


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own, without a key in the environment and without waiting."""
    return in_a_room(tmp_path, monkeypatch)


@pytest.fixture
def server() -> Any:
    with Server(teaching) as running:
        yield running


@pytest.fixture
def data(room: Path) -> str:
    return lines("in.jsonl", some_records(12))


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaMA in float32, whose weights are wide enough for prompts to matter. Not to be written to."""
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import LlamaConfig, LlamaForCausalLM

    from model_hooks.zoo import tokenizer as zoo_tokenizer

    path = tmp_path_factory.mktemp("student") / "student"
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=0, pad_token_id=1,
    ))  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    model.save_pretrained(path)
    tokenizer = zoo_tokenizer.load()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.eos_token_id)]
    )
    tokenizer.save_pretrained(path)
    return path
