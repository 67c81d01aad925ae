"""A model in this process, by transformers: no server, the same journal and the same replies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from model_hooks.errors import RequestError

from .gathered import Gathered, Sleep
from .request import Reply, Request, Usage
from .room import prompt_ids, too_long

ACCEPTED = {"temperature", "top_p", "max_tokens", "seed", "stop"}


class LocalModel(Gathered):
    """Answers with `model.generate`, prompts of similar length together, padded on the left.

    batch_size: prompts at once. max_tokens: of an answer where the request says nothing. A temperature of 0 or none is
    greedy. A request is sampled with a seed of its own content, so that a run that goes on gives the same answers. An
    answer ends where the model's context does; a prompt that fills it has failed.

    Raises `RequestError` for a tokenizer without a chat template, a sampling field that is not known here, and a
    request with a schema: nothing here could enforce it.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 8, max_tokens: int = 512) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise RequestError("the tokenizer has no chat template; give a chat model, or set one")
        super().__init__(most=32 * batch_size, linger=0.05)
        self.model, self.tokenizer, self.batch_size, self.max_tokens = model, tokenizer, batch_size, max_tokens
        config = model.config.get_text_config(decoder=True)
        self.context = int(getattr(config, "max_position_embeddings", None) or 1 << 30)

    def groups(self, requests: Sequence[Request]) -> Iterator[Sequence[int]]:
        """`batch_size` prompts of similar length, sampled alike. Alone is what is drawn by a seed of its own, and what
        leaves less room than its answer may take."""
        lengths = [len(self._prompt(request)) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: (_how(requests[i]), lengths[i]))

        def alone(i: int) -> bool:
            return bool(requests[i].sampling.get("temperature")) or lengths[i] + self._most(requests[i]) > self.context

        while order:
            how = _how(requests[order[0]])
            same = [i for i in order[: self.batch_size] if _how(requests[i]) == how]
            same = same[:1] if alone(same[0]) else [i for i in same if not alone(i)]
            order = order[len(same) :]
            yield same

    async def run(self, requests: Sequence[Request], sleep: Sleep) -> AsyncIterator[tuple[int, Reply]]:
        prompts = [self._prompt(request) for request in requests]
        longest = max(map(len, prompts))
        if longest >= self.context:  # it is alone
            yield 0, too_long(longest, self.context)
            return
        for place, reply in enumerate(await asyncio.to_thread(self._generate, prompts, requests[0])):
            yield place, reply

    def _most(self, request: Request) -> int:
        return int(request.sampling.get("max_tokens") or self.max_tokens)

    def _prompt(self, request: Request) -> list[int]:
        unknown = set(request.sampling) - ACCEPTED
        if unknown or request.schema is not None:
            what = "a schema" if request.schema is not None else ", ".join(sorted(unknown))
            raise RequestError(f"a model in this process cannot take {what}; it takes {', '.join(sorted(ACCEPTED))}")
        return prompt_ids(self.tokenizer, request)

    def _generate(self, prompts: list[list[int]], request: Request) -> list[Reply]:
        """Answers to `prompts` [count][tokens], all sampled as `request` says."""
        import torch

        began, sampling = time.monotonic(), request.sampling
        longest, pad = max(map(len, prompts)), self.tokenizer.pad_token_id or 0
        most = min(self._most(request), self.context - longest)
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
