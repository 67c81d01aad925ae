"""What was used, what it cost, and where to stop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from model_hooks.errors import RequestError

from .errors import BudgetReached
from .request import Reply, Request, Usage

PRICE_KEYS = ("prompt", "completion", "cached")
CHARACTERS_A_TOKEN = 3.5  # of English and code; only for estimates before the first request


@dataclass(frozen=True)
class Prices:
    """Price of a million tokens by model, in the user's currency. None are built in: they change.

    Keys are prompt, completion and, where it differs, cached. A model without a price costs `None`, and a budget of
    cost cannot be kept with it.
    """

    by_model: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for model, prices in self.by_model.items():
            if not isinstance(prices, Mapping) or not {"prompt", "completion"} <= set(prices) <= set(PRICE_KEYS):
                raise RequestError(f"the price of {model} needs prompt and completion, and may have cached: {prices}")
            for kind, price in prices.items():
                if isinstance(price, bool) or not isinstance(price, int | float) or not 0 <= price < math.inf:
                    raise RequestError(f"the price of {model}, {kind}, is {price!r}; it must be a number from 0 on")

    def of(self, model: str, usage: Usage) -> float | None:
        """What `usage` of `model` costs."""
        price = self.by_model.get(model)
        if price is None:
            return None
        cached = price.get("cached", price["prompt"])
        fresh = usage.prompt - usage.cached
        return (fresh * price["prompt"] + usage.cached * cached + usage.completion * price["completion"]) / 1e6


@dataclass
class Line:
    """One line of the account: a stage with a model."""

    requests: int = 0
    usage: Usage = field(default_factory=Usage)
    cost: float | None = 0.0

    def add(self, usage: Usage, cost: float | None, requests: int) -> None:
        self.requests += requests
        self.usage += usage
        self.cost = None if cost is None or self.cost is None else self.cost + cost


class Ledger:
    """What this run sent and got, by stage and model, and how much of it the limits allow.

    max_cost needs prices; max_requests counts attempts. What is in flight when a limit is reached is still paid.
    """

    def __init__(
        self,
        prices: Prices | None = None,
        *,
        max_cost: float | None = None,
        max_tokens: int | None = None,
        max_requests: int | None = None,
    ) -> None:
        self.prices = prices or Prices()
        self.max_cost, self.max_tokens, self.max_requests = max_cost, max_tokens, max_requests
        self.lines: dict[tuple[str, str], Line] = {}
        self.sent = self.journalled = 0

    def check(self, model: str) -> None:
        """Raise `BudgetReached` where no further request may be sent, `RequestError` for a price that is missing."""
        if self.max_cost is not None and model not in self.prices.by_model:
            raise RequestError(f"a limit of cost needs the price of {model}: give it in the file of prices")
        if self.max_cost is None and self.max_tokens is None and self.max_requests is None:
            return
        total = self.total
        for name, limit, used in (
            ("cost", self.max_cost, total.cost or 0.0),
            ("tokens", self.max_tokens, total.usage.total),
            ("requests", self.max_requests, self.sent),
        ):
            if limit is not None and used >= limit:
                raise BudgetReached(
                    f"the limit of {limit:g} {name} is reached ({used:g} used); give a higher one to go on"
                )

    def add(self, request: Request, reply: Reply) -> None:
        """Account for a reply that was paid for."""
        cost = self.prices.of(request.model, reply.usage)
        self.lines.setdefault((request.stage, request.model), Line()).add(reply.usage, cost, 1)

    @property
    def total(self) -> Line:
        total = Line()
        for line in self.lines.values():
            total.add(line.usage, line.cost, line.requests)
        return total

    def rows(self) -> list[dict[str, Any]]:
        """The account as a table."""
        return [
            {
                "stage": stage,
                "model": model,
                "replies": line.requests,
                "prompt tokens": line.usage.prompt,
                "completion tokens": line.usage.completion,
                "cached tokens": line.usage.cached,
                "cost": line.cost,
            }
            for (stage, model), line in self.lines.items()
        ]


def estimate(request: Request) -> Usage:
    """Tokens that a request may use, by its characters and its max_tokens: for a look before the first request."""
    characters = sum(len(message["content"]) + 12 for message in request.messages)
    return Usage(math.ceil(characters / CHARACTERS_A_TOKEN), int(request.sampling.get("max_tokens") or 0))
