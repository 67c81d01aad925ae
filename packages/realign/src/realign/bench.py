"""The client's speed beside the published way, one blocking request after the other, on a server with a fixed latency.

The server runs in a process of its own (`python -m realign.bench SECONDS`) and answers every request after so long.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from instruct_data import Journal
from instruct_data.llm import Client, Endpoint, stream
from instruct_data.llm import Request as Asked

BODY = json.dumps({
    "choices": [{"message": {"role": "assistant", "content": "words " * 100}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 500, "completion_tokens": 100},
}).encode()  # fmt: skip
REPLY = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)


async def serve(seconds: float) -> None:
    """Answer for ever; says its port first."""

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                size = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
                await reader.readexactly(int(size.partition(b":")[2]))
                await asyncio.sleep(seconds)
                writer.write(REPLY)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(connection, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextmanager
def serving(seconds: float) -> Iterator[str]:
    command = [sys.executable, "-m", "realign.bench", str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"
    finally:
        process.kill()
        process.wait()


def measure(url: str, concurrency: int, count: int) -> tuple[float, float]:
    """Replies a second, and CPU milliseconds a reply in this process."""
    text = "A question and its answer. " * 60
    with tempfile.TemporaryDirectory() as folder, Journal(folder, {}) as journal:
        client = Client(Endpoint([url], concurrency=concurrency), journal)
        requests = [
            Asked("rewrite", "model", ({"role": "user", "content": f"{n} {text}"},), {"max_tokens": 2048})
            for n in range(count)
        ]
        began, cpu = time.monotonic(), time.process_time()
        for _ in stream(client, client.ask, requests):
            pass
        return count / (time.monotonic() - began), 1e3 * (time.process_time() - cpu) / count


def run(seconds: float, levels: list[int], rounds: int) -> dict[str, Any]:
    """A row for each number of requests in flight, the first one being the published one at a time."""
    with serving(seconds) as url:
        measure(url, 2, 2)  # imports and first connections
        one, _ = measure(url, 1, 5)
        rows = []
        for level in levels:
            rate, cpu = measure(url, level, level * rounds)
            rows.append({
                "in flight": level, "replies a second": rate, "of what is possible": rate * seconds / level,
                "times one by one": rate / one, "CPU ms a reply": cpu,
            })  # fmt: skip
    return {"latency": seconds, "one by one, replies a second": one, "speed": rows}


if __name__ == "__main__":
    asyncio.run(serve(float(sys.argv[1])))
