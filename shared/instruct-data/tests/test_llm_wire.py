"""The way to one server: what is sent, by which way, and what is made of an answer; and how little runs at once."""

from __future__ import annotations

import asyncio
import gc
import gzip

import pytest
from llm_server import Answer, Server, answer, refusal

from instruct_data.llm.client import ordered, stream
from instruct_data.llm.wire import Refused, Wire, proxy_of


def posted(url, body, key="k"):
    async def post():
        wire = Wire(url, key)
        try:
            return await wire.post("/chat/completions", body)
        finally:
            await wire.close()

    return asyncio.run(post())


def test_what_is_sent_is_as_openai_sends_it(monkeypatch):
    monkeypatch.setenv("OPENAI_ORG_ID", "org-7")
    with Server() as server:
        posted(f"{server.url}/", {"model": "m", "text": "é"}, key="secret")
    (call,) = server.calls
    assert (call.method, call.path, call.body) == ("POST", "/v1/chat/completions", '{"model":"m","text":"é"}'.encode())
    assert {name: call.headers[name] for name in ("content-type", "openai-organization", "authorization")} == {
        "content-type": "application/json", "openai-organization": "org-7", "authorization": "Bearer secret",
    }  # fmt: skip
    assert call.headers["user-agent"].startswith("AsyncOpenAI/")


def test_a_proxy_of_the_environment_is_used(monkeypatch):
    with Server() as server:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.port}")
        monkeypatch.setenv("no_proxy", "near.example")
        assert posted("http://far.example/v1", {})["model"] == "fake"
        assert server.calls[0].path == "http://far.example/v1/chat/completions"
        assert proxy_of("http://near.example:8000/v1") is None


def test_packed_answers_are_unpacked():
    body = answer("packed").body
    packed = Answer(gzip.compress(body), 200, {"content-type": "application/json", "content-encoding": "gzip"})
    with Server(lambda call: packed) as server:
        assert posted(server.url, {})["choices"][0]["message"]["content"] == "packed"


@pytest.mark.parametrize(
    ("bad", "said", "code"),
    [
        (refusal(429, "too many", "insufficient_quota"), "too many", "insufficient_quota"),
        (Answer(b'{"error": "no such model"}', 404), "no such model", None),
        (Answer(b'{"message": "bad", "code": 3}', 400), "bad", 3),
        (Answer(b"<html>\xff</html>", 502), "<html>\N{REPLACEMENT CHARACTER}</html>", None),
        (Answer(b"[1]", 500), "[1]", None),
        (Answer(b"", 503), "", None),
    ],
)
def test_a_refusal_says_what_the_server_said(bad, said, code):
    with Server(lambda call: bad) as server, pytest.raises(Refused) as error:
        posted(server.url, {})
    assert (str(error.value), error.value.status, error.value.code) == (said, bad.status, code)


def test_no_more_items_are_at_work_than_may_be_and_none_too_far_ahead():
    working, most, begun, furthest = 0, 0, 0, 0

    async def work(number):
        nonlocal working, most, begun
        working, begun = working + 1, begun + 1
        most = max(most, working)
        await asyncio.sleep(0.05 if number == 0 else 0.001)
        working -= 1
        return number

    async def main():
        nonlocal furthest
        found = []
        async for ready in ordered(work, range(40), ahead=12, at_work=5):
            furthest = max(furthest, begun - len(found))
            found += ready
        return found

    assert asyncio.run(main()) == list(range(40))
    assert (most, furthest) == (5, 12)


def test_the_collectors_pace_is_given_back():
    class Idle:
        concurrency = 1

        async def close(self):
            pass

    class Asking:
        backend = Idle()

        def stop(self, reason):
            pass

    async def pace(_):
        return gc.get_threshold()

    before = gc.get_threshold()
    (during,) = stream(Asking(), pace, [0])
    assert during[0] >= 10_000
    assert gc.get_threshold() == before
