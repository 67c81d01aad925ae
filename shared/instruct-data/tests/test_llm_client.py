"""The client against a server that does what servers do: refuse, break, stall, and talk nonsense."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from llm_server import Answer, Server, answer, refusal

from instruct_data import Journal
from instruct_data.llm import BudgetReached, Client, Endpoint, Ledger, Prices, Request, ServiceFailed, read_key, stream
from instruct_data.llm import endpoint as module
from instruct_data.llm.client import AHEAD
from model_hooks import RequestError

SAMPLING = {"temperature": 0.3, "max_tokens": 64}


def request(text="hello", stage="test"):
    return Request(stage, "fake", ({"role": "user", "content": text},), SAMPLING)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(module, "backoff", lambda attempt, rng: 0.001)


@pytest.fixture
def ask(tmp_path):
    """Asks requests of a server through a journal; returns their replies. The client is the function's `.client`."""

    def run(server, *requests, ledger=None, folder="journal", **options):
        with Journal(tmp_path / folder, {}) as journal:
            run.client = Client(Endpoint([server.url], **options), journal, ledger)
            return list(stream(run.client, run.client.ask, requests))

    return run


def script(*answers):
    """One answer after the other, the last one for ever."""
    return lambda call: answers[min(call.number, len(answers) - 1)]


def test_a_reply_with_what_is_known_of_it(ask):
    with Server() as server:
        (reply,) = ask(server, request())
    assert (reply.text, reply.finish_reason, reply.model, reply.attempts) == ("hello", "stop", "fake", 1)
    assert (reply.usage.prompt, reply.usage.completion, reply.usage.total) == (10, 5, 15)
    assert server.calls[0].path == "/v1/chat/completions"
    assert server.calls[0].json == {"model": "fake", "messages": [{"role": "user", "content": "hello"}], **SAMPLING}


@pytest.mark.parametrize(
    "bad",
    [
        refusal(500), refusal(503), refusal(429), refusal(408), refusal(409), Answer(b"", cut=True),
        Answer(b"<html>busy</html>", 200, {"content-type": "text/html"}), Answer(b"{broken"), Answer(b"{}"),
        Answer(b'{"choices": []}'), Answer(b'{"choices": [{"message": null}]}'),
        Answer(b"{}", seconds=0.5),
    ],
)  # fmt: skip
def test_three_times_bad_then_good_is_one_reply_of_four_attempts(ask, bad):
    with Server(script(bad, bad, bad, answer("good"))) as server:
        (reply,) = ask(server, request(), timeout=0.2)
    assert (reply.text, reply.attempts, len(server.calls)) == ("good", 4, 4)
    assert ask.client.ledger.sent == 4
    assert ask.client.ledger.total.usage.total == 15


@pytest.mark.parametrize(
    ("message", "finish", "text"),
    [({"content": None}, "length", ""), ({"content": None, "refusal": "I will not."}, "stop", "I will not."),
     ({"content": ""}, "stop", "")],
)  # fmt: skip
def test_a_reply_without_text_is_bought_once_and_accounted_for(ask, message, finish, text):
    body = {"choices": [{"message": message, "finish_reason": finish}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 64}}  # fmt: skip
    with Server(script(Answer(json.dumps(body).encode()))) as server:
        (reply,) = ask(server, request())
        assert (reply.text, reply.truncated, reply.usage.total) == (text, finish == "length", 74)
        assert ask.client.ledger.total.usage.total == 74
        assert ask(server, request())[0].text == text
        assert len(server.calls) == 1


def test_what_stays_bad_fails_and_is_asked_again_by_the_next_run(ask):
    with Server(script(Answer(b"<html>", 200, {"content-type": "text/html"}))) as server:
        (reply,) = ask(server, request(), attempts=3)
        assert (reply.text, reply.attempts, len(server.calls)) == (None, 3, 3)
        assert "no completion" in reply.error
        server.script = script(answer("good"))
        assert ask(server, request())[0].text == "good"


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_other_4xx_are_not_repeated(ask, status):
    with Server(script(refusal(status, "too long"))) as server:
        (reply,) = ask(server, request())
    assert (reply.text, len(server.calls)) == (None, 1)
    assert f"{status}" in reply.error
    assert "too long" in reply.error


def test_retry_after_is_waited_by_everybody(ask):
    with Server(lambda call: refusal(429, retry_after="1.2") if call.number == 0 else answer("ok")) as server:
        began = time.monotonic()
        replies = ask(server, *(request(str(n)) for n in range(3)), concurrency=1)
        assert time.monotonic() - began >= 1.2
    assert [r.text for r in replies] == ["ok"] * 3


@pytest.mark.parametrize("bad", [refusal(401), refusal(403), refusal(429, code="insufficient_quota")])
def test_a_refused_key_stops_within_one_round(ask, bad):
    with Server(script(bad)) as server, pytest.raises(ServiceFailed) as error:
        ask(server, *(request(str(n)) for n in range(200)), concurrency=4)
    assert error.value.exit_code == 5
    assert len(server.calls) <= 4


def test_twenty_failures_in_a_row_open_the_circuit(ask):
    with Server(script(refusal(500))) as server, pytest.raises(ServiceFailed, match="20 requests in a row"):
        ask(server, *(request(str(n)) for n in range(200)), attempts=2, concurrency=5)
    assert 40 <= len(server.calls) <= 2 * AHEAD * 5


def test_equal_requests_are_sent_once_and_never_again(ask):
    with Server(seconds=0.02) as server:
        replies = ask(server, request("a"), request("a"), request("b"), *request("a").candidates(3))
        assert len({id(r) for r in replies[:2]}) == 1
        assert len(server.calls) == 4  # a (which is candidate 0 too), its candidates 1 and 2, b
        again = ask(server, request("a"), *request("a").candidates(3))
        assert len(server.calls) == 4
    assert all(r.journalled and r.text == "hello" for r in again)
    assert ask.client.ledger.sent == 0


def test_budgets_overshoot_by_what_is_in_flight_at_most(ask):
    prices = Prices({"fake": {"prompt": 1.0, "completion": 2.0}})
    cost = (10 * 1 + 5 * 2) / 1e6
    many = [request(str(n)) for n in range(100)]
    with Server(seconds=0.005) as server:
        with pytest.raises(BudgetReached) as error:
            ask(server, *many, ledger=Ledger(prices, max_cost=20 * cost), concurrency=8)
        assert error.value.exit_code == 4
        assert 20 <= len(server.calls) <= 28
        account = ask.client.ledger.total
        assert account.usage.total == 15 * len(server.calls)  # to the token
        assert account.cost == pytest.approx(cost * len(server.calls))
        sent = len(server.calls)
        with pytest.raises(BudgetReached, match="10 requests"):
            ask(server, *many, ledger=Ledger(max_requests=10), concurrency=4)
        assert len(server.calls) == sent + 10
        with pytest.raises(BudgetReached, match="tokens"):
            ask(server, *many, ledger=Ledger(max_tokens=30), concurrency=1)
        assert len(server.calls) == sent + 12
        ask(server, *many)
        assert len(server.calls) == 100
    with pytest.raises(RequestError, match="price of fake"):
        ask(server, request(), ledger=Ledger(max_cost=1.0), folder="other")


@pytest.mark.parametrize(
    "prices", [{"m": {"prompt": 1}}, {"m": {"prompt": -1, "completion": 1}}, {"m": 3},
               {"m": {"prompt": "1", "completion": 1}}, {"m": {"prompt": 1, "completion": 1, "other": 1}}],
)  # fmt: skip
def test_prices_are_checked(prices):
    with pytest.raises(RequestError, match="price of m"):
        Prices(prices)


def test_cached_tokens_have_their_price():
    from instruct_data.llm.request import Usage

    prices = Prices({"m": {"prompt": 1.0, "completion": 2.0, "cached": 0.5}})
    assert prices.of("m", Usage(100, 10, 40)) == pytest.approx((60 * 1 + 40 * 0.5 + 10 * 2) / 1e6)
    assert prices.of("unknown", Usage(1, 1)) is None


def test_order_is_kept_and_a_straggler_stops_nobody(ask):
    with Server(lambda call: answer(call.prompt, seconds=0.4 if call.prompt == "0" else 0.002)) as server:
        began = time.monotonic()
        replies = ask(server, *(request(str(n)) for n in range(60)), concurrency=4)
        assert time.monotonic() - began < 1.5
    assert [r.text for r in replies] == [str(n) for n in range(60)]
    assert server.most_active <= 4


def test_servers_take_turns(tmp_path):
    with Server() as one, Server() as two, Journal(tmp_path, {}) as journal:
        client = Client(Endpoint([one.url, two.url], concurrency=4), journal)
        list(stream(client, client.ask, [request(str(n)) for n in range(10)]))
        assert len(one.calls) == len(two.calls) == 5


def test_the_key_is_sent_and_never_said(ask, tmp_path, monkeypatch):
    secret = "sk-very-secret"
    with Server(lambda call: refusal(401, f"wrong key {call.headers['authorization'][7:]}")) as server:
        with pytest.raises(ServiceFailed) as error:
            ask(server, request(), key=secret)
        assert server.calls[0].headers["authorization"] == f"Bearer {secret}"
    assert secret not in str(error.value)
    assert "[key]" in str(error.value)
    assert all(secret.encode() not in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    monkeypatch.setenv("MY_KEY", secret)
    assert read_key("MY_KEY") == secret
    assert read_key("ABSENT_KEY") == "none"
    (tmp_path / "key").write_text(f"{secret}\n")
    assert read_key(file=tmp_path / "key") == secret
    (tmp_path / "empty").write_text("\n")
    for file in ("empty", "absent"):
        with pytest.raises(RequestError, match=file):
            read_key(file=tmp_path / file)


def test_a_full_journal_stops_and_names_the_file(ask, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device", "0.jsonl")

    monkeypatch.setattr(Journal, "_write", full)
    with Server(seconds=0.01) as server, pytest.raises(OSError, match=r"0\.jsonl"):
        ask(server, *(request(str(n)) for n in range(100)), concurrency=3)
    assert len(server.calls) <= 6


def test_keys_hold_everything_that_decides_the_reply():
    base = request()
    others = [
        request("other"), request(stage="other"), *base.candidates(2)[1:],
        Request("test", "fake", base.messages, {**SAMPLING, "temperature": 0.4}),
        Request("test", "other", base.messages, SAMPLING),
        Request("test", "fake", base.messages, SAMPLING, schema={"type": "object"}),
        Request("test", "fake", base.messages, SAMPLING, prompt_version="2"),
    ]  # fmt: skip
    assert len({r.key for r in (base, *others)}) == 1 + len(others)
    assert base.key == request().key
    written = Request("s", "m", ({"role": "user", "content": "x"},))  # journals of earlier versions stay of use
    assert written.key == "0da50f822cd4ed22fdece04acd417257821def3ad98f8ca09b1db0822648ce3e"
    body = others[5].body()
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}
    json.dumps(body)


def test_an_error_in_the_users_function_ends_the_stream(tmp_path):
    with Server() as server, Journal(tmp_path, {}) as journal:
        client = Client(Endpoint([server.url]), journal)

        async def work(number):
            await client.ask(request(str(number)))
            await asyncio.sleep(0)
            return 1 / (3 - number)

        with pytest.raises(ZeroDivisionError):
            list(stream(client, work, range(10)))


def raw_server(*replies):
    """A server that says these bytes, one for each request, and closes the connection where they are no keep-alive."""
    import socket
    import threading

    listening = socket.create_server(("127.0.0.1", 0))

    def serve():
        left = list(replies)
        while left:
            connection, _ = listening.accept()
            with connection:
                while left:
                    if not connection.recv(1 << 16):
                        break
                    reply = left.pop(0)
                    connection.sendall(reply)
                    if b"keep-alive" not in reply:
                        break

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{listening.getsockname()[1]}/v1"


def test_every_form_of_http_is_read(tmp_path):
    body = answer("good").body
    parts = b"".join(b"%x;note=1\r\n%s\r\n" % (len(p), p) for p in (body[:7], body[7:]))
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
    url = raw_server(
        b"HTTP/1.1 100 Continue\r\n\r\n" + head + b"Connection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n"
        + parts + b"0\r\nTrailer: x\r\n\r\n",
        head + b"Connection: keep-alive\r\nContent-Length: %d\r\n\r\n" % len(body) + body,
        head + b"\r\n" + body,  # up to the end of the connection
        b"no HTTP at all\r\n\r\n",
        head + b"Content-Length: 9999\r\n\r\n" + body,  # cut off
        head + b"Content-Length: %d\r\n\r\n" % len(body) + body,
    )  # fmt: skip
    with Journal(tmp_path, {}) as journal:
        client = Client(Endpoint([url], concurrency=1), journal)
        replies = list(stream(client, client.ask, [request(str(n)) for n in range(4)], ahead=1))
    assert [(r.text, r.attempts) for r in replies] == [("good", 1), ("good", 1), ("good", 1), ("good", 3)]


def test_a_connection_that_the_server_closed_is_not_used_again(tmp_path):
    body = answer("good").body
    url = raw_server(*[b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
                       + body] * 3)  # fmt: skip

    async def slowly(number):
        reply = await client.ask(request(str(number)))
        await asyncio.sleep(0.05)  # meanwhile the server closes
        return reply.attempts

    with Journal(tmp_path, {}) as journal:
        client = Client(Endpoint([url], concurrency=1), journal)
        assert list(stream(client, slowly, range(3), ahead=1)) == [1, 1, 1]
