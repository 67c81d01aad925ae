"""What a request costs the client, how many it keeps in flight, and what it holds in memory."""

from __future__ import annotations

import time
import tracemalloc

import pytest
from llm_server import Server

from instruct_data import Journal
from instruct_data.llm import Client, Endpoint, Reply, Request, stream


def request(text):
    return Request("rewrite", "fake", ({"role": "user", "content": text},), {"temperature": 0.3})


@pytest.mark.slow
def test_it_keeps_its_requests_in_flight_at_little_cost(tmp_path):
    """As many at once as it may have; and by the CPU's time, which other work on a machine changes little, 32 in flight
    at 0.2 s, twenty times the one-request loop's 5 a second, take less than half of a core (server and all)."""
    for concurrency in (32, 256):
        count = concurrency * 4
        with Server(seconds=0.2) as server, Journal(tmp_path / str(concurrency), {}) as journal:
            client = Client(Endpoint([server.url], concurrency=concurrency), journal)
            list(stream(client, client.ask, [request("warm")]))
            client = Client(Endpoint([server.url], concurrency=concurrency), journal)
            began = time.process_time()
            replies = list(stream(client, client.ask, (request(str(n)) for n in range(count))))
            cpu = (time.process_time() - began) / count
        assert [r.text for r in replies] == ["hello"] * count
        assert 0.9 * concurrency <= server.most_active <= concurrency
        assert cpu < 0.2 / 32 / 2


class Instant:
    """A back end that answers at once."""

    concurrency = 8

    async def complete(self, request, may_send, sleep):
        may_send()
        return Reply("x" * 100)

    async def close(self):
        pass


def peak(folder, count):
    with Journal(folder, {}, sync_seconds=3600) as journal:
        client = Client(Instant(), journal)
        tracemalloc.start()
        for _ in stream(client, client.ask, (request(str(n)) for n in range(count))):
            pass
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return found


@pytest.mark.slow
def test_memory_does_not_grow_with_the_records(tmp_path):
    """But for the journal's index: 24 bytes an entry once it is settled, about 250 before."""
    small, large = peak(tmp_path / "small", 300), peak(tmp_path / "large", 2300)
    assert large - small < 2000 * 400
