"""HTTP/1.1 over asyncio streams, for servers spoken to in the clear: vLLM, SGLang, transformers serve nearby.

httpx's own transport looks at every connection of a pool for each request and wraps every read; hundreds of requests in
flight cost it a whole core. Behind `openai` this one takes a tenth of that. It follows no redirects and uses no proxy.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import openai

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
HEAD_BYTES = 1 << 16


def plain_http(url: str) -> bool:
    """Whether a server at `url` can be spoken to by `Transport`: http, and no proxy in the environment."""
    proxies = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")
    return url.startswith("http://") and not any(os.environ.get(name) for name in proxies)


def http_client(timeout: float) -> Any:
    """A client that `openai.AsyncOpenAI(http_client=...)` takes, on a `Transport` of its own."""
    from openai import DefaultAsyncHttpxClient

    base = next(kind for kind in DefaultAsyncHttpxClient.__mro__ if kind.__name__ == "AsyncClient")
    httpx = import_module(base.__module__.partition(".")[0])  # httpx for openai 2, httpx2 for openai 3
    transport: Any = Transport(httpx)
    return DefaultAsyncHttpxClient(transport=transport, timeout=timeout)


class Transport:
    """Requests over connections that are kept alive and used again, the latest first.

    What goes wrong becomes httpx's `ReadError` or `ConnectError`. A request is never sent twice here: whether that is
    wise, the caller knows.
    """

    def __init__(self, httpx: Any) -> None:
        self._httpx, self._idle = httpx, dict[tuple[str, int], deque[Streams]]()

    async def handle_async_request(self, request: Any) -> Any:
        address = (request.url.host, request.url.port or 80)
        body = await request.aread()
        try:
            reader, writer = await self._connection(address)
        except OSError as error:
            raise self._httpx.ConnectError(str(error), request=request) from error
        try:
            writer.write(_head(request) + body)
            await writer.drain()
            status, headers, content = await _answer(reader)
        except BaseException as error:
            writer.close()
            if isinstance(error, (OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError)):
                raise self._httpx.ReadError(str(error), request=request) from error
            raise
        if ("connection", "close") in headers:
            writer.close()
        else:
            self._idle.setdefault(address, deque()).append((reader, writer))
        return self._httpx.Response(status, headers=headers, content=content, request=request)

    async def _connection(self, address: tuple[str, int]) -> Streams:
        idle = self._idle.get(address, deque())
        while idle:
            reader, writer = idle.pop()
            if not reader.at_eof() and not writer.is_closing():  # else the server has closed it meanwhile
                return reader, writer
            writer.close()
        return await asyncio.open_connection(*address, limit=HEAD_BYTES)

    async def aclose(self) -> None:
        for idle in self._idle.values():
            for _, writer in idle:
                writer.close()
        self._idle.clear()

    async def __aenter__(self) -> Transport:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()


def _head(request: Any) -> bytes:
    lines = [b"%s %s HTTP/1.1" % (request.method.encode(), request.url.raw_path)]
    lines += [b"%s: %s" % (name, value) for name, value in request.headers.raw if name.lower() != b"accept-encoding"]
    return b"\r\n".join(lines) + b"\r\n\r\n"


async def _answer(reader: asyncio.StreamReader) -> tuple[int, list[tuple[str, str]], bytes]:
    """Status, headers (names in lower case) and body of one response. Raises `OSError` where it is no HTTP."""
    status = 100
    while status < 200:  # 100 Continue and the like come before the answer
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
        version, _, rest = first.partition(" ")
        if not version.startswith("HTTP/1.") or not rest[:3].isdigit():
            raise OSError("the server does not speak HTTP/1.1")
        status = int(rest[:3])
    pairs = [line.partition(":") for line in lines]
    headers = [(name.strip().lower(), value.strip()) for name, _, value in pairs]
    fields = dict(headers)
    if fields.get("transfer-encoding", "").lower() == "chunked":
        return status, [pair for pair in headers if pair[0] != "transfer-encoding"], await _chunks(reader)
    if "content-length" in fields:
        return status, headers, await reader.readexactly(int(fields["content-length"]))
    if status in (204, 304):
        return status, headers, b""
    return status, [*headers, ("connection", "close")], await reader.read()


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    parts = []
    while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
        parts.append((await reader.readexactly(size + 2))[:-2])
    while await reader.readuntil(b"\r\n") != b"\r\n":  # trailers
        pass
    return b"".join(parts)


def client_of(url: str, key: str, timeout: float) -> openai.AsyncOpenAI:
    """An openai client for `url` that repeats nothing by itself."""
    from openai import AsyncOpenAI

    made = http_client(timeout) if plain_http(url) else None
    return AsyncOpenAI(api_key=key, base_url=url, max_retries=0, timeout=timeout, http_client=made)
