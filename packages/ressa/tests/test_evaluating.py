"""Figures of a model: by one pass, by generation, and each against an independent way to the same."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ressa.data import read
from ressa.encoding import Encoder, collate
from ressa.evaluating import evaluate, generate

from model_hooks import load
from model_hooks.errors import RequestError
from model_hooks.processors import load_processor
from model_hooks.zoo import llava, shapes


@pytest.fixture(scope="module")
def model() -> Any:
    """The narrow LLaVA, a little spoilt so that not every answer is right."""
    found, _ = load("zoo:llava", dtype="float32", tokenizer=False)
    with torch.no_grad():
        for layer in found.get_decoder().layers:
            for part in layer.mlp.children():
                if (weight := getattr(part, "weight", None)) is not None:
                    weight.masked_fill_(weight.abs() < weight.abs().quantile(0.9), 0)
    return found


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(load_processor("zoo:llava"), 3)


def test_exact_answers_are_those_of_the_zoo_and_of_greedy_decoding(model: Any, encoder: Encoder) -> None:
    examples = read("zoo:shapes:heldout", 48)
    found = evaluate(model, encoder, examples, ["exact"], batch_size=20)
    zoo = llava.exact_match(model, shapes.items("heldout", 48))
    assert 0.2 < zoo["all"] < 1
    assert found["exact"]["value"] == pytest.approx(zoo["all"])
    assert found["exact, shape"]["value"] == pytest.approx(zoo["shape"])
    assert found["exact"]["n"] == 48
    said = generate(model, encoder, examples, batch_size=7, new_tokens=9)
    greedy = sum(a == one.answer for a, one in zip(said, examples, strict=True)) / 48
    assert greedy == pytest.approx(zoo["all"])


def test_perplexity_is_that_of_the_models_own_loss(model: Any, encoder: Encoder) -> None:
    examples = read("zoo:shapes:heldout", 8)
    rows = [encoder.encode(one) for one in examples]
    with torch.no_grad():
        loss = model(**collate(rows, encoder.pad)).loss.item()
    found = evaluate(model, encoder, examples, ["perplexity"], batch_size=3)
    assert found["perplexity"]["value"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert found["perplexity"]["se"] > 0


def test_generated_answers_are_scored(model: Any, encoder: Encoder) -> None:
    examples = read("zoo:shapes:heldout", 12)
    found = evaluate(model, encoder, examples, ["vqa", "cider", "exact"], new_tokens=9)
    assert found["vqa"]["value"] == pytest.approx(found["exact"]["value"])
    assert 0 <= found["cider"]["value"] <= 10


def test_retrieval_finds_the_answer_of_an_image(encoder: Encoder) -> None:
    whole, _ = load("zoo:llava", dtype="float32", tokenizer=False)
    describe = [one for one in read("zoo:shapes:heldout", 15) if one.kind == "describe"]
    found = evaluate(whole, encoder, describe, ["recall"])
    assert found["recall@1"]["value"] == 1
    assert found["recall@5"]["value"] == 1


def test_unknown_metrics_name_the_nearest(model: Any, encoder: Encoder) -> None:
    with pytest.raises(RequestError, match=r"metric 'exakt' is not accepted.*exact"):
        evaluate(model, encoder, read("zoo:shapes:heldout", 1), ["exakt"])


def test_answers_of_an_encoder_decoder_go_to_its_decoder() -> None:
    """InstructBLIP with T5: its processor puts the image's tokens before the text itself."""
    from ressa.branches import find_branches
    from ressa.encoding import batches, calibration_inputs, encode_all, encoder_of
    from ressa.pruning import Pruning, prune
    from transformers import InstructBlipProcessor, PreTrainedTokenizerFast
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
    from vlmodels import build

    model, _ = build("instructblip")
    inner = llava.tokenizer().backend_tokenizer
    names = {"pad_token": llava.PAD, "eos_token": llava.EOS, "unk_token": llava.UNKNOWN}
    words, query = (PreTrainedTokenizerFast(tokenizer_object=inner, **names) for _ in range(2))
    model.config.image_token_index = words.convert_tokens_to_ids(llava.IMAGE)
    side = {"height": 8, "width": 8}
    processor = InstructBlipProcessor(BlipImageProcessorPil(size=side), words, query, num_query_tokens=4)
    encoder = encoder_of(model.config, processor)
    assert encoder.encoder_decoder
    examples = read("zoo:shapes:heldout", 6)
    rows = encode_all(encoder, examples)
    assert encoder.tokenizer.decode(rows[0]["labels"][0]) == examples[0].answer
    assert int((rows[0]["input_ids"] == model.config.image_token_index).sum()) == 4
    (batch,) = batches(rows, 6, encoder.pad)
    with torch.no_grad():
        loss = model(**batch).loss.item()
    found = evaluate(model, encoder, examples, ["exact", "perplexity"], rows=rows)
    assert math.log(found["perplexity"]["value"]) == pytest.approx(loss, rel=1e-4)
    assert len(generate(model, encoder, examples, batch_size=6, new_tokens=3)) == 6
    masks = prune(
        model, find_branches(model), [calibration_inputs(batch, encoder)], Pruning("wanda", 0.5),
        image_token_id=encoder.image_token_id,
    ).masks  # fmt: skip
    assert any("decoder" in path for path in masks)
