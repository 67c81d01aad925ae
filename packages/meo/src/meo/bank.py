"""A bank of experts in the place of one linear: gated by what the call says, merged, then applied as one matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_hooks.errors import RequestError

from .config import MeoConfig
from .context import Frame, Runtime
from .gate import Decision, balance_loss, decide, wide
from .merging import merge, mix, mix_outputs
from .pooling import pooled


@dataclass(frozen=True)
class BankSpec:
    """What config.json says of a bank: all that building it takes.

    Attributes:
        name: of the linear it replaces.
        stack: index of the stack of layers that it is in.
        inputs, outputs: of the linear. bias: whether it has one.
        router: width of what the gate looks at; 0 where `leader` decides.
        leader: the bank whose decision this one shares; its own name otherwise.
        conv1d: whether the linear was a GPT-2 Conv1D, whose weight is stored the other way.
    """

    name: str
    stack: int
    inputs: int
    outputs: int
    bias: bool
    router: int
    leader: str
    conv1d: bool = False


class TokenBlock(nn.Module):
    """x + W_up · relu(W_dn · x + b_dn) + b_up, for every token by itself (section 3.3); the identity at the start."""

    def __init__(self, width: int, reduce: int) -> None:
        super().__init__()
        if width < reduce or width % reduce:
            raise RequestError(f"the token block divides the width {width} by {reduce}: give a reduce that divides it")
        self.down = nn.Linear(width, width // reduce)  # Kaiming-uniform, as torch starts every linear
        self.up = nn.Linear(width // reduce, width)
        self.reset()

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """W_up and the biases zero; with a generator W_dn is drawn anew."""
        if generator is not None:
            drawn = torch.empty(self.down.weight.shape)
            self.down.weight.copy_(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator))
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            parameter.zero_()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.up(F.relu(self.down(x)))
        return out


class MergedLinear(nn.Module):
    """n experts of one linear map, [B, T, in] -> [B, T, out].

    State: weight [n, out, in], bias [n, out] or none, w_gate and w_noise [router, n] (zero at the start), first [n]
    (the logits before any text, at level chunk), moves [n] (whole numbers; times bias_rate: biases of the selection),
    token.* (the block). `calls` counts merges.
    """

    def __init__(self, spec: BankSpec, config: MeoConfig, runtime: Runtime) -> None:
        super().__init__()
        self.spec, self.config, self.runtime = spec, config, runtime
        self.in_features, self.out_features = spec.inputs, spec.outputs
        n = config.experts
        self._make_experts()
        self.bias = nn.Parameter(torch.zeros(n, spec.outputs)) if spec.bias else None
        if spec.leader == spec.name:
            self._make_gate(n)
        self.token = TokenBlock(spec.inputs, config.reduce) if config.has_block else None
        self.calls = 0
        self._decided: Decision | None = None  # at level task, out of training; with what it was made from
        self._merged: dict[int, tuple[Any, Tensor, Tensor | None]] = {}

    def _make_experts(self) -> None:
        self.weight = nn.Parameter(torch.empty(self.config.experts, self.spec.outputs, self.spec.inputs))

    def _make_gate(self, n: int) -> None:
        if self.config.gate == "hash":
            generator = torch.Generator().manual_seed(self.config.seed)
            self.register_buffer("projection", torch.randn(self.spec.router, n, generator=generator, device="cpu"))
            return
        self.w_gate = nn.Parameter(torch.zeros(self.spec.router, n))
        if self.config.gate == "noisy-topk":
            self.w_noise = nn.Parameter(torch.zeros(self.spec.router, n))
        if self.runtime.level == "chunk":
            self.first = nn.Parameter(torch.zeros(n))
        if self.config.bias_rate:  # whole numbers, which no half precision rounds
            self.register_buffer("moves", torch.zeros(n, dtype=torch.int64))

    @torch.no_grad()
    def fill(self, weight: Tensor, bias: Tensor | None, generator: torch.Generator) -> None:
        """Take the weights [out, in] and [out] of a dense linear into all experts, with `init`'s differences.

        Differences sum to zero over the first k experts and over the others. Those first k are what gates at zero
        select, with equal weights, so the function stays the dense one.
        """
        self.weight.copy_(weight.expand_as(self.weight))
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias.expand_as(self.bias))
        kind, scale, n, k = self.config.init, self.config.init_scale, self.config.experts, self._block()
        for start, end in ((0, k), (k, n)):
            if kind == "copy" or end - start < 2:
                continue
            if kind == "split":
                own = torch.arange(weight.shape[0], device=weight.device) % (end - start)
                share = F.one_hot(own, end - start).T.to(weight.dtype) - 1 / (end - start)  # [experts, out]
                change = scale * share[..., None] * weight
            else:
                noise = torch.randn(end - start, *weight.shape, generator=generator)
                noise = (noise - noise.mean(0)).to(weight)
                change = scale * weight.std() * noise
            self.weight[start:end] += change

    def _block(self) -> int:
        return self.config.experts if self.config.gate == "softmax" else self.config.k

    # -- forward

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, T, in], or [B * T, in] as OPT has it."""
        frame, shape = self.runtime.frame(), x.shape
        if x.numel() != frame.batch * frame.tokens * self.in_features:
            raise RuntimeError(
                f"{self.spec.name} got {list(shape)}; its stack was given {frame.batch} x {frame.tokens}"
            )
        out = self.mixed(x.reshape(frame.batch, frame.tokens, -1), frame)
        return out.view(*shape[:-1], self.out_features)

    def mixed(self, x: Tensor, frame: Frame) -> Tensor:
        """[B, T, in] -> [B, T, out] in the call `frame`."""
        if self.token is not None:
            x = self.token(x)
        return self._by_task(x, frame) if self.runtime.level == "task" else self._by_group(x, frame)

    def _by_group(self, x: Tensor, frame: Frame) -> Tensor:
        decision = self.decision(x, frame)
        if self.runtime.per_token:
            return self.product_of_tokens(x, decision)
        layout = frame.layout
        return layout.join(self.product(layout.split(x), decision.idx, decision.g), frame.batch, frame.tokens)

    def _by_task(self, x: Tensor, frame: Frame) -> Tensor:
        """Every task is merged once a call, and out of training once for all calls."""
        decision, rows = self.decision(x, frame), frame.task_rows
        tasks = sorted(set(rows))
        if len(tasks) == 1:
            return self._of_task(x, tasks[0], decision)
        places = [[i for i, t in enumerate(rows) if t == task] for task in tasks]
        parts = [self._of_task(x[own], task, decision) for task, own in zip(tasks, places)]
        back = torch.tensor([i for own in places for i in own], device=x.device).argsort()
        return torch.cat(parts)[back]

    def _of_task(self, x: Tensor, task: int, decision: Decision) -> Tensor:
        if torch.is_grad_enabled():
            idx, g = decision.idx[task : task + 1], decision.g[task : task + 1]
            return self.product(x.reshape(1, -1, self.in_features), idx, g).view(*x.shape[:2], -1)
        matrix, shift = self._cached(task, decision)
        return F.linear(x.to(matrix.dtype), matrix, shift)

    def _cached(self, task: int, decision: Decision) -> tuple[Tensor, Tensor | None]:
        """The task's matrix and bias; merged anew where any tensor that they come from has changed since."""
        stamp = (decision.stamp, _stamp(*self.parameters()))
        if task not in self._merged or self._merged[task][0] != stamp:
            matrix, shift = self.merged(decision.idx[task : task + 1], decision.g[task : task + 1])
            self._merged[task] = (stamp, matrix[0], None if shift is None else shift[0])
        return self._merged[task][1:]

    # -- the gate

    def decision(self, x: Tensor, frame: Frame) -> Decision:
        """What the bank that decides decided in this call; at level task for every task, else for every group."""
        leader = self.spec.leader
        if leader != self.spec.name:
            found: Decision = frame.decisions[leader]
            return found
        decision = self._decide(x, frame)
        if self.config.gate_scope != "linear":
            frame.decisions[leader] = decision
        seen = frame.options.seen
        if seen is not None and self.training and (self.config.balance_coef or self.config.z_coef):
            counted = self._counted(decision, frame)
            seen.balance.setdefault(leader, balance_loss(counted, self.config))  # once, if the layer is run again
        if seen is not None and self.training and self.config.bias_rate:
            seen.chosen.setdefault(self, self._counted(decision, frame).chosen.sum(0))
        if seen is not None and seen.record:
            gates = torch.zeros_like(decision.logits).scatter_add(-1, decision.idx, decision.g)
            seen.gates[leader] = gates.detach()
        return decision

    def _decide(self, x: Tensor, frame: Frame) -> Decision:
        bias = self.config.bias_rate * self.get_buffer("moves") if self.config.bias_rate else None
        if self.runtime.level != "task" or torch.is_grad_enabled():
            return decide(*self._logits(x, frame), self.config, self.training, bias)
        assert frame.codes is not None
        stamp = _stamp(frame.codes, *self.parameters(), *self.buffers())
        if self._decided is None or self._decided.stamp != stamp or self.training:
            self._decided = replace(decide(*self._logits(x, frame), self.config, self.training, bias), stamp=stamp)
        return self._decided

    def _counted(self, decision: Decision, frame: Frame) -> Decision:
        """The groups that are to be balanced: of tasks those in the batch, each once; of tokens the real ones."""
        if self.runtime.level == "task":
            counted = torch.tensor(sorted(set(frame.task_rows)), device=decision.g.device)
        elif self.runtime.per_token and frame.real is not None:
            counted = frame.real.flatten()
        else:
            return decision
        parts = (decision.idx, decision.g, decision.logits, decision.load, decision.chosen)
        return Decision(*(part[counted] for part in parts))

    def _logits(self, x: Tensor, frame: Frame) -> tuple[Tensor, Tensor | None]:
        """Logits [groups, n], float32 at least, and the standard deviation of their noise in training."""
        r, before_any = pooled(x, frame, self.spec.name)  # [groups, router], [groups]
        projection: Tensor = self.get_buffer("projection") if self.config.gate == "hash" else self.w_gate
        r = wide(r)
        with torch.autocast(x.device.type, enabled=False):
            logits = r @ projection.to(r.dtype)
            if before_any is not None and self.config.gate != "hash":
                logits = torch.where(before_any[:, None], self.first.to(r.dtype), logits)
            if self.config.gate != "noisy-topk" or not self.training:
                return logits, None
            return logits, F.softplus(r @ self.w_noise.to(r.dtype)) + self.config.noise_eps

    # -- the experts

    def product(self, x: Tensor, idx: Tensor, g: Tensor) -> Tensor:
        """[G, L, in] -> [G, L, out] with the experts of each group."""
        self.calls += 1
        x, weight, bias = self._cast(x)
        order = "output" if self.config.method == "moe" else self.config.order
        return mix(x, weight, bias, idx, g, order, self.config.merge_chunk)

    def product_of_tokens(self, x: Tensor, decision: Decision) -> Tensor:
        """[B, T, in] -> [B, T, out] with the experts of each token."""
        flat, weight, bias = self._cast(x.flatten(0, 1))
        return mix_outputs(flat, weight, bias, decision.idx, decision.g).view(*x.shape[:2], -1)

    def merged(self, idx: Tensor, g: Tensor) -> tuple[Tensor, Tensor | None]:
        """Merged matrices [G, out, in] and biases [G, out]."""
        self.calls += 1
        return merge(self.weight, self.bias, idx, g)

    def _cast(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Input and experts in one dtype: autocast's where that is on, the experts' otherwise."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return x.to(dtype), self.weight.to(dtype), bias

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, experts={self.config.experts}, k={self.config.k}"


class LowRankLinear(MergedLinear):
    """Experts that share a matrix and differ by low rank: W_i = weight + up_i · down_i (init lora).

    State: weight [out, in], down [n, r, in], up [n, out, r]. Mixtures are taken in rank space: n experts cost 1 + 2nr/d
    of the parameters, and a merge costs k·r instead of k·d.
    """

    def _make_experts(self) -> None:
        n, spec = self.config.experts, self.spec
        rank = min(self.config.rank(min(spec.inputs, spec.outputs)), spec.inputs, spec.outputs)
        self.weight = nn.Parameter(torch.empty(spec.outputs, spec.inputs))
        self.down = nn.Parameter(torch.empty(n, rank, spec.inputs))
        self.up = nn.Parameter(torch.empty(n, spec.outputs, rank))

    @torch.no_grad()
    def fill(self, weight: Tensor, bias: Tensor | None, generator: torch.Generator) -> None:
        """As of all banks: `down` is alike in all experts, `up` sums to zero over the first k and over the others."""
        self.weight.copy_(weight)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias.expand_as(self.bias))
        rank, n, k = self.down.shape[1], self.config.experts, self._block()
        shared = torch.randn(rank, self.in_features, generator=generator) / self.in_features**0.5
        self.down.copy_(shared.expand_as(self.down))
        self.up.zero_()
        for start, end in ((0, k), (k, n)):
            if end - start > 1:
                noise = torch.randn(end - start, self.out_features, rank, generator=generator)
                size = self.config.init_scale * float(weight.std()) * (self.in_features / rank) ** 0.5
                self.up[start:end] = size * (noise - noise.mean(0)).to(self.up)

    def product(self, x: Tensor, idx: Tensor, g: Tensor) -> Tensor:
        self.calls += 1
        x, weight, bias = self._cast(x)
        down, up = self.down.to(x.dtype)[idx], self.up.to(x.dtype)[idx]  # [G, k, r, in], [G, k, out, r]
        g = g.to(x.dtype)
        hidden = torch.einsum("gli,gkri->glkr", x, down) * g[:, None, :, None]
        out = F.linear(x, weight) + torch.einsum("glkr,gkor->glo", hidden, up)
        return out if bias is None else out + torch.einsum("gk,gko->go", g, bias[idx])[:, None]

    def product_of_tokens(self, x: Tensor, decision: Decision) -> Tensor:
        flat = x.reshape(-1, 1, x.shape[-1])
        return self.product(flat, decision.idx, decision.g).view(*x.shape[:2], -1)

    def merged(self, idx: Tensor, g: Tensor) -> tuple[Tensor, Tensor | None]:
        self.calls += 1
        g = g.to(self.weight.dtype)
        delta = torch.einsum("gk,gkor,gkri->goi", g, self.up[idx], self.down[idx])
        bias = None if self.bias is None else torch.einsum("gk,gko->go", g, self.bias[idx])
        return self.weight + delta, bias


def _stamp(*tensors: Tensor) -> tuple[Any, ...]:
    """Differs whenever one of the tensors was replaced, or changed in place (as optimizers and load_state_dict do)."""
    return tuple((t.data_ptr(), t._version, t.dtype) for t in tensors)


def make_bank(spec: BankSpec, config: MeoConfig, runtime: Runtime) -> MergedLinear:
    """A bank as `config` says, with experts yet to be filled."""
    return (LowRankLinear if config.init == "lora" else MergedLinear)(spec, config, runtime)
