"""The one way to a model: what is in the journal is not asked again, what is asked twice is sent once.

with Journal("run", {}) as journal:
    client = Client(Endpoint(["http://127.0.0.1:8000/v1"]), journal)
    for row in stream(client, rewrite, records):    # async def rewrite(record): ... await client.ask(Request(...))
        ...
"""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeVar

from instruct_data.journal import Journal

from .cost import Ledger
from .errors import Interrupted, Stopped
from .request import Reply, Request

Item = TypeVar("Item")
Result = TypeVar("Result")
# Records for each request that may be in flight: begun and not yet given out, since results come in order and a slow
# one must not stop the rest; and of those still at work, so that some wait for a place and none stays free.
AHEAD, AT_WORK = 16, 4


class Backend(Protocol):
    """What answers requests. `may_send()` is called before each attempt, `sleep` to wait; both raise at the end."""

    concurrency: int

    async def complete(
        self, request: Request, may_send: Callable[[], None], sleep: Callable[[float], Awaitable[None]]
    ) -> Reply: ...

    async def close(self) -> None: ...


class Client:
    """Requests through a journal to a back end, accounted for.

    A reply is in the journal before anybody sees it. A failure is not journalled: the next run tries again. The first
    exception of any request, such as a budget that is reached, a key that is refused or a full disk, stops the client:
    what is in flight is waited for and kept, what has not been sent raises the same.
    """

    def __init__(self, backend: Backend, journal: Journal, ledger: Ledger | None = None) -> None:
        self.backend, self.journal, self.ledger = backend, journal, ledger or Ledger()
        self.stopped: BaseException | None = None
        self._end = asyncio.Event()
        self._sending: dict[str, asyncio.Task[Reply]] = {}

    def stop(self, reason: BaseException) -> None:
        """Send nothing more; whoever asks gets `reason`."""
        if self.stopped is None:
            self.stopped = reason
            self._end.set()

    async def ask(self, request: Request) -> Reply:
        """The reply, from the journal or the back end. Raises what stopped the client."""
        key = request.key
        stored = self.journal.get(key)
        if stored is not None:
            self.ledger.journalled += 1
            return Reply.restored(stored)
        task = self._sending.get(key)
        if task is None:
            task = self._sending[key] = asyncio.create_task(self._send(request))
            task.add_done_callback(lambda _: self._sending.pop(key, None))
        return await asyncio.shield(task)

    async def _send(self, request: Request) -> Reply:
        try:
            self._may_start(request)
            reply = await self.backend.complete(request, lambda: self._count(request), self._sleep)
            if reply.text is not None:
                self.ledger.add(request, reply)
                self.journal.append(request.key, reply.stored())
            return reply
        except BaseException as error:
            self.stop(error)
            raise

    def _may_start(self, request: Request) -> None:
        if self.stopped is not None:
            raise self.stopped
        self.ledger.check(request.model)

    def _count(self, request: Request) -> None:
        self._may_start(request)
        self.ledger.sent += 1

    async def _sleep(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._end.wait(), seconds)
        if self.stopped is not None:
            raise self.stopped


async def ordered(
    function: Callable[[Item], Awaitable[Result]], items: Iterable[Item], ahead: int, at_work: int
) -> AsyncGenerator[list[Result], None]:
    """`function` of every item in the items' order, those that are ready together; up to `at_work` at once, and no
    further than `ahead` beyond the oldest that is not done.

    The first exception ends it, after all that is at work has ended.
    """
    tasks: deque[asyncio.Task[Result]] = deque()
    source, working, ended = iter(items), 0, asyncio.Event()

    def end(_: asyncio.Task[Result]) -> None:
        nonlocal working
        working -= 1
        ended.set()

    try:
        while True:
            while len(tasks) < ahead and working < at_work and (item := next(source, _END)) is not _END:
                tasks.append(asyncio.ensure_future(function(item)))
                tasks[-1].add_done_callback(end)
                working += 1
                if working % 8 == 0:
                    await asyncio.sleep(0)  # let those that have begun send
            ready = []
            while tasks and tasks[0].done():
                ready.append(tasks.popleft().result())
            if ready:
                yield ready
            elif tasks:
                ended.clear()
                await ended.wait()
            else:
                return
    finally:
        await asyncio.gather(*tasks, return_exceptions=True)


_END: Any = object()


def stream(
    client: Client, function: Callable[[Item], Awaitable[Result]], items: Iterable[Item], *, ahead: int = 0
) -> Iterator[Result]:
    """`function` of every item, in order and as a plain iterator, in constant memory.

    ahead: items begun and not yet given out; 0 for `AHEAD` times the back end's concurrency. Ctrl-C lets what is in
    flight end, so that nothing paid for is lost, and raises `KeyboardInterrupt`; a second one does not wait.
    """
    with asyncio.Runner() as runner:
        most = client.backend.concurrency
        results = ordered(function, items, ahead or AHEAD * most, AT_WORK * most)
        loop = runner.get_loop()
        try:
            with _interrupts(client, loop):
                while True:
                    try:
                        with _collecting_rarely():
                            ready = loop.run_until_complete(anext(results))
                    except StopAsyncIteration:
                        return
                    except Interrupted:
                        raise KeyboardInterrupt from None
                    yield from ready
        finally:
            client.stop(Stopped("the results are no longer wanted"))
            loop.run_until_complete(results.aclose())
            loop.run_until_complete(client.backend.close())


@contextmanager
def _collecting_rarely() -> Iterator[None]:
    """What is in flight is many objects and no garbage: looking through it every 700 allocations took a quarter of the
    time. A program that has its collector look more rarely still, or never, keeps it so."""
    before = gc.get_threshold()
    gc.set_threshold(before[0] and max(before[0], 10_000), *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextmanager
def _interrupts(client: Client, loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """SIGINT stops the client; a second one is a plain KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def interrupt(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        loop.call_soon_threadsafe(client.stop, Interrupted("interrupted"))

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
