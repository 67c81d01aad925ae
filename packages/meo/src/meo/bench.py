"""What merging costs on this machine, as ratios of medians taken in one process, in turn, beside the targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paper_tables.timing import interleaved

from .bank import BankSpec, make_bank
from .config import MeoConfig
from .context import Runtime
from .flops import Sizes, count
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

    def grouped(self, k: int) -> Callable[[], Tensor]:
        """The same, experts being whole feed-forwards, as transformers runs its mixtures: tokens sorted by expert."""
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        idx, g = self.gates(self.batch * self.tokens, k)
        experts = SimpleNamespace(
            num_experts=self.experts, up_proj=self.up, down_proj=self.down, act_fn=F.gelu, has_gate=False,
            has_bias=False, is_transposed=False,
        )  # fmt: skip
        forward: Callable[..., Tensor] = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
        return lambda: forward(experts, self.x.flatten(0, 1), idx, g)

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


def operations(probe: Probe, method: str, k: int = 1, groups: int | None = None) -> float:
    """Of a forward pass of the two banks, by formula."""
    sizes = Sizes(1, probe.x.shape[2], probe.up.shape[1])
    found = count(sizes, method=method, k=k, batch=probe.batch, tokens=probe.tokens, groups=groups)
    return found["ffn"] + found["merge"]


def ratios(probe: Probe, one: Probe, rounds: int) -> list[dict[str, Any]]:
    """A row for each comparison of two, the second with the first: how many times faster it is, how many times fewer
    operations it takes, and what the target is."""
    meo, moe, grouped = probe.merged(4), probe.vanilla(4), probe.grouped(4)
    dense, four, many = (operations(probe, m, 4) for m in ("dense", "meo", "moe"))
    eight, two = (operations(probe, "meo", k) for k in (8, 2))
    step = probe.step
    pairs: dict[str, tuple[Mapping[str, Work], float | None, str]] = {
        "merge: one product / broadcast": (probe.merges(4), None, "at least 3"),
        "forward: MEO / MoE, k = 4": ({"moe": moe, "meo": meo}, many / four, "at least 1.5"),
        "forward: MEO / transformers' grouped MoE, k = 4": ({"moe": grouped, "meo": meo}, many / four, "at least 1.5"),
        "training step: MEO / MoE, k = 4": ({"moe": step(moe), "meo": step(meo)}, None, "at least 1.3"),
        "training step: MEO / transformers' grouped MoE, k = 4": (
            {"moe": step(grouped), "meo": step(meo)}, None, "at least 1.3",
        ),
        "forward: task cached / dense": ({"dense": probe.dense, "cached": probe.cached(4)}, 1.0, "at least 0.91"),
        "forward: MEO, k = 8 / k = 2": ({"2": probe.merged(2), "8": probe.merged(8)}, two / eight, "at least 0.8"),
        "forward: MEO / dense, k = 4": ({"dense": probe.dense, "meo": meo}, dense / four, ""),
        "one token: auto / outputs": (
            {"output": one.merged(4, "output"), "auto": one.merged(4)}, None, "at least 0.91",
        ),
    }  # fmt: skip
    rows = []
    for name, (variants, fewer, target) in pairs.items():
        with torch.no_grad():
            found = list(interleaved(variants, rounds=rounds).values())[1]
        rows.append({"times faster": name, "ratio": found.speedup, "se": found.se, "by operations": fewer,
                     "target": target})  # fmt: skip
    return rows


def memory(probe: Probe, chunk: int = 4) -> list[dict[str, Any]]:
    """What merging needs at its peak, and what low-rank experts store, each beside its target."""
    from paper_tables.memory import peak_tensor_bytes

    idx, g = probe.gates(probe.batch, 4)
    with torch.no_grad():
        ours = peak_tensor_bytes(lambda: mix(probe.x, probe.up, None, idx, g, "merge", chunk))
        original = peak_tensor_bytes(probe.merges(4)["broadcast"])
    inner, hidden = probe.up.shape[1:]
    outputs = 2 * probe.batch * probe.tokens * inner * probe.up.element_size()  # by chunks, and joined
    bound = min(chunk, probe.batch) * inner * hidden * probe.up.element_size()
    with torch.device("meta"):
        config = MeoConfig(experts=probe.experts, init="lora")
        low = make_bank(BankSpec("", 0, hidden, inner, False, 0, "another"), config, Runtime(config, "sequence", False))
    stored = sum(parameter.numel() for parameter in low.parameters()) / (hidden * inner)
    return [
        {"memory": f"merging, beside {chunk} matrices", "ratio": (ours - outputs) / bound, "target": "at most 1.1"},
        {"memory": "merging by broadcast, beside ours", "ratio": original / max(1, ours - outputs),
         "target": "at least 4 (16 sequences)"},
        {"memory": f"parameters of {probe.experts} low-rank experts, beside dense", "ratio": stored,
         "target": "at most 1.3 (8 experts)"},
    ]  # fmt: skip


def run(
    *, hidden: int = 768, inner: int = 3072, experts: int = 8, batch: int = 8, tokens: int = 128, rounds: int = 5
) -> dict[str, Any]:
    """All of it, beside the targets."""
    from paper_tables.machine import describe, machine

    probe, one = Probe(hidden, inner, experts, batch, tokens), Probe(hidden, inner, experts, 1, 1)
    return {
        "machine": describe(machine()), "sizes": [batch, tokens, hidden, inner], "experts": experts,
        "memory": memory(probe), "speed": ratios(probe, one, rounds),
    }  # fmt: skip
