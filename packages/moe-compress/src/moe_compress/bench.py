"""What trimming buys on this machine, with the same kernels on both sides, and what measuring costs.

All times are ratios of medians taken in one process, in turn.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from model_hooks import anatomy
from model_hooks.experts import moe_layers
from moe_compress.selection import Plan
from moe_compress.trimming import apply
from paper_tables.probe import speed, token_ids
from paper_tables.timing import interleaved


def probe_mixtral(layers: int = 8, hidden_size: int = 256, experts: int = 8) -> Any:
    """A Mixtral with random weights in float32: speed does not depend on what the weights are."""
    from transformers import AutoModelForCausalLM, MixtralConfig

    config = MixtralConfig(
        vocab_size=2048, hidden_size=hidden_size, intermediate_size=2 * hidden_size, num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64, num_key_value_heads=hidden_size // 64, max_position_embeddings=2048,
        num_local_experts=experts, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def usual_plans(model: Any) -> dict[str, Plan]:
    """A quarter of the experts, of the MoE sublayers and of the blocks gone."""
    parts = anatomy(model)
    layers = moe_layers(parts)
    some = tuple(parts.original_index[layer.block] for layer in layers[: max(1, len(layers) // 4)])
    kept = {parts.original_index[layer.block]: tuple(range(_three_quarters(layer))) for layer in layers}
    names = {f"{len(next(iter(kept.values())))} of {layers[0].num_experts} experts": Plan(keep=kept)}
    return names | {
        f"{len(some)} MoE layers dropped": Plan(layers=some),
        f"{len(some)} blocks dropped": Plan(blocks=some),
    }


def _three_quarters(layer: Any) -> int:
    return max(layer.top_k, layer.num_experts * 3 // 4 // layer.num_groups * layer.num_groups)


def bench_speed(
    parent: Any, plans: Mapping[str, Plan], *, context: int, new_tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """A row for each plan: shares of parameters and of mixture bytes, and speed in both phases."""
    from paper_tables.metrics import parameters

    variants = {name: apply(copy.deepcopy(parent), plan) for name, plan in plans.items()}
    measured = speed(parent, variants, context=context, new_tokens=new_tokens, rounds=rounds)
    return [
        {"model": name, "parameters": parameters(model) / parameters(parent),
         **{phase: timing.speedup for phase, timing in measured[name].items()}}
        for name, model in variants.items()
    ]  # fmt: skip


def bench_stats(model: Any, *, samples: int = 8, length: int = 128, rounds: int = 5) -> dict[str, float]:
    """Time of the scoring pass over that of plain forwards of the same data with eager experts."""
    from moe_compress.scores import score

    ids = token_ids(model, samples, length)

    @torch.no_grad()
    def eager() -> None:
        for part in ids.split(4):
            model(input_ids=part, use_cache=False)

    model.set_experts_implementation("eager")
    timed = interleaved({"eager": eager, "score": lambda: score(model, ids)}, rounds=rounds, warmup=1)
    model.set_experts_implementation("grouped_mm")
    return {"score_over_eager_forward": 1 / timed["score"].speedup}


def run(model: Any, *, context: int = 256, new_tokens: int = 16, rounds: int = 7) -> dict[str, Any]:
    """All of it."""
    from paper_tables.machine import describe, machine

    plans = usual_plans(model)
    rows = bench_speed(model, plans, context=context, new_tokens=new_tokens, rounds=rounds)
    found = {"machine": describe(machine()), "context": context, "new_tokens": new_tokens}
    return {**found, **bench_stats(model, rounds=max(3, rounds // 2)), "speed": rows}
