"""What merging costs on this machine, as ratios of medians taken in one process, in turn: M10 and M11's figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paper_tables.timing import interleaved

from .merging import merge, mix, mix_outputs

Work = Callable[[], Any]


class Probe:
    """A feed-forward's two banks, random experts [n, inner, hidden] and [n, hidden, inner], and input for them."""

    def __init__(self, hidden: int, inner: int, experts: int, batch: int, tokens: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator) / hidden**0.5

        self.experts, self.batch, self.tokens = experts, batch, tokens
        self.up, self.down = random(experts, inner, hidden), random(experts, hidden, inner)
        self.x = random(batch, tokens, hidden)
        self.generator = generator

    def gates(self, groups: int, k: int) -> tuple[Tensor, Tensor]:
        """Experts and weights by lot, [groups, k]."""
        idx = torch.rand(groups, self.experts, generator=self.generator).argsort(1)[:, :k]
        return idx, torch.rand(groups, k, generator=self.generator).softmax(1)

    def dense(self) -> Tensor:
        """One expert as a plain feed-forward."""
        return F.linear(F.gelu(F.linear(self.x, self.up[0])), self.down[0])

    def merged(self, k: int, order: str = "auto") -> Callable[[], Tensor]:
        """MEO with a gate for each sequence."""
        idx, g = self.gates(self.batch, k)
        return lambda: mix(F.gelu(mix(self.x, self.up, None, idx, g, order)), self.down, None, idx, g, order)

    def vanilla(self, k: int) -> Callable[[], Tensor]:
        """A mixture of experts with a gate for each token."""
        idx, g = self.gates(self.batch * self.tokens, k)
        flat = self.x.flatten(0, 1)

        def run() -> Tensor:
            hidden = F.gelu(mix_outputs(flat, self.up, None, idx, g))
            return mix_outputs(hidden, self.down, None, idx, g)

        return run

    def cached(self, k: int) -> Callable[[], Tensor]:
        """MEO whose task was merged before."""
        idx, g = self.gates(1, k)
        up, down = merge(self.up, None, idx, g)[0][0], merge(self.down, None, idx, g)[0][0]
        return lambda: F.linear(F.gelu(F.linear(self.x, up)), down)

    def merges(self, k: int) -> dict[str, Work]:
        """Merging alone: by one product, and by broadcasting as the original did."""
        idx, g = self.gates(self.batch, k)
        return {
            "broadcast": lambda: (self.up[idx] * g[..., None, None]).sum(1),
            "product": lambda: merge(self.up, None, idx, g),
        }

    def step(self, forward: Callable[[], Tensor]) -> Work:
        """A training step without the optimizer."""

        def run() -> None:
            for tensor in (self.up, self.down):
                tensor.requires_grad_(True).grad = None
            with torch.enable_grad():
                forward().square().mean().backward()
            for tensor in (self.up, self.down):
                tensor.requires_grad_(False)

        return run


def ratios(probe: Probe, one: Probe, rounds: int) -> list[dict[str, Any]]:
    """A row for each comparison: how many times faster the second is than the first, and what the target is."""
    meo, moe = probe.merged(4), probe.vanilla(4)
    pairs: dict[str, tuple[Mapping[str, Work], str]] = {
        "merge: one product / broadcast": (probe.merges(4), "at least 3"),
        "forward: MEO / MoE, k = 4": ({"moe": moe, "meo": meo}, "at least 1.5"),
        "training step: MEO / MoE, k = 4": ({"moe": probe.step(moe), "meo": probe.step(meo)}, "at least 1.3"),
        "forward: task cached / dense": ({"dense": probe.dense, "cached": probe.cached(4)}, "at least 0.91"),
        "forward: MEO, k = 8 / k = 2": ({"2": probe.merged(2), "8": probe.merged(8)}, "at least 0.8"),
        "forward: MEO / dense, k = 4": ({"dense": probe.dense, "meo": meo}, ""),
        "one token: auto / outputs": ({"output": one.merged(4, "output"), "auto": one.merged(4)}, "at least 0.91"),
    }  # fmt: skip
    rows = []
    for name, (variants, target) in pairs.items():
        with torch.no_grad():
            found = list(interleaved(variants, rounds=rounds).values())[1]
        rows.append({"times faster": name, "ratio": found.speedup, "se": found.se, "target": target})
    return rows


def run(
    *, hidden: int = 768, inner: int = 3072, experts: int = 8, batch: int = 8, tokens: int = 128, rounds: int = 5
) -> dict[str, Any]:
    """All of it, and the most memory that merging takes beside the original's way."""
    from paper_tables.machine import describe, machine
    from paper_tables.memory import peak_tensor_bytes

    probe, one = Probe(hidden, inner, experts, batch, tokens), Probe(hidden, inner, experts, 1, 1)
    work = probe.merges(4)
    with torch.no_grad():
        ours, original = peak_tensor_bytes(probe.merged(4)), peak_tensor_bytes(work["broadcast"])
    return {
        "machine": describe(machine()), "sizes": [batch, tokens, hidden, inner], "experts": experts,
        "peak_bytes": ours, "peak_bytes_of_broadcast_merge": original, "speed": ratios(probe, one, rounds),
    }  # fmt: skip
