"""One record from question and answer to the answer that is kept (the paper's step 3, reformatting)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from instruct_data import Example, Record
from instruct_data.completions import prompt_messages
from instruct_data.llm import Client, Request, ask_parsed
from instruct_data.llm.structured import Parsed
from instruct_data.schemas import question_of
from instruct_data.texts import count_words
from model_hooks.errors import RequestError

from .classify import Classifier
from .filters import Change, refuse
from .prompts import REVISION, REVISION_LENIENT, VERSION, rewriting
from .retrieval import Evidence, Retriever, evidence_for
from .reward import Reward
from .taxonomy import Task, Taxonomy

Result = TypeVar("Result")
ORIGINAL = "realign_original"  # the column of the answer as it was
SELECT = ("filter-then-longest", "longest", "first")
REWARD = "reward:"  # and a model


@dataclass(frozen=True)
class Recipe:
    """How answers are rewritten. The defaults are the published ones, but for `select` (published: longest) and
    `filters`.

    select: the candidate to keep: the longest that passes the filters, the longest, the first, or the one that passes
    and that a reward model rates highest.
    """

    model: str
    temperature: float = 0.3
    top_p: float = 1.0
    max_tokens: int = 2048
    candidates: int = 2
    select: str = "filter-then-longest"
    filters: tuple[str, ...] = ()
    adaptive: bool = True
    turns: str = "last"

    def __post_init__(self) -> None:
        if self.select not in SELECT and not self.reward_model:
            raise RequestError(f"select {self.select!r}; choose {', '.join(SELECT)} or {REWARD}MODEL")
        if self.turns not in ("last", "all", "none"):
            raise RequestError(f"turns {self.turns!r}; give last, all, or none (conversations stay as they are)")
        if self.candidates < 1 or self.max_tokens < 1:
            raise RequestError("candidates and max_tokens must be at least 1")

    def examples_of(self, record: Record) -> Sequence[Example]:
        """The answers of a record that may be rewritten."""
        if self.turns == "all":
            return record.examples
        return record.examples[-1:] if self.turns == "last" or len(record.examples) == 1 else ()

    @property
    def reward_model(self) -> str:
        """The model that rates candidates; empty where none does."""
        return self.select.removeprefix(REWARD) if self.select.startswith(REWARD) else ""

    def told(self) -> dict[str, Any]:
        """All of it, a model's folder by its name alone."""
        select = f"{REWARD}{Path(self.reward_model).name}" if self.reward_model else self.select
        return asdict(self) | {"select": select}

    @property
    def sampling(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "top_p": self.top_p, "max_tokens": self.max_tokens}


@dataclass(frozen=True)
class Outcome:
    """What became of a record.

    status: rewrite or original. category: None where the request for it failed. text: the new answer, None for an
    original. reason: why an original stays, "" for a rewrite: not_rewritten (its task never is), unsuitable (the model
    says that the format does not suit), unchanged, failed, truncated, parse_failed, rejected (reject_reason is what the
    filters said), conversation or empty. turns: where all turns are rewritten, the outcome of each answer of a
    conversation (see `realign.turns`).
    """

    status: str
    category: str | None
    category_score: float | None = None
    text: str | None = None
    reason: str = ""
    reject_reason: str | None = None
    model: str | None = None
    prompt_version: str | None = None
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float | None = None
    request_key: str | None = None
    evidence: list[str] = field(default_factory=list)
    turns: list[dict[str, Any]] | None = None

    def columns(self) -> dict[str, Any]:
        """The side columns of the record."""
        made = {f"realign_{name}": value for name, value in asdict(self).items() if name not in ("text", "turns")}
        return made | {"realign_evidence": self.evidence or None}


@dataclass
class Rewriter:
    """`await rewriter(record)`: the record and its `Outcome`. `tokens` counts those of a text."""

    client: Client
    recipe: Recipe
    taxonomy: Taxonomy
    classifier: Classifier
    retriever: Retriever | None
    structured: Callable[[], Any]
    tokens: Callable[[str], int] = count_words
    reward: Reward | None = None

    async def __call__(self, record: Record) -> tuple[Record, Outcome]:
        if self.recipe.turns != "all":
            return record, await self._answer(record, record.examples[-1])
        # each turn with the earlier ones as they were, so that all can be asked for at once
        return record, joined(await together(self._answer(record, example) for example in record.examples))

    async def _answer(self, record: Record, example: Example) -> Outcome:
        question = question_of(example)
        category, score = given_category(record.data, self.taxonomy), None
        if category is None or example is not record.examples[-1]:
            category, score = await self.classifier(question)
        if category is None:
            return Outcome("original", None, reason="failed")
        task = self.taxonomy[category]
        if not task.rewrite:
            return Outcome("original", category, score, reason="not_rewritten")
        if not example.response.strip():
            return Outcome("original", category, score, reason="empty")
        if len(record.examples) > 1 and self.recipe.turns == "none":
            return Outcome("original", category, score, reason="conversation")
        evidence = await self._evidence(record, task, question)
        return await self._rewrite(example, question, task, score, evidence)

    async def _evidence(self, record: Record, task: Task, question: str) -> list[Evidence]:
        given = given_evidence(record.data)
        if given:
            return [Evidence(text, "", rank) for rank, text in enumerate(given, 1)]
        if self.retriever is None or not task.retrieve or len(record.examples) > 1:
            return []
        return await evidence_for(question, self.retriever, self.client.journal)

    async def _rewrite(
        self, example: Example, question: str, task: Task, score: float | None, evidence: Sequence[Evidence]
    ) -> Outcome:
        structured, recipe = await self.structured(), self.recipe
        messages = rewriting(
            question, example.response, task.format, [e.text for e in evidence], history=example.history,
            adaptive=recipe.adaptive, structured=structured,
        )  # fmt: skip
        base = Request(
            "rewrite", recipe.model, messages, recipe.sampling, REVISION.schema if structured else None, VERSION
        )
        form = REVISION if structured else REVISION_LENIENT
        parsed = await together(ask_parsed(self.client.ask, r, form.parse) for r in base.candidates(recipe.candidates))
        return await self._choose(parsed, example, question, task, score, evidence)

    async def _choose(
        self, parsed: Sequence[Parsed], example: Example, question: str, task: Task, score: float | None,
        evidence: Sequence[Evidence],
    ) -> Outcome:  # fmt: skip
        """The candidate that is kept, or why none is."""
        prices = self.client.ledger.prices
        costs = [prices.of(self.recipe.model, reply.usage) for p in parsed for reply in p.replies]
        told: dict[str, Any] = {
            "category": task.name, "category_score": score, "model": self.recipe.model, "prompt_version": VERSION,
            "tokens_in": sum(reply.usage.prompt for p in parsed for reply in p.replies),
            "tokens_out": sum(reply.usage.completion for p in parsed for reply in p.replies),
            "cost": None if None in costs else sum(cost for cost in costs if cost is not None),
            "evidence": [e.text for e in evidence],
        }  # fmt: skip
        good = [(p, str(p.value["revised_response"]).strip()) for p in parsed if p.value is not None]
        if not good:
            return Outcome("original", reason=parsed[0].problem, request_key=parsed[0].requests[-1].key, **told)
        original = example.response
        names = tuple(dict.fromkeys((*task.checks, *self.recipe.filters)))
        changes = [Change(question, original, text, task.name, self.tokens(original), self.tokens(text))
                   for _, text in good]  # fmt: skip
        refused = [refuse(change, names) for change in changes]
        best = await self._best(example, changes, refused)
        chosen, text = good[best]
        told["request_key"] = chosen.requests[-1].key
        value = chosen.value or {}
        if self.recipe.adaptive and value.get("suitable") is False:
            return Outcome("original", reason="unsuitable", **told)
        if text == original.strip():
            return Outcome("original", reason="unchanged", **told)
        if refused[best] is not None:
            return Outcome("original", reason="rejected", reject_reason=refused[best], **told)
        return Outcome("rewrite", text=text, **told)

    async def _best(self, example: Example, changes: Sequence[Change], refused: Sequence[str | None]) -> int:
        """The candidate to keep; of equals the first."""
        select = self.recipe.select
        if select == "first":
            return 0
        every = range(len(changes))
        passed = every if select == "longest" else [i for i in every if refused[i] is None] or every
        if self.reward is None:
            return max(passed, key=lambda i: changes[i].rewritten_tokens)
        rated = await self.reward(prompt_messages(example), [changes[i].rewritten for i in passed])
        return passed[rated.index(max(rated))]


async def together(asked: Iterable[Awaitable[Result]]) -> list[Result]:
    """All results, in order. All are waited for, also where one of them ends the run: what is in flight is paid for."""
    found = await asyncio.gather(*asked, return_exceptions=True)
    for result in found:
        if isinstance(result, BaseException):
            raise result
    return cast("list[Result]", found)


def joined(each: Sequence[Outcome]) -> Outcome:
    """The outcome of a conversation: that of its last answer, but `rewrite` if any was, and with what all took."""
    last, costs = each[-1], [one.cost for one in each if one.request_key is not None]
    rewritten = any(one.status == "rewrite" for one in each)
    return replace(
        last, status="rewrite" if rewritten else "original", reason="" if rewritten else last.reason,
        tokens_in=sum(one.tokens_in for one in each), tokens_out=sum(one.tokens_out for one in each),
        cost=None if not costs or None in costs else sum(cost for cost in costs if cost is not None),
        turns=[asdict(one) for one in each] if len(each) > 1 else [],
    )  # fmt: skip


def given_category(data: Mapping[str, Any], taxonomy: Taxonomy) -> str | None:
    """The task that the record itself names: by `classify`, as `category`, or as ReAlign's own files do."""
    first = (data.get("items") or [{}])[0]
    for value in (data.get("realign_category"), data.get("category"), first.get("category")):
        if isinstance(value, str) and (name := taxonomy.find(value)):
            return name
    return None


def given_evidence(data: Mapping[str, Any]) -> list[str]:
    """The evidence that the record brings: from `retrieve`, or as ReAlign's own files have it."""
    first = (data.get("items") or [{}])[0]
    return [str(text) for text in data.get("realign_evidence") or first.get("evidence") or ()]
