"""What routing costs and saves on this machine: speed at several capacities beside static dropping of the same layers,
cache bytes, and what a training step takes. All times are ratios of medians taken in one process, in turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from paper_tables.probe import token_ids
from paper_tables.timing import Timed, decode, interleaved, prefill

from .attaching import attach, routers
from .context import routing_context
from .draft import sharing_copy
from .gate import runtime_of
from .objective import token_losses


class Forced:
    """A routed model whose decisions are given, as what times models calls it."""

    def __init__(self, model: Any, forced: Mapping[int, Tensor]) -> None:
        self.model, self.forced, self.device = model, forced, model.device

    def __call__(self, **kwargs: Any) -> Any:
        with routing_context(forced=self.forced):
            return self.model(**kwargs)


def closed(layers: tuple[int, ...], share: float, rows: int = 1) -> dict[int, Tensor]:
    """Decisions that leave a share of the gated layers open, the same for all rows: the last ones are closed."""
    keep = round(share * len(layers))
    return {layer: torch.full((rows,), place < keep) for place, layer in enumerate(layers)}


def bench_speed(base: Any, layers: str, *, context: int, new_tokens: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each capacity: speed in both phases as a ratio to the base, and to static dropping; KV share."""
    from model_hooks import drop
    from model_hooks.kv import kv_bytes

    routed = attach(sharing_copy(base), layers=layers)
    gated = runtime_of(routed).layers
    variants: dict[str, Any] = {"base": base}
    decisions = {share: closed(gated, share) for share in (1.0, 0.5, 0.0)}
    for share, forced in decisions.items():
        name = f"{share:g}"
        variants[name] = Forced(routed, forced)
        gone = tuple(layer for layer, gate in forced.items() if not gate.any())
        if gone:
            variants[f"static {name}"] = drop(sharing_copy(base), attention=gone, check=False)
    variants["untrained"] = routed
    ids = token_ids(base, 1, context)
    timed = {
        "prefill": interleaved({n: prefill(m, ids) for n, m in variants.items()}, rounds=rounds),
        "decode": interleaved({n: decode(m, ids, new_tokens) for n, m in variants.items()}, rounds=rounds),
    }

    def cache_bytes(model: Any) -> int:
        with torch.no_grad():
            return kv_bytes(model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values)

    whole = cache_bytes(base)
    rows: list[dict[str, Any]] = []
    for name in ("untrained", *(f"{share:g}" for share in decisions)):
        row: dict[str, Any] = {"capacity": "1, by routers" if name == "untrained" else name}
        for phase, found in timed.items():
            row[phase] = found[name].speedup
            if f"static {name}" in found:
                row[f"{phase}_of_static"] = found[f"static {name}"].seconds / found[name].seconds
        rows.append({**row, "kv_bytes": cache_bytes(variants[name]) / whole})
    return rows


def bench_training(base: Any, layers: str, *, batch: int, length: int, rounds: int) -> dict[str, float]:
    """A training step with all rows computed, and with skipped rows left out; the time of a forward pass of the base is
    the unit. How much faster skipping is with all rows in one batch than one by one, as the paper has to train. Bytes
    of the optimizer's state."""
    model = attach(sharing_copy(base), layers=layers)
    found = [router.weight for router in routers(model).values()]
    trained = {id(weight) for weight in found}
    frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in trained]
    for parameter in frozen:
        parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW(found)
    runtime, ids = runtime_of(model), token_ids(base, batch, length)
    whole = runtime.config
    labels = ids.clone()
    labels[:, : length // 2] = -100

    def step(cheap: bool, rows: int = batch) -> None:
        runtime.config = replace(whole, cheap_train=cheap)
        for first in range(0, batch, rows):
            part = slice(first, first + rows)
            with routing_context(train=True):
                logits = model(input_ids=ids[part], use_cache=False).logits
                loss = token_losses(logits, labels[part], None, 0.0).sum() / batch
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def forward(_: Any) -> None:
        base(input_ids=ids, use_cache=False)

    timed = interleaved(
        {"forward": Timed(forward), "step": Timed(lambda _: step(False)), "cheap": Timed(lambda _: step(True)),
         "one by one": Timed(lambda _: step(True, 1))},
        rounds=rounds, warmup=1,
    )  # fmt: skip
    for parameter in frozen:
        parameter.requires_grad_(True)
    state = sum(
        tensor.numel() * tensor.element_size()
        for values in optimizer.state.values() for tensor in values.values()
        if isinstance(tensor, Tensor) and tensor.dim()
    )  # fmt: skip
    return {
        "step_over_forward": 1 / timed["step"].speedup, "cheap_step_over_forward": 1 / timed["cheap"].speedup,
        "cheap_batch_over_one_by_one": timed["one by one"].seconds / timed["cheap"].seconds,
        "optimizer_bytes": float(state), "router_bytes": float(sum(4 * w.numel() for w in found)),
    }  # fmt: skip


def run(
    base: Any, layers: str = "last", *, context: int = 512, new_tokens: int = 32, rounds: int = 9
) -> dict[str, Any]:
    """All of it for `base`."""
    from paper_tables.machine import describe, machine

    rows = bench_speed(base, layers, context=context, new_tokens=new_tokens, rounds=rounds)
    training = bench_training(base, layers, batch=8, length=min(context, 128), rounds=max(3, rounds // 2))
    return {"machine": describe(machine()), "context": context, "new_tokens": new_tokens, **training, "speed": rows}
