"""Plan for a budget instead of a count: the least important sublayers whose loss meets it.

    minimise  sum of S(u) over dropped u    such that    sum of saving(u) >= total - budget * total,   per resource

Resources are KV-cache bytes, latency (measured on this machine) and parameters. Sublayers that save the same are
interchangeable, so of each such class the least important go first, and only how many of each class is open; merging
the classes' prefixes and discarding dominated combinations solves this exactly (no other set within budget has a lower
sum of importance). At least one attention layer stays.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

import torch

from llm_drop.plan import ONE_MUST_STAY, Plan
from llm_drop.scoring import Scores
from llm_drop.selection import Objective, Unit, plan_of
from model_hooks import RequestError, anatomy

Resource = Literal["kv", "latency", "parameters"]
SLACK = 1e-9  # relative; lets "half of the bytes" be exactly half


@dataclass(frozen=True)
class Costs:
    """What a model needs of one resource, in all and by sublayer (bytes, seconds per token, or parameters)."""

    total: float
    units: Mapping[Unit, float]


def choose(importance: Mapping[Unit, float], demands: Iterable[tuple[Mapping[Unit, float], float]]) -> list[Unit]:
    """Units of least summed importance whose savings meet every demand (savings by unit, amount to save).

    Ties go to fewer units. Raises `RequestError` where the demands cannot be met while one attention layer stays.
    """
    units = list(importance)
    wanted = [(savings, amount * (1 - SLACK)) for savings, amount in demands]
    best = _cheapest(units, importance, wanted)
    attention = [u for u in units if u[0] == "attention"]
    if best is not None and attention and set(attention) <= set(best):  # one must stay: try each
        tries = (_cheapest([u for u in units if u != kept], importance, wanted) for kept in attention)
        best = min((t for t in tries if t is not None), key=lambda t: _sum(importance, t), default=None)
    if best is None:
        most = [sum(savings.get(u, 0.0) for u in units) for savings, _ in wanted]
        least = [max((savings.get(u, 0.0) for u in attention), default=0.0) for savings, _ in wanted]
        raise RequestError(
            "the budget cannot be met: dropping everything but one attention layer saves "
            + ", ".join(f"at least {m - a:.4g} of the {w:.4g} needed" for m, a, (_, w) in zip(most, least, wanted))
            + f"; {ONE_MUST_STAY}"
        )
    return best


def _sum(importance: Mapping[Unit, float], units: Iterable[Unit]) -> float:
    return math.fsum(importance[u] for u in units)


def _cheapest(
    units: list[Unit], importance: Mapping[Unit, float], wanted: list[tuple[Mapping[Unit, float], float]]
) -> list[Unit] | None:
    classes: dict[tuple[Any, ...], list[Unit]] = {}
    for unit in sorted(units, key=importance.__getitem__):
        saving = tuple(savings.get(unit, 0.0) for savings, _ in wanted)
        if any(saving):
            classes.setdefault((unit[0], *saving), []).append(unit)
    needs = tuple(amount for _, amount in wanted)
    front: list[tuple[float, tuple[float, ...], tuple[Unit, ...]]] = [(0.0, (0.0,) * len(needs), ())]
    for (_, *savings_of_class), members in classes.items():
        grown = []
        for cost, saved, taken in front:
            for n in range(len(members) + 1):
                now = tuple(min(s + n * d, need) for s, d, need in zip(saved, savings_of_class, needs, strict=True))
                grown.append((cost + _sum(importance, members[:n]), now, taken + tuple(members[:n])))
                if now == needs:
                    break  # more of this class only costs more
        front = _undominated(grown)
    met = [(cost, len(taken), list(taken)) for cost, saved, taken in front if saved == needs]
    return min(met, key=lambda m: m[:2])[2] if met else None


def _undominated(
    states: list[tuple[float, tuple[float, ...], tuple[Unit, ...]]],
) -> list[tuple[float, tuple[float, ...], tuple[Unit, ...]]]:
    """Drop every state for which a cheaper one saves as much of everything."""
    kept: list[tuple[float, tuple[float, ...], tuple[Unit, ...]]] = []
    for state in sorted(states, key=lambda s: (s[0], len(s[2]))):
        if not any(all(a >= b for a, b in zip(other[1], state[1], strict=True)) for other in kept):
            kept.append(state)
    return kept


def plan_for_budget(
    scores: Scores, costs: Mapping[Resource, Costs], budgets: Mapping[Resource, float], objective: Objective = "cosine"
) -> Plan:
    """The plan that meets every budget.

    Args:
        costs: what the model needs, from `kv_costs`, `parameter_costs`, `latency_costs`.
        budgets: share of the total that may remain, e.g. `{"kv": 0.5}`; between 0 and 1.
    """
    for resource, share in budgets.items():
        if not 0 < share < 1:
            raise RequestError(f"{resource} budget {share} is out of range; give the share that may remain, 0 to 1")
        if resource not in costs:
            raise RequestError(f"no costs for {resource}; there are {', '.join(costs) or 'none'}")
    importance = {u: v for u, v in scores.importance(objective).items() if u[0] != "block"}
    bad = [u for u, v in importance.items() if not math.isfinite(v)]
    if bad:
        raise RequestError(f"the importance of {bad[0][0]} {bad[0][1]} is not a finite number")
    demands = [(costs[r].units, (1 - share) * costs[r].total) for r, share in budgets.items()]
    units = choose(importance, demands)
    return plan_of(units, scores, " ".join(f"{r} {share:g}" for r, share in budgets.items()), objective)


def kv_costs(model: Any, context: int = 2048) -> Costs:
    """Bytes of KV cache per attention layer at `context` tokens, batch 1; windows count for what they hold.

    Sizes are read off a real cache after a short pass and scaled, so every cache layout counts as it is.
    """
    from transformers import DynamicCache

    from model_hooks.kv import kv_bytes
    from model_hooks.trace import small_input

    parts = anatomy(model)
    ids = small_input(model)
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    config = model.config.get_text_config(decoder=True)
    units: dict[Unit, float] = {}
    for block, original in zip(parts.blocks, parts.original_index, strict=True):
        if block.attention is None:
            continue
        layer = cache.layers[block.index]
        per_token = sum(t.numel() * t.element_size() for t in (layer.keys, layer.values)) / ids.shape[1]
        window = getattr(config, "sliding_window", None) if getattr(layer, "is_sliding", False) else None
        units[("attention", original)] = per_token * (min(context, window - 1) if window else context)
    assert kv_bytes(cache) > 0
    return Costs(sum(units.values()), units)


def parameter_costs(model: Any) -> Costs:
    """Parameters by sublayer, with the norms that go with it."""
    parts = anatomy(model)
    units: dict[Unit, float] = {}
    for block, original in zip(parts.blocks, parts.original_index, strict=True):
        for sub in block.sublayers:
            modules = [sub.module, *(block.module.get_submodule(n) for n in sub.own_norms)]
            units[(sub.kind, original)] = float(sum(p.numel() for m in modules for p in m.parameters()))
    return Costs(float(sum(p.numel() for p in model.parameters())), units)


def latency_costs(
    model: Any, context: int = 512, rounds: int = 12, phase: Literal["decode", "prefill"] = "decode"
) -> Costs:
    """Seconds per decoded token at `context` tokens of cache, in all and by sublayer, measured here.

    With `phase="prefill"`: seconds of a forward over `context` tokens that fills the cache.

    Each sublayer is timed with its norms inside the running model. Sublayers of one kind and shape get the median of
    all of them: they do the same work, and the noise between them must not choose.
    """
    parts = anatomy(model)
    spent: dict[Unit, list[float]] = {}
    hooks = []
    cuda = any(p.is_cuda for p in model.parameters())

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return perf_counter()

    def timer(unit: Unit, module: Any) -> None:
        began: list[float] = []
        hooks.append(module.register_forward_pre_hook(lambda *_: began.append(now()), prepend=True))
        hooks.append(module.register_forward_hook(lambda *_: spent.setdefault(unit, []).append(now() - began.pop())))

    modules: dict[Unit, int] = {}
    for block, original in zip(parts.blocks, parts.original_index, strict=True):
        for sub in block.sublayers:
            members = [sub.module, *(block.module.get_submodule(n) for n in sub.own_norms)]
            modules[(sub.kind, original)] = len(members)
            for module in members:
                timer((sub.kind, original), module)
    try:
        total = _pass_seconds(model, context, rounds, spent, now, phase)
    finally:
        for hook in hooks:
            hook.remove()
    shape: dict[Unit, tuple[Any, ...]] = {(s.kind, o): (s.kind, sum(p.numel() for p in s.module.parameters()),
                           getattr(s.module, "is_sliding", None), len(s.own_norms))
             for b, o in zip(parts.blocks, parts.original_index, strict=True) for s in b.sublayers}  # fmt: skip
    each = {u: statistics.median(_per_pass(times, modules[u])) for u, times in spent.items()}
    alike = {k: statistics.median(v for u, v in each.items() if shape[u] == k) for k in set(shape.values())}
    return Costs(total, {u: alike[shape[u]] for u in each})


def _per_pass(times: list[float], modules: int) -> list[float]:
    return [sum(times[i : i + modules]) for i in range(0, len(times), modules)]


@torch.no_grad()
def _pass_seconds(model: Any, context: int, rounds: int, spent: dict[Unit, list[float]], now: Any, phase: str) -> float:
    device = model.get_input_embeddings().weight.device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(context, device=device) * 7 + 3).remainder(vocabulary).unsqueeze(0)
    cache = None
    if phase == "decode":
        cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        ids = ids[:, :1]
    times = []
    for done in range(rounds + 2):
        if done == 2:  # two to warm up
            spent.clear()
        began = now()
        cache = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
        times.append(now() - began)
        cache = cache if phase == "decode" else None
    return statistics.median(times[2:])
