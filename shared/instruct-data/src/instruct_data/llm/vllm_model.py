"""A model in this process, by vLLM, which batches by itself: no server, the same journal and the same replies.

The extra `[vllm]` brings vLLM, in an environment without llm-compressor (so without moe-compress and ressa): each wants
a version of compressed-tensors that the other refuses.
"""

from __future__ import annotations

import asyncio
import importlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from model_hooks.errors import RequestError

from .gathered import Gathered, Sleep
from .request import Reply, Request, Usage
from .room import prompt_ids, too_long

MOST = 2048  # requests of one call; replies are journalled when it ends
ACCEPTED = {"temperature", "top_p", "max_tokens", "seed", "stop", "presence_penalty", "frequency_penalty"}


class VllmModel(Gathered):
    """Answers with `vllm.LLM.chat`, a schema by structured outputs.

    model: Hub id or folder. max_tokens: of an answer where the request says nothing. options: of `vllm.LLM`. A request
    is sampled with a seed of its own content. An answer ends where the model's context does; a prompt that fills it has
    failed. Raises `RequestError` where vLLM is missing or cannot run the model, and for sampling fields that are not
    known here.
    """

    def __init__(self, model: str, *, max_tokens: int = 512, most: int = MOST, **options: Any) -> None:
        try:
            vllm = importlib.import_module("vllm")
        except ImportError:
            raise RequestError(
                "the backend vllm needs vLLM: install with the extra [vllm], in an environment without llm-compressor"
            ) from None
        super().__init__(most, linger=0.05)
        self.vllm, self.max_tokens = vllm, max_tokens
        try:
            self.model = vllm.LLM(model=model, **options)
        except (OSError, RuntimeError, ValueError) as error:
            raise RequestError(f"vLLM cannot run {model} here, is there a GPU? It said: {error}") from error
        self.tokenizer, self.context = self.model.get_tokenizer(), self.model.llm_engine.model_config.max_model_len

    async def run(self, requests: Sequence[Request], sleep: Sleep) -> AsyncIterator[tuple[int, Reply]]:
        lengths = [len(prompt_ids(self.tokenizer, request)) for request in requests]
        fits = []
        for place, length in enumerate(lengths):
            if length < self.context:
                fits.append(place)
            else:  # `chat` would refuse all for it
                yield place, too_long(length, self.context)
        how = [self._sampling(requests[place], self.context - lengths[place]) for place in fits]
        messages = [[dict(message) for message in requests[place].messages] for place in fits]
        began = time.monotonic()
        found = await asyncio.to_thread(self.model.chat, messages, sampling_params=how, use_tqdm=False) if fits else []
        seconds = round(time.monotonic() - began, 3)
        for place, one in zip(fits, found):
            said = one.outputs[0]
            usage = Usage(len(one.prompt_token_ids or ()), len(said.token_ids), one.num_cached_tokens or 0)
            yield place, Reply(said.text, said.finish_reason or "", usage, requests[place].model, seconds=seconds)

    def _sampling(self, request: Request, room: int) -> Any:
        unknown = set(request.sampling) - ACCEPTED
        if unknown:
            raise RequestError(
                f"the backend vllm cannot take {', '.join(sorted(unknown))}; it takes {sorted(ACCEPTED)}"
            )
        how: dict[str, Any] = {"temperature": 0.0, "max_tokens": self.max_tokens, **request.sampling}
        how["max_tokens"] = min(how["max_tokens"], room)
        if how["temperature"]:
            how["seed"] = request.seed
        if request.schema is not None:
            how["structured_outputs"] = self.vllm.sampling_params.StructuredOutputsParams(json=dict(request.schema))
        return self.vllm.SamplingParams(**how)
