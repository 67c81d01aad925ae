"""Inputs of the weight matrices of one block, summed over the tokens that reach each of them.

A matrix of expert e sees the tokens that the router sends to e, and no other; `n` counts them. Sums are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_hooks.experts import ExpertCall, MoeLayer, watching_experts
from model_hooks.trace import first_tensor
from model_hooks.watch import ResidualWatcher

Key = tuple[str, int | None]  # source and expert of a `Matrix`


@dataclass(frozen=True)
class Matrix:
    """One weight matrix of a block: a view [rows, d_in] that is changed in place, and where its inputs come from."""

    name: str  # for people: "experts.3.gate_proj", "self_attn.q_proj"
    parameter: str  # of the block that holds it
    weight: Tensor
    expert: int | None  # its number, None for a Linear that all tokens pass
    source: str  # "in" and "hidden" of an expert, the module's name of a Linear

    @property
    def key(self) -> Key:
        """Matrices with the same key have the same inputs."""
        return self.source, self.expert


@dataclass(frozen=True)
class Moment:
    """Of `n` inputs [d]: `square` [d] is the sum of squares, `outer` [d, d] is 2/n times that of
    products, the Hessian of the squared error (None where not wanted)."""

    n: int
    square: Tensor
    outer: Tensor | None

    def mixed(self, other: Moment, share: float) -> Moment:
        """The mean moment of which `other`'s has weight `share`, as if of one input."""
        mine, theirs = (1 - share) / max(self.n, 1), share / max(other.n, 1)
        outer = None
        if self.outer is not None and other.outer is not None:
            outer = self.outer * (1 - share) + other.outer * share
        return Moment(1, self.square * mine + other.square * theirs, outer)


def moment_of(x: Tensor, outer: bool) -> Moment:
    """The moment of inputs [n, d]."""
    x = x.float()
    return Moment(len(x), x.square().sum(0), (x.T @ x).mul_(2 / max(len(x), 1)) if outer else None)


class Moments(ResidualWatcher):
    """Collects the moments of `matrices` of one block, and the first `sample_tokens` inputs of its mixture.

    Attributes:
        found: `Matrix.key` -> moment, once `finish` was called.
        sample: [N, d].
    """

    def __init__(self, matrices: list[Matrix], *, outer: bool, sample_tokens: int) -> None:
        self.sums, self.outer, self.sample_tokens = {}, outer, sample_tokens
        self.wanted = {m.key: m.weight.shape[1] for m in matrices}
        self.experts: dict[str, list[int]] = {}  # source -> experts whose inputs are wanted
        for source, expert in self.wanted:
            if expert is not None:
                self.experts.setdefault(source, []).append(expert)
        device = matrices[0].weight.device if matrices else None
        # one tensor for all experts, [E', d], so that one addition serves them all
        self.together = {
            source: torch.zeros(len(experts), self.wanted[source, experts[0]], device=device)
            for source, experts in self.experts.items()
        }
        self.squares: dict[Key, Tensor] = {
            (source, expert): square
            for source, experts in self.experts.items()
            for expert, square in zip(experts, self.together[source], strict=True)
        }
        self.outers: dict[Key, Tensor] = {}
        self.counts: dict[Key, int] = dict.fromkeys(self.wanted, 0)
        for key, width in self.wanted.items():
            if key not in self.squares:
                self.squares[key] = torch.zeros(width, device=device)
            if outer:
                self.outers[key] = torch.zeros(width, width, device=device)
        self.found: dict[Key, Moment] = {}
        self.sample = torch.zeros(0)

    def see(self, *_: Any) -> None:
        pass

    def see_experts(self, layer: MoeLayer, call: ExpertCall) -> None:
        if len(self.sample) < self.sample_tokens:
            more = call.hidden_states[: self.sample_tokens - len(self.sample)].clone()
            self.sample = torch.cat([self.sample, more]) if len(self.sample) else more
        for source, inputs in (("in", call.x), ("hidden", call.h)):
            experts = self.experts.get(source)
            if not experts:
                continue
            squares = call.sums(inputs.float().square())  # [E, d]
            self.together[source].add_(squares if len(experts) == len(squares) else squares[experts])
            for expert in experts:
                self.counts[source, expert] += call.counts[expert]
                if self.outers:
                    x = inputs[call.part(expert)].float()
                    self.outers[source, expert].addmm_(x.T, x)

    def finish(self) -> None:
        """Fill `found`. Hessians are made in place: a second one would take more memory than an expert's weights."""
        for key, square in self.squares.items():
            n, outer = self.counts[key], self.outers.get(key)
            self.found[key] = Moment(n, square, None if outer is None else outer.mul_(2 / max(n, 1)))

    @contextmanager
    def watching(self, model: Any, block: nn.Module, layer: MoeLayer | None) -> Iterator[None]:
        """Collect while the block runs."""
        with ExitStack() as stack:
            if layer is not None:
                stack.enter_context(watching_experts(model, (layer,), self))
            for source, expert in self.wanted:
                if expert is None:
                    module = block.get_submodule(source)
                    stack.callback(module.register_forward_pre_hook(self._linear(source), with_kwargs=True).remove)
            yield

    def _linear(self, source: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = first_tensor(args, kwargs)
            if x is None or not self.mask.numel():
                return
            x, key = x.reshape(-1, x.shape[-1])[self.mask.flatten().to(x.device)].float(), (source, None)
            self.squares[key].add_(x.square().sum(0))
            self.counts[key] += len(x)
            if self.outers:
                self.outers[key].addmm_(x.T, x)

        return hook


def matrices_of(block: Any, layer: MoeLayer | None, *, everything: bool, exclude: tuple[str, ...] = ()) -> list[Matrix]:
    """The matrices of the mixture's experts and shared experts; with `everything` also those of attention and of a
    dense feed-forward. `exclude`: parts of names (`shared_expert`) to leave out. Routers are never among them."""
    found: list[Matrix] = []
    if layer is not None:
        prefix = _name_in(block, layer.bank)
        half = layer.bank.gate_up_proj.shape[1] // 2
        for e in range(layer.num_experts):
            up, down = layer.bank.gate_up_proj.data[e], layer.bank.down_proj.data[e]
            for name, parameter, weight, source in (
                ("gate_proj", "gate_up_proj", up[:half], "in"), ("up_proj", "gate_up_proj", up[half:], "in"),
                ("down_proj", "down_proj", down, "hidden"),
            ):  # fmt: skip
                found.append(Matrix(f"{prefix}.{e}.{name}", f"{prefix}.{parameter}", weight, e, source))
    mixture = "" if layer is None else _name_in(block, layer.module)
    shared = () if layer is None else tuple(f"{mixture}.{name}." for name in layer.shared)
    for name, module in block.named_modules():
        in_shared = any(f"{name}.".startswith(s) for s in shared)
        rest = everything and not (mixture and name.startswith(f"{mixture}."))
        if isinstance(module, nn.Linear) and (in_shared or rest):
            found.append(Matrix(name, f"{name}.weight", module.weight.data, None, name))
    return [m for m in found if not any(part in m.name for part in exclude)]


def _name_in(block: Any, module: Any) -> str:
    return next(name for name, m in block.named_modules() if m is module)


def expert_inputs(layer: MoeLayer, expert: int, sample: Tensor) -> dict[str, Tensor]:
    """What an expert's matrices would get if all tokens of `sample` [N, d] came to it: "in" and "hidden"."""
    hidden = layer.bank._apply_gate(F.linear(sample, layer.bank.gate_up_proj[expert]))
    return {"in": sample, "hidden": hidden}
