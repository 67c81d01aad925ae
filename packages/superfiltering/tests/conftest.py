"""Two tiny random models with the zoo's tokenizer, as folders, and a few records of each shape, for every test."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from model_hooks.zoo import tokenizer as zoo_tokenizer

WORDS = ["the", "value", "of", "self", "is", "returned", "as", "a", "list", "if", "not", "in", "(x)", "=", "0", ":",
         "def", "f", "return", "None", ".", ",", "and", "for", "every", "item"]  # fmt: skip


def build(seed: int = 0, **changes: Any) -> GPT2LMHeadModel:
    """A random GPT-2 whose weights are wide enough for the prompt to matter."""
    sizes = {"vocab_size": 2048, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "bos_token_id": 0,
             "eos_token_id": 0, "pad_token_id": 1}  # fmt: skip
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**(sizes | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model


def _folder(factory: pytest.TempPathFactory, name: str, seed: int) -> Path:
    path = factory.mktemp(name) / name
    build(seed).save_pretrained(path)
    zoo_tokenizer.load().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def weak(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint. Not to be written to."""
    return _folder(tmp_path_factory, "weak", 0)


@pytest.fixture(scope="session")
def strong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with other weights. Not to be written to."""
    return _folder(tmp_path_factory, "strong", 1)


def _text(number: int, words: int) -> str:
    return " ".join(WORDS[(number * 7 + k * (1 + number % 5)) % len(WORDS)] for k in range(words))


def some_records(count: int) -> list[dict[str, Any]]:
    """Alpaca records of 2 to 20 words; the keys are not in the usual order, and `topic` is nobody's business."""
    return [
        {"output": _text(n + 3, 3 + n % 17), "topic": "ab"[n % 2], "instruction": _text(n, 2 + n % 5) + f" {n}",
         "input": _text(n + 1, 3) if n % 3 == 0 else ""}
        for n in range(count)
    ]  # fmt: skip


def some_talks(count: int, key: str = "conversations") -> list[dict[str, Any]]:
    """Conversations of one to three answers, as sharegpt or messages have them."""
    names = {"conversations": ("from", "value", "human", "gpt"), "messages": ("role", "content", "user", "assistant")}
    role, text, user, assistant = names[key]
    return [
        {"id": f"talk-{n}", key: [
            {role: who, text: _text(n + 5 * turn, 2 + (n + turn) % 6)}
            for turn in range(1 + n % 3) for who in (user, assistant)
        ]}
        for n in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="session")
def alpaca() -> Callable[[int], list[dict[str, Any]]]:
    return some_records


@pytest.fixture(scope="session")
def talks() -> Callable[..., list[dict[str, Any]]]:
    return some_talks


@pytest.fixture(scope="session")
def model_of() -> Callable[..., GPT2LMHeadModel]:
    return build


def write_lines(path: str | Path, records: Sequence[Any]) -> str:
    Path(path).write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="session")
def lines() -> Callable[[str | Path, Sequence[Any]], str]:
    """Writes records as JSON lines and gives the path as text."""
    return write_lines


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path
