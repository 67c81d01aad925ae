"""How fast requests may go: a window that additive increase and multiplicative decrease move, and token buckets."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

LONGEST_WAIT = 60.0

Sleep = Callable[[float], Awaitable[None]]


def backoff(attempt: int, rng: random.Random) -> float:
    """Seconds before attempt `attempt` + 1 (from 1): 0.5 · 2^(attempt - 1), at most 60, with full jitter."""
    return rng.uniform(0, min(LONGEST_WAIT, 0.5 * 2 ** (attempt - 1)))


def asked_wait(headers: Mapping[str, str], now: datetime | None = None) -> float:
    """Seconds that a server asks to wait: Retry-After (seconds or a date), or else the later of x-ratelimit-reset-*.

    0 where it says nothing that can be read.
    """
    given = headers.get("retry-after", "")
    if given:
        try:
            return max(0.0, float(given))
        except ValueError:
            pass
        try:
            return max(0.0, (parsedate_to_datetime(given) - (now or datetime.now(UTC))).total_seconds())
        except (ValueError, TypeError):
            return 0.0
    resets = [headers.get(f"x-ratelimit-reset-{kind}", "") for kind in ("requests", "tokens")]
    return max(map(_duration, resets))


def _duration(text: str) -> float:
    """Seconds in "1m30s", "250ms" or "2.5"."""
    units = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}
    parts = re.findall(r"([\d.]+)(ms|s|m|h|)", text)
    try:
        return sum(float(number) * units[unit] for number, unit in parts)
    except ValueError:
        return 0.0


class Window:
    """At most `limit` requests in flight. A 429 halves the limit, a second without one adds 1, up to `most`.

    Of the 429s that answer one burst only the first halves: those whose request was sent before the last halving say
    nothing new. `hold(seconds)` keeps back everybody who waits for `opened`.
    """

    def __init__(self, most: int) -> None:
        self.most, self.limit, self.active = most, float(most), 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._halved = self._raised = self._closed_until = 0.0

    async def enter(self) -> None:
        """Wait for a place, to be given back by `leave`."""
        if self.active >= int(self.limit) or self._waiting:
            place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(place)
            await place  # `_admit` has counted it
        else:
            self.active += 1

    async def opened(self, sleep: Sleep = asyncio.sleep) -> None:
        """Wait until no `hold` holds any more."""
        while (wait := self._closed_until - time.monotonic()) > 0:
            await sleep(wait)

    def leave(self) -> None:
        self.active -= 1
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self.active < int(self.limit):
            place = self._waiting.popleft()
            if not place.cancelled():
                self.active += 1
                place.set_result(None)

    def refused(self, sent: float) -> None:
        """A request that was sent at `sent` came back with 429."""
        if sent >= self._halved:
            self.limit = max(1.0, self.limit / 2)
            self._halved = self._raised = time.monotonic()

    def answered(self) -> None:
        now = time.monotonic()
        if self.limit < self.most and now - self._raised >= 1:
            self.limit, self._raised = min(self.most, self.limit + 1), now
            self._admit()

    def hold(self, seconds: float) -> None:
        self._closed_until = max(self._closed_until, time.monotonic() + seconds)


class Bucket:
    """At most `per_minute` units a minute, evenly, after a burst of a tenth of that; 0: no limit."""

    def __init__(self, per_minute: float) -> None:
        self.rate = per_minute / 60
        self.room = self.burst = max(per_minute / 10, 1.0)
        self._filled = time.monotonic()

    async def take(self, units: float, sleep: Sleep = asyncio.sleep) -> None:
        """Wait until there is room, then use it. More than fits at once is owed, and those who follow wait."""
        if not self.rate:
            return
        self._fill()
        while self.room < min(units, self.burst):
            await sleep((min(units, self.burst) - self.room) / self.rate)
            self._fill()
        self.room -= units

    def correct(self, units: float) -> None:
        """Use `units` more than was thought (or fewer)."""
        self.room -= units

    def _fill(self) -> None:
        now = time.monotonic()
        self.room = min(self.burst, self.room + (now - self._filled) * self.rate)
        self._filled = now
