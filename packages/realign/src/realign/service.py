"""Where the models are, what may be spent on them, and where all that they answered is kept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from instruct_data import Journal
from instruct_data.llm import Client, Endpoint, Ledger, ParseError, Prices, Request, read_key
from instruct_data.llm.client import Backend
from model_hooks.errors import RequestError

from .prompts import REVISION, VERSION, rewriting

SETTINGS = {"journal": "realign", "version": 1}


@dataclass(frozen=True)
class Service:
    """Where the models are: an endpoint, its key, its limits, and where everything that was answered is kept."""

    journal: Path
    base_url: tuple[str, ...] = ("https://api.openai.com/v1",)
    key_variable: str = "OPENAI_API_KEY"
    key_file: Path | None = None
    backend: str = "server"
    concurrency: int = 32
    timeout: float = 120.0
    attempts: int = 8
    requests_per_minute: float = 0
    tokens_per_minute: float = 0
    prices: Path | None = None
    max_cost: float | None = None
    max_tokens: int | None = None
    max_requests: int | None = None
    structured: str = "auto"
    writer: str = "0"
    fsync_each: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("backend", self.backend, ("server", "batch", "local")),
            ("structured", self.structured, ("auto", "schema", "labels")),
        ):
            if value not in known:
                raise RequestError(f"{name} {value!r}; choose {', '.join(known)}")

    def ledger(self) -> Ledger:
        from paper_tables.yamlfile import read_yaml

        prices = Prices(read_yaml(self.prices)) if self.prices else Prices()
        return Ledger(prices, max_cost=self.max_cost, max_tokens=self.max_tokens, max_requests=self.max_requests)

    def make(self, model: str, journal: Journal) -> Backend:
        """The back end."""
        if self.backend == "server":
            return Endpoint(
                self.base_url, read_key(self.key_variable, self.key_file), concurrency=self.concurrency,
                timeout=self.timeout, attempts=self.attempts, requests_per_minute=self.requests_per_minute,
                tokens_per_minute=self.tokens_per_minute,
            )  # fmt: skip
        if self.backend == "batch":
            from openai import AsyncOpenAI

            from instruct_data.llm.batch import BatchEndpoint

            key = read_key(self.key_variable, self.key_file)
            return BatchEndpoint(AsyncOpenAI(api_key=key, base_url=self.base_url[0]), journal)
        from instruct_data.llm.local import LocalModel
        from model_hooks.loading import load_placed

        return LocalModel(*load_placed(model, "auto"))

    @contextmanager
    def client(self, model: str, ledger: Ledger) -> Iterator[Client]:
        with Journal(self.journal, SETTINGS, self.writer, **({"sync_seconds": 0} if self.fsync_each else {})) as kept:
            yield Client(self.make(model, kept), kept, ledger)

    def forms(self, client: Client, model: str) -> Callable[[], Awaitable[bool]]:
        """Whether replies can be asked for by schema: as the user says, or (auto) as one request shows."""
        if self.structured != "auto" or self.backend == "local":
            fixed = self.structured == "schema"

            async def known() -> bool:
                return fixed

            return known
        found: list[asyncio.Task[bool]] = []

        async def probed() -> bool:
            if not found:
                found.append(asyncio.create_task(_probe(client, model)))
            return await asyncio.shield(found[0])

        return probed


async def _probe(client: Client, model: str) -> bool:
    """Does the endpoint keep to a schema? It is asked for a rewriting, and must give the object and nothing else."""
    messages = rewriting("What is 1 + 1?", "2", "One sentence.")
    sampling = {"temperature": 0, "max_tokens": 256}
    reply = await client.ask(Request("probe", model, messages, sampling, REVISION.schema, VERSION))
    try:
        REVISION.parse(reply.text if reply.text is not None else "")
        json.loads(reply.text or "")
    except (ParseError, ValueError):
        return False
    return True
