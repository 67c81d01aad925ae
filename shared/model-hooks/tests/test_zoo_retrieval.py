"""zoo:recall finds values by their keys; its questions, training rows and starting weights are what they say."""

from __future__ import annotations

import itertools
import json
import random
import re
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from model_hooks import zoo
from model_hooks.zoo import evaluate, export, synthetic, tasks, tokenizer
from model_hooks.zoo.recipes import RECIPES
from model_hooks.zoo.starts import STARTS
from model_hooks.zoo.stream import ANSWER_WEIGHT, NEEDLES, Stream
from model_hooks.zoo.train import build, loss_of

PAIR = re.compile(r"\n  ([a-z]+):( [a-z]+)")
SAMPLE = 12  # lookups of a length


@cache
def bpe() -> Any:
    return tokenizer.load()


def encode(text: str) -> list[int]:
    ids: list[int] = bpe().backend_tokenizer.encode(text, add_special_tokens=False).ids
    return ids


@cache
def recall() -> Any:
    return AutoModelForCausalLM.from_pretrained(zoo.resolve("zoo:recall"), dtype=torch.float32).eval()


def stated(key: str) -> float:
    value: float = json.loads((zoo.resolve("zoo:recall") / "measurements.json").read_text())[key]
    return value


def test_every_key_and_value_is_one_token_where_it_stands() -> None:
    keys, values = synthetic.words()
    assert len(keys) > 900
    assert len(values) > 200
    for key, value in zip(keys, itertools.cycle(values), strict=False):
        pieces = [bpe().decode([i]) for i in encode(f"def\n  {key}: {value}\n  {key}:")]
        assert pieces == ["def", "\n  ", key, ":", f" {value}", "\n  ", key, ":"]


@given(tokens=st.integers(19, 3823), seed=st.integers(0, 999))
def test_a_lookup_has_its_length_and_its_answer_stands_at_its_depth(tokens: int, seed: int) -> None:
    (question,) = zoo.lookups(tokens, 1, seed)
    assert tokens - 4 < len(encode(question.prompt)) <= tokens
    assert len(encode(question.answer)) == 1
    found = PAIR.findall(question.prompt)
    asked = question.prompt.rsplit("\n  ", 1)[1].removesuffix(":")
    assert len({key for key, _ in found}) == len(found)
    at = [i for i, (key, value) in enumerate(found) if (key, value) == (asked, question.answer)]
    assert at == [round(question.depth * (len(found) - 1))]
    assert set(question.others) == {value for _, value in found} - {question.answer}
    assert zoo.lookups(tokens, 1, seed) == (question,)


def test_lookups_ask_at_all_depths_alike_and_differ_by_seed() -> None:
    depths = np.sort([question.depth for question in zoo.lookups(512, 400, seed=1)])
    assert np.abs(depths - np.linspace(0, 1, 400)).max() < 1.63 / 400**0.5  # Kolmogorov-Smirnov, 1 %
    assert zoo.lookups(512, 2, seed=1) != zoo.lookups(512, 2, seed=2)


@given(tokens=st.integers(23, 4096), depth=st.floats(0, 1), seed=st.integers(0, 99))
def test_a_needle_is_heldout_text_and_one_line(tokens: int, depth: float, seed: int) -> None:
    question = zoo.needle(tokens, depth, seed)
    hay, asked = question.prompt[: question.prompt.rindex("\n  ")], question.prompt[question.prompt.rindex("\n  ") :]
    line = asked + question.answer
    assert abs(len(encode(question.prompt)) - tokens) <= 4
    assert len(encode(question.answer)) == 1
    places = [m.start() for m in re.finditer(re.escape(line), hay)]
    texts = [hay[:at] + hay[at + len(line) :] for at in places]
    whole = [i for i, text in enumerate(texts) if any(text in document for _, document in zoo.text("heldout"))]
    assert any(places[i] / len(texts[i]) == pytest.approx(question.depth) for i in whole)
    assert zoo.needle(tokens, depth, seed) == question


def test_a_needle_lies_near_the_depth_asked_for() -> None:
    assert [round(zoo.needle(1024, d, 5).depth, 1) for d in (0.0, 0.2, 0.5, 0.8, 1.0)] == [0.0, 0.2, 0.5, 0.8, 1.0]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: zoo.lookups(18, 1), "a lookup of 18 tokens: give 19 to 3823 tokens"),
        (lambda: zoo.lookups(3827, 1), "a lookup of 3827 tokens: give 19 to 3823 tokens"),
        (lambda: zoo.needle(1024, 1.5), "a needle at depth 1.5: give 0 .* to 1"),
        (lambda: zoo.needle(22, 0.5), "a needle in 22 tokens: give 23 to "),
        (lambda: zoo.needle(10**6, 0.5), "a needle in 1000000 tokens: give 23 to "),
    ],
)
def test_what_cannot_be_asked_is_one_clear_line(ask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ask()
    assert "\n" not in str(caught.value)


@given(lines=st.integers(1, 300), seed=st.integers(0, 999))
def test_a_table_asks_only_for_what_it_said(lines: int, seed: int) -> None:
    table = synthetic.table(random.Random(seed), lines)
    known: dict[str, str] = {}
    for line in table:
        assert line.asked == (line.prompt in known)
        assert known.setdefault(line.prompt, line.answer) == line.answer
    assert len(table) == lines
    assert 0.15 * lines < len(known) < 0.85 * lines + 1


def stream(**shares: float) -> Stream:
    documents = [list(range(16, 1500 + i)) for i in range(20)]
    return Stream(documents, encode, 0, 0.0, 3, window=2048, **shares)  # type: ignore[arg-type]


@given(length=st.sampled_from([64, 256, 1024]), seed=st.integers(0, 999))
def test_only_the_answers_of_a_lookup_row_count(length: int, seed: int) -> None:
    tokens, weights = stream().lookup_row(random.Random(seed), length)
    assert len(tokens) == len(weights) == length
    said: dict[str, str] = {}
    expected = []
    text = bpe().decode(tokens.tolist()).removeprefix("<|endoftext|>")
    for key, value in PAIR.findall(text):
        expected.append(ANSWER_WEIGHT if key in said else 0.0)
        assert said.setdefault(key, value) == value
    counts = weights[np.isin(tokens, [encode(f" {value}")[0] for value in synthetic.words()[1]])]
    assert counts.tolist() == expected
    assert weights.sum() == sum(expected) > 0


@given(length=st.sampled_from([64, 256, 2048]), seed=st.integers(0, 999))
def test_a_needle_row_asks_for_every_line_hidden_in_its_text(length: int, seed: int) -> None:
    text = np.arange(length, dtype=np.uint16) % 7 + 16  # punctuation: no token of a pair
    tokens, weights = stream().needle_row(random.Random(seed), text)
    found = PAIR.findall(bpe().decode(tokens.tolist()))
    count = len(found) // 2
    assert len(tokens) == len(weights) == length
    assert 1 <= count <= NEEDLES
    assert sorted(found[:count]) == sorted(found[count:])
    assert tokens[weights == 1.0].tolist() == text[: length - 8 * count].tolist()
    answers = np.flatnonzero(weights == ANSWER_WEIGHT)
    assert answers.tolist() == list(range(length - 4 * count + 3, length, 4))
    assert set(weights.tolist()) <= {0.0, 1.0, ANSWER_WEIGHT}


def test_a_stream_mixes_by_its_shares_and_resumes_with_its_weights() -> None:
    whole, part = stream(lookup_share=0.3, needle_share=0.3), stream(lookup_share=0.3, needle_share=0.3)
    rows = whole.weighted_batch(60, 256)
    assert rows.tokens.shape == rows.weights.shape == (480, 256)
    kinds = [
        "text" if (w == 1).all() else "needle" if (w == 1).any() else "lookup" for w in rows.weights.reshape(60, 2048)
    ]
    assert min(kinds.count(kind) for kind in ("text", "needle", "lookup")) >= 8
    part.cursor = 60
    assert all((a == b).all() for a, b in zip(part.weighted_batch(3, 512), whole.weighted_batch(3, 512), strict=True))


class Fixed(nn.Module):
    """Logits of the row's own tokens, so that a loss has values to differ by."""

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        logits = torch.randn(*input_ids.shape, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return type("Output", (), {"logits": logits})


def test_a_loss_counts_tokens_by_their_weights() -> None:
    rows = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    weights = torch.randint(0, 5, (2, 9), generator=torch.Generator().manual_seed(2)).float()
    logits = Fixed()(rows, False).logits
    total = count = 0.0
    for row, place in itertools.product(range(2), range(1, 9)):
        total -= weights[row, place].item() * logits[row, place - 1].log_softmax(0)[rows[row, place]].item()
        count += weights[row, place].item()
    assert loss_of(Fixed(), rows, weights).item() == pytest.approx(total / count, rel=1e-5)
    assert loss_of(Fixed(), rows).item() == pytest.approx(loss_of(Fixed(), rows, torch.ones(2, 9)).item(), rel=1e-6)
    assert loss_of(Fixed(), rows, torch.zeros(2, 9)).item() == 0.0


def test_every_recipe_names_a_start() -> None:
    assert {recipe.start for recipe in RECIPES.values()} <= set(STARTS)


@pytest.mark.parametrize(("name", "finder"), [("recall", 0), ("gpt2", 1)])
@torch.inference_mode()
def test_the_induction_start_looks_back_and_finds_the_value(name: str, finder: int) -> None:
    model: Any = build(RECIPES[name]).eval()
    model.set_attn_implementation("eager")
    (question,) = zoo.lookups(128, 1, seed=4)
    ids = torch.tensor([encode(question.prompt)])
    first, second = model(input_ids=ids, output_attentions=True, use_cache=False).attentions[:2]
    for head, distance in ((0, 1), (1, 2)):
        back = [first[0, head].diagonal(-d).mean().item() for d in range(6)]
        assert back.index(max(back)) == distance
    place = 4 * round(question.depth * 30) + 3  # of the asked value
    assert second[0, finder, -1].argmax().item() == place


def test_the_zero_start_leaves_the_residual_stream_alone() -> None:
    assert RECIPES["llama"].start == "zero"
    model: Any = build(RECIPES["llama"])
    ids = torch.tensor([[5, 6, 7]])
    states = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert torch.equal(states[0], states[-2])


def test_the_checkpoint_takes_its_whole_context() -> None:
    config, loaded = recall().config, AutoTokenizer.from_pretrained(zoo.resolve("zoo:recall"))
    assert config.max_position_embeddings == loaded.model_max_length == RECIPES["recall"].context == 2048
    assert config.head_dim == 64
    assert config.num_attention_heads == 2 * config.num_key_value_heads


@pytest.mark.parametrize("tokens", [256, 512, 1024])
def test_recall_answers_lookups_and_only_from_the_table(tokens: int) -> None:
    questions = zoo.lookups(tokens, SAMPLE, seed=11)
    said = [(q.prompt.rsplit("\n  ", 1)[1], q) for q in questions]
    without = [zoo.Lookup(q.prompt.replace(f"\n  {key}{q.answer}", "", 1), q.answer, q.depth) for key, q in said]
    assert evaluate.exact_match(recall(), bpe(), questions) >= 10 / SAMPLE
    assert evaluate.exact_match(recall(), bpe(), without) <= 2 / SAMPLE


def test_the_card_of_recall_states_what_is_measured() -> None:
    card = (zoo.resolve("zoo:recall") / "README.md").read_text()
    assert f"| held-out bits per byte (lower is better) | {stated('heldout_bits_per_byte'):.3f} |" in card
    for task in tasks.TASKS:
        assert f"| {task} accuracy | {stated(task):.3f} | 0.25 (chance) |" in card
    for kind, length in itertools.product(("lookup", "needle"), export.LENGTHS):
        assert f"| {kind} exact match at {length:,} tokens | {stated(f'{kind}_{length}'):.2f} |" in card
    assert stated("heldout_bits_per_byte") < 0.7 * stated("unigram_bits_per_byte")
    assert min(stated(f"lookup_{length}") for length in (256, 512, 1024)) > 0.9
    assert stated("zoo_lookup") > 0.9


@pytest.mark.slow
def test_recall_answers_the_task_as_the_card_says() -> None:
    found = evaluate.accuracy(recall(), bpe(), zoo.questions("zoo_lookup")[:40])
    assert found == pytest.approx(stated("zoo_lookup"), abs=0.06)
