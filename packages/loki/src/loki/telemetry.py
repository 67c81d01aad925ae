"""How well tokens are picked: recall of the exact top-k, attention that is captured, share that is read. Sampled."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from .method import FEW, Method, Step, attention_weights

FIELDS = ("recall", "jaccard", "captured", "selected", "union")


class Telemetry:
    """Means per layer over every n-th step of it, for the settings field `stats`.

    A sampled step is worked out densely beside the real one, so sampled runs are slower; others cost nothing.
    """

    def __init__(self, every: int, timed: bool = True) -> None:
        self.every, self.timed = every, timed
        self.calls: dict[int, int] = defaultdict(int)
        self.samples: dict[int, int] = defaultdict(int)
        self.sums: dict[int, dict[str, float]] = defaultdict(lambda: dict.fromkeys((*FIELDS, "seconds"), 0.0))

    def see(self, layer: int, step: Step, method: Method) -> None:
        self.calls[layer] += 1
        if (self.calls[layer] - 1) % self.every or method.evicts:
            return
        values = measure(step, method)
        if self.timed:
            started = time.perf_counter()
            method.attend(step) if step.queries > FEW else method.decode(step)
            values["seconds"] = time.perf_counter() - started
        self.samples[layer] += 1
        for name, value in values.items():
            self.sums[layer][name] += value

    def means(self) -> dict[int, dict[str, float]]:
        return {
            layer: {"steps": float(n)} | {name: total / n for name, total in self.sums[layer].items()}
            for layer, n in sorted(self.samples.items())
        }


def measure(step: Step, method: Method) -> dict[str, float]:
    """Means over rows, heads and queries:

    recall: share of the exact best tokens, as many as were read, that were read; jaccard: overlap of both sets;
    captured: share of the exact attention on what was read; selected: share of the visible tokens that was read;
    union: the same for the tokens that any head of a group reads.
    """
    allowed = method.allowed(step) & step.rows.visible  # [B, H, Q, S]
    exact = torch.cat([weights for _, weights in attention_weights(step)], dim=3)  # [B, Hkv, G, Q, S]
    scores = exact.mean(2) if allowed.shape[1] == step.kv_heads else exact.flatten(1, 2)
    best = top_of(scores, step.rows.visible, allowed)
    both, either = (allowed & best).sum(-1), (allowed | best).sum(-1)
    whole = exact.flatten(1, 2)
    share = whole * (allowed if allowed.shape[1] == whole.shape[1] else _to_heads(allowed, whole.shape[1]))
    counts = step.rows.visible.sum(-1).clamp_min(1)
    group = allowed.unflatten(1, (step.kv_heads, -1)).any(2)
    return {
        "recall": float((both / best.sum(-1).clamp_min(1)).mean()),
        "jaccard": float((both / either.clamp_min(1)).mean()),
        "captured": float(share.sum(-1).mean()),
        "selected": float((allowed.sum(-1) / counts).mean()),
        "union": float((group.sum(-1) / counts).mean()),
    }


def top_of(scores: Tensor, visible: Tensor, allowed: Tensor) -> Tensor:
    """For each query the best tokens by `scores`, as many as `allowed` has."""
    ranked = scores.masked_fill(~visible, -torch.inf).argsort(-1, descending=True)
    within = torch.arange(scores.shape[-1], device=scores.device) < allowed.sum(-1, keepdim=True)
    return torch.zeros_like(allowed).scatter_(-1, ranked, within)


def _to_heads(allowed: Tensor, heads: int) -> Tensor:
    return allowed.repeat_interleave(heads // allowed.shape[1], dim=1)


def stats(model: Any) -> dict[int, dict[str, float]]:
    """What was measured since `enable(model, basis, stats=True)`: by layer, the means that `measure` lists, the number
    of sampled steps and the seconds of the method in one of them. Raises `RequestError` where nothing is measured."""
    from model_hooks.errors import RequestError

    from .sessions import runtime_of

    telemetry = runtime_of(model).telemetry
    if telemetry is None:
        raise RequestError("nothing is measured; enable Loki with stats=True")
    return telemetry.means()
