"""Which of several rewritten answers a reward model rates highest."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from instruct_data.llm.request import Message
from model_hooks.errors import RequestError
from model_hooks.loading import load_tokenizer, quiet, resolve


@dataclass
class Reward:
    """`await reward(messages, answers)`: a number for each answer, in their order; more is better.

    A sequence-classification model with one output. It reads the conversation by its chat template, or, where it has
    none, question and answer as a pair of texts. What is longer than it can read is cut at the end.
    """

    model: Any
    tokenizer: Any
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    @classmethod
    def load(cls, source: str) -> Reward:
        """From a hub id, a folder or `zoo:NAME`. Raises `RequestError` for what is no reward model, a causal language
        model among them, whose rating head would be random."""
        where = resolve(source)

        import torch
        from transformers import AutoModelForSequenceClassification

        with quiet():
            try:
                model, info = AutoModelForSequenceClassification.from_pretrained(
                    where, dtype="auto", use_safetensors=True, output_loading_info=True
                )
            except (OSError, ValueError, RuntimeError) as error:
                raise RequestError(
                    f"{source} is no reward model that can be read: {str(error).splitlines()[0]}"
                ) from None
        missing = sorted(info["missing_keys"])
        if missing:
            raise RequestError(f"{source} is no reward model: its weights lack {missing[0]}")
        if model.config.num_labels != 1:
            raise RequestError(f"{source} has {model.config.num_labels} outputs; a reward model has one")
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        return cls(model, load_tokenizer(source))

    async def __call__(self, messages: Sequence[Message], answers: Sequence[str]) -> list[float]:
        async with self._turn:  # one at a time, while requests go on
            return await asyncio.to_thread(self._rate, messages, answers)

    def _rate(self, messages: Sequence[Message], answers: Sequence[str]) -> list[float]:
        import torch

        with torch.inference_mode():
            return [float(self.model(**self._read(messages, answer)).logits) for answer in answers]

    def _read(self, messages: Sequence[Message], answer: str) -> Any:
        room = min(self.tokenizer.model_max_length, getattr(self.model.config, "max_position_embeddings", 1 << 30))
        cut: dict[str, Any] = {"truncation": True, "max_length": room, "return_tensors": "pt"}
        if self.tokenizer.chat_template:
            talk = [*messages, {"role": "assistant", "content": answer}]
            read = self.tokenizer.apply_chat_template(talk, return_dict=True, **cut)
        else:
            read = self.tokenizer("\n\n".join(message["content"] for message in messages), answer, **cut)
        return read.to(self.model.device)
