"""What kind of task is a question? Three answers of one interface (the paper's step 1, task classification)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from instruct_data.llm import Client, ParseError, Request
from instruct_data.llm.structured import check, first_object
from model_hooks.errors import RequestError

from .linear import LinearClassifier
from .prompts import VERSION, classifying, task_schema
from .taxonomy import Taxonomy

SAMPLING = {"temperature": 0, "top_p": 1, "max_tokens": 50}  # the published ones


class Classifier(Protocol):
    """`await classifier(question)`: the task's name, and its probability where one is defined; None for a name where
    the request failed.

    fallbacks: how often the answer named no task, so that the default was taken.
    """

    fallbacks: int

    async def __call__(self, question: str) -> tuple[str | None, float | None]: ...


@dataclass
class Local:
    """A `LinearClassifier`. Raises `RequestError` where it knows tasks that the taxonomy does not have."""

    classifier: LinearClassifier
    taxonomy: Taxonomy
    fallbacks: int = 0

    async def __call__(self, question: str) -> tuple[str, float | None]:
        strange = [name for name in self.classifier.names if name not in self.taxonomy.tasks]
        if strange:
            raise RequestError(f"the classifier knows {strange[0]}, no task of the taxonomy; train one for it")
        return self.classifier.predict(question)


@dataclass
class Asked:
    """A chat model, greedily. `structured`: under a JSON schema that admits nothing but the tasks' names."""

    client: Client
    model: str
    taxonomy: Taxonomy
    structured: Callable[[], Awaitable[bool]]
    fallbacks: int = 0

    async def __call__(self, question: str) -> tuple[str | None, float | None]:
        schema = task_schema(self.taxonomy) if await self.structured() else None
        messages = classifying(question, self.taxonomy)
        reply = await self.client.ask(Request("classify", self.model, messages, SAMPLING, schema, VERSION))
        if reply.text is None:
            return None, None
        name = self.taxonomy.find(_named(reply.text, schema))
        if name is None:
            self.fallbacks += 1
        return name or self.taxonomy.default, None


def _named(text: str, schema: Any) -> str:
    found = first_object(text)
    if schema is None or found is None:
        return text
    try:
        check(found, schema)
    except ParseError:
        return str(found.get("task", text))
    return str(found["task"])


@dataclass
class Likeliest:
    """A causal model in this process: the name that it finds likeliest after the prompt, so no other can come out.

    Names are compared by the mean log-likelihood of their tokens; the probability is the softmax over the names' sums.
    """

    model: Any
    tokenizer: Any
    taxonomy: Taxonomy
    batch_size: int = 16
    fallbacks: int = 0
    _names: list[list[int]] = field(default_factory=list)

    async def __call__(self, question: str) -> tuple[str, float | None]:
        import torch

        names = list(self.taxonomy.tasks)
        if not self._names:
            self._names = [self.tokenizer(f" {n}", add_special_tokens=False)["input_ids"] for n in names]
        system, user = (message["content"] for message in classifying(question, self.taxonomy))
        prompt = self.tokenizer(f"{system}\n\n{user}\n\nTask:")["input_ids"]
        sums = torch.tensor(self._log_likelihoods(prompt))
        best = int((sums / torch.tensor([len(name) for name in self._names])).argmax())
        return names[best], float(sums.softmax(0)[best])

    def _log_likelihoods(self, prompt: Sequence[int]) -> list[float]:
        """Of each name after the prompt, summed over its tokens."""
        import torch

        found: list[float] = []
        for start in range(0, len(self._names), self.batch_size):
            names = self._names[start : start + self.batch_size]
            longest = max(map(len, names))
            rows = [[*prompt, *name, *[0] * (longest - len(name))] for name in names]  # padding after what is scored
            with torch.inference_mode():
                ids = torch.tensor(rows, device=self.model.device)  # [names, prompt + longest]
                logits = self.model(input_ids=ids, use_cache=False).logits[:, len(prompt) - 1 : -1]
                scores = logits.float().log_softmax(-1).gather(2, ids[:, len(prompt) :, None])[..., 0]
            found += [float(row[: len(name)].sum()) for row, name in zip(scores, names)]
        return found
