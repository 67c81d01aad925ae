"""What routers do on data: loss beside the ungated model's, what share runs, and which layers on which prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model_hooks.trace import eval_mode

from .attaching import base_of, set_tau
from .context import routing_context
from .data import Example, collate
from .gate import runtime_of
from .objective import token_losses

STEPS = 14  # of the bisection for a threshold, at most
CLOSE = 2e-3  # share at which it ends


@contextmanager
def ungated_model(model: Any) -> Iterator[None]:
    """The base, in this block: all gates open and, where LoRA was trained along with them, without it."""
    without = getattr(model, "disable_adapter", nullcontext)
    with routing_context(off=True), without():
        yield


@dataclass(frozen=True)
class Measured:
    """Over some examples: `loss` [N] (nats a token after the prompt), `base` [N] of the ungated model or None, `kl` [N]
    from it or None, `used` layer -> [N], the share of each sequence that ran the layer."""

    loss: Tensor
    base: Tensor | None
    kl: Tensor | None
    used: Mapping[int, Tensor]

    @property
    def capacity(self) -> float:
        return float(torch.stack([used.mean() for used in self.used.values()]).mean()) if self.used else 1.0

    def figure(self, values: Tensor) -> dict[str, float]:
        """Mean and standard error over examples."""
        spread = float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0
        return {"value": float(values.mean()), "se": spread}

    @property
    def cost(self) -> dict[str, float]:
        """Loss above the ungated model's, paired by example."""
        assert self.base is not None
        return self.figure(self.loss - self.base)


@torch.no_grad()
def measure(
    model: Any,
    examples: Sequence[Example],
    *,
    batch_size: int = 8,
    forced: Callable[[int, int], Mapping[int, Tensor]] | None = None,
    compare: bool = True,
    runner: Any = None,
) -> Measured:
    """Run `examples` through a routed model, each deciding on its prompt.

    Args:
        forced: (first example, how many) -> decisions by layer, instead of the routers'.
        compare: also run the ungated model.
        runner: what to call instead of `model`, where a trainer has wrapped it.
    """
    target = base_of(model)
    call = runner or model
    loss, base, kl = [], [], []
    used: dict[int, list[Tensor]] = {}
    with eval_mode(target):
        for start in range(0, len(examples), batch_size):
            rows = examples[start : start + batch_size]
            batch = {k: v.to(device_of(target)) for k, v in collate(rows).items()}
            pool, labels = batch.pop("pool_mask"), batch.pop("labels")
            with routing_context(pool_mask=pool, forced=forced(start, len(rows)) if forced else None) as seen:
                logits = call(**batch, use_cache=False).logits
            for layer in seen.gates:
                used.setdefault(layer, []).append(seen.used(layer).cpu())
            loss.append(token_losses(logits, labels, None, 0.0).cpu())
            if compare:
                with ungated_model(model):
                    whole = call(**batch, use_cache=False).logits
                base.append(token_losses(whole, labels, None, 0.0).cpu())
                kl.append(token_losses(logits, labels, whole, 1.0).cpu())
    return Measured(
        torch.cat(loss), torch.cat(base) if base else None, torch.cat(kl) if kl else None,
        {layer: torch.cat(parts) for layer, parts in sorted(used.items())},
    )  # fmt: skip


@torch.no_grad()
def capacity(model: Any, examples: Sequence[Example], *, batch_size: int = 16, runner: Any = None) -> float:
    """Mean share of (sequence, layer) pairs that run; at sequence level from the prompts alone."""
    target, runtime = base_of(model), runtime_of(model)
    call = runner or model
    shares: list[Tensor] = []
    with eval_mode(target):
        for start in range(0, len(examples), batch_size):
            rows = examples[start : start + batch_size]
            if runtime.config.level == "sequence" and runtime.config.pool != "masked_mean":
                rows = [Example(row.ids[: row.prompt], row.prompt) for row in rows]  # what follows decides nothing
            batch = {k: v.to(device_of(target)) for k, v in collate(rows).items()}
            batch.pop("labels")
            with routing_context(pool_mask=batch.pop("pool_mask")) as seen:
                call(**batch, use_cache=False)
            shares.append(torch.stack([seen.used(layer) for layer in sorted(seen.gates)]).mean(0).cpu())
    return float(torch.cat(shares).mean())


def calibrate(
    model: Any, examples: Sequence[Example], target: float, *, batch_size: int = 16, runner: Any = None
) -> float:
    """Move the threshold so that a share `target` runs on `examples`; returns it. A bisection over real passes, since
    what an earlier gate skips changes what a later one sees."""
    low, high = 0.0, 1.0
    tried: list[tuple[float, float]] = []
    center = runtime_of(model).config.tau
    for step in range(STEPS):
        tau = center if step == 0 else _between(low, high)
        set_tau(model, tau)
        found = capacity(model, examples, batch_size=batch_size, runner=runner)
        tried.append((abs(found - target), tau))
        if abs(found - target) < CLOSE:
            break
        low, high = (tau, high) if found > target else (low, tau)
    best = min(tried)[1]
    set_tau(model, best)
    return best


def _between(low: float, high: float) -> float:
    """The middle in logits within 1e-6 of 0 and 1: probabilities of a router crowd where their logits do not."""
    bounds = torch.tensor([low, high], dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
    return float(torch.sigmoid(torch.logit(bounds).mean()))


def sweep(
    model: Any, examples: Sequence[Example], targets: Sequence[float], *, calibration: Sequence[Example] = ()
) -> list[dict[str, float]]:
    """One trained router, the whole curve: for each target capacity its threshold, what runs, and what it costs.

    The thresholds are found on `calibration`, or on the examples themselves. The model's threshold is put back.
    """
    before = runtime_of(model).config.tau
    rows = []
    for target in targets:
        tau = calibrate(model, calibration or examples, target)
        found = measure(model, examples)
        assert found.kl is not None
        rows.append(
            {
                "target": target, "tau": tau, "capacity": found.capacity, "loss": float(found.loss.mean()),
                "cost": found.cost["value"], "cost_se": found.cost["se"], "kl": float(found.kl.mean()),
            }
        )  # fmt: skip
    set_tau(model, before)
    return rows


def device_of(model: Any) -> Any:
    """Where a model takes its input."""
    return model.get_input_embeddings().weight.device
