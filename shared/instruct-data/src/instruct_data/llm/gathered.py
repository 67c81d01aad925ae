"""For back ends that want many requests at once: those that wait together are handed over together."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import NamedTuple

from .request import Reply, Request

Sleep = Callable[[float], Awaitable[None]]


class Waiting(NamedTuple):
    """A request that has not been handed over, or has no reply yet."""

    request: Request
    may_send: Callable[[], None]
    future: asyncio.Future[Reply]

    def let_go(self) -> bool:
        """Whether it may be sent now; if not, whoever waits for it is told why."""
        try:
            self.may_send()
        except Exception as error:
            self.future.set_exception(error)
            return False
        return True


class Gathered(ABC):
    """A back end whose `run` answers a list of requests. A list is closed when `most` wait, or when none has come for
    `linger` seconds: then everybody who could ask has asked. Lists run one after the other, each in `groups`; a request
    is sent, and may be refused by a budget or Ctrl-C, when its group is handed over."""

    def __init__(self, most: int, linger: float) -> None:
        self.concurrency, self.linger = most, linger
        self._waiting: list[Waiting] = []
        self._came = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    @abstractmethod
    def run(self, requests: Sequence[Request], sleep: Sleep) -> AsyncIterator[tuple[int, Reply]]:
        """A reply for each request, with its place among them, as they come: each is journalled at once."""

    def groups(self, requests: Sequence[Request]) -> Iterable[Sequence[int]]:
        """The places of what `run` gets at once: all of them."""
        return [range(len(requests))]

    async def complete(self, request: Request, may_send: Callable[[], None], sleep: Sleep) -> Reply:
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting.append(Waiting(request, may_send, future))
        self._came.set()
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work(sleep))
        return await future

    async def _work(self, sleep: Sleep) -> None:
        while self._waiting:
            await self._quiet()
            batch, self._waiting = self._waiting[: self.concurrency], self._waiting[self.concurrency :]
            try:
                for places in self.groups([one.request for one in batch]):
                    await self._hand_over([batch[place] for place in places], sleep)
                if any(not one.future.done() for one in batch):
                    raise RuntimeError(f"{type(self).__name__} left requests without a reply; please report it")
            except Exception as error:
                for one in batch + self._waiting:
                    if not one.future.done():
                        one.future.set_exception(error)
                self._waiting = []
                return

    async def _hand_over(self, group: Sequence[Waiting], sleep: Sleep) -> None:
        sent = [one for one in group if one.let_go()]
        if sent:
            async for place, reply in self.run([one.request for one in sent], sleep):
                sent[place].future.set_result(reply)
                await asyncio.sleep(0)  # it is journalled and accounted for before the next group is let go

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
