"""The KV cache of a routed model: decisions live here, and layers hold keys of the rows that run, and of no other.

`generate` fills, reorders, repeats and crops it like the stock one; a decision, once made, is kept until the cache is
reset or emptied, so chunks, drafts and further turns of a conversation go by it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)


class _Routed:
    """Decision of one layer, and keys [active rows, heads, T, D] of the rows that are open.

    Attributes:
        packed: keys of open rows only; without it (a gate on the MLP) keys of all rows.
        static: keys of all rows in tensors of fixed size.
        decision: [B] bool, None before it is made. batch: B. count: how many rows are open.
        rows: the open ones, ascending; None where all or none are.
        expected: rows that the next update must bring, set by the gate.
    """

    routed = True
    packed = True
    static = False
    decision: Tensor | None = None
    rows: Tensor | None = None
    batch = count = 0
    expected: int | None = None
    length = 0

    def decide(self, decision: Tensor, open_rows: list[int]) -> None:
        self.decision, self.batch, self.count = decision, len(decision), len(open_rows)
        mixed = 0 < self.count < self.batch
        self.rows = torch.tensor(open_rows, dtype=torch.long, device=decision.device) if mixed else None

    def expect(self) -> None:
        """The gate is about to run the attention on the open rows."""
        self.expected = self.count if self.packed else self.batch

    def skip(self, tokens: int) -> None:
        """The layer was closed for all rows of a call."""
        self._advance(tokens)

    def _advance(self, tokens: int) -> None:
        self.length += tokens

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.packed and self.expected is None:
            raise TypeError(
                "this cache holds the decisions of a routed model, and its layer was run without its gate; give a "
                "model without routers a fresh cache"
            )
        self.expected = None
        out: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)  # type: ignore[misc]
        self._count_tokens(key_states.shape[-2])
        return out

    def _count_tokens(self, tokens: int) -> None:
        self._advance(tokens)

    @property
    def _holds(self) -> bool:
        return bool(self.is_initialized) and self.keys.numel() > 0

    def _select(self, index: Tensor) -> None:
        """Row b of the batch becomes what row index[b] was."""
        old, rows = self.decision, self.rows
        index = index.nonzero().squeeze(1) if index.dtype == torch.bool else index
        places = index
        if old is not None:
            index = index.to(old.device)
            decision = old[index]
            if rows is None:
                open_rows = list(range(len(decision))) if self.count else []
            else:
                open_rows = [i for i, is_open in enumerate(decision.tolist()) if is_open]
            self.decide(decision, open_rows)
            if self.packed and rows is not None:
                row_of = torch.zeros(len(old), dtype=torch.long, device=old.device)
                row_of[rows] = torch.arange(len(rows), device=old.device)
                places = row_of[index[torch.tensor(open_rows, dtype=torch.long, device=old.device)]]
            elif self.packed and not self.count:
                places = index[:0]
        if self._holds:
            keep = places.to(self.keys.device)
            self._set(self.keys.index_select(0, keep), self.values.index_select(0, keep))

    def _set(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        batch = self._batch()
        if batch:
            self._select(torch.arange(batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self._batch():
            self._select(indices)

    def _batch(self) -> int:
        if self.decision is not None:
            return self.batch
        return int(self.keys.shape[0]) if self._holds else 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget tokens at the end: -n of them, or (as older versions of transformers say it) all after the first n."""
        before = self.get_seq_length()  # type: ignore[attr-defined]
        remove = max(0, before - tokens_to_remove) if tokens_to_remove > 0 else min(-tokens_to_remove, before)
        if self._holds:
            self._crop_keys(remove)
        self._advance(-remove)
        if remove and remove == before:
            self.reset()

    def _crop_keys(self, remove: int) -> None:
        if remove:
            self._set(self.keys[..., :-remove, :], self.values[..., :-remove, :])

    def reset(self) -> None:
        self.decision = self.rows = self.expected = None
        self.count = 0
        self.keys = self.values = None  # type: ignore[assignment]
        self.is_initialized = False
        self._advance(-self.get_seq_length())  # type: ignore[attr-defined]


class RoutedLayer(_Routed, DynamicLayer):
    """A layer that attends to all tokens."""

    def __init__(self, packed: bool = True) -> None:
        DynamicLayer.__init__(self)
        self.packed = packed

    def get_seq_length(self) -> int:
        return self.length


class RoutedSlidingLayer(_Routed, DynamicSlidingWindowLayer):
    """A layer whose attention has a window, of which no more is kept than transformers' own layer keeps."""

    def __init__(self, sliding_window: int, packed: bool = True) -> None:
        DynamicSlidingWindowLayer.__init__(self, sliding_window=sliding_window)
        self.packed = packed

    def _advance(self, tokens: int) -> None:
        self.cumulative_length += tokens

    def _count_tokens(self, tokens: int) -> None:
        return None  # the stock update has counted them

    def _crop_keys(self, remove: int) -> None:
        length = self.cumulative_length
        if length >= self.sliding_window and not self.record_past and remove:
            raise RuntimeError("a window that is full can be cropped only after activate_past_recording()")
        kept = self.keys.shape[-2] - remove
        start = max(0, kept - self.sliding_window + 1)
        self._set(self.keys[..., start:kept, :], self.values[..., start:kept, :])


class _RoutedStatic:
    """Decision of one layer whose keys, of all rows, lie in tensors of fixed size: what compiled decoding needs. A
    closed row's output is left out, and nothing is saved."""

    routed = static = True
    packed = False
    decision: Tensor | None = None
    batch = count = 0

    def decide(self, decision: Tensor, open_rows: list[int]) -> None:
        self.decision, self.batch, self.count = decision, len(decision), len(open_rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        if self.decision is not None:
            self.decision = self.decision[beam_idx.to(self.decision.device)]

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.decision, self.batch, self.count = None, 0, 0


class RoutedStaticLayer(_RoutedStatic, StaticLayer):
    """A layer of fixed size that attends to all tokens."""


class RoutedStaticSlidingLayer(_RoutedStatic, StaticSlidingWindowLayer):
    """A layer of fixed size whose attention has a window."""


STATIC: dict[type, type] = {StaticLayer: RoutedStaticLayer, StaticSlidingWindowLayer: RoutedStaticSlidingLayer}


def convert_static(cache: Cache, layers: Iterable[int]) -> None:
    """Let the layers of an empty static cache hold decisions; what they have allocated stays theirs."""
    for index in layers:
        kind = STATIC.get(type(cache.layers[index]))
        if kind is None:
            raise TypeError(
                f"layer {index} of the cache is a {type(cache.layers[index]).__name__}: no routers work on it"
            )
        routed: Any = object.__new__(kind)
        vars(routed).update(vars(cache.layers[index]))
        cache.layers[index] = routed


def convert(cache: Cache, layers: dict[int, type | None], depth: int, packed: bool) -> None:
    """Put routed layers in the places `layers` of an empty stock cache; a place's own class goes before the usual."""
    while len(cache.layers) < depth:
        cache.layers.append(DynamicLayer())
    for index, kind in layers.items():
        stock = cache.layers[index]
        if kind is not None:
            cache.layers[index] = kind(getattr(stock, "sliding_window", None))
        elif type(stock) is DynamicLayer:
            cache.layers[index] = RoutedLayer(packed)
        elif type(stock) is DynamicSlidingWindowLayer:
            cache.layers[index] = RoutedSlidingLayer(stock.sliding_window, packed)
        else:
            raise TypeError(f"layer {index} of the cache is a {type(stock).__name__}; routers work on ordinary caches")


def is_routed(layer: Any) -> bool:
    """Whether it can hold what gates decide."""
    return getattr(layer, "routed", False)


class RoutedCache(DynamicCache):
    """The cache of a model with routers; `generate` and calls with use_cache make theirs by themselves.

    Args:
        model: to which routers are attached; `RequestError` otherwise.
    """

    def __init__(self, model: Any) -> None:
        from .gate import runtime_of

        runtime = runtime_of(model)
        super().__init__(config=model.config.get_text_config(decoder=True))
        runtime.convert(self)

    @property
    def decisions(self) -> dict[int, Tensor]:
        """layer -> [B] bool, for the layers that have decided."""
        return {i: d for i, layer in enumerate(self.layers) if (d := getattr(layer, "decision", None)) is not None}
