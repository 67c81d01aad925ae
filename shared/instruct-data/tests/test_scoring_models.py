"""Architectures, precisions and misbehaving models: what is computed otherwise is either proven equal or not used."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import scoring_reference as reference
import torch

from instruct_data.scoring import Pair, score
from instruct_data.scoring.losses import SAMPLES, Losses
from instruct_data.scoring.segments import Segment
from model_hooks import RequestError


def some_pairs(count: int) -> list[Pair]:
    """Pairs with responses, the first of them twice."""
    pairs = [pair for pair in reference.some_pairs(2 * count) if pair.response][: count - 1]
    return [*pairs, pairs[0]._replace(key="twin")]


def deviation(rows: list[dict[str, Any]], pairs: list[Pair], model: Any, compat: str = "original") -> float:
    """Largest difference of a mean loss from the reference; counts must agree."""
    worst = 0.0
    for row, pair in zip(rows, pairs, strict=True):
        expected = reference.REFERENCES[compat](model, reference.tokenizer(), pair.prompt, pair.response, 128)
        assert (row["n_cond"], row["n_direct"]) == (expected.n_cond, expected.n_direct)
        if expected.n_direct:
            worst = max(worst, abs(row["loss_cond_sum"] - expected.cond) / expected.n_cond)
            worst = max(worst, abs(row["loss_direct_sum"] - expected.direct) / expected.n_direct)
    return worst


@pytest.mark.parametrize("name", reference.MODELS)
def test_every_architecture_equals_its_own_forward(name: str) -> None:
    """Soft-cap, logit scale, head bias, windows, experts, recurrence: all without a list of classes."""
    model, pairs = reference.model(name), some_pairs(12)
    scores = score(model, reference.tokenizer(), pairs, max_length=128, budget=512)
    assert deviation(list(scores), pairs, model) <= 1e-5
    assert scores.facts["how"] == "losses of target positions without logits, padded batches"
    assert scores.facts["duplicates"] >= 2


class Leaky(torch.nn.Module):
    """A causal model made wrong around its forward; `leak` is what it adds to the logits it is given."""

    def __init__(self, leak: Any) -> None:
        super().__init__()
        inner = copy.deepcopy(reference.model())
        self.inner, self.leak, self.config, self.dtype = inner, leak, inner.config, inner.dtype
        self.device = inner.device
        self.base_model = inner.base_model
        self.get_output_embeddings = inner.get_output_embeddings
        self.get_input_embeddings = inner.get_input_embeddings

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        logits = self.inner(input_ids=input_ids, **kwargs).logits
        return SimpleNamespace(logits=logits + self.leak(input_ids, logits))


@pytest.mark.parametrize(
    ("leak", "how"),
    [
        # looks at the ids, which the gathered hidden states do not carry
        (
            lambda ids, logits: 0.5 * ids[..., None].float().cos() * logits.cos(),
            "logits of all positions, padded batches",
        ),
        # sees the padding
        (lambda ids, logits: logits.mean(1, keepdim=True).cos(), "logits of all positions, batches of equal length"),
        # sees the other rows, as experts with a capacity do
        (lambda ids, logits: ids.float().mean().cos() * logits.cos(), "logits of all positions, one by one"),
    ],
)
def test_a_model_that_looks_elsewhere_is_forwarded_in_a_way_that_is_right(leak: Any, how: str) -> None:
    model, pairs = Leaky(leak), some_pairs(12)
    scores = score(model, reference.tokenizer(), pairs, max_length=128, budget=512)
    assert scores.facts["how"] == how
    assert deviation(list(scores), pairs, model) <= 1e-5


def test_a_head_that_is_more_than_its_matrix_is_not_taken_for_it() -> None:
    """Something added to the logits is seen by the self-test; a layer of another class or with a hook is not tried."""
    pairs = some_pairs(8)

    class Shifted(type(reference.model())):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            found = super().forward(*args, **kwargs)
            found.logits = found.logits + found.logits.sin()
            return found

    class Halved(torch.nn.Linear):
        def forward(self, given: torch.Tensor) -> torch.Tensor:
            return super().forward(given) / 2

    shifted, halved, hooked = (copy.deepcopy(reference.model()) for _ in range(3))
    shifted.__class__, halved.lm_head.__class__ = Shifted, Halved
    hooked.lm_head.register_forward_hook(lambda layer, given, found: -found)
    for model in (shifted, halved, hooked):
        scores = score(model, reference.tokenizer(), pairs, max_length=128)
        assert scores.facts["how"] == "logits of target positions only, padded batches"
        assert deviation(list(scores), pairs, model) <= 1e-5


def test_a_forward_built_otherwise_falls_back_to_all_positions() -> None:
    model = copy.deepcopy(reference.model())
    plain = model.base_model.forward
    model.base_model.forward = lambda *args, **kwargs: tuple(plain(*args, **kwargs, return_dict=False))
    model.lm_head.register_forward_hook(lambda *_: None)  # more than a matrix
    model.forward = lambda input_ids, **kwargs: SimpleNamespace(
        logits=model.lm_head(model.base_model(input_ids=input_ids, **kwargs)[0])
    )
    losses = Losses(model)
    pairs = some_pairs(8)
    scores = score(model, reference.tokenizer(), pairs, max_length=128)
    assert scores.facts["how"].startswith("logits of all positions")
    assert deviation(list(scores), pairs, reference.model()) <= 1e-5
    assert losses.model is model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_near(dtype: torch.dtype) -> None:
    pairs = some_pairs(60)
    exact = reference.model(seed=3)
    model = copy.deepcopy(exact).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = score(model, reference.tokenizer(), pairs, max_length=128)
        rows, precise = list(scores), list(score(exact, reference.tokenizer(), pairs, max_length=128))
    assert scores.facts["settings"]["dtype"] == str(dtype).removeprefix("torch.")
    assert "padded batches" in scores.facts["how"]
    for row, other in zip(rows, precise):
        assert row["status"] == other["status"]
        if row["ifd_ppl"] is not None:
            assert abs(row["loss_cond_sum"] / row["n_cond"] - other["loss_cond_sum"] / other["n_cond"]) <= 2e-2
    best = [{r["key"] for r in sorted(given, key=lambda r: -(r["ifd_ppl"] or 0))[:6]} for given in (rows, precise)]
    assert len(best[0] & best[1]) >= 5


def test_the_model_is_left_as_it_was_and_dropout_is_off() -> None:
    model = copy.deepcopy(reference.model()).train()
    pairs = some_pairs(6)
    assert deviation(list(score(model, reference.tokenizer(), pairs, max_length=128)), pairs, reference.model()) <= 1e-5
    assert model.training
    assert "forward" not in model.base_model.__dict__


def test_numbers_that_overflow_fail_and_are_never_a_score() -> None:
    model = copy.deepcopy(reference.model())
    with torch.no_grad():
        model.lm_head.weight[5:] = float("inf")
    rows = list(score(model, reference.tokenizer(), some_pairs(5), max_length=128))
    assert {row["status"] for row in rows} <= {"failed", "one_token"}
    assert all(row["ifd_ppl"] is None and row["ifd_loss"] is None for row in rows)


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(RequestError, match="GPT2Model has no output embedding"):
        score(reference.model().base_model, reference.tokenizer(), some_pairs(2), max_length=128)


def test_a_slow_tokenizer_gives_the_same() -> None:
    from transformers import PreTrainedTokenizer

    class Bytes(PreTrainedTokenizer):
        """A tokenizer in Python, one token a byte."""

        vocab_size = 256

        def get_vocab(self) -> dict[str, int]:
            return {str(i): i for i in range(256)}

        def _tokenize(self, text: str) -> list[str]:
            return [str(byte) for byte in text.encode()]

        def _convert_token_to_id(self, token: str) -> int:
            return int(token)

        def _convert_id_to_token(self, index: int) -> str:
            return str(index)

    tokenizer, model = Bytes(), reference.model()
    rows = list(score(model, tokenizer, [Pair("a", "one\n", "two 漢")], max_length=128))
    expected = reference.original(model, tokenizer, "one\n", "two 漢", 128)
    assert (rows[0]["n_cond"], rows[0]["n_direct"]) == (7, 6)
    assert rows[0]["loss_cond_sum"] == pytest.approx(expected.cond, abs=1e-4)


def test_the_self_test_runs_once_a_model_object_and_again_for_other_code() -> None:
    model = copy.deepcopy(reference.model())
    calls: list[int] = []
    model.base_model.register_forward_hook(lambda *_: calls.append(1))
    segments = [Segment(list(range(2, 4 + n)), 1) for n in range(SAMPLES)]

    def forwards(given: list[Segment], head: str = "linear") -> int:
        calls.clear()
        losses = Losses(model)
        losses.check(given)
        assert (losses.head, losses.batching, losses.base) == (head, "padded", model.base_model)
        return len(calls)

    assert forwards(segments[:2]) > 0
    assert forwards(segments) > 0  # what two segments show is not remembered
    assert forwards(segments) == 0
    assert forwards(segments[:2]) == 0
    model.set_attn_implementation("eager")
    assert forwards(segments) > 0
    model.__class__ = type("Other", (type(model),), {})
    assert forwards(segments) > 0
    model.lm_head.register_forward_hook(lambda *_: None)
    assert forwards(segments, "gathered") > 0
    model.to(torch.bfloat16)
    assert forwards(segments, "gathered") > 0
