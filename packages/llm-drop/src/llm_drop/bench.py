"""What dropping buys on this machine: speed beside its ideal, cache bytes, and what calibration costs.

All times are ratios of medians taken in one process, in turn. The ideal of a dropped model is what is left of the
parent when the profiled time of the dropped sublayers is taken away: 1 / (1 - t_dropped / t_total).
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llm_drop.budget import latency_costs
from llm_drop.plan import Plan
from llm_drop.repair import apply
from llm_drop.speculative import sharing_copy
from paper_tables.memory import peak_memory, peak_tensor_bytes
from paper_tables.probe import speed, token_ids
from paper_tables.timing import interleaved


def bench_speed(
    parent: Any, plans: Mapping[str, Plan], *, context: int, new_tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """A row for each plan: KV share, and speed in both phases beside its ideal."""
    from paper_tables.quality import size

    variants = {name: apply(sharing_copy(parent), plan, check=False) for name, plan in plans.items()}
    measured = speed(parent, variants, context=context, new_tokens=new_tokens, rounds=rounds)
    costs = {phase: latency_costs(parent, context, phase=phase) for phase in ("prefill", "decode")}
    whole = size(parent)
    rows = []
    for name, plan in plans.items():
        left = size(variants[name])
        row: dict[str, Any] = {
            "model": name,
            "kv_bytes": left["kv_bytes"] / whole["kv_bytes"],
            "parameters": left["parameters"] / whole["parameters"],
        }
        for phase, cost in costs.items():
            ideal = 1 / (1 - sum(cost.units[u] for u in plan.units) / cost.total)
            row |= {phase: measured[name][phase].speedup, f"{phase}_of_ideal": measured[name][phase].speedup / ideal}
        rows.append(row)
    return rows


def static_kv_share(parent: Any, dropped: Any, length: int = 256) -> float:
    """Bytes of a static cache of `length` positions that the dropped model needs, as a share of the parent's."""
    from transformers import StaticCache

    from model_hooks.kv import kv_bytes

    def needed(model: Any) -> int:
        cache = StaticCache(config=model.config, max_cache_len=length)
        with torch.no_grad():
            model(input_ids=token_ids(model, 1, 4), past_key_values=cache, use_cache=True)
        return kv_bytes(cache)

    return needed(dropped) / needed(parent)


def bench_unit(model: Any, dropped: Any, index: int, *, context: int, rounds: int) -> float:
    """Time of block `index` without its attention, as a ratio of its feed-forward half written out by hand."""
    from model_hooks import anatomy

    block = anatomy(dropped).blocks[index]
    assert block.attention is None
    assert block.mlp is not None
    norms = [block.module.get_submodule(name) for name in block.mlp.pre]
    x = torch.randn(1, context, model.config.get_text_config().hidden_size, dtype=model.dtype, device=model.device)

    def by_hand() -> Any:
        h = x
        for norm in norms:
            h = norm(h)
        return x + block.mlp.module(h)  # type: ignore[union-attr]

    with torch.no_grad():
        timed = interleaved({"by hand": by_hand, "block": lambda: block.module(x)}, rounds=rounds * 5, warmup=5)
    return 1 / timed["block"].speedup


def bench_calibration(model: Any, *, samples: int, length: int, batch_size: int, rounds: int) -> dict[str, float]:
    """Wall time of a scoring pass over plain forwards of the same data, and its peak of live tensors: at 256 sequences
    over that at 16, and at 64 over what `stored_similarities` needs."""
    from llm_drop.scoring import score

    ids = token_ids(model, samples, length)

    @torch.no_grad()
    def forwards() -> None:
        for part in ids.split(batch_size):
            model(input_ids=part, use_cache=False)

    timed = interleaved(
        {"forwards": forwards, "score": lambda: score(model, ids, batch_size=batch_size)}, rounds=rounds, warmup=1
    )
    found = {"calibration_time": 1 / timed["score"].speedup}

    few, some, many = (token_ids(model, n, min(length, 128)) for n in (16, 64, 256))
    peaks = [
        max(peak_tensor_bytes(partial(score, model, ids, batch_size=batch_size)) for _ in range(times))
        for ids, times in ((few, 4), (some, 1), (many, 1))  # when a tensor is freed is not the same in every pass
    ]
    stored = peak_tensor_bytes(partial(stored_similarities, model, some, batch_size))
    return found | {
        "calibration_peak_256_over_16": peaks[2] / peaks[0],
        "calibration_peak_over_stored_64": peaks[1] / stored,
    }


@torch.no_grad()
def stored_similarities(model: Any, ids: torch.Tensor, batch_size: int) -> list[float]:
    """Mean similarity of each block's input and output the plain way: keep all of them, join them, then compare."""
    kept: list[list[torch.Tensor]] = [[] for _ in range(model.config.num_hidden_layers + 1)]
    for part in ids.split(batch_size):
        states = model(input_ids=part, use_cache=False, output_hidden_states=True).hidden_states
        for own, state in zip(kept, states):
            own.append(state)
    joined = [torch.cat(own) for own in kept]
    return [float(torch.cosine_similarity(x, y, dim=-1).mean()) for x, y in itertools.pairwise(joined)]


def bench_load(parent: Any, dropped: Any, rounds: int) -> dict[str, float]:
    """Time and memory of loading the dropped model's checkpoint and running it once, as shares of the parent's.

    Weights are mapped from the file and read when they are first used, so without a forward nothing would be loaded.
    """
    from model_hooks import Card, load, save

    with tempfile.TemporaryDirectory() as room:
        folders = {"parent": Path(room) / "parent", "dropped": Path(room) / "dropped"}
        for (name, folder), model in zip(folders.items(), (parent, dropped)):
            save(model, folder, card=Card(base="probe", method=name), verify=False)

        @torch.no_grad()
        def first_run(folder: Path) -> None:
            model, _ = load(folder, tokenizer=False)
            model(input_ids=token_ids(model, 1, 64), use_cache=False)

        loads = {name: partial(first_run, folder) for name, folder in folders.items()}
        timed = interleaved(loads, rounds=rounds, warmup=1)
        peaks = {name: peak_memory(function) for name, function in loads.items()}
    found = {"load_time": 1 / timed["dropped"].speedup}
    return found | ({"load_peak": peaks["dropped"] / peaks["parent"]} if all(peaks.values()) else {})


def run(
    parent: Any, plans: Mapping[str, Plan], *, context: int = 512, new_tokens: int = 32, rounds: int = 9
) -> dict[str, Any]:
    """All of it for `parent`, with `plans` or, where none are given, a quarter and half of the attention dropped."""
    from model_hooks import anatomy
    from paper_tables.machine import describe, machine

    parts = anatomy(parent)
    depth = parts.num_original_layers
    if not plans:
        plans = {f"attention {n} of {depth}": Plan(depth, tuple(range(depth - n - 1, depth - 1)))
                 for n in (depth // 4, depth // 2)}  # fmt: skip
    rows = bench_speed(parent, plans, context=context, new_tokens=new_tokens, rounds=rounds)
    found: dict[str, Any] = {"machine": describe(machine()), "context": context, "new_tokens": new_tokens}
    attention = [plan for plan in plans.values() if plan.attention and not plan.mlp]
    if attention:
        dropped = apply(sharing_copy(parent), attention[-1], check=False)
        found["static_kv"] = static_kv_share(parent, dropped)
        found["block_over_mlp_half"] = bench_unit(
            parent, dropped, attention[-1].attention[0], context=context, rounds=rounds
        )
        found |= bench_load(parent, dropped, rounds)
    found |= bench_calibration(parent, samples=16, length=min(context, 512), batch_size=4, rounds=rounds)
    return {**found, "speed": rows}
