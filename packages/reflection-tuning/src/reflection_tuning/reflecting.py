"""One record from the original pair to the versions that the teacher makes of it (section 3.1 of both papers)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from instruct_data import Example, Record
from instruct_data.llm import Client, Request, ask_parsed
from instruct_data.llm.cost import estimate
from model_hooks.errors import RequestError

from .checks import Change, refuse
from .parsing import INSTRUCTION, RESPONSE, form_of, parse
from .prompts import VERSION, reflection
from .versions import Version, Versions, original

WHAT = {"both": ("Q", "A", "QA"), "v1": ("Q", "QA"), "instruction": ("Q",), "response": ("A",)}
WARMER = 0.3  # the second time, so that an unreadable reply is not given again
LEAST_ROOM = 64  # tokens that a reply needs at least


@dataclass(frozen=True)
class Recipe:
    """How records are reflected on. The defaults are the published ones, but for `checks` (published: none).

    what: both (the versions Q, A and QA), v1 (Q and QA), instruction (Q) or response (A). context: tokens that the
    teacher takes, prompt and reply together; 0: not known, nothing is held back.
    """

    model: str
    what: str = "both"
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 2048
    context: int = 0
    checks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.what not in WHAT:
            raise RequestError(f"what {self.what!r}; choose {', '.join(WHAT)}")
        if self.max_tokens < LEAST_ROOM or self.context < 0:
            raise RequestError(f"a reply needs {LEAST_ROOM} tokens at least, and the context a number from 0 on")

    @property
    def versions(self) -> tuple[str, ...]:
        return WHAT[self.what]


def request_for(
    recipe: Recipe, names: Sequence[str], instruction: str, answer: str, example: Example, structured: bool
) -> Request | None:
    """The request of one reflection; None where it leaves no room for a reply within the teacher's context."""
    input = example.input if instruction == example.instruction else ""
    messages = reflection(names, instruction, answer, input, history=example.history, structured=structured)
    sampling: dict[str, Any] = {"temperature": recipe.temperature, "top_p": recipe.top_p}
    stage = "reflect-instruction" if tuple(names) == INSTRUCTION else "reflect-response"
    schema = form_of(names).schema if structured else None
    most = recipe.max_tokens
    if recipe.context:
        most = min(most, recipe.context - estimate(Request(stage, recipe.model, messages)).prompt)
    if most < LEAST_ROOM:
        return None
    return Request(stage, recipe.model, messages, {**sampling, "max_tokens": most}, schema, VERSION)


@dataclass
class Reflector:
    """`await reflector(record)`: the record and its versions. `structured` says whether replies can be asked for by
    schema."""

    client: Client
    recipe: Recipe
    structured: Callable[[], Awaitable[bool]]

    async def __call__(self, record: Record) -> tuple[Record, Versions]:
        example, wanted = record.examples[-1], self.recipe.versions
        versions = {"ori": original(record)}
        if not example.response.strip() or not (example.instruction.strip() or example.input.strip()):
            empty = Version("rejected", reject_reason="empty: an instruction and an answer are needed")
            return record, versions | dict.fromkeys(wanted, empty)
        makes = {"Q": self._instruction_then, "A": self._response_alone}
        stages = [makes[name](example) for name in ("Q", "A") if name in wanted]
        # all are waited for, also where one of them ends the run: what is in flight is paid for
        for found in await asyncio.gather(*stages, return_exceptions=True):
            if isinstance(found, BaseException):
                raise found
            versions |= found
        return record, {name: versions[name] for name in ("ori", *wanted) if name in versions}

    async def _instruction_then(self, example: Example) -> dict[str, Version]:
        """Q, and QA where it is wanted: a reflection on the answer that Q has."""
        made = {"Q": await self._one(INSTRUCTION, example.instruction, example.response, example)}
        new = made["Q"]
        if "QA" in self.recipe.versions and new.usable:
            assert new.instruction is not None
            assert new.answer is not None
            made["QA"] = await self._one(RESPONSE, new.instruction, new.answer, example)
        return made

    async def _response_alone(self, example: Example) -> dict[str, Version]:
        return {"A": await self._one(RESPONSE, example.instruction, example.response, example)}

    async def _one(self, names: Sequence[str], instruction: str, answer: str, example: Example) -> Version:
        request = request_for(self.recipe, names, instruction, answer, example, await self.structured())
        if request is None:
            return Version("too_long")
        parsed = await ask_parsed(self.client.ask, request, lambda text: parse(text, names), WARMER)
        told: dict[str, Any] = {
            "request_key": parsed.requests[-1].key,
            "tokens_in": sum(reply.usage.prompt for reply in parsed.replies),
            "tokens_out": sum(reply.usage.completion for reply in parsed.replies),
        }
        if parsed.value is None:
            return Version(parsed.problem, **told)
        value, same = parsed.value, tuple(names) == RESPONSE
        new_instruction = instruction if same else value["new_instruction"]
        new_answer = value["better_answer"] if same else value["new_answer"]
        kept = None if same and instruction == example.instruction else new_instruction
        reason = refuse(Change(instruction, answer, new_instruction, new_answer, same), self.recipe.checks)
        return Version(
            "rejected" if reason else "ok", kept, new_answer, value["criticism"] or None, reason, **told,
        )  # fmt: skip
