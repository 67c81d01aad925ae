"""Summed losses of segments under a model, without logits for tokens that nobody asks about.

The base model runs once on a padded batch, and the hidden states that predict targets are gathered. Where the head is a
matrix with at most a bias, a scale and a soft-cap, `lean_kernels.linear_ce` makes losses of them. Where it is more, the
model's own forward turns them into logits, in chunks of rows, with the base model standing in as a constant: whatever
the architecture does after its last norm is then done by its own code. Right padding needs no mask under causal
attention. All of this is believed only after `Losses.check` has seen it give what the plain forward gives, one segment
at a time; what deviates is not used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from model_hooks.errors import RequestError

from .batches import Batching
from .heads import Heads
from .linear_head import LinearHead, output_embedding
from .pairs import Segment

Head = Literal["linear", "gathered", "whole"]

CHUNK_ROWS, CHUNK_ELEMENTS = 2048, 1 << 27  # of the logits that exist at a time
SAMPLES, SAMPLE_LENGTH = 8, 32
TOLERANCE = {torch.float32: 5e-5, torch.float64: 5e-5}
LOW_PRECISION_TOLERANCE = 2e-2
SETTLED: WeakKeyDictionary[Any, dict[tuple[Any, ...], tuple[int, Head, Batching]]] = WeakKeyDictionary()


class Losses:
    """Callable: segments -> float64 array of summed losses in nats. `how` says what `check` settled on."""

    def __init__(self, model: Any) -> None:
        if output_embedding(model) is None:
            raise RequestError(
                f"{type(model).__name__} has no output embedding, so it predicts nothing; give a causal language model"
            )
        self.model = model
        # where the model's forward gets its hidden states from: most call the base model, OPT the decoder inside it
        self.bases = [model.base_model, *([model.get_decoder()] if hasattr(model, "get_decoder") else [])]
        self.base = self.bases[0]
        self.head: Head = "linear" if LinearHead.of(model) else "gathered"
        self.heads, self.spared = Heads(()), 0  # spared: tokens that were not forwarded, since their head was
        self.batching: Batching = "padded"

    @property
    def how(self) -> str:
        head = {
            "linear": "losses of target positions without logits",
            "gathered": "logits of target positions only",
            "whole": "logits of all positions",
        }[self.head]
        batching = {"padded": "padded batches", "equal_length": "batches of equal length", "one_by_one": "one by one"}
        return f"{head}, {batching[self.batching]}"

    @torch.inference_mode()
    def __call__(self, segments: Sequence[Segment], parts: Sequence[slice] = (slice(None),)) -> NDArray[np.float64]:
        """The base model takes one part after the other, a linear head the targets of all of them together: on a CPU
        the first is fastest with few tokens, which stay in the caches, the second with many, which share its matrix."""
        sums = np.zeros(len(segments), np.float64)

        def add(places: NDArray[np.int64], losses: Tensor) -> None:
            sums[:] += np.bincount(places, losses.double().cpu().numpy(), len(segments))

        linear = LinearHead.of(self.model) if self.head == "linear" else None
        waiting: list[tuple[NDArray[np.int64], Tensor, Tensor]] = []
        for part in parts:
            chosen = np.arange(len(segments))[part]
            for number, members in self.heads.groups([segments[place] for place in chosen]):
                own = chosen[members]
                rows, hidden, targets, output = self._hidden([segments[place] for place in own], number)
                if linear:
                    waiting.append((own[rows], hidden, targets))
                else:
                    add(own[rows], self._logit_losses(hidden, targets, output))
        if linear and waiting:
            places, found, wanted = zip(*waiting)
            add(np.concatenate(places), linear.losses(torch.cat(found), torch.cat(wanted)))
        return sums

    def _hidden(self, segments: Sequence[Segment], number: int) -> tuple[NDArray[np.int64], Tensor, Tensor, Any]:
        """Of segments that all begin with the head `number` (-1: none), for each target: its segment, the hidden state
        [hidden_size] that predicts it (logits [vocab_size] where all are computed), its token; the base's output."""
        cached, skip = {}, 0
        if number >= 0:
            skip = len(self.heads.ids[number])
            segments = [Segment(s.ids[skip:], s.first - skip) for s in segments]
            cached = {"past_key_values": self.heads.cache(number, len(segments), self.base, self.model.device)}
        ids, rows, columns = pad(segments)
        device = self.model.device
        targets = ids[rows, columns].to(device)
        given, at, before = ids.to(device), rows.to(device), (columns - 1).to(device)
        if self.head == "whole":
            output = None
            found = self.model(input_ids=given, use_cache=False).logits
        else:
            output = self.base(input_ids=given, use_cache=bool(cached), **cached)
            found = output[0]
        self.spared += skip * len(segments)
        return rows.numpy(), found[at.to(found.device), before.to(found.device)], targets, output

    def _logit_losses(self, found: Tensor, targets: Tensor, output: Any) -> Tensor:
        """Losses [targets] by logits, which are `found` or made of it, for some rows at a time."""
        parts = []
        step = max(1, min(CHUNK_ROWS, CHUNK_ELEMENTS // output_embedding(self.model).weight.shape[0]))
        for part, target in zip(found.split(step), targets.split(step)):
            logits = self._logits(part, output) if self.head == "gathered" else part
            parts.append(functional.cross_entropy(logits.float(), target.to(logits.device), reduction="none"))
        return torch.cat(parts)

    def _logits(self, hidden: Tensor, output: Any) -> Tensor:
        """Logits [n, vocab_size] of hidden states [n, hidden_size], by the model's forward from the base model on."""
        dummy = torch.zeros((1, len(hidden)), dtype=torch.long, device=self.model.device)
        with _constant(self.base, type(output)(last_hidden_state=hidden[None])):
            logits: Tensor = self.model(input_ids=dummy, use_cache=False).logits
        return logits[0]

    def check(self, segments: Sequence[Segment]) -> None:
        """Settle on the fastest way that gives, on cut copies of `segments`, what the plain forward gives alone.

        Once for a model object, its class, dtype and attention: other weights do not change what its code does.
        """
        config, linear = self.model.config, LinearHead.of(self.model) is not None
        code = (type(self.model), self.model.dtype, config._attn_implementation, self.model.device.type, linear)
        known = SETTLED.setdefault(self.model, {})
        if code in known:
            number, self.head, self.batching = known[code]
            self.base = self.bases[number]
            return
        self._settle(segments)
        if len(segments) >= SAMPLES:  # fewer show less
            known[code] = self.bases.index(self.base), self.head, self.batching

    def _settle(self, segments: Sequence[Segment]) -> None:
        of = range(1, SAMPLES + 1)  # eighths of their lengths, so that there is something to pad
        sample = [_cut(s, min(len(s.ids), SAMPLE_LENGTH) * i // SAMPLES) for i, s in zip(of, segments)]
        shortest = min((len(s.ids) for s in sample), default=0)
        ways: list[tuple[Batching, list[Segment]]] = [
            ("padded", sample), ("equal_length", [_cut(s, shortest) for s in sample]), ("one_by_one", sample),
        ]  # fmt: skip
        for batching, given in ways:
            self.base, self.head, self.batching = self.bases[0], "whole", "one_by_one"
            expected = self._each(given)
            quick: list[Head] = ["linear", "gathered"] if LinearHead.of(self.model) else ["gathered"]
            heads: list[tuple[Any, Head]] = [*product(self.bases, quick), (self.bases[0], "whole")]
            for base, head in heads:
                self.base, self.head, self.batching = base, head, batching
                if self._agrees(given, expected):
                    return

    def share(self, heads: Heads, segments: Sequence[Segment]) -> None:
        """Forward these heads once from now on, if that gives on cut copies of `segments` what whole forwards give."""
        if self.head == "whole":
            return
        sample = [
            Segment(s.ids[: len(heads.ids[number]) + SAMPLE_LENGTH], len(heads.ids[number]) + 1)
            for s in segments
            if (number := heads.number_of(s)) >= 0
        ]
        try:
            expected = self._each(sample)
            self.heads = heads
            agrees = bool(sample) and self._agrees(sample, expected)
        except (MemoryError, RuntimeError):  # the runs that follow have smaller batches and will say it
            agrees = False
        if not agrees:
            self.heads = Heads(())
        self.spared = 0

    def _each(self, segments: Sequence[Segment]) -> NDArray[np.float64]:
        return np.array([self([segment])[0] for segment in segments])

    def _agrees(self, segments: Sequence[Segment], expected: NDArray[np.float64]) -> bool:
        try:
            found = self._each(segments) if self.batching == "one_by_one" else self(segments)
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError):  # a forward that is built otherwise
            return False
        count = np.array([segment.targets for segment in segments])
        tolerance = TOLERANCE.get(self.model.dtype)
        allowed = tolerance if tolerance else LOW_PRECISION_TOLERANCE * (1 + 4 / np.sqrt(count))
        same = np.isnan(found) == np.isnan(expected)  # float16 may overflow, alone as well as together
        return bool(np.all(same & ~(np.abs(found - expected) / count > allowed)))


def pad(segments: Sequence[Segment]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [rows, longest], padded on the right, and (row, column) of every target, row by row."""
    ids = torch.zeros((len(segments), max(len(s.ids) for s in segments)), dtype=torch.long)
    for row, segment in enumerate(segments):
        ids[row, : len(segment.ids)] = torch.from_numpy(np.asarray(segment.ids, np.int64))
    rows = torch.repeat_interleave(torch.arange(len(segments)), torch.tensor([s.targets for s in segments]))
    columns = torch.cat([torch.arange(s.first, len(s.ids)) for s in segments])
    return ids, rows, columns


def _cut(segment: Segment, length: int) -> Segment:
    """The first `length` tokens (two at least), all of them targets but the first."""
    return Segment(segment.ids[: max(2, length)], 1)


@contextmanager
def _constant(module: Any, output: Any) -> Iterator[None]:
    """Inside, calling `module` returns `output`."""
    own = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
