"""Mixtures of experts: find them by structure, and watch every expert at work through transformers' experts interface.

transformers holds the experts of a layer as one module with fused weights, gate_up_proj [E, 2f, d] (gate first) and
down_proj [E, d, f], and calls it as bank(hidden_states [T, d], top_k_index [T, k], top_k_weights [T, k]). No Linear
exists inside, so hooks on Linears would see nothing; `watching_experts` registers an experts function instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import RequestError, UnsupportedArchitectureError
from .moe import mixture_of_experts
from .structure import Anatomy, Block

IMPLEMENTATION = "moe_stats"  # name of our experts function in transformers' interface
FEW_PAIRS = 64  # of an expert on average: up to here a loop over experts is slower than torch's grouped product


@dataclass(frozen=True)
class MoeLayer:
    """The mixture of experts of one block."""

    block: int  # number of the block in the stack
    name: str  # path of the feed-forward from the model
    module: Any
    bank: Any  # holds gate_up_proj [E, 2f, d] and down_proj [E, d, f]
    router: Any  # holds weight [E, d]; gives (logits [T, E], weights [T, k], indices [T, k])
    shared: tuple[str, ...]  # shared experts, names inside the feed-forward

    @property
    def num_experts(self) -> int:
        return int(self.bank.gate_up_proj.shape[0])

    @property
    def top_k(self) -> int:
        return int(self.router.top_k)

    @property
    def num_groups(self) -> int:
        """Groups among which the router chooses first (DeepSeek); 1 where it does not."""
        limited = getattr(self.router, "topk_method", "group_limited_greedy") == "group_limited_greedy"
        return int(getattr(self.router, "num_group", None) or 1) if limited else 1

    @property
    def topk_group(self) -> int:
        """Groups that the router takes for a token."""
        return int(getattr(self.router, "topk_group", None) or 1) if self.num_groups > 1 else 1


def moe_layer(block: Block) -> MoeLayer | None:
    """The mixture of experts of a block, None where it is dense. Raises `UnsupportedArchitectureError` for a bank
    whose layout is another than the one above, naming its class."""
    if block.mlp is None or block.experts is None:
        return None
    feed_forward: Any = block.mlp.module
    bank, router = getattr(feed_forward, block.experts.experts), getattr(feed_forward, block.experts.router)
    _check_layout(bank)
    for name in ("top_k", "weight"):
        if not hasattr(router, name):
            raise UnsupportedArchitectureError(f"{type(router).__name__} is no router that is known: it has no {name}")
    return MoeLayer(
        block.index, f"{block.name}.{block.mlp.name}", feed_forward, bank, router, block.experts.shared
    )  # fmt: skip


def moe_layers(parts: Anatomy) -> tuple[MoeLayer, ...]:
    """All mixtures of experts of a model. Raises `RequestError` where there are none."""
    found = tuple(layer for layer in map(moe_layer, parts.blocks) if layer is not None)
    if not found:
        raise RequestError(f"no MoE layers found in {type(parts.model).__name__}; give a mixture-of-experts model")
    return found


def layer_of(feed_forward: nn.Module, block: int = 0) -> MoeLayer | None:
    """As `moe_layer`, for a feed-forward module alone."""
    found = mixture_of_experts(feed_forward)
    if found is None:
        return None
    bank, router = getattr(feed_forward, found.experts), getattr(feed_forward, found.router)
    _check_layout(bank)
    return MoeLayer(block, "", feed_forward, bank, router, found.shared)


def routed_output(layer: MoeLayer, hidden_states: Tensor, keep: Sequence[int] | None = None) -> Tensor:
    """What the routed experts give for `hidden_states` [N, d]; with `keep`, as if only those experts were there."""
    if keep is None:
        _, weights, indices = layer.router(hidden_states)
    else:
        from .expert_surgery import sliced_router

        _, weights, places = sliced_router(layer, keep)(hidden_states)
        indices = torch.tensor(sorted(keep), device=hidden_states.device)[places]
    output: Tensor = layer.bank(hidden_states, indices, weights)
    return output


def _check_layout(bank: Any) -> None:
    wanted = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
    for name, value in wanted.items():
        if getattr(bank, name, None) != value or getattr(bank, "has_post_expert_norm", False):
            raise UnsupportedArchitectureError(
                f"the experts of class {type(bank).__name__} have a layout that is not supported ({name} is "
                f"{getattr(bank, name, None)}, {value} is needed); fused, gated experts without biases are"
            )


@dataclass(frozen=True)
class ExpertCall:
    """What the experts of one layer did for the T real tokens of a batch. The S = T * k (token, expert) pairs are
    sorted by expert: those of expert e are rows `part(e)`."""

    hidden_states: Tensor  # [T, d] input of the mixture
    logits: Tensor  # [T, E] of the router
    output: Tensor  # [T, d] of the routed experts together
    x: Tensor  # [S, d] input of each pair
    h: Tensor  # [S, f] input of down_proj
    y: Tensor  # [S, d] output of the expert, before the gate
    gates: Tensor  # [S]
    tokens: Tensor  # [S] row of hidden_states
    counts: tuple[int, ...]  # pairs of each expert

    @cached_property
    def starts(self) -> tuple[int, ...]:
        starts = [0]
        for count in self.counts:
            starts.append(starts[-1] + count)
        return tuple(starts)

    def part(self, expert: int) -> slice:
        """The rows of an expert's pairs."""
        return slice(self.starts[expert], self.starts[expert + 1])

    @cached_property
    def experts(self) -> Tensor:
        """Expert of each pair, [S]."""
        counts = torch.tensor(self.counts, device=self.x.device)
        return torch.arange(len(self.counts), device=self.x.device).repeat_interleave(counts)

    def sums(self, values: Tensor) -> Tensor:
        """Sum over each expert's pairs of `values` [S] or [S, n], float64: [E] or [E, n]."""
        total = values.new_zeros((len(self.counts), *values.shape[1:]), dtype=torch.float64)
        return total.index_add_(0, self.experts, values.double())

    def without_padding(self, mask: Tensor) -> ExpertCall:
        """The call of the real tokens alone; `mask` [T] is true on them."""
        if bool(mask.all()):
            return self
        real = mask.to(self.x.device)
        number = real.cumsum(0) - 1  # of each real token among the real ones
        pairs = real[self.tokens]
        counts = torch.bincount(self.experts[pairs], minlength=len(self.counts)).tolist()
        return ExpertCall(
            self.hidden_states[real], self.logits[real], self.output[real], self.x[pairs], self.h[pairs],
            self.y[pairs], self.gates[pairs], number[self.tokens[pairs]], tuple(counts),
        )  # fmt: skip


class ExpertWatcher(Protocol):
    """Who is shown the experts: a `ResidualWatcher`, whose `mask` says which tokens are real, with this method."""

    mask: Tensor

    def see_experts(self, layer: MoeLayer, call: ExpertCall) -> None:
        """The mixture of `layer` has run on a batch. No tensor may be written to."""


@contextmanager
def watching_experts(model: Any, layers: tuple[MoeLayer, ...], watcher: ExpertWatcher) -> Iterator[None]:
    """Show `watcher` the experts of `layers` whenever a batch runs; outputs are those of the eager implementation."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _run_and_show)
    with ExitStack() as undo:
        undo.enter_context(_implementation(model))
        for layer in layers:
            seen = _Observed(layer, watcher)
            undo.callback(layer.router.register_forward_hook(seen.routed).remove)
            layer.bank.__dict__["lean_observed"] = seen
            undo.callback(layer.bank.__dict__.pop, "lean_observed", None)
        yield


@contextmanager
def _implementation(model: Any) -> Iterator[None]:
    """All experts of the model run `_run_and_show` inside the block."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = [(config, getattr(config, "_experts_implementation", None)) for config in configs]
    for config, _ in before:
        config._experts_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        for config, name in before:
            config._experts_implementation = name


class _Observed:
    """One layer, the logits that its router gave last, and who wants to know."""

    def __init__(self, layer: MoeLayer, watcher: ExpertWatcher) -> None:
        self.layer, self.watcher = layer, watcher
        self.logits = torch.zeros(0)

    def routed(self, router: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        self.logits = output[0]


def _run_and_show(bank: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts function: [T, d], [T, k], [T, k] -> [T, d]."""
    total, k = top_k_index.shape
    pairs = top_k_index.flatten()
    order = pairs.argsort(stable=True)  # [S]
    counts = torch.bincount(pairs, minlength=bank.gate_up_proj.shape[0]).tolist()
    tokens, gates = order // k, top_k_weights.flatten()[order]
    x = hidden_states.index_select(0, tokens)  # [S, d]; indexing would take six times as long
    h, y = _run(bank, x, counts)
    dtype = torch.promote_types(y.dtype, gates.dtype)
    bags = order.argsort().view(total, k)  # each token's pairs, as rows of y: output is their sum, weighted by gates
    output = F.embedding_bag(bags, y.to(dtype), per_sample_weights=top_k_weights.to(dtype), mode="sum")
    output = output.to(hidden_states.dtype)
    seen: _Observed | None = bank.__dict__.get("lean_observed")
    if seen is not None and len(seen.watcher.mask):  # not in the forward pass that reads the anatomy
        call = ExpertCall(hidden_states, seen.logits, output, x, h, y, gates, tokens, tuple(counts))
        seen.watcher.see_experts(seen.layer, call.without_padding(seen.watcher.mask.flatten()))
    return output


def _run(bank: Any, x: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """What the experts make of their pairs, sorted by expert: [S, d] -> h [S, f], y [S, d]."""
    up, down = bank.gate_up_proj, bank.down_proj
    if len(x) <= FEW_PAIRS * len(counts) and _groupable(x, up) and _groupable(x, down):
        ends = torch.tensor(counts, device=x.device).cumsum(0, dtype=torch.int32)  # [E]
        h = bank._apply_gate(F.grouped_mm(x, up.transpose(1, 2), offs=ends))
        return h, F.grouped_mm(h, down.transpose(1, 2), offs=ends)
    h, y = x.new_empty(len(x), down.shape[-1]), torch.empty_like(x)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            part = slice(start, start + count)
            h[part] = bank._apply_gate(F.linear(x[part], up[expert]))
            y[part] = F.linear(h[part], down[expert])
            start += count
    return h, y


def _groupable(x: Tensor, weight: Tensor) -> bool:
    """torch's grouped product takes rows [S, in] and `weight` [E, out, in] of one of three types, with every row of the
    weight at a multiple of 16 bytes, on a CPU or a GPU no older than Ampere."""
    typed = x.dtype == weight.dtype and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    aligned = weight.data_ptr() % 16 == 0 and weight.shape[-1] * weight.element_size() % 16 == 0
    return typed and aligned and (not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (8, 0))
