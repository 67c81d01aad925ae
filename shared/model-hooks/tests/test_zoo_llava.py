"""The zoo's vision-language models know the shapes, load as they say, and their images are drawn alike everywhere."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForImageTextToText, AutoProcessor

from model_hooks import load, zoo
from model_hooks.zoo import llava, shapes
from model_hooks.zoo.recipes import IMAGE_RECIPES

ASKED = 192
NAMES = sorted(IMAGE_RECIPES)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_competent_as_its_card_says(name: str) -> None:
    folder = zoo.resolve(f"zoo:{name}")
    stated = json.loads((folder / "measurements.json").read_text())
    assert all(stated[kind] >= least for kind, least in llava.FLOOR.items())
    assert f"| all | {stated['all']:.3f} |" in (folder / "README.md").read_text()
    found = llava.measure(folder, ASKED)
    for kind, least in llava.FLOOR.items():
        n = ASKED if kind == "all" else ASKED // 3
        assert abs(found[kind] - stated[kind]) <= 3 * (0.03 * 0.97 / n) ** 0.5, kind
        assert found[kind] >= least - 0.03


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_whole_and_within_its_size(name: str) -> None:
    folder = zoo.resolve(f"zoo:{name}")
    _, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert (folder / "model.safetensors").stat().st_size < IMAGE_RECIPES[name].limit_mb * 1e6


def test_its_processor_makes_what_it_was_trained_on() -> None:
    pytest.importorskip("PIL", reason="images are read by Pillow")
    processor: Any = AutoProcessor.from_pretrained(zoo.resolve("zoo:llava"))
    items = shapes.items("heldout", 3)
    expected = llava.encode(items)
    for i, item in enumerate(items):
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": item.question}]},
                {"role": "assistant", "content": item.answer}]  # fmt: skip
        text = processor.apply_chat_template(chat, tokenize=False)
        found = processor(text=[text], images=[item.image], return_tensors="pt", add_special_tokens=False)
        length = found["input_ids"].shape[1]
        assert torch.equal(found["input_ids"][0], expected["input_ids"][i, :length])
        assert (expected["labels"][i, length:] == -100).all()
        torch.testing.assert_close(found["pixel_values"][0], expected["pixel_values"][i], atol=1e-6, rtol=0)


def test_load_takes_it_and_it_answers() -> None:
    model, tokenizer = load("zoo:llava", dtype="float32")
    item = shapes.items("heldout", 3)[2]
    inputs = llava.encode([item])
    asked = inputs["labels"][0].eq(-100).sum()
    out = model.generate(
        input_ids=inputs["input_ids"][:, :asked], pixel_values=inputs["pixel_values"], max_new_tokens=9, do_sample=False
    )
    assert tokenizer.decode(out[0, asked:], skip_special_tokens=True) == item.answer
    assert item.question == "describe"


@given(st.sampled_from(shapes.SPLITS), st.integers(1, 9), st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_items_depend_on_split_count_and_seed_alone(split: str, count: int, seed: int) -> None:
    first, again = shapes.items(split, count, seed), shapes.items(split, count, seed)
    assert all(np.array_equal(a.image, b.image) and a.answer == b.answer for a, b in zip(first, again, strict=True))
    assert first[0].image.shape == (32, 32, 3)
    assert first[0].image.dtype == np.uint8
    assert {word for item in first for word in (*item.question.split(), *item.answer.split())} <= set(shapes.WORDS)


def test_splits_share_no_image() -> None:
    seen = [{hashlib.sha256(i.image.tobytes()).digest() for i in shapes.items(s, 200)} for s in shapes.SPLITS]
    assert len(set.union(*seen)) == 600


def test_the_answers_say_what_is_drawn() -> None:
    """Each cell's most frequent pure colour is the one named, and a square covers more than a cross."""
    (item,) = shapes.items("calibration", 1, kinds=("describe",))
    words = item.answer.split()
    for cell, name in enumerate(words[::2]):
        row, column = divmod(cell, 2)
        middle = item.image[16 * row + 7 : 16 * row + 9, 16 * column + 7 : 16 * column + 9].reshape(-1, 3).mean(0)
        nearest = min(shapes.COLORS, key=lambda c: float(np.abs(np.array(shapes.COLORS[c]) - middle).sum()))
        assert nearest == name


@pytest.mark.parametrize(("split", "kinds"), [("test", shapes.KINDS), ("train", ("count",)), ("train", ())])
def test_unknown_words_are_refused(split: str, kinds: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="the shapes have"):
        shapes.items(split, 1, kinds=kinds)


def test_training_learns_and_an_incompetent_model_is_not_written(tmp_path: Any) -> None:
    recipe = replace(IMAGE_RECIPES["llava"], steps=30, batch=32, warmup=5)
    log: list[dict[str, float]] = []
    model = llava.train(recipe, log)
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    with pytest.raises(RuntimeError, match="not competent"):
        llava.export("llava", model, log, tmp_path / "weak")
