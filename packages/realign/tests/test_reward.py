"""Candidates chosen by a reward model: a small random one, read from a folder."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch
from commands import Command
from llm_server import Server, answer
from realign.cli import app
from realign.reward import Reward
from rewriters import revised
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from instruct_data import read
from model_hooks.loading import load_tokenizer

COMMAND = Command(app)
TEXTS = ["It is 0, briefly.", "It is 0, and it says so at some length.", "It is 0, since nothing was added to it."]
CODE = "It is 0 ```code``` " * 9
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def saved(folder: Path, kind: type = LlamaForSequenceClassification, labels: int = 1, template: str = "") -> str:
    tokenizer = load_tokenizer("zoo:llama")
    tokenizer.chat_template = template or None
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, num_labels=labels,
    )  # fmt: skip
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def rated(source: str, read_as: list[str]) -> list[float]:
    """What the model says of these token sequences, one at a time."""
    tokenizer, model = load_tokenizer(source), LlamaForSequenceClassification.from_pretrained(source).eval()
    with torch.no_grad():
        return [float(model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=64)).logits)
                for text in read_as]  # fmt: skip


@pytest.mark.parametrize("template", ["", TEMPLATE])
def test_each_answer_is_rated_after_its_question(tmp_path: Path, template: str) -> None:
    source = saved(tmp_path / "reward", template=template)
    messages = [{"role": "user", "content": "What is 0?"}]
    found = asyncio.run(Reward.load(source)(messages, TEXTS))
    before = "<user>What is 0?<assistant>" if template else "What is 0?"
    assert found == pytest.approx(rated(source, [before + text for text in TEXTS]), abs=1e-6)
    assert len(set(found)) == len(TEXTS)


def test_what_is_too_long_is_cut(tmp_path: Path) -> None:
    reward = Reward.load(saved(tmp_path / "reward"))
    long = " ".join(["word"] * 500)
    (whole,) = asyncio.run(reward([{"role": "user", "content": "What?"}], [long]))
    (more,) = asyncio.run(reward([{"role": "user", "content": "What?"}], [long + " and more"]))
    assert whole == more


def test_of_what_passes_the_filters_the_best_rated_is_kept(server: Server, tmp_path: Path) -> None:
    source = saved(tmp_path / "reward")
    texts = [*TEXTS, CODE]
    server.script = lambda found: answer(revised(texts[found.times - 1]))
    row = {"id": 0, "instruction": "What is 0?", "output": "It is 0.", "category": "closed_qa"}
    Path("in.jsonl").write_text(json.dumps(row) + "\n")
    COMMAND.said(
        "run", "in.jsonl", "--base-url", server.url, "--structured", "labels", "-n", 4, "--concurrency", 1,
        "--filters", "alpaca", "--select", f"reward:{source}", "-o", "out.jsonl",
    )  # fmt: skip
    (kept,) = [record.data for record in read("out.jsonl")]
    scores = rated(source, ["What is 0?" + text for text in TEXTS])  # code is refused by the filters, however rated
    assert kept["output"] == TEXTS[scores.index(max(scores))]
    manifest = json.loads(Path("out.jsonl.manifest.json").read_text())
    assert manifest["recipe"]["select"] == "reward:reward"  # no path of this machine


def test_what_is_no_reward_model_is_refused_before_anything_is_sent(server: Server, tmp_path: Path) -> None:
    Path("in.jsonl").write_text(json.dumps({"instruction": "What is 0?", "output": "It is 0."}) + "\n")
    arguments = ("run", "in.jsonl", "--base-url", server.url, "-o", "out.jsonl", "--select")
    causal = saved(tmp_path / "causal", LlamaForCausalLM)
    COMMAND.refused("its weights lack score.weight", *arguments, f"reward:{causal}")
    COMMAND.refused("has 2 outputs; a reward model has one", *arguments, f"reward:{saved(tmp_path / 'two', labels=2)}")
    COMMAND.refused("no folder ./none", *arguments, "reward:./none")
    COMMAND.refused("select 'reward:'; choose", *arguments, "reward:")
    assert not server.calls
    assert not Path("out.jsonl").exists()
