"""Back ends that want many requests at once: budgets and Ctrl-C are asked about when a group is handed over."""

from __future__ import annotations

import pytest

from instruct_data import Journal
from instruct_data.llm import BudgetReached, Client, Ledger, Prices, Reply, Request, Stopped, stream
from instruct_data.llm.gathered import Gathered
from instruct_data.llm.request import Usage
from instruct_data.llm.service import Service
from model_hooks import RequestError


class Fours(Gathered):
    """Answers four requests at once, with 10 tokens each. `after` is called with the number of each group."""

    def __init__(self, after=lambda number: None):
        super().__init__(most=100, linger=0.05)
        self.computed, self.after = [], after

    def groups(self, requests):
        return [range(len(requests))[start : start + 4] for start in range(0, len(requests), 4)]

    async def run(self, requests, sleep):
        self.computed.append([request.messages[0]["content"] for request in requests])
        self.after(len(self.computed))
        for place, _ in enumerate(requests):
            yield place, Reply("ok", "stop", Usage(6, 4))


def asked(folder, backend, count=20, ledger=None):
    texts = [str(number) for number in range(count)]
    requests = [Request("test", "fake", ({"role": "user", "content": text},)) for text in texts]
    with Journal(folder, {}) as journal:
        backend.client = Client(backend, journal, ledger)
        return list(stream(backend.client, backend.client.ask, requests, ahead=1000))


@pytest.mark.parametrize(
    ("limits", "groups"),
    [({"max_tokens": 60}, [4, 4]), ({"max_cost": 60.0}, [4, 4]), ({"max_requests": 6}, [4, 2]), ({}, [4] * 5)],
)
def test_what_has_not_been_handed_over_stops_at_the_limit(tmp_path, limits, groups):
    backend, ledger = Fours(), Ledger(Prices({"fake": {"prompt": 1e6, "completion": 1e6}}), **limits)
    if limits:
        with pytest.raises(BudgetReached):
            asked(tmp_path, backend, ledger=ledger)
    else:
        assert len(asked(tmp_path, backend, ledger=ledger)) == 20
    assert [len(group) for group in backend.computed] == groups
    assert (ledger.sent, ledger.total.usage.total) == (sum(groups), 10 * sum(groups))
    again = Fours()
    asked(tmp_path, again)
    assert sum(map(len, again.computed)) == 20 - sum(groups)  # what was computed is in the journal


def test_what_has_not_been_handed_over_stops_when_the_user_says_so(tmp_path):
    backend = Fours(lambda number: number == 2 and backend.client.stop(Stopped("enough")))
    with pytest.raises(Stopped, match="enough"):
        asked(tmp_path, backend)
    assert [len(group) for group in backend.computed] == [4, 4]
    assert backend.client.ledger.total.usage.total == 80


def test_a_batch_refuses_limits_that_it_would_see_too_late(tmp_path):
    for limit in ({"max_cost": 1.0}, {"max_tokens": 10}):
        with pytest.raises(RequestError, match="limit max-requests"):
            Service(tmp_path, "test", backend="batch", **limit)
    assert Service(tmp_path, "test", backend="batch", max_requests=10).ledger().max_requests == 10
