"""A model in this process, by transformers: no server, the same journal and the same replies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from model_hooks.errors import RequestError

from .gathered import Gathered, Sleep
from .request import Reply, Request, Usage

ACCEPTED = {"temperature", "top_p", "max_tokens", "seed", "stop"}


class LocalModel(Gathered):
    """Answers with `model.generate`, prompts of similar length together, padded on the left.

    batch_size: prompts at once. max_tokens: of an answer where the request says nothing. A temperature of 0 or none is
    greedy. A request is sampled with a seed of its own content, so that a run that goes on gives the same answers.

    Raises `RequestError` for a tokenizer without a chat template, a sampling field that is not known here, and a
    request with a schema: nothing here could enforce it.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 8, max_tokens: int = 512) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise RequestError("the tokenizer has no chat template; give a chat model, or set one")
        super().__init__(most=32 * batch_size, linger=0.05)
        self.model, self.tokenizer, self.batch_size, self.max_tokens = model, tokenizer, batch_size, max_tokens

    async def run(self, requests: Sequence[Request], sleep: Sleep) -> AsyncIterator[tuple[int, Reply]]:
        prompts = [self._prompt(request) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: (_how(requests[i]), len(prompts[i])))
        while order:
            how = _how(requests[order[0]])
            same = [i for i in order[: self.batch_size] if _how(requests[i]) == how]
            if requests[same[0]].sampling.get("temperature"):
                same = same[:1]  # each is drawn by its own seed
            order = order[len(same) :]
            answers = await asyncio.to_thread(self._generate, [prompts[i] for i in same], requests[same[0]])
            for place, reply in zip(same, answers):
                yield place, reply

    def _prompt(self, request: Request) -> list[int]:
        unknown = set(request.sampling) - ACCEPTED
        if unknown or request.schema is not None:
            what = "a schema" if request.schema is not None else ", ".join(sorted(unknown))
            raise RequestError(f"a model in this process cannot take {what}; it takes {', '.join(sorted(ACCEPTED))}")
        messages = [dict(message) for message in request.messages]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _generate(self, prompts: list[list[int]], request: Request) -> list[Reply]:
        """Answers to `prompts` [count][tokens], all sampled as `request` says."""
        import torch

        began, sampling = time.monotonic(), request.sampling
        longest, pad = max(map(len, prompts)), self.tokenizer.pad_token_id or 0
        most = int(sampling.get("max_tokens") or self.max_tokens)
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])  # [count, longest]
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        drawn = bool(sampling.get("temperature"))
        how: dict[str, Any] = {"do_sample": drawn}
        if drawn:
            torch.manual_seed(request.seed)
            how |= {"temperature": float(sampling["temperature"]), "top_p": float(sampling.get("top_p") or 1.0)}
        if sampling.get("stop"):
            how |= {"stop_strings": sampling["stop"], "tokenizer": self.tokenizer}
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                max_new_tokens=most,
                pad_token_id=pad,
                **how,
            )[:, longest:].tolist()  # [count, new]
        seconds = round(time.monotonic() - began, 3)
        return [self._reply(len(prompt), new, most, seconds, request.model) for prompt, new in zip(prompts, out)]

    def _reply(self, prompt: int, new: list[int], most: int, seconds: float, name: str) -> Reply:
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        length = next((at + 1 for at, token in enumerate(new) if token in ends), len(new))
        text = self.tokenizer.decode(new[:length], skip_special_tokens=True)
        finish = "length" if length == most and new[-1] not in ends else "stop"
        return Reply(text, finish, Usage(prompt, length), name, seconds=seconds)


def _how(request: Request) -> str:
    return repr(sorted(request.sampling.items(), key=str))
