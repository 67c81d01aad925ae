"""Scoring beside the published procedure, one record at a time, on the same model and data; in CPU seconds.

The procedure: for every record tokenise the whole text, the prompt and the answer; forward the whole text and the
answer alone with labels, which computes the logits of every position. Model load is not counted. CPU seconds of the
process, because neighbours on a machine change wall time and not these; a GPU's figures are wall time.
"""

from __future__ import annotations

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

SENTENCES = {"short": 180, "long": 1200}  # characters of an answer


def probe_model(small: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """GPT-2 of 124M parameters with random weights: speed does not depend on what the weights are."""
    from transformers import AutoModelForCausalLM, GPT2Config

    torch.manual_seed(0)
    config = GPT2Config(n_layer=4, n_embd=256, n_head=4) if small else GPT2Config()
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    return model.to("cuda") if torch.cuda.is_available() else model


def probe_pairs(records: int, characters: int) -> list[Pair]:
    """Pairs of the zoo, answers of about `characters`: cut, or joined until they are long enough."""
    rows = [record.examples[0] for record in read("zoo:pairs")]
    pairs: list[Pair] = []
    for number in range(records):
        answer, step = "", number
        while len(answer) < characters * (0.5 + number % 7 / 6):
            answer += rows[step % len(rows)].response + "\n"
            step += 1
        limit = int(characters * (0.5 + number % 7 / 6))
        pairs.append(Pair(str(number), rows[number % len(rows)].instruction + "\n", answer[:limit]))
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


def linearity(model: Any, tokenizer: Any, sizes: Sequence[int], characters: int) -> dict[str, float]:
    """How straight time over tokens is, for so many records: R², and the drift of tokens a second in percent."""
    points = []
    for size in sizes:
        seconds, scores = timed(partial(score, model, tokenizer, probe_pairs(size, characters)))
        points.append((scores.facts["tokens"], seconds))
    tokens, times = torch.tensor(points, dtype=torch.float64).T
    r2 = float(torch.corrcoef(torch.stack([tokens, times]))[0, 1] ** 2)
    speeds = tokens / times
    return {"r2": r2, "drift_percent": float(100 * (speeds.max() / speeds.median() - 1))}


def tokenisation(tokenizer: Any, pairs: list[Pair], total: float) -> float:
    """Percent of the whole time that tokenising takes."""
    from instruct_data.scoring import Encoder

    encoder = Encoder(tokenizer, "original", 1024, 10**6)
    return 100 * timed(lambda: encoder.encode(pairs))[0] / total


def two_ranks(model: Any, tokenizer: Any, pairs: list[Pair]) -> float:
    """Time of one process over that of the slower of two shares: what a second free device saves."""
    whole = timed(lambda: score(model, tokenizer, pairs))[0]
    with tempfile.TemporaryDirectory() as room:
        share = partial(score, model, tokenizer, pairs, folder=room, world=2)
        shares = [timed(partial(share, rank=rank))[0] for rank in (0, 1)]
    return whole / max(shares)


def run(*, records: int = 60, rounds: int = 3, small: bool = False) -> dict[str, Any]:
    """All of it; see `superfiltering bench`."""
    from model_hooks import zoo
    from model_hooks.loading import load_tokenizer
    from paper_tables.machine import describe, machine

    tokenizer = load_tokenizer(str(zoo.resolve("zoo:gpt2")))
    model = probe_model(small)
    found: dict[str, Any] = {"machine": describe(machine()), "model": "16M GPT-2" if small else "124M GPT-2"}
    rows: list[dict[str, Any]] = []
    for name, characters in SENTENCES.items():
        pairs = probe_pairs(records, characters)
        rows.append({"answers": name, "dtype": "float32", **_ratio(model, model, tokenizer, pairs, rounds)})
        if native_bf16():
            half = probe_model(small, torch.bfloat16)
            rows.append({"answers": name, "dtype": "bfloat16", **_ratio(model, half, tokenizer, pairs, rounds)})
        if name == "short":
            found["tokenising_percent"] = tokenisation(tokenizer, pairs, rows[0]["seconds"])
    shape = probe_model(small=True)
    sizes = [records * 2**k for k in range(4)]
    found |= {f"linear_{k}": v for k, v in linearity(shape, tokenizer, sizes, SENTENCES["short"]).items()}
    found["two_ranks"] = two_ranks(shape, tokenizer, probe_pairs(records * 4, SENTENCES["short"]))
    return {**found, "speed": rows}
