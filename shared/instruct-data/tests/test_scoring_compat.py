"""Scores against the published procedure, one record at a time, at every border."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import scoring_reference as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from instruct_data.scoring import Pair, score
from model_hooks import RequestError

DATA = Path(__file__).parents[4] / "shared" / "data"
LIMIT = 24
BORDERS = [
    ("plain prompt\n", "plain answer with some words"),
    ("say it\n", "\nstarts with a newline"),
    ("say it\n", "  starts with spaces, which this tokenizer merges with the newline"),
    ("say it\n", " "),
    ("say it\n", "\n"),
    ("say it\n", "   \n \n"),
    ("repeat: word\n", "word"),
    ("yes yes yes\nyes\n", "yes"),
    ("x\n", "xx\nx\n"),
    ("", "no prompt at all"),
    ("", "a"),
    ("empty\n", ""),
    ("", ""),
    ("\n", "only a newline before"),
    ("emoji\n", "🙂🙃 " * 12),
    ("漢字\n", "これは日本語の文章です。" * 5),
    ("special <|endoftext|> inside\n", "text <|endoftext|> more"),
    ("nul \x00\n", "\x00\x00 nul"),
]
LENGTHS = [("x" + " a" * (before - 1), " a" * after) for before in (1, 2, LIMIT - 2, LIMIT - 1, LIMIT, LIMIT + 1, 70)
           for after in (1, 2, 3, LIMIT - 1, LIMIT, LIMIT + 1, 5 * LIMIT)]  # fmt: skip


def rows_of(pairs: list[tuple[str, str]], model: Any, tokenizer: Any, compat: str, limit: int) -> list[dict[str, Any]]:
    given = [Pair(str(i), *pair) for i, pair in enumerate(pairs)]
    return list(score(model, tokenizer, given, compat=compat, max_length=limit, budget=256))  # type: ignore[arg-type]


def check(row: dict[str, Any], expected: reference.Expected, tolerance: float = 1e-5) -> None:
    """Sums agree per token, and what has no token is None and never 0."""
    assert (row["n_cond"], row["n_direct"]) == (expected.n_cond, expected.n_direct)
    for name, total, count in (
        ("cond", expected.cond, expected.n_cond),
        ("direct", expected.direct, expected.n_direct),
    ):
        found = row[f"loss_{name}_sum"]
        assert (found is None) == (count == 0)
        if count:
            assert abs(found - total) / count <= tolerance
    if expected.n_cond and expected.n_direct:
        cond, direct = expected.cond / expected.n_cond, expected.direct / expected.n_direct
        assert row["ifd_ppl"] == pytest.approx(math.exp(cond - direct), rel=1e-4)
        assert row["ifd_loss"] == pytest.approx(cond / direct, rel=1e-4)
        assert row["status"] == "ok"
    else:
        assert row["ifd_ppl"] is None
        assert row["ifd_loss"] is None
        assert row["status"] != "ok"


@pytest.mark.parametrize("compat", ["original", "aligned"])
@pytest.mark.parametrize("kind", ["plain", "bos", "closed"])
def test_every_border_case_equals_the_reference(kind: str, compat: str) -> None:
    model = reference.model("GPT2LMHeadModel" if kind == "plain" else "LlamaForCausalLM")
    tokenizer, cases = reference.tokenizer(kind), BORDERS + LENGTHS
    rows = rows_of(cases, model, tokenizer, compat, LIMIT)
    for (prompt, response), row in zip(cases, rows, strict=True):
        check(row, reference.REFERENCES[compat](model, tokenizer, prompt, response, LIMIT))


def test_statuses_say_why_there_is_no_score() -> None:
    too_long = "x" + " a" * (LIMIT - 1)
    cases = {
        "ok": ("x\n", " a a"),
        "empty_response": ("x\n", ""),
        "one_token": ("x\n", "a"),
        "prompt_too_long": (too_long, " a a"),
        "no_target": ("x\n", " " * 12),  # one token together with the newline, two on its own
        "failed": ("x\n", "a lone surrogate \ud800"),
    }
    rows = rows_of(list(cases.values()), reference.model(), reference.tokenizer(), "original", LIMIT)
    assert [row["status"] for row in rows] == list(cases)
    assert [row["ifd_ppl"] is None for row in rows] == [False, True, True, True, True, True]
    assert rows[2]["loss_cond_sum"] > 0  # a single token has a loss after its prompt, and none alone
    statuses = [
        r["status"] for r in rows_of(list(cases.values()), reference.model(), reference.tokenizer(), "aligned", LIMIT)
    ]
    assert statuses == ["ok", "empty_response", "ok", "prompt_too_long", "ok", "failed"]


def test_truncation_is_told() -> None:
    pairs = [("x" + " a" * 4, " a" * n) for n in (LIMIT - 5, LIMIT - 4)]
    rows = rows_of(pairs, reference.model(), reference.tokenizer(), "original", LIMIT)
    assert [row["truncated"] for row in rows] == [False, True]


def test_gpt2_sees_one_token_more_of_a_truncated_response_alone() -> None:
    """The published off-by-one: the direct text keeps room for a BOS that GPT-2 does not add."""
    row = rows_of([("x a a a", " a" * 60)], reference.model(), reference.tokenizer(), "original", LIMIT)[0]
    assert (row["n_cond"], row["n_direct"]) == (LIMIT - 4, LIMIT - 4)
    short = rows_of([("x a a a", " a" * 6)], reference.model(), reference.tokenizer(), "original", LIMIT)[0]
    assert (short["n_cond"], short["n_direct"]) == (6, 5)


text = st.text(st.sampled_from(" \n\tab<é漢🙂.") | st.characters(exclude_categories=["Cs"]), max_size=30)


@pytest.mark.parametrize("compat", ["original", "aligned"])
@settings(max_examples=25)
@given(pairs=st.lists(st.tuples(text, text), min_size=1, max_size=6), limit=st.integers(2, 40))
def test_random_texts_equal_the_reference(compat: str, pairs: list[tuple[str, str]], limit: int) -> None:
    model, tokenizer = reference.model(), reference.tokenizer()
    for (prompt, response), row in zip(pairs, rows_of(pairs, model, tokenizer, compat, limit), strict=True):
        check(row, reference.REFERENCES[compat](model, tokenizer, prompt, response, limit))


@settings(max_examples=20)
@given(pairs=st.lists(st.tuples(text, text), min_size=1, max_size=6))
def test_aligned_averages_the_same_tokens_on_both_sides(pairs: list[tuple[str, str]]) -> None:
    rows = rows_of(pairs, reference.model(), reference.tokenizer(), "aligned", 40)
    assert all(row["n_cond"] == row["n_direct"] for row in rows)


@pytest.mark.slow
def test_the_real_gpt2_tokenizer_on_real_records() -> None:
    if not (DATA / "gpt2_vocab.json").is_file() or not (DATA / "alpaca_cherry_5pct.json").is_file():
        pytest.skip("shared/data beside the workspace has the GPT-2 tokenizer and Cherry-Alpaca; it is not here")
    from transformers import GPT2Tokenizer

    tokenizer = GPT2Tokenizer(vocab=str(DATA / "gpt2_vocab.json"), merges=str(DATA / "gpt2_merges.txt"))
    model = reference.model(vocab_size=50257, max_position_embeddings=256)
    records = json.loads((DATA / "alpaca_cherry_5pct.json").read_text())[:40]
    pairs = [(f"{r['instruction']}\n" + (f"{r['input']}\n" if r["input"] else ""), r["output"]) for r in records]
    for pair, row in zip(pairs, rows_of(pairs, model, tokenizer, "original", 256), strict=True):
        check(row, reference.original(model, tokenizer, *pair, 256))


def test_wrong_requests_are_named() -> None:
    model, tokenizer, pairs = reference.model(), reference.tokenizer(), [Pair("r7", "a\n", "b c")]
    with pytest.raises(RequestError, match=r"compat 'both'.*original, aligned"):
        score(model, tokenizer, pairs, compat="both")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="max_length 1 leaves nothing"):
        score(model, tokenizer, pairs, max_length=1)
    with pytest.raises(RequestError, match=r"token \d+ for r7, the model has 40 embeddings"):
        score(reference.model(vocab_size=40), tokenizer, pairs, max_length=64)
    with pytest.raises(RequestError, match="budget 0"):
        score(model, tokenizer, pairs, budget=0)
    with pytest.warns(UserWarning, match="lowered to 128, the model's context"):
        assert score(model, tokenizer, pairs, max_length=1024).facts["settings"]["max_length"] == 128
