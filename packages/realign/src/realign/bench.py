"""The client's speed beside the published way, one blocking request after the other, at a fixed latency; the share of
the journal in it; and the memory of the whole pipeline, from few records to many.

Rates are those of this machine: the figures say where one core allows less than the latency does, and how long other
work on the machine kept this one waiting. `python -m realign.bench COUNT FOLDER` runs the pipeline over so many
generated records and prints its peak memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from instruct_data import Journal, read
from instruct_data.journal import content_key
from instruct_data.llm import Reply, Request
from instruct_data.llm.client import Backend
from instruct_data.llm.cost import Usage
from instruct_data.llm.pace import measure, paced
from instruct_data.llm.service import Service

ENTRIES = 2000  # of a journal that is measured
TURNS = 3  # times that both ways are measured, in turn


def run(seconds: float, levels: Sequence[int], rounds: int, records: Sequence[int] = ()) -> dict[str, Any]:
    """Rows for numbers of requests in flight, beside the published one at a time; and for numbers of records."""
    journal = journal_cost()
    with paced(seconds) as url:
        measure(url, 2, 2)  # imports and first connections
        one = measure(url, 1, 5).rate
        rows = []
        for level in levels:
            began, before = time.monotonic(), waited()
            found = [measure(url, level, level * rounds) for _ in range(TURNS)]
            kept = (waited() - before) / (time.monotonic() - began)
            rate, cpu = median(pace.rate for pace in found), median(pace.cpu for pace in found)
            rows.append({
                "in flight": level, "replies a second": rate, "of what is possible": rate * seconds / level,
                "times one by one": rate / one, "CPU ms a reply": cpu,
                "a core allows, of what is possible": min(1.0, 1e3 / cpu * seconds / level),
                "waited for a core, share of the time": kept, "journal, share of CPU": journal / cpu,
                "journal, share of the time": journal * rate / 1e3,
            })  # fmt: skip
    told: dict[str, Any] = {"latency": seconds, "one by one, replies a second": one, "speed": rows}
    return told | ({"memory": memory(records)} if records else {})


def waited() -> float:
    """Seconds that this thread could have run but other work had the cores; 0 where the system does not tell."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def journal_cost() -> float:
    """CPU milliseconds that a reply takes of the journal: looked up, not found, written."""
    value = Reply("words " * 100, "stop", Usage(500, 100), "model").stored()
    keys = [content_key(number) for number in range(ENTRIES)]
    with tempfile.TemporaryDirectory() as folder, Journal(folder, {}) as journal:
        began = time.thread_time()
        for key in keys:
            journal.get(key)
            journal.append(key, value)
        return 1e3 * (time.thread_time() - began) / ENTRIES


def memory(counts: Sequence[int]) -> list[dict[str, Any]]:
    """Peak memory of the pipeline, each time in a process of its own."""
    rows: list[dict[str, Any]] = []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [sys.executable, "-m", __name__, str(count), folder], check=True, capture_output=True, text=True
            )
        found = json.loads(done.stdout)
        first = rows[0]["peak MB"] if rows else found["peak MB"]
        rows.append({**found, "times the first": found["peak MB"] / first})
    return rows


class Instant(Backend):
    """Answers at once."""

    concurrency = 32

    async def complete(self, request: Request, may_send: Callable[[], None], sleep: Any) -> Reply:
        may_send()
        answer = request.messages[-1]["content"].partition("[response starts]\n")[2].partition("\n[response ends]")[0]
        reply = {"suitable": True, "reasoning": "It fits.", "revised_response": f"1. {answer}\n2. That is all."}
        return Reply(json.dumps(reply), "stop", Usage(400, 80), "instant")

    async def close(self) -> None:
        """Nothing is open."""


@dataclass(frozen=True)
class InstantService(Service):
    def make(self, model: str, journal: Journal) -> Backend:
        return Instant()


def pipeline(count: int, folder: Path) -> dict[str, Any]:
    """Rewrite `count` records as `realign run` does, without a server. Peak memory in MB, and records a second."""
    import resource

    from .filters import PRESETS
    from .rewriting import Recipe
    from .taxonomy import load_taxonomy
    from .workflow import rewrite_records

    data = folder / "data.jsonl"
    with data.open("w", encoding="utf-8") as file:
        file.writelines(lines(count))
    recipe = Recipe("instant", candidates=1, filters=PRESETS["careful"])
    service = InstantService(folder / "journal", "realign", structured="schema")
    began = time.monotonic()
    said = rewrite_records(read(str(data)), folder / "out.jsonl", recipe, service, load_taxonomy())
    seconds = time.monotonic() - began
    assert said["rewritten"] == count, said
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << (20 if sys.platform == "darwin" else 10))
    return {"records": count, "peak MB": peak, "records a second": count / seconds}


def lines(count: int) -> Iterator[str]:
    text = "It follows from what was said before, and from nothing else, that the answer must be number"
    for number in range(count):
        row = {"id": number, "instruction": f"What is the answer to question {number}?", "category": "closed_qa"}
        yield json.dumps({**row, "output": f"{text} {number}. " * 4}) + "\n"


if __name__ == "__main__":
    print(json.dumps(pipeline(int(sys.argv[1]), Path(sys.argv[2]))))
