"""Any server that speaks OpenAI's chat completions: all waiting and repeating is done here."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

from model_hooks.errors import RequestError

from .cost import estimate
from .errors import ServiceFailed
from .rate import Bucket, Sleep, Window, asked_wait, backoff
from .request import Reply, Request, reply_of
from .wire import Refused, Wire

REPEATED = (408, 409, 429)  # and 5xx
FAILURES = 20  # requests in a row that failed for good open the circuit


def read_key(variable: str = "OPENAI_API_KEY", file: str | Path | None = None) -> str:
    """The API key from `file`, or from the environment; "none" where there is none, as servers at home need none.

    Raises `RequestError` for a file that cannot be read or is empty.
    """
    if file is None:
        return os.environ.get(variable) or "none"
    try:
        key = Path(file).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"the key file {file} cannot be read ({type(error).__name__})") from None
    if not key:
        raise RequestError(f"the key file {file} is empty")
    return key


class Endpoint:
    """A back end over HTTP.

    base_urls: one, or several equal servers that take turns. concurrency: most requests in flight; 429s lower it for a
    while. requests_per_minute, tokens_per_minute: 0 for no limit of one's own. timeout: seconds of one attempt.

    Repeated are 408, 409, 429, 5xx, timeouts, broken connections and bodies that are no completion, up to `attempts`
    times; other 4xx fail at once. 401, 403, an empty quota and `FAILURES` failed requests in a row raise
    `ServiceFailed`, which ends the run.
    """

    def __init__(
        self,
        base_urls: Sequence[str],
        key: str = "none",
        *,
        concurrency: int = 32,
        timeout: float = 120.0,
        attempts: int = 8,
        requests_per_minute: float = 0,
        tokens_per_minute: float = 0,
        seed: int | None = None,
    ) -> None:
        if not base_urls or concurrency < 1 or attempts < 1 or timeout <= 0:
            raise RequestError("an endpoint needs a base URL, and concurrency, attempts and timeout above 0")
        self.base_urls, self.concurrency, self.attempts, self.timeout = tuple(base_urls), concurrency, attempts, timeout
        self.window = Window(concurrency)
        self._requests, self._tokens = Bucket(requests_per_minute), Bucket(tokens_per_minute)
        self._key, self._rng, self._failures = key, random.Random(seed), 0
        self._wires: list[Wire] = []

    async def _post(self, body: Mapping[str, Any]) -> Any:
        """What the server answers; several take turns."""
        if not self._wires:
            self._wires = [Wire(url, self._key) for url in self.base_urls]
            self._turns = cycle(self._wires)
        return await next(self._turns).post("/chat/completions", body)

    async def complete(self, request: Request, may_send: Callable[[], None], sleep: Sleep) -> Reply:
        """The reply, after as many attempts as it needs. `may_send()` is called before each, and may raise."""
        error, wait = "", 0.0
        for attempt in range(1, self.attempts + 1):
            if attempt > 1:
                await sleep(max(wait, backoff(attempt - 1, self._rng)))
            found = await self._attempt(request, may_send, sleep)
            if isinstance(found, Reply):
                self._failures = 0
                return replace(found, attempts=attempt) if attempt > 1 else found
            error, wait = found
            if wait < 0:
                break
        self._failures += 1
        if self._failures >= FAILURES:
            raise ServiceFailed(f"{FAILURES} requests in a row failed, the last one with: {error}")
        return Reply(None, attempts=attempt, error=error)

    async def _attempt(self, request: Request, may_send: Callable[[], None], sleep: Sleep) -> Reply | tuple[str, float]:
        """The reply, or what went wrong and how long the server asks to wait; -1: it would go wrong again."""
        from aiohttp import ClientError

        guess = estimate(request).total
        await self._requests.take(1, sleep)
        await self._tokens.take(guess, sleep)
        await self.window.enter()
        try:
            await self.window.opened(sleep)
            may_send()
            sent = time.monotonic()
            async with asyncio.timeout(self.timeout):
                reply = reply_of(await self._post(request.body()))
        except Refused as error:
            return self._refusal(error, sent)
        except (TimeoutError, ClientError) as error:
            return self._said(error), 0.0
        except ValueError as error:
            return f"no completion in the reply: {self._said(error)}", 0.0
        finally:
            self.window.leave()
        self.window.answered()
        self._tokens.correct(reply.usage.total - guess)
        return replace(reply, seconds=round(time.monotonic() - sent, 3))

    def _refusal(self, error: Refused, sent: float) -> tuple[str, float]:
        status, said = error.status, f"{error.status}: {self._said(error)}"
        if status in (401, 403) or "insufficient_quota" in (error.code, error.type):
            raise ServiceFailed(f"the server refuses to serve, {said}")
        if status not in REPEATED and status < 500:
            return said, -1.0
        wait = asked_wait(error.headers)
        if status == 429:
            self.window.refused(sent)
            self.window.hold(wait)
        return said, wait

    def _said(self, error: Exception) -> str:
        """An error in one line, without the key, which some servers repeat."""
        line = " ".join(str(error).split())[:300] or type(error).__name__
        return line if self._key == "none" else line.replace(self._key, "[key]")

    async def close(self) -> None:
        for wire in self._wires:
            await wire.close()
        self._wires = []
