"""For back ends that want many requests at once: those that wait together are handed over together."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence

from .request import Reply, Request

Waiting = tuple[Request, "asyncio.Future[Reply]"]


class Gathered(ABC):
    """A back end whose `run` answers a list of requests. A list is closed when `most` wait, or when none has come for
    `linger` seconds: then everybody who could ask has asked. Lists run one after the other."""

    def __init__(self, most: int, linger: float) -> None:
        self.concurrency, self.linger = most, linger
        self._waiting: list[Waiting] = []
        self._came = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    @abstractmethod
    async def run(self, requests: Sequence[Request], sleep: Callable[[float], Awaitable[None]]) -> Sequence[Reply]:
        """A reply for each request, in their order."""

    async def complete(
        self, request: Request, may_send: Callable[[], None], sleep: Callable[[float], Awaitable[None]]
    ) -> Reply:
        may_send()
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        self._came.set()
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work(sleep))
        return await future

    async def _work(self, sleep: Callable[[float], Awaitable[None]]) -> None:
        while self._waiting:
            await self._quiet()
            batch, self._waiting = self._waiting[: self.concurrency], self._waiting[self.concurrency :]
            try:
                replies = await self.run([request for request, _ in batch], sleep)
            except Exception as error:
                for _, future in batch + self._waiting:
                    future.set_exception(error)
                self._waiting = []
                return
            for (_, future), reply in zip(batch, replies, strict=True):
                future.set_result(reply)
            await asyncio.sleep(0)

    async def _quiet(self) -> None:
        while len(self._waiting) < self.concurrency:
            self._came.clear()
            try:
                await asyncio.wait_for(self._came.wait(), self.linger)
            except TimeoutError:
                return

    async def close(self) -> None:
        if self._worker is not None:
            self._worker.cancel()
