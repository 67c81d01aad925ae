"""A scripted server of OpenAI's protocol for tests: any status, header, delay and body, and a record of what was asked.

    with Server(lambda call: answer("hello")) as server:
        ... server.url ...; server.calls

A script takes a `Call` and returns an `Answer`. `python llm_server.py SECONDS` serves from a process of its own, every
reply after so many seconds, and prints its URL.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest


@dataclass(frozen=True)
class Call:
    """A request. `number` counts all of them from 0, `times` those with the same body from 1."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    number: int
    times: int

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body)  # type: ignore[no-any-return]

    @property
    def prompt(self) -> str:
        """The last message."""
        return str(self.json["messages"][-1]["content"])


@dataclass(frozen=True)
class Answer:
    body: bytes
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=lambda: {"content-type": "application/json"})
    seconds: float = 0.0  # before it is sent; None of it is sent if the connection is cut
    cut: bool = False  # close the connection instead


def answer(text: str, seconds: float = 0.0, finish: str = "stop", prompt: int = 10, completion: int = 5) -> Answer:
    """A chat completion."""
    made = {
        "id": "x", "object": "chat.completion", "created": 1, "model": "fake",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}],
        "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion},
    }  # fmt: skip
    return Answer(json.dumps(made).encode(), seconds=seconds)


def refusal(status: int, message: str = "no", code: str = "", **headers: str) -> Answer:
    """An error in OpenAI's form; headers as retry_after="2"."""
    body = json.dumps({"error": {"message": message, "code": code or None}}).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(body, status, {"content-type": "application/json", **named})


class Server:
    """Serves `script` in a thread of this process."""

    def __init__(self, script: Callable[[Call], Answer] = lambda call: answer("hello"), seconds: float = 0.0) -> None:
        self.script, self.seconds = script, seconds
        self.calls: list[Call] = []
        self.bodies: Counter[bytes] = Counter()
        self.active = self.most_active = 0
        self.loop = asyncio.new_event_loop()
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Server:
        started = threading.Event()
        self.thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self.thread.start()
        assert started.wait(10)
        return self

    def __exit__(self, *error: object) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)

    def _run(self, started: threading.Event) -> None:
        self.loop.run_until_complete(self.listen())
        started.set()
        self.loop.run_forever()

    async def listen(self) -> None:
        server = await asyncio.get_running_loop().create_server(lambda: _Connection(self), "127.0.0.1", self.port)
        self.port = server.sockets[0].getsockname()[1]

    def call(self, head: bytes, body: bytes) -> Answer:
        first, *lines = head.decode("latin-1").split("\r\n")
        method, path, _ = first.split(" ")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        self.bodies[body] += 1
        call = Call(method, path, headers, body, len(self.calls), self.bodies[body])
        self.calls.append(call)
        return self.script(call)


class _Connection(asyncio.Protocol):
    def __init__(self, server: Server) -> None:
        self.server, self.waiting = server, b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.waiting += data
        end = self.waiting.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self.waiting[:end]
        sizes = [line[15:] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        size = int(sizes[0]) if sizes else 0
        body = self.waiting[end + 4 : end + 4 + size]
        if len(body) < size:
            return
        self.waiting = self.waiting[end + 4 + size :]
        server = self.server
        server.active += 1
        server.most_active = max(server.active, server.most_active)
        made = server.call(head, body)
        asyncio.get_running_loop().call_later(made.seconds + server.seconds, self.send, made)

    def send(self, made: Answer) -> None:
        self.server.active -= 1
        if made.cut or self.transport.is_closing():
            self.transport.close()
            return
        lines = [f"HTTP/1.1 {made.status} Said", f"content-length: {len(made.body)}"]
        lines += [f"{name}: {value}" for name, value in made.headers.items()]
        self.transport.write("\r\n".join(lines).encode() + b"\r\n\r\n" + made.body)


async def _serve(seconds: float) -> None:
    server = Server(seconds=seconds)
    await server.listen()
    print(server.url, flush=True)
    await asyncio.Event().wait()


def in_a_room(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in the folder `path`, without a key in the environment and without waiting between attempts."""
    from instruct_data.llm import endpoint

    monkeypatch.chdir(path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(endpoint, "backoff", lambda attempt, rng: 0.001)
    return path


if __name__ == "__main__":
    asyncio.run(_serve(float(sys.argv[1])))
