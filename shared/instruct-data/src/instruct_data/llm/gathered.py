"""For back ends that want many requests at once: those that wait together are handed over together."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from .request import Reply, Request

Waiting = tuple[Request, "asyncio.Future[Reply]"]
Sleep = Callable[[float], Awaitable[None]]


class Gathered(ABC):
    """A back end whose `run` answers a list of requests. A list is closed when `most` wait, or when none has come for
    `linger` seconds: then everybody who could ask has asked. Lists run one after the other."""

    def __init__(self, most: int, linger: float) -> None:
        self.concurrency, self.linger = most, linger
        self._waiting: list[Waiting] = []
        self._came = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    @abstractmethod
    def run(self, requests: Sequence[Request], sleep: Sleep) -> AsyncIterator[tuple[int, Reply]]:
        """A reply for each request, with its place among them, as they come: each is journalled at once."""

    async def complete(self, request: Request, may_send: Callable[[], None], sleep: Sleep) -> Reply:
        may_send()
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        self._came.set()
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work(sleep))
        return await future

    async def _work(self, sleep: Sleep) -> None:
        while self._waiting:
            await self._quiet()
            batch, self._waiting = self._waiting[: self.concurrency], self._waiting[self.concurrency :]
            try:
                async for place, reply in self.run([request for request, _ in batch], sleep):
                    batch[place][1].set_result(reply)
                    await asyncio.sleep(0)
                if any(not future.done() for _, future in batch):
                    raise RuntimeError(f"{type(self).__name__} left requests without a reply; please report it")
            except Exception as error:
                for _, future in batch + self._waiting:
                    if not future.done():
                        future.set_exception(error)
                self._waiting = []
                return

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
