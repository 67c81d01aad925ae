"""Metrics against naive float64 oracles and formulas, on a tiny random llama with a tokenizer of characters."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from paper_tables import TableError, metrics
from paper_tables.metrics import flops, kv_bytes, language_score, lm_eval_tasks, parameters

HIDDEN, FEED, LAYERS, HEADS, KV_HEADS, CONTEXT = 32, 48, 3, 4, 2, 64
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
DOCUMENTS = ["The cat sat.\n", "", "Käse & 乳酪 = 🧀, " * 7, "x", "def f(x):\n    return x + 1\n" * 4]


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token a byte, so that a test can count them; special tokens as given."""
    vocabulary = {c: i for i, c in enumerate([*ALPHABET, *special.values()])}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **special)


TOKENIZERS = {
    "bos and eos": make_tokenizer(bos_token="<s>", eos_token="</s>"),
    "eos alone": make_tokenizer(eos_token="</s>"),
    "bos alone": make_tokenizer(bos_token="<s>"),
    "neither": make_tokenizer(),
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(ALPHABET) + 2, hidden_size=HIDDEN, intermediate_size=FEED, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=CONTEXT,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def naive(model, tokenizer, documents, length):
    """Losses of the documents' tokens, each predicted by a pass of its own in float64, and their windows."""
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    between = tokenizer.bos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    stream = [] if first is None else [(first, False)]
    for number, text in enumerate(documents):
        stream += [(between, False)] if number and between is not None else []
        stream += [(t, True) for t in tokenizer(text, add_special_tokens=False)["input_ids"]]
    double = LlamaForCausalLM(model.config).double().eval()
    double.load_state_dict(model.double().state_dict())
    model.float()
    losses: list[float] = []
    windows: list[tuple[float, int]] = []
    for start in range(0, len(stream) - 1, length - 1):
        window = stream[start : start + length]
        scored = []
        for at in range(1, len(window)):
            if window[at][1]:
                ids = torch.tensor([[token for token, _ in window[:at]]])
                logits = double(input_ids=ids, use_cache=False).logits[0, -1]
                scored.append(-torch.log_softmax(logits, -1)[window[at][0]].item())
        losses += scored
        windows.append((sum(scored), len(scored)))
    return losses, windows


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("length", [7, 64])
def test_every_token_is_predicted_once_and_as_a_naive_pass_does(model, name, length):
    tokenizer = TOKENIZERS[name]
    losses, windows = naive(model, tokenizer, DOCUMENTS, length)
    found = language_score(model, tokenizer, DOCUMENTS, length=length, batch_size=3)
    size = sum(len(text.encode()) for text in DOCUMENTS) - (name == "neither")  # its first token has no context
    assert found.tokens == len(losses) == size  # a token a byte
    assert found.bytes == size
    assert found.windows == len(windows)
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    ratio, n = sum(losses) / len(losses), len(windows)
    squares = sum((loss - ratio * count) ** 2 for loss, count in windows)
    assert found.loss_se == pytest.approx(math.sqrt(squares / (n - 1) * n) / len(losses), rel=1e-4)


def test_perplexity_and_bits_per_byte_are_the_loss_in_other_units(model):
    tokenizer = TOKENIZERS["bos and eos"]
    found = language_score(model, tokenizer, DOCUMENTS)
    ppl, bits = (f(model, tokenizer, DOCUMENTS) for f in (metrics.perplexity, metrics.bits_per_byte))
    assert ppl == pytest.approx({"value": math.exp(found.loss), "se": math.exp(found.loss) * found.loss_se})
    factor = found.tokens / found.bytes / math.log(2)
    assert bits == pytest.approx({"value": found.loss * factor, "se": found.loss_se * factor})


@settings(max_examples=15)
@given(batch=st.integers(1, 9), limit=st.integers(1, 6))
def test_the_batch_size_changes_nothing_and_the_limit_counts_documents(model, batch, limit):
    tokenizer = TOKENIZERS["bos and eos"]
    one = language_score(model, tokenizer, DOCUMENTS[:limit], length=9, batch_size=1)
    many = language_score(model, tokenizer, iter(DOCUMENTS), length=9, batch_size=batch, limit=limit)
    assert (many.tokens, many.bytes, many.windows) == (one.tokens, one.bytes, one.windows)
    assert many.loss == pytest.approx(one.loss, rel=1e-5)
    assert many.loss_se == pytest.approx(one.loss_se, rel=1e-3, abs=1e-9)


def test_documents_are_taken_one_by_one_and_progress_is_told(model):
    taken, done = [], []

    def documents():
        for text in ["a" * 40] * 6:
            taken.append(len(done))
            yield text

    language_score(model, TOKENIZERS["neither"], documents(), length=11, batch_size=1, progress=done.append)
    assert taken[-1] > 10  # the last document was not read before most windows were scored
    assert done[-1] == 6 * 40 - 1
    assert all(a <= b for a, b in pairwise(done))


def test_an_empty_document_at_the_front_takes_no_bytes_away(model):
    found = language_score(model, TOKENIZERS["neither"], ["", "äbc"])
    assert (found.tokens, found.bytes) == (2, 2)  # the two tokens of the first character are context


def test_a_single_window_has_no_error(model):
    assert language_score(model, TOKENIZERS["eos alone"], ["abc"]).loss_se == 0.0


@pytest.mark.parametrize(
    ("documents", "length", "said"),
    [
        ([], None, "no text to score: 0 documents, 0 bytes"),
        (["", ""], None, "no text to score: 2 documents, 0 bytes"),
        (["abc"], 1, "window length 1 is not within 2 and the model's context of 64 tokens"),
        (["abc"], 65, "window length 65 is not within"),
    ],
)
def test_nothing_to_score_and_impossible_windows_are_refused(model, documents, length, said):
    with pytest.raises(TableError, match=said):
        language_score(model, TOKENIZERS["bos and eos"], documents, length=length)


@pytest.mark.parametrize(("batch", "length"), [(1, 5), (3, 17)])
def test_kv_bytes_flops_and_parameters_are_those_of_the_formulas(model, batch, length):
    ids = torch.zeros(batch, length, dtype=torch.long)
    head, vocabulary = HIDDEN // HEADS, model.config.vocab_size
    assert kv_bytes(model, ids) == 2 * LAYERS * batch * length * KV_HEADS * head * 4
    projections = HIDDEN * (HIDDEN + 2 * KV_HEADS * head + HIDDEN) + 3 * HIDDEN * FEED
    attention = 2 * HEADS * head * length  # scores and weighted sum, for each token over all
    linear = LAYERS * (projections + attention) + HIDDEN * vocabulary
    rotary = (head // 2) * length  # the angles: an outer product, written as a matrix product
    assert flops(model, ids) - 2 * batch * length * linear in (0, 2 * rotary)
    norms = (2 * LAYERS + 1) * HIDDEN
    assert parameters(model) == LAYERS * projections + 2 * HIDDEN * vocabulary + norms


def test_tied_parameters_count_once(model):
    tied = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "tie_word_embeddings": True}))
    assert parameters(model) - parameters(tied) == HIDDEN * model.config.vocab_size


@pytest.fixture(scope="module")
def zoo():
    from model_hooks import zoo

    return zoo


@pytest.mark.slow
def test_lm_eval_tasks_from_a_folder_give_their_metrics_with_errors(model, zoo):
    model = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "max_position_embeddings": 2048})).eval()
    tokenizer = TOKENIZERS["bos and eos"]
    found = lm_eval_tasks(model, tokenizer, ["zoo_bracket"], folder=zoo.tasks_dir(), limit=8)
    accuracy = found["zoo_bracket"]["acc"]
    right = accuracy["value"] * 8
    assert right == pytest.approx(round(right))
    share = accuracy["value"]
    assert accuracy["se"] == pytest.approx(math.sqrt(share * (1 - share) / 7))
    again = lm_eval_tasks(model, tokenizer, ["zoo_bracket"], folder=zoo.tasks_dir(), limit=8, batch_size=3)
    assert again == found


@pytest.mark.slow
def test_an_unknown_lm_eval_task_is_named_with_the_nearest(model, zoo):
    with pytest.raises(TableError, match="no lm-eval task 'zoo_brackets'; did you mean 'zoo_bracket'"):
        lm_eval_tasks(model, TOKENIZERS["neither"], ["zoo_bracket", "zoo_brackets"], folder=zoo.tasks_dir())
    with pytest.raises(TableError, match="no lm-eval task was named"):
        lm_eval_tasks(model, TOKENIZERS["neither"], [], folder=zoo.tasks_dir())
