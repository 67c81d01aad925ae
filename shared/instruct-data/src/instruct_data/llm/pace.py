"""How fast requests go, on a server of this machine whose replies take a known time.

The server runs in a process of its own: `python -m instruct_data.llm.pace SECONDS [EVERY TIMES]` answers every request
after so many seconds, and each EVERYth one TIMES as late.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from instruct_data.journal import Journal

from .client import Client, stream
from .endpoint import Endpoint
from .request import Request

BODY = json.dumps({
    "choices": [{"message": {"role": "assistant", "content": "words " * 100}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 500, "completion_tokens": 100},
}).encode()  # fmt: skip
REPLY = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
Way = Callable[[Client, Sequence[Request]], None]


async def serve(seconds: float, every: int = 0, times: float = 1.0) -> None:
    """Answer for ever; says its port first."""
    served = 0

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal served
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                size = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
                await reader.readexactly(int(size.partition(b":")[2]))
                served += 1
                await asyncio.sleep(seconds * (times if every and served % every == 0 else 1))
                writer.write(REPLY)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(connection, "127.0.0.1", 0)
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


def measure(url: str, concurrency: int, count: int, way: Way = in_order) -> tuple[float, float]:
    """Replies a second, and CPU milliseconds a reply in this process."""
    text = "A question and its answer. " * 60
    with tempfile.TemporaryDirectory() as folder, Journal(folder, {}) as journal:
        client = Client(Endpoint([url], concurrency=concurrency), journal)
        requests = [
            Request("rewrite", "model", ({"role": "user", "content": f"{n} {text}"},), {"max_tokens": 2048})
            for n in range(count)
        ]
        began, cpu = time.monotonic(), time.process_time()
        way(client, requests)
        return count / (time.monotonic() - began), 1e3 * (time.process_time() - cpu) / count


if __name__ == "__main__":
    given = [float(text) for text in sys.argv[1:]]
    asyncio.run(serve(given[0], int(given[1]) if given[1:] else 0, given[2] if given[2:] else 1.0))
