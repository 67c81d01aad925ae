"""Choose experts kept, bits and layers dropped, for each layer, so that a budget is met at the least measured damage.

One walk through the layers measures what each choice does to the residual stream: the squared change of the mixture's
output over the squared size of the stream behind it, mean over tokens. Damages of layers are taken to add up; the
choice for each layer is then a multiple-choice knapsack, which is solved exactly up to the rounding of costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_hooks.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

    from model_hooks.experts import MoeLayer
    from moe_compress.stats import StreamStats

STEPS = 2000  # into which a budget is cut; costs are rounded up to whole steps, so a budget is never exceeded
UNITS = ("bytes", "flops", "latency")


@dataclass(frozen=True, order=True)
class Choice:
    """What becomes of one mixture. No experts: the whole sublayer is dropped. 16 bits: as it is."""

    experts: int
    bits: int


@dataclass(frozen=True)
class Offer:
    """A choice, what it costs (in the unit of the budget) and what damage it does."""

    choice: Choice
    cost: float
    damage: float


@dataclass
class Measured:
    """What a walk found: block (original number) -> choice -> damage and costs; and what does not change."""

    damage: dict[int, dict[Choice, float]] = field(default_factory=dict)
    bytes: dict[int, dict[Choice, float]] = field(default_factory=dict)
    flops: dict[int, dict[Choice, float]] = field(default_factory=dict)
    latency: dict[int, dict[Choice, float]] = field(default_factory=dict)
    keep: dict[int, dict[int, tuple[int, ...]]] = field(default_factory=dict)  # block -> experts -> which
    fixed: dict[str, float] = field(default_factory=lambda: dict.fromkeys(UNITS, 0.0))

    def total(self, unit: str) -> float:
        """Cost of the whole model as it is."""
        costs: dict[int, dict[Choice, float]] = getattr(self, unit)
        return self.fixed[unit] + sum(max(own.values()) for own in costs.values())

    def offers(self, unit: str) -> dict[int, list[Offer]]:
        costs: dict[int, dict[Choice, float]] = getattr(self, unit)
        return {b: [Offer(c, costs[b][c], d) for c, d in own.items()] for b, own in self.damage.items()}


def solve(offers: Mapping[int, Sequence[Offer]], budget: float, steps: int = STEPS) -> dict[int, Choice]:
    """One choice for each layer, of the least total damage whose total cost is within `budget`.

    Raises `RequestError` where not even the cheapest choices fit.
    """
    least = sum(min(o.cost for o in own) for own in offers.values())
    if least > budget:
        raise RequestError(
            f"the budget leaves {budget:.4g} for the experts, and the least that the choices need is {least:.4g}: "
            "allow fewer experts, fewer bits or dropped layers, or raise it"
        )
    unit = budget / steps if budget else 1.0
    best: dict[int, tuple[float, tuple[Choice, ...]]] = {0: (0.0, ())}  # steps used -> damage, choices
    for own in offers.values():
        following: dict[int, tuple[float, tuple[Choice, ...]]] = {}
        for used, (damage, chosen) in best.items():
            for offer in own:
                now = used + _ceil(offer.cost / unit)
                candidate = (damage + offer.damage, (*chosen, offer.choice))
                if now <= steps and (now not in following or candidate[0] < following[now][0]):
                    following[now] = candidate
        best = _undominated(following)
    if not best:  # only by the rounding up of costs
        return {b: min(own, key=lambda o: (o.cost, o.damage)).choice for b, own in offers.items()}
    return dict(zip(offers, min(best.values())[1], strict=True))


def _ceil(value: float) -> int:
    whole = int(value)
    return whole if value - whole < 1e-9 else whole + 1


def _undominated(found: dict[int, tuple[float, tuple[Choice, ...]]]) -> dict[int, tuple[float, tuple[Choice, ...]]]:
    """Only what no cheaper entry equals or beats."""
    kept: dict[int, tuple[float, tuple[Choice, ...]]] = {}
    least = float("inf")
    for used in sorted(found):
        if found[used][0] < least:
            least = found[used][0]
            kept[used] = found[used]
    return kept


def counts_for(layer: MoeLayer, shares: Sequence[float]) -> list[int]:
    """Numbers of experts that a layer could keep: the shares given, as far as its router allows them."""
    groups = layer.num_groups
    least = max(layer.top_k, groups * max(2, -(-layer.top_k // layer.topk_group)) if groups > 1 else 1)
    found = {round(layer.num_experts * share / groups) * groups for share in shares}
    return sorted((n for n in found if least <= n <= layer.num_experts), reverse=True)


def measure(
    source: str | Path, sequences: Tensor, *, shares: Sequence[float] = (1.0, 0.75, 0.5),
    bits: Sequence[int] = (16, 8, 4), drop_layers: bool = True, group: int = 128, metric: str = "gate",
    sample_tokens: int = 256, batch_size: int = 4, progress: Callable[[int, int], None] | None = None,
) -> Measured:  # fmt: skip
    """Walk through `source` and measure all choices of every mixture on the first `sample_tokens` of its inputs."""
    from model_hooks.experts import moe_layers, watching_experts
    from model_hooks.layer_stream import LayerStream
    from model_hooks.layer_walk import LayerWalk
    from moe_compress.stats import StreamStats

    stream = LayerStream(source)
    walk = LayerWalk(stream, sequences, batch_size=batch_size)
    mixtures = {layer.block: layer for layer in moe_layers(walk.parts)}
    width = stream.model.get_input_embeddings().weight.shape[-1]
    most = max(layer.num_experts for layer in mixtures.values())
    if min(bits) < 16:
        _check_groups(mixtures.values(), group)
    found = Measured()
    for block in walk.layers():
        stats = StreamStats(len(walk.parts.blocks), width, most, gaps=False, sample_tokens=sample_tokens)
        layer = mixtures.get(block.index)
        if layer is None:
            walk.show(stats, carry=True)
        else:
            with watching_experts(stream.model, (layer,), stats):
                walk.show(stats, carry=True)
            number = walk.parts.original_index[block.index]
            _measure_layer(found, number, layer, stats, shares, bits, drop_layers, group, metric)
        if progress:
            progress(block.index + 1, len(walk.parts.blocks))
    _fixed_costs(found, stream, mixtures)
    return found


def _check_groups(layers: Iterable[MoeLayer], group: int) -> None:
    for layer in layers:
        widths = {p.shape[-1] for p in layer.bank.parameters()}
        if wrong := sorted(w for w in widths if w % group):
            raise RequestError(f"group {group} does not divide the {wrong[0]} inputs of {layer.name}; choose another")


def _measure_layer(
    found: Measured, block: int, layer: MoeLayer, stats: StreamStats, shares: Sequence[float], bits: Sequence[int],
    drop_layers: bool, group: int, metric: str,
) -> None:  # fmt: skip
    from model_hooks.experts import routed_output
    from moe_compress.scores import Experts
    from moe_compress.stats import EXPERT_SUMS

    x = stats.sample[layer.block]
    sums = {name: stats.sums[f"experts.{name}"][layer.block, : layer.num_experts].tolist() for name in EXPERT_SUMS}
    tokens = max(int(sum(sums["count"])) // layer.top_k, 1)
    importance = Experts(layer.top_k, layer.num_groups, layer.topk_group, **sums, reconstruction=[]).importance(
        metric, tokens
    )
    stream_size = float(stats.sums["stream"][layer.block]) / tokens
    whole = routed_output(layer, x).double()
    size = layer.module(x[None])[0].double().square().sum(-1).mean()  # of what the sublayer adds
    own: dict[Choice, float] = {}
    kept = {n: _best(importance, layer.num_groups, n) for n in counts_for(layer, shares)}
    for width in bits:
        with _rounded_bank(layer, width, group):
            for n, keep in kept.items():
                change = routed_output(layer, x, keep).double() - whole
                own[Choice(n, width)] = float(change.square().sum(-1).mean()) / stream_size
    if drop_layers:
        own[Choice(0, 16)] = float(size) / stream_size
    found.damage[block], found.keep[block] = own, kept
    found.bytes[block] = {c: _bytes(layer, c, group) for c in own}
    found.flops[block] = {c: _flops(layer, c) for c in own}
    found.latency[block] = _latencies(layer, x, own)


def _best(importance: Sequence[float], groups: int, n: int) -> tuple[int, ...]:
    """The `n` most important experts, as many of each group."""
    size, kept = len(importance) // groups, []
    for g in range(groups):
        order = sorted(range(g * size, (g + 1) * size), key=lambda e: -importance[e])
        kept += order[: n // groups]
    return tuple(sorted(kept))


class _rounded_bank:
    """The layer's experts rounded to some bits while the block lasts."""

    def __init__(self, layer: MoeLayer, bits: int, group: int) -> None:
        self.layer, self.bits, self.group = layer, bits, group

    def __enter__(self) -> None:
        import torch

        from moe_compress.quantising import Codes, rtn

        self.before = {name: p.data for name, p in self.layer.bank.named_parameters()}
        if self.bits < 16:
            how = Codes(self.bits, self.group)
            for name, weight in self.before.items():
                rounded = torch.stack([rtn(expert, how).weight for expert in weight])
                self.layer.bank.get_parameter(name).data = rounded

    def __exit__(self, *_: object) -> None:
        for name, weight in self.before.items():
            self.layer.bank.get_parameter(name).data = weight


def _bytes(layer: MoeLayer, choice: Choice, group: int) -> float:
    """Of the mixture in its file: packed weights with a scale a group, router, shared experts."""
    weights = [p for p in layer.module.parameters() if p.dim() == 3]
    fixed = sum(p.numel() * p.element_size() for p in layer.module.parameters() if p.dim() < 3)
    if not choice.experts:
        return 0.0
    share = choice.experts / layer.num_experts
    total = 0.0
    for p in weights:
        size = p.element_size()
        total += p.numel() * (size if choice.bits == 16 else choice.bits / 8 + size / group)
    return total * share + fixed


def _flops(layer: MoeLayer, choice: Choice) -> float:
    """Multiplications and additions a token."""
    if not choice.experts:
        return 0.0
    one = sum(2 * p[0].numel() for p in layer.bank.parameters())
    rest = sum(2 * p.numel() for p in layer.module.parameters() if p.dim() == 2)
    return float(min(layer.top_k, choice.experts) * one + rest)


def _latencies(layer: MoeLayer, x: Tensor, choices: Mapping[Choice, float]) -> dict[Choice, float]:
    """Seconds of the mixture for one token: fewer experts in memory, or fewer bits, run no faster here."""
    from paper_tables.timing import interleaved

    seconds = interleaved({"mixture": lambda: layer.module(x[None, :1])}, rounds=9)["mixture"].seconds
    return {choice: seconds if choice.experts else 0.0 for choice in choices}


def _fixed_costs(found: Measured, stream: Any, mixtures: Mapping[int, MoeLayer]) -> None:
    """What no choice changes: bytes and operations of everything but the mixtures. Time: of the mixtures alone."""
    inside = {id(p) for layer in mixtures.values() for p in layer.module.parameters()}
    outside = [(n, p) for n, p in stream.model.named_parameters() if id(p) not in inside]
    found.fixed["bytes"] = float(sum(p.numel() * p.element_size() for _, p in outside))
    embeddings, head = stream.model.get_input_embeddings().weight, stream.model.get_output_embeddings()
    read = [p for _, p in outside if p.dim() == 2 and p is not embeddings]  # embeddings are looked up, not multiplied
    tied = [embeddings] if head is not None and head.weight is embeddings else []
    found.fixed["flops"] = float(sum(2 * p.numel() for p in read + tied))


def steps_for(found: Measured, chosen: Mapping[int, Choice], method: str, group: int) -> list[dict[str, Any]]:
    """The steps of a recipe that carry a solution out."""
    dropped = [block for block, choice in chosen.items() if not choice.experts]
    keep = {b: list(found.keep[b][c.experts]) for b, c in chosen.items() if c.experts}
    fewer = {b: k for b, k in keep.items() if len(k) < max(found.keep[b])}
    bits = {b: c.bits for b, c in chosen.items() if c.experts}
    steps: list[dict[str, Any]] = [{"layer_drop": {"layers": dropped}}] if dropped else []
    steps += [{"expert_drop": {"experts": fewer}}] if fewer else []
    if any(b < 16 for b in bits.values()):
        steps.append({"quantize": {"method": method, "bits": 16, "layer_bits": bits, "group": group}})
    return steps
