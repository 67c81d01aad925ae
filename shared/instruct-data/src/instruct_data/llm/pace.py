"""How fast requests go, on a server of this machine whose replies take a known time.

The server runs in a process of its own: `python -m instruct_data.llm.pace SECONDS [EVERY TIMES]` answers every request
after so many seconds, and one in EVERY, by chance, TIMES as late.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from random import Random
from typing import Any, NamedTuple, cast

from instruct_data.journal import Journal

from .client import Client, stream
from .endpoint import Endpoint
from .request import Reply, Request

BODY = json.dumps({
    "choices": [{"message": {"role": "assistant", "content": "words " * 100}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 500, "completion_tokens": 100},
}).encode()  # fmt: skip
REPLY = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
Way = Callable[[Client, Sequence[Request]], None]


class Answering(asyncio.Protocol):
    """One connection to the server: `delays` says after how many seconds each request is answered."""

    def __init__(self, delays: Iterator[float]) -> None:
        self._delays, self._received = delays, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if end and len(body) >= int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0]):
            self._received = b""
            asyncio.get_running_loop().call_later(next(self._delays), self._transport.write, REPLY)


def delays(seconds: float, every: int = 0, times: float = 1.0) -> Iterator[float]:
    """For each reply the seconds until it comes; of 20 · EVERY replies 20 are late, always the same.

    Of forty batches of ten, with one in twenty late, sixteen have a late one: as many as by chance, 40 · (1 - 0.95^10).
    """
    late = set(Random(1).sample(range(20 * every), 20)) if every else set()
    for number in cycle(range(20 * every or 1)):
        yield seconds * times if number in late else seconds


async def serve(seconds: float, every: int = 0, times: float = 1.0) -> None:
    """Answer for ever; says its port first. Requests come one at a time on a connection, as this client sends them."""
    coming = delays(seconds, every, times)
    server = await asyncio.get_running_loop().create_server(lambda: Answering(coming), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextmanager
def paced(seconds: float, every: int = 0, times: float = 1.0) -> Iterator[str]:
    """The base URL of such a server, for as long as the block lasts."""
    command = [sys.executable, "-m", __name__, str(seconds), str(every), str(times)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"
    finally:
        process.kill()
        process.wait()


def in_order(client: Client, requests: Sequence[Request]) -> None:
    """As every verb does it: as many in flight as there may be."""
    for _ in stream(client, client.ask, requests):
        pass


def by_barrier(client: Client, requests: Sequence[Request]) -> None:
    """In batches of as many as may be in flight, each waited for: the way of scripts that gather."""

    async def batch(part: Sequence[Request]) -> None:
        await asyncio.gather(*(client.ask(request) for request in part))

    size = client.backend.concurrency
    parts = [requests[start : start + size] for start in range(0, len(requests), size)]
    for _ in stream(client, batch, parts, ahead=1):
        pass


class Pace(NamedTuple):
    """Replies a second, from start to end and between the first and the last tenth of them; CPU milliseconds a reply in
    this process."""

    rate: float
    midst: float
    cpu: float


class Watched(Endpoint):
    """An endpoint that remembers when each reply came."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.came: list[float] = []

    async def complete(
        self, request: Request, may_send: Callable[[], None], sleep: Callable[[float], Awaitable[None]]
    ) -> Reply:
        reply = await super().complete(request, may_send, sleep)
        self.came.append(time.monotonic())
        return reply


def measure(url: str, concurrency: int, replies: int, way: Way = in_order) -> Pace:
    """How fast so many replies come."""
    text = "A question and its answer. " * 60
    with tempfile.TemporaryDirectory() as folder, Journal(folder, {}) as journal:
        endpoint = Watched([url], concurrency=concurrency)
        requests = [
            Request("rewrite", "model", ({"role": "user", "content": f"{n} {text}"},), {"max_tokens": 2048})
            for n in range(replies)
        ]
        began, cpu = time.monotonic(), time.process_time()
        way(Client(endpoint, journal), requests)
        seconds, used = time.monotonic() - began, time.process_time() - cpu
    came, first, last = endpoint.came, replies // 10, replies - 1 - replies // 10
    midst = (last - first) / (came[last] - came[first]) if last > first else replies / seconds
    return Pace(replies / seconds, midst, 1e3 * used / replies)


if __name__ == "__main__":
    given = [float(text) for text in sys.argv[1:]]
    asyncio.run(serve(given[0], int(given[1]) if given[1:] else 0, given[2] if given[2:] else 1.0))
