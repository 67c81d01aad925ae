"""Speed beside the published ways: batches of ten that are waited for, and sixteen forward passes a record.

Times are those of this machine and of one run; what counts is their ratio. Tokens are exact.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from instruct_data import Example, Records, read
from instruct_data.llm.pace import by_barrier, in_order, measure, paced
from instruct_data.scoring.pairs import Pair
from instruct_data.templates import template as template_named

from .reverse import pairs_of_version
from .versions import Version, columns, original

SLOW_EVERY, SLOW_TIMES = 20, 10.0  # one reply in twenty, by chance, takes ten times as long
BATCH = 10  # requests that the published scripts send together
PUBLISHED = 400  # replies that they wait for; then the server's chances begin anew


def replies(seconds: float, concurrency: int, count: int) -> dict[str, Any]:
    """Replies a second of both ways, on a server of which one reply in twenty takes ten times as long.

    Ours are counted between the first and the last tenth, since a run ends with a wait for the last slow ones that does
    not grow with it; the rate of the whole of this run stands beside. The published way has no such end.
    """
    with paced(0.01) as url:
        measure(url, 2, 2)  # imports
    with paced(seconds, SLOW_EVERY, SLOW_TIMES) as url:
        published = measure(url, BATCH, min(PUBLISHED, max(BATCH, count // 8)), by_barrier).rate
        ours = measure(url, concurrency, count, in_order)
    return {
        "latency": seconds, "in flight": concurrency, "batches of ten, replies a second": published,
        "replies a second": ours.midst, "of what is possible": ours.midst * usual(seconds) / concurrency,
        "times as fast": ours.midst / published, "times as fast, start and end included": ours.rate / published,
        "CPU ms a reply": ours.cpu,
    }  # fmt: skip


def usual(seconds: float) -> float:
    """The mean of what replies take."""
    return seconds * (1 + (SLOW_TIMES - 1) / SLOW_EVERY)


def with_versions(records: Records) -> list[dict[str, Any]]:
    """The records with versions of about the length that a teacher writes, made without one."""
    rows = []
    for record in records:
        example = record.examples[-1]
        new, better = f"Explain, step by step: {example.instruction}", f"{example.response}\n{example.response}"
        versions = {
            "ori": original(record), "Q": Version(instruction=new, answer=f"In short, {example.response}"),
            "A": Version(answer=better), "QA": Version(instruction=new, answer=f"In short, {better}"),
        }  # fmt: skip
        rows.append({**record.data, **columns(versions)})
    return rows


def passes(model: Any, tokenizer: Any, rows: list[dict[str, Any]], template: str, max_length: int) -> int:
    """Forward sixteen texts a record, one by one, as the published script does; returns the tokens."""
    import torch

    from .versions import versions_of

    prompt, tokens = template_named(template, tokenizer), 0
    with torch.inference_mode():
        for record in read(rows, "alpaca", name="records"):
            for version in versions_of(record).values():
                example: Example = version.example(record.examples[-1])
                for pair in pairs_of_version("", example, prompt):
                    tokens += _pass(model, tokenizer, pair, max_length)
    return tokens


def _pass(model: Any, tokenizer: Any, pair: Pair, max_length: int) -> int:
    count = 0
    for text in (pair.prompt + pair.response, pair.response):
        ids = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")["input_ids"].to(model.device)
        model(input_ids=ids)
        count += ids.shape[1]
    return count


def scoring(student: str, records: Records, template: str, max_length: int, rounds: int) -> dict[str, Any]:
    """Tokens and seconds of both ways; medians of the rounds, the ways in turn."""
    from model_hooks.loading import load_placed

    from .workflow import score_records

    model, tokenizer = load_placed(student)
    rows = with_versions(records)
    times: dict[str, list[float]] = {"published": [], "ours": []}
    tokens: dict[str, int] = {}
    for turn in range(rounds + 1):
        began = time.perf_counter()
        tokens["published"] = passes(model, tokenizer, rows, template, max_length)
        between = time.perf_counter()
        with tempfile.TemporaryDirectory() as room:
            told = score_records(
                model, tokenizer, read(rows, "alpaca", name="records"), Path(room) / "scored.jsonl", template=template,
                max_length=max_length,
            )  # fmt: skip
        if turn:  # the first round warms up
            times["published"].append(between - began)
            times["ours"].append(time.perf_counter() - between)
        tokens["ours"] = told["forwarded_tokens"]
    return {
        "records": len(rows), "tokens, published way": tokens["published"], "tokens": tokens["ours"],
        "tokens spared": 1 - tokens["ours"] / tokens["published"],
        "times as fast": median(a / b for a, b in zip(times["published"], times["ours"])),
    }  # fmt: skip
