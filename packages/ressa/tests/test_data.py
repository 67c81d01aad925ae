"""Records become examples and inputs: labels on answers alone, and every bad record is one clear line."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from ressa.data import BadRow, Example, example, read
from ressa.encoding import IGNORED, Encoder, collate, encode_all

from model_hooks.errors import RequestError
from model_hooks.processors import load_processor
from model_hooks.zoo import llava, shapes

PICTURE = np.zeros((32, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(load_processor("zoo:llava"), 3)


def write(folder: Path, *records: Any) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


@pytest.fixture
def image(tmp_path: Path) -> str:
    Image.fromarray(PICTURE).save(tmp_path / "one.png")
    return "one.png"


def test_drawn_shapes_become_what_the_model_was_trained_on(encoder: Encoder) -> None:
    rows = encode_all(encoder, read("zoo:shapes:heldout", 6))
    found, expected = collate(rows, encoder.pad), llava.encode(shapes.items("heldout", 6))
    assert found.keys() == expected.keys()
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(found[name], expected[name]), name
    torch.testing.assert_close(found["pixel_values"], expected["pixel_values"], atol=1e-6, rtol=0)


def test_labels_are_the_answers_and_their_end(encoder: Encoder) -> None:
    row = encoder.encode(read("zoo:shapes:heldout", 1)[0])
    said = row["input_ids"][row["labels"] != IGNORED]
    assert encoder.tokenizer.decode(said) == f"{shapes.items('heldout', 1)[0].answer} </s>"


def test_every_turn_of_the_assistant_is_learned(encoder: Encoder, image: str, tmp_path: Path) -> None:
    asked = ("<image> what color topleft ?", "red", "what shape topleft ?", "circle")
    chat = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(asked)]
    (one,) = read(write(tmp_path, {"image": image, "messages": chat}), 5)
    row = encoder.encode(one)
    said = row["input_ids"][row["labels"] != IGNORED]
    assert encoder.tokenizer.decode(said) == "red </s> circle </s>"
    assert (row["labels"][row["input_ids"] == 3] == IGNORED).all()
    prompt = encoder.prompt(one)["input_ids"][0]
    assert torch.equal(prompt, row["input_ids"][0, : len(prompt)])
    assert len(prompt) == row["input_ids"].shape[1] - 2


def test_records_in_every_form(image: str, tmp_path: Path) -> None:
    data = (tmp_path / image).read_bytes()
    forms = [
        {"image": image, "question": "what color topleft ?", "answer": "red"},
        {"image": {"bytes": data, "path": None}, "question": "q", "answers": ["red", "blue"]},
        {"image": {"bytes": None, "path": str(tmp_path / image)}, "caption": "red circle"},
        {"images": [image, image], "question": "<image> and <image> ?", "answer": "red"},
    ]
    found = [example(record, "row", tmp_path) for record in forms]
    assert [one.answers for one in found] == [("red",), ("red", "blue"), ("red circle",), ("red",)]
    assert [len(one.pictures()) for one in found] == [1, 1, 1, 2]
    assert found[2].messages[0]["content"][1]["text"] == "describe"
    assert all(one.pictures()[0].size == (32, 32) for one in found)


def test_every_caption_is_an_example_to_train_on_and_all_are_references(
    encoder: Encoder, image: str, tmp_path: Path
) -> None:
    several = {"image": image, "annotations_captions": ["red circle", "blue cross", "red circle"]}  # NoCaps' column
    source = write(tmp_path, several, {"image": image, "caption": "green square"})
    together, apart = read(source, 2), read(source, 4, apart=True)
    assert [one.answers for one in together] == [("red circle", "blue cross", "red circle"), ("green square",)]
    assert [one.answers for one in apart] == [("red circle",), ("blue cross",), ("red circle",), ("green square",)]
    for one, row in zip(apart, encode_all(encoder, apart), strict=True):
        assert encoder.tokenizer.decode(row["input_ids"][row["labels"] != IGNORED]) == f"{one.answer} </s>"
    assert [one.answer for one in read(source, 2, apart=True)] == ["red circle", "blue cross"]
    with pytest.raises(RequestError, match=r"rows.jsonl gives 4 examples, 5 are asked for; ask fewer"):
        read(source, 5, apart=True, whole=True)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"question": "q", "answer": "a"}, "rows.jsonl:1: no image in it; a record needs image with question"),
        ({"image": "one.png", "question": "q"}, "no answer in it"),
        ({"image": "one.png", "question": "q", "answer": "  "}, "no answer in it"),
        ({"image": "none.png", "caption": "a"}, "no image file .*none.png"),
        ({"image": "bad.png", "caption": "a"}, "rows.jsonl:1: the image cannot be read"),
        ({"image": "one.png", "question": "<image> <image> ?", "answer": "a"},
         "2 image placeholders in the text, 1 image is given"),
        ({"images": ["one.png", "one.png"], "question": "a <image> ?", "answer": "a"},
         "1 image placeholder in the text, 2 images are given"),
        ({"image": "one.png", "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}]},
         "0 image placeholders in the text, 1 image is given"),
        ({"image": "one.png", "messages": [{"role": "user", "content": "<image>"}]}, "last message is the user's"),
        ({"image": "one.png", "messages": [{"text": "hi"}]}, "not a message with role and content"),
        (["one.png"], "a list is not a record"),
    ],
)  # fmt: skip
def test_a_bad_record_is_named(record: Any, says: str, image: str, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes((tmp_path / image).read_bytes()[:40])
    with pytest.raises(BadRow, match=says) as caught:
        read(write(tmp_path, record), 5)
    assert "--skip-bad-rows 1" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_as_many_bad_records_as_said_are_passed_over(image: str, tmp_path: Path) -> None:
    good, bad = {"image": image, "caption": "red circle"}, {"image": "none.png", "caption": "a"}
    source = write(tmp_path, bad, good, bad, good)
    assert len(read(source, 5, skip_bad_rows=2)) == 2
    assert len(read(source, 1, skip_bad_rows=1)) == 1
    with pytest.raises(BadRow, match=r"rows.jsonl:3: .*1 were passed over before; .*--skip-bad-rows 2"):
        read(source, 5, skip_bad_rows=1)
    with pytest.raises(RequestError, match="gives no examples, 1 bad ones were passed over"):
        read(write(tmp_path, bad), 5, skip_bad_rows=3)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("zoo:shapes:test", "unknown split 'test'; the shapes have train, calibration, heldout"),
        ("./none.jsonl", "no file ./none.jsonl"),
        ("rows.txt", "no dataset|unknown kind of file"),
    ],
)
def test_a_source_that_cannot_be_read_is_one_line(source: str, says: str) -> None:
    pytest.importorskip("datasets", reason="needs the extra [train]")
    with pytest.raises(RequestError, match=says):
        read(source, 3)


def test_lines_that_are_no_json_are_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"image": "\xff"}\n')
    with pytest.raises(RequestError, match=r"rows.jsonl:1: not JSON in UTF-8"):
        read(str(tmp_path / "rows.jsonl"), 1)
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(RequestError, match="gives no examples"):
        read(str(tmp_path / "rows.jsonl"), 1)


def test_a_saved_dataset_is_read_and_a_broken_image_is_a_bad_row(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra [train]")
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).save(buffer, "PNG")
    images = [{"bytes": data, "path": None} for data in (buffer.getvalue(), b"not an image", buffer.getvalue())]
    features = datasets.Features(image=datasets.Image(), caption=datasets.Value("string"))
    rows = datasets.Dataset.from_dict({"image": images, "caption": ["red", "blue", "green"]}, features=features)
    rows.save_to_disk(tmp_path / "saved")
    assert [one.answer for one in read(str(tmp_path / "saved"), 5, skip_bad_rows=1)] == ["red", "green"]
    with pytest.raises(BadRow, match="row 1: the image cannot be read"):
        read(str(tmp_path / "saved"), 5)


def test_what_is_too_long_is_refused_and_not_cut(encoder: Encoder) -> None:
    short = Encoder(encoder.processor, 3, max_length=24)
    color, _, describe = read("zoo:shapes:heldout", 3)
    assert short.encode(color)["input_ids"].shape[1] == 23
    with pytest.raises(BadRow, match="row 2: 27 tokens with its image, more than --max-length 24"):
        short.encode(describe)
    assert len(encode_all(short, [color, describe], skip_bad_rows=1)) == 1


def test_a_batch_without_labels_is_refused(encoder: Encoder) -> None:
    row = encoder.encode(read("zoo:shapes:heldout", 1)[0])
    with pytest.raises(RequestError, match="all labels of a batch are -100"):
        collate([{**row, "labels": torch.full_like(row["labels"], IGNORED)}], 0)


def test_a_template_that_rewrites_the_prompt_is_refused(encoder: Encoder) -> None:
    processor = load_processor("zoo:llava")
    processor.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}<image>{{ 'describe ' if loop.last else 'what ' }}"
        "{% else %}red</s>{% endif %}{% endfor %}"
    )
    with pytest.raises(BadRow, match="the chat template writes the prompt otherwise"):
        Encoder(processor, 3).encode(read("zoo:shapes:heldout", 1)[0])


def test_without_a_chat_template_the_plain_form_is_used(encoder: Encoder) -> None:
    processor = load_processor("zoo:llava")
    processor.chat_template = None
    processor.tokenizer.chat_template = None
    row = Encoder(processor, 3).encode(read("zoo:shapes:heldout", 1)[0])
    words = encoder.tokenizer.decode(row["input_ids"][0]).split()
    assert words[:17] == [*["<image>"] * 16, "what"]
    assert int((row["labels"] != IGNORED).sum()) == 2


def test_a_model_without_images_is_refused() -> None:
    with pytest.raises(RequestError, match="zoo:llama has no processor for images"):
        load_processor("zoo:llama")


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), left=st.booleans())
@settings(max_examples=30, deadline=None)
def test_padding_keeps_every_token_in_its_place(lengths: list[int], left: bool) -> None:
    rows = [{"input_ids": torch.arange(1, n + 1)[None], "attention_mask": torch.ones(1, n, dtype=torch.long)}
            for n in lengths]  # fmt: skip
    batch = collate(rows, 0, "left" if left else "right")
    for i, n in enumerate(lengths):
        kept = batch["input_ids"][i][batch["attention_mask"][i].bool()]
        assert kept.tolist() == list(range(1, n + 1))
        assert int(batch["attention_mask"][i].sum()) == n
        assert bool(batch["attention_mask"][i, -1 if left else 0])


def test_images_in_tiles_are_padded_to_the_most() -> None:
    rows = [
        {"input_ids": torch.ones(1, 2, dtype=torch.long), "pixel_values": torch.ones(1, n, 3, 4, 4)} for n in (1, 3)
    ]
    found = collate(rows, 0)["pixel_values"]
    assert found.shape == (2, 3, 3, 4, 4)
    assert float(found[0, 1:].abs().sum()) == 0


def test_examples_hold_no_decoded_images(image: str, tmp_path: Path) -> None:
    (one,) = read(write(tmp_path, {"image": image, "caption": "red"}), 1)
    assert isinstance(one, Example)
    assert isinstance(one.images[0], Path)
