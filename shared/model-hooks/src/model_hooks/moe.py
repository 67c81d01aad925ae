"""The parts of a mixture-of-experts block, found by shape: experts, router, shared experts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class MixtureOfExperts:
    """Names inside the feed-forward module. `experts` is a ModuleList (one module an expert) or one module holding
    fused weights [num_experts, ..., ...]; `router` holds the [num_experts, hidden_size] matrix."""

    experts: str
    router: str
    shared: tuple[str, ...]
    num_experts: int
    fused: bool


def mixture_of_experts(feed_forward: nn.Module) -> MixtureOfExperts | None:
    """The experts of `feed_forward`, or None where it is a dense MLP."""
    for name, child in feed_forward.named_children():
        if isinstance(child, nn.ModuleList) and len(child) > 1 and len({type(m) for m in child}) == 1:
            return _complete(feed_forward, name, len(child), fused=False)
        banks = [p.shape[0] for p in child.parameters(recurse=False) if p.dim() == 3]
        if banks and len(set(banks)) == 1:
            return _complete(feed_forward, name, banks[0], fused=True)
    return None


def _complete(feed_forward: nn.Module, experts: str, count: int, *, fused: bool) -> MixtureOfExperts | None:
    router, shared = None, []
    for name, child in feed_forward.named_children():
        matrices = [p for p in child.parameters() if p.dim() == 2]
        if name == experts or not matrices:
            continue
        if len(matrices) == 1 and matrices[0].shape[0] == count:
            router = name
        elif not (len(matrices) == 1 and matrices[0].shape[0] == 1):  # a [1, hidden] matrix gates the shared expert
            shared.append(name)
    return None if router is None else MixtureOfExperts(experts, router, tuple(shared), count, fused)
