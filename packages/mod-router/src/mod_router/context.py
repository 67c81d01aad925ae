"""What a forward pass of a routed model must know beside its inputs: which tokens decide, and where decisions are kept.

A `Frame` is one call of the decoder. Nothing of it stays on the modules, so generations may be interleaved and threads
may share a model. (Recomputation under gradient checkpointing runs after the call: it finds the last training frame.)
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from model_hooks.errors import RequestError

if TYPE_CHECKING:
    from .gate import Runtime


@dataclass(frozen=True)
class Options:
    """See `routing_context`. `prompt`: ids and mask that `generate` was given."""

    prompt_lens: Tensor | None = None
    pool_mask: Tensor | None = None
    off: bool = False
    train: bool = False
    forced: Mapping[int, Tensor] | None = None
    noise: float = 0.0
    prompt: tuple[Tensor, Tensor | None] | None = None
    seen: Seen | None = None


@dataclass
class Seen:
    """What the gates did in the forward passes of one `routing_context`; the last pass counts.

    Attributes:
        probabilities: layer -> p, [B], or [B, T] at token level; with gradient in training.
        gates: layer -> what was open, of the same shape: bool, or in training 0 and 1 with the gradient of p.
        real: which tokens are real, [B, T], or None for all.
    """

    probabilities: dict[int, Tensor] = field(default_factory=dict)
    gates: dict[int, Tensor] = field(default_factory=dict)
    real: Tensor | None = None

    def used(self, layer: int) -> Tensor:
        """Share of each sequence that ran the layer, [B]."""
        gate = self.gates[layer].float()
        if gate.dim() == 1:
            return gate
        real = torch.ones_like(gate) if self.real is None else self.real.to(gate)
        return (gate * real).sum(1) / real.sum(1).clamp_min(1)

    @property
    def capacity(self) -> Tensor:
        """Mean share of (sequence, layer) pairs that ran; has a gradient in training."""
        return torch.stack([self.used(layer).mean() for layer in sorted(self.gates)]).mean()


class _Local(threading.local):
    """Of one thread: the contexts and the calls that it is in, innermost last."""

    def __init__(self) -> None:
        self.options: list[Options] = []
        self.frames: list[Frame] = []


_local = _Local()
_DEFAULT = Options()


@dataclass
class Frame:
    """One call of the decoder with [B, T] tokens."""

    runtime: Runtime
    options: Options
    cache: Any
    batch: int
    tokens: int
    past: int  # tokens in the cache before
    attention_mask: Tensor | None  # [B, past + T] of real tokens, where it was given in that form
    device: Any
    settled: list[Any] | None = None  # the cache's layers, where gates may go by their decisions without a further look

    @cached_property
    def real(self) -> Tensor | None:
        """[B, T] bool: which of the call's tokens are no padding; None for all."""
        mask = self.attention_mask
        return None if mask is None else mask[:, self.past : self.past + self.tokens].bool()

    @cached_property
    def deciding(self) -> Tensor | None:
        """[B, T] bool: the tokens that sequence-level gates look at; None for all."""
        if self.runtime.config.pool == "masked_mean":
            return self.real
        options = self.options
        if options.pool_mask is not None:
            return _checked(options.pool_mask, self).bool().to(self.device)
        if options.prompt_lens is not None:
            lens = torch.as_tensor(options.prompt_lens, device=self.device).view(-1, 1)
            real = self._real_or_all()
            return self._never_empty(real & (real.long().cumsum(1) <= lens), real)
        slots = options.prompt[0].shape[1] - self.past if options.prompt is not None else self.tokens
        if slots >= self.tokens:
            return self.real
        real = self._real_or_all()
        return self._never_empty(real & (torch.arange(self.tokens, device=self.device) < slots), real)

    def _real_or_all(self) -> Tensor:
        return (
            torch.ones(self.batch, self.tokens, dtype=torch.bool, device=self.device)
            if self.real is None
            else self.real
        )

    @staticmethod
    def _never_empty(mask: Tensor, real: Tensor) -> Tensor:
        """A row with no prompt is decided by its first token: no text that follows may decide."""
        first = real & (real.long().cumsum(1) == 1)
        return torch.where(mask.any(1, keepdim=True), mask, first)

    @property
    def seen(self) -> Seen | None:
        return self.options.seen


def _checked(mask: Tensor, frame: Frame) -> Tensor:
    if tuple(mask.shape) != (frame.batch, frame.tokens):
        raise RequestError(f"pool_mask is {list(mask.shape)}; [{frame.batch}, {frame.tokens}] as the tokens is needed")
    return mask


def options() -> Options:
    """The innermost `routing_context`'s."""
    return _local.options[-1] if _local.options else _DEFAULT


def enter(frame: Frame) -> None:
    _local.frames.append(frame)
    if frame.options.train:
        frame.runtime.last = frame


def leave(runtime: Runtime) -> None:
    frames = _local.frames
    for place in reversed(range(len(frames))):
        if frames[place].runtime is runtime:
            del frames[place]
            return


def frame_of(runtime: Runtime) -> Frame | None:
    """The call that is running, or else the last training call (checkpointed blocks run again in the backward pass)."""
    frames = _local.frames
    if frames and frames[-1].runtime is runtime:
        return frames[-1]
    return next((f for f in reversed(frames) if f.runtime is runtime), runtime.last)


@contextmanager
def with_options(**changes: Any) -> Iterator[Options]:
    stack = _local.options
    stack.append(replace(options(), **changes))
    try:
        yield stack[-1]
    finally:
        stack.pop()


@contextmanager
def routing_context(
    *,
    prompt_lens: Any = None,
    pool_mask: Tensor | None = None,
    off: bool = False,
    train: bool = False,
    forced: Mapping[int, Tensor] | None = None,
    noise: float = 0.0,
) -> Iterator[Seen]:
    """Say how routed models decide in this block; yields what their gates did (see `Seen`).

    Without it a call decides on all tokens it is given, and `generate` on its prompt.

    Args:
        prompt_lens: number of real tokens, [B], that make up each row's prompt; what follows does not decide.
        pool_mask: instead, the tokens that decide, [B, T] bool.
        off: all gates open, routers not asked: the base model, in this block and in those inside it.
        train: closed gates compute too, and get a gradient (unless the configuration says cheap_train).
        forced: decisions by layer, [B] bool ([1]: the same for all rows; [B, T] at token level), instead of the
            routers', in this block and in those inside it; a layer not named decides itself.
        noise: standard deviation of noise on router logits.
    """
    forced = options().forced if forced is None else forced
    lens = None if prompt_lens is None else torch.as_tensor(prompt_lens)
    seen = Seen()
    with with_options(
        prompt_lens=lens,
        pool_mask=pool_mask,
        off=off or options().off,
        train=train,
        forced=forced,
        noise=noise,
        seen=seen,
        prompt=None,
    ):
        yield seen


class Forced:
    """A routed model whose decisions are given, as what times models calls it."""

    def __init__(self, model: Any, forced: Mapping[int, Tensor]) -> None:
        self.model, self.forced, self.device = model, forced, model.device

    def __call__(self, **kwargs: Any) -> Any:
        with routing_context(forced=self.forced):
            return self.model(**kwargs)


def closed(layers: tuple[int, ...], share: float, rows: int = 1) -> dict[int, Tensor]:
    """Decisions that leave a share of the gated layers open, the same for all rows: the last ones are closed."""
    keep = round(share * len(layers))
    return {layer: torch.full((rows,), place < keep) for place, layer in enumerate(layers)}
