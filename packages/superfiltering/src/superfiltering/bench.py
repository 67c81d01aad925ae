"""Scoring beside the published procedure, one record at a time, on the same model and data; in CPU seconds.

The procedure: for every record tokenise the whole text, the prompt and the answer; forward the whole text and the
answer alone with labels, which computes the logits of every position. Model load is not counted. CPU seconds of the
process, because neighbours on a machine change wall time and not these; a GPU's figures are wall time.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from instruct_data.records import read
from instruct_data.scoring import Pair, score
from instruct_data.templates import none

KINDS = ("short", "long")  # answers cut to their first 1 to 6 sentences or lines, and whole ones
SENTENCE = re.compile(r"(?<=[.!?])\s+|\n")


def probe_model(small: bool = False, dtype: torch.dtype = torch.float32, tiny: bool = False) -> Any:
    """GPT-2 of 124M parameters (small: 16M, tiny: 7M) with random weights, on which speed does not depend."""
    from transformers import AutoModelForCausalLM, GPT2Config

    torch.manual_seed(0)
    config = GPT2Config(n_layer=4, n_embd=256, n_head=4) if small else GPT2Config()
    if tiny:
        config = GPT2Config(n_layer=2, n_embd=128, n_head=2)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    return model.to("cuda") if torch.cuda.is_available() else model


def probe_pairs(records: int, kind: str = "short", data: str = "zoo:pairs") -> list[Pair]:
    """Pairs of the first records of `data` in the original's template; numbered anew where the data has fewer."""
    examples = [example for record in read(data) for example in record.examples if example.response.strip()]
    pairs = []
    for number in range(records):
        example, again = examples[number % len(examples)], number // len(examples)
        answer = f"# {again}\n{example.response}" if again else example.response
        if kind == "short":
            ends = [found.start() for found in SENTENCE.finditer(answer)][: 1 + number % 6]
            answer = answer[: ends[-1]] if len(ends) == 1 + number % 6 else answer
        pairs.append(Pair(str(number), none(example), answer))
    return pairs


@torch.no_grad()
def one_by_one(model: Any, tokenizer: Any, pairs: Sequence[Pair], max_length: int = 1024) -> list[tuple[float, float]]:
    """(mean loss given the prompt, mean loss alone) of each pair, the published way."""
    found = []
    for pair in pairs:
        whole, prompt, alone = (
            tokenizer(text, return_tensors="pt").input_ids.to(model.device)
            for text in (pair.prompt + pair.response, pair.prompt, pair.response)
        )
        whole = whole[:, :max_length]
        labels = whole.clone()
        labels[:, : prompt.shape[1]] = -100
        alone = alone[:, : max_length - prompt.shape[1] + 1]
        losses = (
            model(input_ids=ids, labels=target, output_hidden_states=True).loss.item()
            for ids, target in ((whole, labels), (alone, alone))
        )
        found.append(tuple(losses))
    return found


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, result): CPU seconds of the process, or wall seconds on a GPU."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    began = clock()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - began, result


def _ratio(model: Any, other: Any, tokenizer: Any, pairs: list[Pair], rounds: int) -> dict[str, float]:
    """Plain time of `model` over ours of `other`, in turn, medians; and the largest difference of a mean loss."""
    plain: list[float] = []
    ours: list[float] = []
    for turn in range(rounds + 1):
        seconds, reference = timed(lambda: one_by_one(model, tokenizer, pairs))
        mine, table = timed(lambda: score(other, tokenizer, pairs).table())
        if turn:  # the first round warms up
            plain.append(seconds)
            ours.append(mine)
    sums = {name: table[name].to_pylist() for name in table.column_names}
    worst = 0.0
    for row, losses in enumerate(reference):
        for side, loss in zip(("cond", "direct"), losses):
            worst = max(worst, abs(sums[f"loss_{side}_sum"][row] / sums[f"n_{side}"][row] - loss))
    ratio = median(a / b for a, b in zip(plain, ours))
    return {"times_faster": ratio, "seconds": median(ours), "largest_difference": worst}


def native_bf16() -> bool:
    """Whether bfloat16 is fast here: a GPU, or a CPU that multiplies it."""
    if torch.cuda.is_available():
        return True
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text() or "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def linearity(model: Any, tokenizer: Any, sizes: Sequence[int], rounds: int) -> dict[str, float]:
    """How straight time over tokens is, for so many records: R², and how far the tokens a second of one size stray from
    those of all, in percent. Medians of rounds that take all sizes in turn."""
    batches = [probe_pairs(size) for size in sizes]
    times: list[list[float]] = [[] for _ in sizes]
    counts = [0] * len(sizes)
    for _ in range(rounds):
        for place, pairs in enumerate(batches):
            seconds, scores = timed(partial(score, model, tokenizer, pairs))
            times[place].append(seconds)
            counts[place] = scores.facts["tokens"]
    tokens = torch.tensor(counts, dtype=torch.float64)
    middle = torch.tensor([median(found) for found in times], dtype=torch.float64)
    r2 = float(torch.corrcoef(torch.stack([tokens, middle]))[0, 1] ** 2)
    speeds = tokens / middle
    return {"r2": r2, "drift_percent": float(100 * (speeds / speeds.median() - 1).abs().max())}


def tokenisation(tokenizer: Any, pairs: list[Pair], total: float) -> float:
    """Percent of the whole time that tokenising takes."""
    from instruct_data.scoring import Encoder

    encoder = Encoder(tokenizer, "original", 1024, 10**6)
    return 100 * timed(lambda: encoder.encode(pairs))[0] / total


def _rank(rank: int, world: int, records: int, folder: str, started: Any, times: Any) -> None:
    """One process of `two_ranks`, on a core of its own with one thread."""
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    tokenizer, model, pairs = _tokenizer(), probe_model(small=True), probe_pairs(records)
    started.wait()
    began = time.perf_counter()
    score(model, tokenizer, pairs, folder=folder, rank=rank, world=world)
    times.put(time.perf_counter() - began)


def ranks_speedup(records: int, world: int = 2) -> float | None:
    """Wall time of one process over that of `world` at once, a core and a thread each; None with too few cores."""
    if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < world:
        return None
    spawn = multiprocessing.get_context("spawn")
    found = []
    for processes in (1, world):
        with tempfile.TemporaryDirectory() as room:
            started, times = spawn.Barrier(processes), spawn.SimpleQueue()
            arguments = (processes, records, room, started, times)
            running = [spawn.Process(target=_rank, args=(rank, *arguments)) for rank in range(processes)]
            for process in running:
                process.start()
            found.append(max(times.get() for _ in running))
            for process in running:
                process.join()
    return found[0] / found[1]


def _tokenizer(source: str = "zoo:gpt2") -> Any:
    from model_hooks.loading import load_tokenizer

    return load_tokenizer(source)


def run(
    *, records: int = 60, rounds: int = 3, scaling: int = 960, small: bool = False, data: str = "zoo:pairs",
    tokenizer: str = "zoo:gpt2",
) -> dict[str, Any]:  # fmt: skip
    """All of it; see `superfiltering bench`."""
    from paper_tables.machine import describe, machine

    reader, model = _tokenizer(tokenizer), probe_model(small)
    found: dict[str, Any] = {
        "machine": describe(machine()), "model": "16M GPT-2" if small else "124M GPT-2", "data": Path(data).name,
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        pairs = probe_pairs(records, kind, data)
        rows.append({"answers": kind, "dtype": "float32", **_ratio(model, model, reader, pairs, rounds)})
        if native_bf16():
            half = probe_model(small, torch.bfloat16)
            rows.append({"answers": kind, "dtype": "bfloat16", **_ratio(model, half, reader, pairs, rounds)})
        if kind == "short":
            found["tokenising_percent"] = tokenisation(reader, pairs, rows[0]["seconds"])
    sizes = [scaling // k for k in (8, 4, 2, 1)]
    found["linear_records"] = sizes
    found |= {f"linear_{k}": v for k, v in linearity(probe_model(tiny=True), _tokenizer(), sizes, rounds).items()}
    found["two_ranks_times_faster"] = ranks_speedup(min(scaling, 960))
    return {**found, "speed": rows}
