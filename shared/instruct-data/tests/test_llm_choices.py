"""Several replies by one request, on servers that know `n`, ignore it, refuse it, or send one choice too few."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest
from llm_server import Answer, Server, answer, refusal

from instruct_data import Journal
from instruct_data.llm import Client, Endpoint, Ledger, Request, ServiceFailed, stream
from instruct_data.llm import endpoint as module
from instruct_data.llm.choices import ChoicesEndpoint


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(module, "backoff", lambda attempt, rng: 0.001)


def choices(call, count=None, prompt=10):
    """As many choices as the request asks for, or `count`; 5 tokens each."""
    count = call.json.get("n", 1) if count is None else count
    made = [{"index": n, "message": {"content": f"{call.prompt}{n}"}, "finish_reason": "stop"} for n in range(count)]
    usage = {"prompt_tokens": prompt, "completion_tokens": 5 * count}
    return Answer(json.dumps({"choices": made, "usage": usage}).encode())


def ask(folder, server, records=2, count=3, make=ChoicesEndpoint, **limits):
    """Texts of `count` candidates of each record, asked for together, and the ledger."""
    ledger = Ledger(**limits)
    with Journal(folder, {}) as journal:
        client = Client(make([server.url], attempts=3), journal, ledger)

        async def one(text):
            base = Request("rewrite", "fake", ({"role": "user", "content": text},), {"temperature": 1})
            return await asyncio.gather(*(client.ask(r) for r in base.candidates(count)))

        return list(stream(client, one, "abcdef"[:records])), ledger


def test_one_request_brings_all_candidates_and_is_paid_for_once(tmp_path):
    with Server(choices) as server:
        found, ledger = ask(tmp_path / "j", server)
        assert [[reply.text for reply in replies] for replies in found] == [["a0", "a1", "a2"], ["b0", "b1", "b2"]]
        assert [call.json["n"] for call in server.calls] == [3, 3]
        assert (ledger.sent, ledger.total.usage.prompt, ledger.total.usage.completion) == (2, 20, 30)
        again, ledger = ask(tmp_path / "j", server, make=Endpoint)  # the journal serves the other way too
        assert [[r.text for r in replies] for replies in again] == [[r.text for r in replies] for replies in found]
        assert (ledger.sent, ledger.journalled, len(server.calls)) == (0, 6, 2)


def test_more_candidates_than_the_journal_has_are_asked_for_together(tmp_path):
    with Server(choices) as server:
        ask(tmp_path / "j", server, records=1, count=1)
        found, ledger = ask(tmp_path / "j", server, records=1, count=4)
        assert [reply.text for reply in found[0]] == ["a0", "a0", "a1", "a2"]
        assert "n" not in server.calls[0].json
        assert server.calls[1].json["n"] == 3
        assert ledger.journalled == 1


@pytest.mark.parametrize(
    "script",
    [
        lambda call: answer("x"), lambda call: refusal(400, "n is not supported") if "n" in call.json else answer("x"),
    ],
    ids=["ignores", "refuses"],
)  # fmt: skip
def test_a_server_without_n_is_asked_one_by_one(tmp_path, script):
    with Server(script) as server:
        found, ledger = ask(tmp_path / "j", server, records=6)
        assert [[reply.text for reply in replies] for replies in found] == [["x"] * 3] * 6
        assert ledger.total.usage.completion == 5 * 18
        sent = len(server.calls)
        ask(tmp_path / "k", server, records=1, make=Endpoint)
        assert len(server.calls) - sent == 3
        assert sent <= 18 + 6  # and what was in flight before the first answer came


def test_a_choice_too_few_is_asked_for_again(tmp_path):
    with Server(lambda call: choices(call, 2 if call.number == 0 else None)) as server:
        found, _ = ask(tmp_path / "j", server, records=1, count=4)
    assert [reply.text for reply in found[0]] == ["a0", "a1", "a0", "a0"]
    assert ["n" in call.json for call in server.calls] == [True, False, False]


def test_a_refused_prompt_is_no_reason_to_stop_asking_for_several(tmp_path):
    with Server(lambda call: refusal(400, "too long") if call.prompt == "a" else choices(call)) as server:
        first, _ = ask(tmp_path / "j", server, records=1)
        assert [reply.text for reply in first[0]] == [None] * 3
        found, _ = ask(tmp_path / "j", server, records=2)
    assert [reply.text for reply in found[1]] == ["b0", "b1", "b2"]
    assert [call.json["n"] for call in server.calls if call.prompt == "b"] == [3]


def test_what_fails_fails_for_all_and_what_ends_the_run_ends_it(tmp_path):
    bad = [refusal(500), Answer(b"{}")]
    with Server(lambda call: bad[call.number] if call.number < 2 else choices(call)) as server:
        found, ledger = ask(tmp_path / "j", server, records=1)
        assert [reply.text for reply in found[0]] == ["a0", "a1", "a2"]
        assert [reply.attempts for reply in found[0]] == [3, 0, 0]
        assert ledger.sent == 3
        server.script = lambda call: refusal(500)
        found, _ = ask(tmp_path / "k", server, records=1)
        assert [reply.text for reply in found[0]] == [None] * 3
        assert all("500" in reply.error for reply in found[0])
        server.script = lambda call: refusal(401)
        with pytest.raises(ServiceFailed):
            ask(tmp_path / "l", server)


def test_candidates_of_different_messages_are_not_mixed(tmp_path):
    with Server(choices) as server, Journal(tmp_path / "j", {}) as journal:
        client = Client(ChoicesEndpoint([server.url]), journal)
        base = Request("rewrite", "fake", ({"role": "user", "content": "a"},), {"temperature": 1})
        others = [
            base,
            replace(base, candidate=1),
            replace(base, sampling={"temperature": 0}),
            replace(base, model="m"),
        ]

        async def all_at_once(_):
            return await asyncio.gather(*(client.ask(request) for request in others))

        ((one, two, three, four),) = list(stream(client, all_at_once, [None]))
    assert [reply.text for reply in (one, two, three, four)] == ["a0", "a1", "a0", "a0"]
    assert sorted(call.json.get("n", 1) for call in server.calls) == [1, 1, 2]
