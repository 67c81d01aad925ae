"""Where the models are, what may be spent on them, and where all that they answered is kept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from instruct_data.journal import Journal
from model_hooks.errors import RequestError

from .client import Backend, Client
from .cost import Ledger, Prices
from .endpoint import Endpoint, read_key
from .request import Request
from .structured import Form, ParseError

BACKENDS = ("server", "batch", "local", "vllm", "ray", "ray-http")


@dataclass(frozen=True)
class Service:
    """Where the models are: an endpoint, its key, its limits, and where everything that was answered is kept.

    method: whose journal it is; another method's is refused. backend: server, batch (the batch API), local or vllm (in
        this process), ray (vLLM engines on a Ray cluster) or ray-http (servers, from a Ray cluster), with so many
        `workers`. prices: as of `Prices`. structured: auto, schema or labels.
    """

    journal: Path
    method: str
    base_url: tuple[str, ...] = ("https://api.openai.com/v1",)
    key_variable: str = "OPENAI_API_KEY"
    key_file: Path | None = None
    backend: str = "server"
    concurrency: int = 32
    timeout: float = 120.0
    attempts: int = 8
    requests_per_minute: float = 0
    tokens_per_minute: float = 0
    prices: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    max_cost: float | None = None
    max_tokens: int | None = None
    max_requests: int | None = None
    workers: int = 1
    structured: str = "auto"
    writer: str = "0"
    fsync_each: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("backend", self.backend, BACKENDS),
            ("structured", self.structured, ("auto", "schema", "labels")),
        ):
            if value not in known:
                raise RequestError(f"{name} {value!r}; choose {', '.join(known)}")
        if self.backend == "batch" and (self.max_cost, self.max_tokens) != (None, None):
            raise RequestError(
                "backend batch says what it used when a batch has ended, too late for max-cost or max-tokens: limit "
                "max-requests, after a look at --dry-run"
            )

    @property
    def settings(self) -> dict[str, object]:
        """Of the journal."""
        return {"journal": self.method, "version": 1}

    def ledger(self) -> Ledger:
        return Ledger(
            Prices(self.prices), max_cost=self.max_cost, max_tokens=self.max_tokens, max_requests=self.max_requests
        )

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

            from .batch import BatchEndpoint

            key = read_key(self.key_variable, self.key_file)
            return BatchEndpoint(AsyncOpenAI(api_key=key, base_url=self.base_url[0]), journal)
        if self.backend == "vllm":
            from .vllm_model import VllmModel

            return VllmModel(model)
        if self.backend in ("ray", "ray-http"):
            from .ray_data import RayData

            urls = self.base_url if self.backend == "ray-http" else ()
            return RayData(
                model, urls, read_key(self.key_variable, self.key_file), workers=self.workers,
                concurrency=self.concurrency, attempts=self.attempts,
            )  # fmt: skip
        from model_hooks.loading import load_placed

        from .local import LocalModel

        return LocalModel(*load_placed(model, "auto"))

    @contextmanager
    def client(self, model: str, ledger: Ledger) -> Iterator[Client]:
        seconds = {"sync_seconds": 0.0} if self.fsync_each else {}
        with Journal(self.journal, self.settings, self.writer, **seconds) as kept:
            yield Client(self.make(model, kept), kept, ledger)

    def forms(self, client: Client, probe: Request, form: Form) -> Callable[[], Awaitable[bool]]:
        """Whether replies can be asked for by schema: as the user says, or (auto) as one request, `probe`, shows: its
        reply must be the object of `form` and nothing else."""
        if self.structured != "auto" or self.backend == "local":
            fixed = self.structured == "schema"

            async def known() -> bool:
                return fixed

            return known
        found: list[asyncio.Task[bool]] = []

        async def probed() -> bool:
            if not found:
                found.append(asyncio.create_task(_keeps_to(client, probe, form)))
            return await asyncio.shield(found[0])

        return probed


async def _keeps_to(client: Client, probe: Request, form: Form) -> bool:
    reply = await client.ask(probe)
    try:
        form.parse(reply.text if reply.text is not None else "")
        json.loads(reply.text or "")
    except (ParseError, ValueError):
        return False
    return True
