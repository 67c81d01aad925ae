"""From examples to a model's inputs: the processor's chat template, labels on answers alone, batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from model_hooks.errors import RequestError
from ressa.data import BadRow, Example

IGNORED = -100
SEQUENCES = ("labels", "token_type_ids", "mm_token_type_ids")  # beside what ends on one of the next
ENDINGS = ("input_ids", "attention_mask")


class Encoder:
    """Makes examples into a model's inputs.

    Args:
        processor: Of the model.
        image_token_id: Of the model's configuration; None: the processor's.
        max_length: Tokens of an example at most, images included; 0: no limit. What is longer is refused, not cut,
            since a cut could go through an image.
        encoder_decoder: Whether the answer goes to a decoder of its own (T5) and not after the question.
    """

    def __init__(
        self, processor: Any, image_token_id: int | None = None, max_length: int = 0, encoder_decoder: bool = False
    ) -> None:
        self.processor, self.max_length, self.encoder_decoder = processor, max_length, encoder_decoder
        self.tokenizer = processor.tokenizer
        own = getattr(processor, "image_token_id", None)
        self.image_token_id = image_token_id if image_token_id is not None else own
        self.pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0

    def encode(self, example: Example) -> dict[str, Tensor]:
        """Inputs of one example, each [1, ...], with `labels` on what the assistant says and never on images."""
        if self.encoder_decoder:
            answer = self.tokenizer([example.answer], return_tensors="pt")["input_ids"]
            return self._checked(example, {**self.prompt(example), "labels": answer})
        inputs = self._inputs(example, self._text(example, len(example.messages), False))
        ids = inputs["input_ids"][0]
        labels = torch.full_like(ids, IGNORED)
        for turn, message in enumerate(example.messages):
            if message["role"] != "assistant":
                continue
            start = self._length(example, turn, True, ids)
            whole = turn == len(example.messages) - 1
            end = len(ids) if whole else self._length(example, turn + 1, False, ids)
            labels[start:end] = ids[start:end]
        if self.image_token_id is not None:
            labels[ids == self.image_token_id] = IGNORED
        return self._checked(example, {**inputs, "labels": labels[None]})

    def _checked(self, example: Example, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inputs. Raises `BadRow` where nothing can be learned from them or they are too long."""
        if bool((inputs["labels"] == IGNORED).all()):
            raise BadRow(f"{example.where}: no token of an answer is left to learn from")
        length = inputs["input_ids"].shape[1]
        if self.max_length and length > self.max_length:
            raise BadRow(
                f"{example.where}: {length} tokens with its image, more than --max-length {self.max_length}; it is not "
                "cut, since that could go through the image"
            )
        return inputs

    def prompt(self, example: Example) -> dict[str, Tensor]:
        """Inputs up to the last answer, for `generate`."""
        return self._inputs(example, self._text(example, len(example.messages) - 1, True))

    def _length(self, example: Example, turns: int, ask: bool, whole: Tensor) -> int:
        """Tokens of the first turns. Raises `BadRow` unless they begin the whole example's."""
        found = self._inputs(example, self._text(example, turns, ask), turns)["input_ids"][0]
        if not torch.equal(found, whole[: len(found)]):
            raise BadRow(
                f"{example.where}: the chat template writes the prompt otherwise once the answer is known, so which "
                "tokens are the answer's cannot be told"
            )
        return len(found)

    def _text(self, example: Example, turns: int, ask: bool) -> str:
        """The first `turns` messages as text, by the chat template, or in the plain form `<image> question answer`."""
        messages = list(example.messages[:turns])
        if getattr(self.processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None):
            text: str = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
            return text
        adds_itself = getattr(self.processor, "num_query_tokens", None) is not None  # BLIP-2's, before the text
        image = "" if adds_itself else str(getattr(self.processor, "image_token", "<image>"))
        end = self.tokenizer.eos_token or ""
        pieces = []
        for message in messages:
            said = [image if part["type"] == "image" else part["text"] for part in message["content"]]
            pieces.append(" ".join(filter(None, said)) + (end if message["role"] == "assistant" else ""))
        return " ".join(pieces)

    def _inputs(self, example: Example, text: str, turns: int | None = None) -> dict[str, Tensor]:
        shown = [p for m in example.messages[:turns] for p in m["content"] if p["type"] == "image"]
        begun = self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)
        try:
            found = self.processor(
                text=[text], images=example.pictures()[: len(shown)] or None, return_tensors="pt",
                add_special_tokens=not begun,
            )  # fmt: skip
        except (ValueError, TypeError, IndexError) as error:
            raise BadRow(f"{example.where}: the processor refuses it ({str(error).splitlines()[0]})") from None
        inputs = {name: value for name, value in found.items() if isinstance(value, Tensor)}
        self._check_images(example, inputs)
        return inputs

    def _check_images(self, example: Example, inputs: dict[str, Tensor]) -> None:
        if self.image_token_id is None or "pixel_values" not in inputs:
            return
        if not bool((inputs["input_ids"] == self.image_token_id).any()):
            raise BadRow(
                f"{example.where}: the processor's text has no image token {self.image_token_id} for its image"
            )


def encoder_of(config: Any, processor: Any, max_length: int = 0) -> Encoder:
    """The encoder for the inputs of a model with this configuration."""
    text = config.get_text_config()
    two = bool(getattr(text, "is_encoder_decoder", False))
    return Encoder(processor, getattr(config, "image_token_id", None), max_length, two)


def collate(rows: Sequence[dict[str, Tensor]], pad: int, side: str = "right") -> dict[str, Tensor]:
    """One batch of encoded examples: sequences padded on a side, what belongs to images joined.

    Raises `RequestError` where no example has a token to learn from.
    """
    batch: dict[str, Tensor] = {}
    for name in rows[0]:
        parts = [row[name] for row in rows]
        if name in SEQUENCES or name.endswith(ENDINGS):
            fill = {"input_ids": pad, "labels": IGNORED}.get(name, 0)
            width = max(part.shape[1] for part in parts)
            parts = [_widen(part, width, fill, side) for part in parts]
        else:
            parts = _same_shape(parts)
        batch[name] = torch.cat(parts)
    if "labels" in batch and bool((batch["labels"] == IGNORED).all()):
        raise RequestError("all labels of a batch are -100: none of its examples has an answer to learn from")
    return batch


def _widen(part: Tensor, width: int, fill: int, side: str) -> Tensor:
    missing = width - part.shape[1]
    return torch.nn.functional.pad(part, (0, missing) if side == "right" else (missing, 0), value=fill)


def _same_shape(parts: list[Tensor]) -> list[Tensor]:
    """Parts [1, n, ...] with n padded by zeros to the largest: models that cut images into tiles expect that."""
    if len({part.shape[1:] for part in parts}) == 1 or parts[0].dim() < 3:
        return parts
    most = max(part.shape[1] for part in parts)
    return [torch.cat([p, p.new_zeros(p.shape[0], most - p.shape[1], *p.shape[2:])], 1) for p in parts]


def encode_all(encoder: Encoder, examples: Sequence[Example], skip_bad_rows: int = 0) -> list[dict[str, Tensor]]:
    """All examples encoded; up to `skip_bad_rows` that cannot be are left out. Raises `BadRow`, `RequestError`."""
    rows, skipped = [], 0
    for one in examples:
        try:
            rows.append(encoder.encode(one))
        except BadRow:
            skipped += 1
            if skipped > skip_bad_rows:
                raise
    if not rows:
        raise RequestError(f"none of {len(examples)} examples can be used")
    return rows


def batches(rows: Sequence[dict[str, Tensor]], size: int, pad: int) -> Iterator[dict[str, Tensor]]:
    """Rows in their order, `size` at a time."""
    for start in range(0, len(rows), size):
        yield collate(rows[start : start + size], pad)


def calibration_inputs(batch: dict[str, Tensor], encoder: Encoder) -> dict[str, Tensor]:
    """A batch without labels; where a decoder's inputs are made of them, with a mask that leaves their padding out."""
    if encoder.encoder_decoder:
        return {**batch, "decoder_attention_mask": (batch["labels"] != IGNORED).long()}
    return {name: value for name, value in batch.items() if name != "labels"}
