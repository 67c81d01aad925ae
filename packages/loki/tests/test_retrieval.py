"""Questions are what they say, and answers are taken from decoding, each row as if it were alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import lokimodels
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loki import calibrate, session
from loki.quality import decoding_perplexity, recall
from loki.retrieval import Question, hits, key_values, lookups, needle, needles
from torch.nn.functional import cross_entropy

from model_hooks import RequestError, zoo
from model_hooks.loading import load_tokenizer


@cache
def zoo_tokenizer() -> Any:
    return load_tokenizer("zoo:llama")


@pytest.fixture
def tokenizer() -> Any:
    return zoo_tokenizer()


def count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text)["input_ids"])


@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(200, 900), depth=st.floats(0, 1), seed=st.integers(0, 9))
def test_a_needle_lies_where_it_should_and_fills_the_context(tokens: int, depth: float, seed: int) -> None:
    tokenizer = zoo_tokenizer()
    text = "one two three four five six seven eight nine ten\n" * 200
    found = needle(tokenizer, text, tokens, depth, seed)
    sentence = f"{found.query.strip()}{found.answer}."
    assert found.context.count(sentence) == 1
    before = found.context.index(sentence) / len(found.context)
    assert abs(before - depth) < 0.25  # tokens and characters are not evenly matched, and the needle has a length
    assert abs(count(tokenizer, found.context + found.query) - tokens) <= 8


def test_a_text_too_short_for_the_haystack_is_refused(tokenizer: Any) -> None:
    with pytest.raises(RequestError, match="give a longer one"):
        needle(tokenizer, "short", 500, 0.5)


def test_needles_spread_over_the_depth(tokenizer: Any) -> None:
    assert [q.depth for q in needles(tokenizer, "zoo:heldout", 300, 5)] == [0, 0.25, 0.5, 0.75, 1]


@pytest.mark.parametrize("tokens", [200, 1000])
def test_a_table_holds_what_is_asked_once(tokenizer: Any, tokens: int) -> None:
    found = key_values(tokenizer, tokens, seed=3)
    assert found.context.count(f"{found.query}{found.answer}") == 1
    assert abs(count(tokenizer, found.context + found.query) - tokens) < 0.15 * tokens
    assert found != key_values(tokenizer, tokens, seed=4)
    assert found == key_values(tokenizer, tokens, seed=3)


def test_lookups_are_those_of_the_zoo(tokenizer: Any) -> None:
    for found, zoos in zip(lookups(200, 6, seed=2), zoo.lookups(200, 6, seed=2), strict=True):
        assert found.context + found.query == zoos.prompt
        assert found.answer == zoos.answer
        assert found.context.count(found.query + found.answer) == 1
        assert len(tokenizer(found.query)["input_ids"]) == 3  # line break, key, colon
    with pytest.raises(RequestError, match="give 19 to"):
        lookups(8, 1)


class Letters:
    """A tokenizer of one token a character, for models of 97 tokens."""

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(c) % 90 for c in text]}


def alone(model: Any, question: Question) -> bool:
    """The plain way: the context at once, then token by token, each guess compared."""
    context, query, answer = (
        Letters()(part)["input_ids"] for part in (question.context, question.query, question.answer)
    )
    out = model(input_ids=torch.tensor([context]), use_cache=True)
    for token in query:
        out = model(input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
    for token in answer:
        if int(out.logits[0, -1].argmax()) != token:
            return False
        out = model(input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
    return True


@torch.no_grad()
def questions_with_some_hits(model: Any) -> list[Question]:
    """Random contexts; every other answer is what the model itself says after the query."""
    made = []
    for i in range(8):
        context = "".join(chr(65 + int(t)) for t in lokimodels.tokens(1, 12 + 5 * i, seed=i)[0] % 26)
        query = "qrs"[: 1 + i % 3]
        ids = torch.tensor([Letters()(context + query)["input_ids"]])
        said = model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)[0, -2:]
        letters = {Letters()(chr(c))["input_ids"][0]: chr(c) for c in range(33, 123)}
        if i % 2 or not all(int(t) in letters for t in said):
            made.append(Question(context, query, "zz", 0.0))
        else:
            made.append(Question(context, query, "".join(letters[int(t)] for t in said), 0.0))
    return made


@pytest.mark.parametrize("method", ["full", "loki", "topk", "snapkv"])
def test_hits_of_a_padded_batch_are_those_of_each_question_alone(method: str) -> None:
    model = lokimodels.build()
    asked = questions_with_some_hits(model)
    basis = lokimodels.basis_of("Llama")
    with session(model, basis, method=method, k=0.5, d=0.5, sink=0, recent=0, min_k=0, min_length=0), torch.no_grad():
        together = hits(model, Letters(), asked, batch_size=8)
        assert together == [alone(model, q) for q in asked]
        assert together == hits(model, Letters(), asked, batch_size=3)
    if method == "full":
        assert any(together)
        assert not all(together)
        figure = recall(model, Letters(), asked)
        assert figure["value"] == 100 * sum(together) / 8


def test_the_perplexity_of_decoding_is_that_of_the_formula() -> None:
    model, ids = lokimodels.build(), lokimodels.tokens(5, 24)
    found = decoding_perplexity(model, ids, prompt=10, batch_size=2)
    with torch.no_grad():
        logits = model(input_ids=ids).logits.double()
    losses = cross_entropy(logits[:, 10:-1].flatten(0, 1), ids[:, 11:].flatten(), reduction="none").view(5, -1).mean(1)
    assert found["value"] == pytest.approx(float(losses.mean().exp()), rel=1e-5)
    assert found["se"] == pytest.approx(float(losses.mean().exp() * losses.std() / 5**0.5), rel=1e-4)
    with pytest.raises(RequestError, match="at least 2 tokens"):
        decoding_perplexity(model, ids, prompt=23)


def test_a_method_changes_the_perplexity_of_decoding_but_not_at_its_full_budget() -> None:
    model, ids = lokimodels.build(), lokimodels.tokens(3, 40)
    basis = calibrate(model, lokimodels.tokens(24, 32, seed=5))
    plain = decoding_perplexity(model, ids, prompt=20)["value"]
    exact = {"sink": 0, "recent": 0, "min_k": 0, "min_length": 0}
    with session(model, basis, k=1.0, **exact):
        assert decoding_perplexity(model, ids, prompt=20)["value"] == pytest.approx(plain, rel=1e-4)
    with session(model, basis, k=0.1, **exact):
        assert decoding_perplexity(model, ids, prompt=20)["value"] != pytest.approx(plain, rel=1e-3)
