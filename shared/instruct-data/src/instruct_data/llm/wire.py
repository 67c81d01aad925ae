"""POSTs of JSON to one server of OpenAI's protocol: `openai` says where and as whom, aiohttp carries.

`AsyncOpenAI.post` makes options, URL, headers, request and response anew each time, which took more CPU than all else
that a reply costs. Here they are made once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.request import getproxies, proxy_bypass

if TYPE_CHECKING:
    import aiohttp


class Refused(Exception):
    """An answer of status 400 or more. It says what the server said; `code` and `type` are those of OpenAI's errors."""

    def __init__(self, status: int, headers: Mapping[str, str], text: str) -> None:
        self.status, self.headers = status, headers
        try:
            body = json.loads(text)
        except ValueError:
            body = text
        error = body.get("error", body) if isinstance(body, dict) else body
        known = error if isinstance(error, dict) else {"message": error}
        self.code, self.type = known.get("code"), known.get("type")
        super().__init__(str(known.get("message") or text))


class Wire:
    """One server, by its base URL, and the connections to it, which are used again. Nothing is repeated or timed here.

    Organisation, project and further headers come from the environment, as `AsyncOpenAI` reads them; so does a proxy.
    """

    def __init__(self, base_url: str, key: str) -> None:
        from openai import AsyncOpenAI

        self._openai = AsyncOpenAI(api_key=key, base_url=base_url)
        self._url = str(self._openai.base_url).rstrip("/")
        self._session: aiohttp.ClientSession | None = None

    def _connected(self) -> aiohttp.ClientSession:
        if self._session is None:
            from aiohttp import ClientSession, ClientTimeout, DummyCookieJar, TCPConnector

            headers = {**self._openai.auth_headers, **self._openai.default_headers}
            self._session = ClientSession(
                connector=TCPConnector(limit=0), timeout=ClientTimeout(total=None), cookie_jar=DummyCookieJar(),
                headers={name: value for name, value in headers.items() if isinstance(value, str)},
                proxy=proxy_of(self._url),
            )  # fmt: skip
        return self._session

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """What the server answers, read as JSON.

        Raises `Refused`, `ValueError` for what is no JSON, and `aiohttp.ClientError` where no whole answer comes.
        """
        data = json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
        async with self._connected().post(self._url + path, data=data) as answer:
            content = await answer.read()
            if answer.status >= 400:
                raise Refused(answer.status, answer.headers, content.decode("utf-8", "replace"))
            return json.loads(content)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
        await self._openai.close()


def proxy_of(url: str) -> str | None:
    """The proxy that the environment names for `url`."""
    scheme, _, rest = url.partition("://")
    if proxy_bypass(rest.partition("/")[0]):
        return None
    proxies = getproxies()
    return proxies.get(scheme) or proxies.get("all")
