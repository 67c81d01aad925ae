"""The client's speed beside the published way, one blocking request after the other, at a fixed latency."""

from __future__ import annotations

from typing import Any

from instruct_data.llm.pace import measure, paced


def run(seconds: float, levels: list[int], rounds: int) -> dict[str, Any]:
    """A row for each number of requests in flight, the first one being the published one at a time."""
    with paced(seconds) as url:
        measure(url, 2, 2)  # imports and first connections
        one, _ = measure(url, 1, 5)
        rows = []
        for level in levels:
            rate, cpu = measure(url, level, level * rounds)
            rows.append({
                "in flight": level, "replies a second": rate, "of what is possible": rate * seconds / level,
                "times one by one": rate / one, "CPU ms a reply": cpu,
            })  # fmt: skip
    return {"latency": seconds, "one by one, replies a second": one, "speed": rows}
