"""What banks must know of a call beside their input: which tokens are real, what decides, the task, the state.

A `Frame` is one call of a stack of layers (an encoder or a decoder). Nothing of it stays on the modules, except the
last training frame: under gradient checkpointing layers run again in the backward pass, after the call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from model_hooks.errors import RequestError

from .config import MeoConfig
from .layout import Layout, by_segment, chunks, segments


@dataclass
class Seen:
    """What the gates of the calls inside one `gating` did.

    Attributes:
        balance: bank -> its loss (training only; the first call counts).
        gates: bank -> weight of every expert in every group, [G, n] (with record=True).
        chosen: bank with biases of selection -> how often it selected each expert, [n] (training only): what
            `move_biases` takes.
    """

    record: bool = False
    balance: dict[str, Tensor] = field(default_factory=dict)
    gates: dict[str, Tensor] = field(default_factory=dict)
    chosen: dict[Any, Tensor] = field(default_factory=dict)

    @property
    def loss(self) -> Tensor:
        """The balance losses of all banks, to be added to the task's once; a scalar."""
        return torch.stack(list(self.balance.values())).sum() if self.balance else torch.zeros(())


@dataclass(frozen=True)
class Options:
    """See `gating`. prompt_slots: places of the prompt that `generate` was given. labels: of the call."""

    task: str | Sequence[str] | None = None
    task_ids: Tensor | None = None
    prompt_lens: Tensor | None = None
    documents: Tensor | None = None
    prompt_slots: int | None = None
    labels: Tensor | None = None
    seen: Seen | None = None


_OPTIONS: ContextVar[Options] = ContextVar("meo_options", default=Options())  # noqa: B039  (frozen)
_FRAMES: ContextVar[tuple[Frame, ...]] = ContextVar("meo_frames", default=())


def options() -> Options:
    """The innermost `gating`'s."""
    return _OPTIONS.get()


@contextmanager
def with_options(**changes: Any) -> Iterator[Options]:
    """`options()`, changed in this block."""
    token = _OPTIONS.set(replace(options(), **changes))
    try:
        yield options()
    finally:
        _OPTIONS.reset(token)


@contextmanager
def gating(
    *,
    task: str | Sequence[str] | None = None,
    prompt_lens: Any = None,
    documents: Tensor | None = None,
    record: bool = False,
) -> Iterator[Seen]:
    """Say what a call's tokens are; yields what the gates did (see `Seen`).

    Args:
        task: name of the task, or one for each row.
        prompt_lens: number of real tokens, [B], that make up each row's prompt: they decide at level prefix. Without
            it the labels tell (what leads with -100), or `generate`; otherwise the first token decides.
        documents: number of each token's document in a packed row, [B, T]; documents are gated apart.
        record: keep the gates.
    """
    seen = Seen(record)
    lens = None if prompt_lens is None else torch.as_tensor(prompt_lens)
    with with_options(task=task, prompt_lens=lens, documents=documents, seen=seen):
        yield seen


class Runtime:
    """What the banks of one stack share: settings, the level that they are gated at, the running call.

    Attributes:
        config: as converted. level: of this stack; "encoder" where the encoder's output decides.
        causal: whether tokens see none after them.
        last: the last training call, for layers that are run again in the backward pass.
    """

    def __init__(self, config: MeoConfig, level: str, causal: bool) -> None:
        self.config, self.level, self.causal = config, level, causal
        self.last: Frame | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtime:
        new = Runtime(self.config, self.level, self.causal)
        memo[id(self)] = new
        return new

    @property
    def per_token(self) -> bool:
        """Whether each token has its own decision, so that outputs are mixed."""
        return self.level == "cumulative" or (self.level == "token" and self.config.method == "moe")

    def frame(self) -> Frame:
        """The running call, or else the last training call. Raises RuntimeError outside of any."""
        found = next((f for f in reversed(_FRAMES.get()) if f.runtime is self), self.last)
        if found is None:
            raise RuntimeError("a bank of experts was called outside its model; call the model that was converted")
        return found


@dataclass
class Frame:
    """One call of a stack with [B, T] tokens.

    Attributes:
        mask: [B, past + T] of real tokens, or None for all.
        past: tokens in the cache before.
        state: bank -> its running sums, kept with the cache; None without one.
        documents: number of each token's document in a packed row, [B, T], or None.
        encoder: mean of the encoder's output, [B, width]. codes: of all tasks, [tasks, width].
        decisions: bank that decides -> what it decided: banks may share.
    """

    runtime: Runtime
    options: Options
    batch: int
    tokens: int
    device: Any
    mask: Tensor | None = None
    past: int = 0
    state: dict[str, dict[str, Tensor]] | None = None
    documents: Tensor | None = None
    encoder: Tensor | None = None
    codes: Tensor | None = None
    decisions: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def real(self) -> Tensor | None:
        """[B, T] bool: which of the call's tokens are no padding; None for all."""
        return None if self.mask is None else self.mask[:, self.mask.shape[1] - self.tokens :].bool()

    @cached_property
    def real_or_all(self) -> Tensor:
        """`real`, or all true."""
        if self.real is not None:
            return self.real
        return torch.ones(self.batch, self.tokens, dtype=torch.bool, device=self.device)

    @cached_property
    def seen_before(self) -> Tensor:
        """Real tokens of each row in the cache, [B]."""
        if self.mask is None:
            return torch.full((self.batch,), self.past, device=self.device)
        return self.mask[:, : self.mask.shape[1] - self.tokens].sum(1)

    @cached_property
    def layout(self) -> Layout:
        """Which tokens share a decision."""
        level, size = self.runtime.level, self.runtime.config.chunk
        if level == "chunk":
            whole = self.real is None and self.documents is None and not self.past and self.tokens % size == 0
            return chunks(self.batch, self.tokens, size, self.device) if whole else by_segment(self, size)
        packed = self.documents is not None and level != "encoder"
        return by_segment(self, None) if packed else segments(self.batch, self.tokens, self.device)

    @cached_property
    def deciding(self) -> Tensor:
        """[B, T] bool: the tokens that gates of level sequence and prefix look at."""
        real = self.real_or_all
        if self.runtime.level != "prefix":
            return real
        told, place = self.options, self.places
        if told.prompt_lens is not None:
            chosen = real & (place < told.prompt_lens.to(self.device)[:, None])
        elif told.prompt_slots is not None:
            chosen = real & (torch.arange(self.tokens, device=self.device) < told.prompt_slots - self.past)
        elif told.labels is not None and told.labels.shape == real.shape:
            chosen = real & ((told.labels != -100).cumsum(1) == 0)
        else:
            chosen = real & (place == 0)
        first = real & (place == 0)  # a row, or a packed document, with no prompt is decided by its first token
        return chosen | first

    @cached_property
    def places(self) -> Tensor:
        """Place of each token among the real ones of its row or document, [B, T]; what is cached is counted."""
        count = self.real_or_all.long().cumsum(1) - 1
        if self.documents is None:
            return count + self.seen_before[:, None]
        start = torch.ones_like(self.documents, dtype=torch.bool)
        start[:, 1:] = self.documents[:, 1:] != self.documents[:, :-1]
        return count - torch.where(start, count, 0).cummax(1).values

    @cached_property
    def task_rows(self) -> list[int]:
        """Task of each row. Raises `RequestError` where none is given or known."""
        names = list(self.runtime.config.tasks)
        told = self.options
        if told.task_ids is not None:
            found = told.task_ids.view(-1).tolist()
            found = found * self.batch if len(found) == 1 else found
        elif told.task is None:
            if len(names) > 1:
                raise RequestError(f"no task was given; it is one of {', '.join(names)}: meo.gating(task=...)")
            found = [0] * self.batch
        else:
            given = [told.task] * self.batch if isinstance(told.task, str) else list(told.task)
            unknown = next((name for name in given if name not in names), None)
            if unknown is not None:
                raise RequestError(f"unknown task {unknown!r}; it is one of {', '.join(names)}")
            found = [names.index(name) for name in given]
        if self.batch % max(1, len(found)) or not all(0 <= t < len(names) for t in found):
            raise RequestError(f"{len(found)} tasks were given for {self.batch} rows; one, or one a row, is needed")
        return [t for t in found for _ in range(self.batch // len(found))]  # beams are rows beside each other


def enter(frame: Frame, training: bool) -> None:
    """A call begins."""
    _FRAMES.set((*_FRAMES.get(), frame))
    if training:
        frame.runtime.last = frame


def leave(runtime: Runtime) -> None:
    """The call of this stack ended; what an exception left behind goes too."""
    frames = _FRAMES.get()
    place = next((i for i in reversed(range(len(frames))) if frames[i].runtime is runtime), None)
    if place is not None:
        _FRAMES.set(frames[:place])
