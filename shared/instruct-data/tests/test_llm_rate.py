"""Windows, buckets, waiting: on a clock of their own, so that a minute takes no time."""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instruct_data.llm import rate
from instruct_data.llm.rate import Bucket, Window, asked_wait, backoff


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds + 1e-9


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(rate, "time", clock)
    return clock


@given(st.integers(1, 200), st.integers(0, 99))
def test_backoff_is_jittered_and_bounded(attempt, seed):
    assert 0 <= backoff(attempt, random.Random(seed)) <= min(60, 0.5 * 2 ** (attempt - 1))


def test_the_servers_wish_is_read_in_every_form():
    now = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
    assert asked_wait({"retry-after": "2"}) == 2
    assert asked_wait({"retry-after": "Thu, 01 Jan 2026 12:00:07 GMT"}, now) == 7
    assert asked_wait({"retry-after": "Thu, 01 Jan 2026 11:00:07 GMT"}, now) == 0
    assert asked_wait({"retry-after": "soon"}) == 0
    assert asked_wait({"x-ratelimit-reset-requests": "1m30s", "x-ratelimit-reset-tokens": "250ms"}) == 90
    assert asked_wait({}) == 0


def test_a_burst_of_429_halves_once_and_a_clean_second_adds_one(clock):
    window = Window(32)
    sent = clock.now
    clock.now += 1
    for _ in range(5):
        window.refused(sent)
    assert window.limit == 16
    window.answered()
    assert window.limit == 16  # not yet a second
    clock.now += 1.5
    window.answered()
    window.answered()
    assert window.limit == 17
    window.refused(clock.now)
    assert window.limit == 8.5
    for _ in range(100):
        clock.now += 2
        window.answered()
    assert window.limit == 32


def test_no_more_than_the_window_are_in_and_they_enter_in_order():
    async def main():
        window, order = Window(2), []

        async def one(number):
            await window.enter()
            order.append(number)
            assert window.active <= 2
            await asyncio.sleep(0.001)
            window.leave()

        await asyncio.gather(*map(one, range(9)))
        assert order == list(range(9))
        assert window.active == 0

    asyncio.run(main())


@pytest.mark.parametrize("units", [1, 7, 300])
def test_a_bucket_lets_through_its_rate_and_no_more(clock, units):
    bucket, taken, began = Bucket(600), 0, clock.now

    async def main():
        nonlocal taken
        while taken < 1200:
            await bucket.take(units, clock.sleep)
            taken += units

    asyncio.run(main())
    minutes = (clock.now - began) / 60
    assert taken <= 600 * minutes + 60 + units
    assert minutes < 2.1
