"""What routing costs and saves on this machine: speed at several capacities beside static dropping of the same layers,
cache bytes, and what a training step takes. All times are ratios of medians taken in one process, in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from paper_tables.probe import token_ids
from paper_tables.timing import Timed, decode, interleaved, prefill

from .attaching import attach, routers
from .context import Forced, closed, routing_context
from .draft import sharing_copy
from .gate import runtime_of
from .objective import token_losses


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


class Training:
    """Steps that train the routers of `base` on `batch` examples of `length` tokens, half of them the prompt's; with
    `ragged` one example has half as many, one all, the others numbers in between."""

    def __init__(self, base: Any, layers: str, *, batch: int, length: int, ragged: bool = False) -> None:
        self.model, self.ids = attach(sharing_copy(base), layers=layers), token_ids(base, batch, length)
        self.routers = [router.weight for router in routers(self.model).values()]
        own = {id(weight) for weight in self.routers}
        self.frozen = [p for p in self.model.parameters() if p.requires_grad and id(p) not in own]  # the base's
        self.optimizer = torch.optim.AdamW(self.routers)
        self.runtime = runtime_of(self.model)
        self.whole = self.runtime.config
        lengths = torch.linspace(length // 2, length, batch).long() if ragged else torch.full((batch,), length)
        self.mask = (torch.arange(length) < lengths[:, None]).long().to(self.ids.device)  # padding on the right
        self.labels = self.ids.masked_fill(self.mask == 0, -100)
        self.labels[:, : length // 4 if ragged else length // 2] = -100

    def __enter__(self) -> Training:
        for parameter in self.frozen:
            parameter.requires_grad_(False)
        return self

    def __exit__(self, *_: Any) -> None:
        for parameter in self.frozen:
            parameter.requires_grad_(True)

    def step(self, cheap: bool, rows: int) -> None:
        """Over all examples, `rows` in a batch, each no longer than its longest; `cheap` leaves skipped rows out."""
        self.runtime.config = replace(self.whole, cheap_train=cheap)
        for first in range(0, len(self.ids), rows):
            part = slice(first, first + rows), slice(int(self.mask[first : first + rows].sum(-1).max()))
            with routing_context(train=True):
                logits = self.model(input_ids=self.ids[part], attention_mask=self.mask[part], use_cache=False).logits
                loss = token_losses(logits, self.labels[part], None, 0.0).sum() / len(self.ids)
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_bytes(self) -> float:
        """Of the optimizer, but for its counters."""
        kept = [t for values in self.optimizer.state.values() for t in values.values() if isinstance(t, Tensor)]
        return float(sum(t.numel() * t.element_size() for t in kept if t.dim()))


def bench_training(base: Any, layers: str, *, batch: int, length: int, rounds: int) -> dict[str, float]:
    """A training step with all rows computed, and with skipped rows left out; the time of a forward pass of the base is
    the unit. Bytes of the optimizer's state."""

    @torch.no_grad()
    def forward(_: Any) -> None:
        base(input_ids=training.ids, use_cache=False)

    with Training(base, layers, batch=batch, length=length) as training:
        timed = interleaved(
            {"forward": Timed(forward), "step": Timed(lambda _: training.step(False, batch)),
             "cheap": Timed(lambda _: training.step(True, batch))},
            rounds=rounds, warmup=1,
        )  # fmt: skip
    return {
        "step_over_forward": 1 / timed["step"].speedup, "cheap_step_over_forward": 1 / timed["cheap"].speedup,
        "optimizer_bytes": training.state_bytes(), "router_bytes": float(sum(4 * w.numel() for w in training.routers)),
    }  # fmt: skip


def bench_batching(base: Any, layers: str, *, batch: int, lengths: Sequence[int], rounds: int) -> dict[str, float]:
    """How much faster `cheap` training goes over examples of different lengths in one padded batch than one by one, as
    the paper's code has to: by the length of the longest. Arithmetic bounds it: it is most where examples are short."""
    found = {}
    for length in lengths:
        with Training(base, layers, batch=batch, length=length, ragged=True) as training:
            ways = {name: partial(training.step, True, rows) for name, rows in (("one by one", 1), ("batch", batch))}
            timed = interleaved(ways, rounds=rounds, warmup=1)
        found[str(length)] = timed["batch"].speedup
    return found


def run(
    base: Any, layers: str = "last", *, context: int = 512, new_tokens: int = 32, rounds: int = 9
) -> dict[str, Any]:
    """All of it for `base`."""
    from paper_tables.machine import describe, machine

    rows = bench_speed(base, layers, context=context, new_tokens=new_tokens, rounds=rounds)
    training = bench_training(base, layers, batch=8, length=min(context, 128), rounds=max(3, rounds // 2))
    lengths = [length for length in (16, 32, 64, 128, 256) if length <= context]
    batching = bench_batching(base, layers, batch=8, lengths=lengths, rounds=max(3, rounds // 2))
    found = {"machine": describe(machine()), "context": context, "new_tokens": new_tokens, **training}
    return {**found, "cheap_batch_of_8_over_one_by_one": batching, "speed": rows}
