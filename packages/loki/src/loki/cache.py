"""The KV cache with turned keys: `generate` fills, reorders and crops it like the stock one.

Everything that the method keeps from step to step lies in the layers, so that beams, crops and batch changes reach it.
Sliding, chunked and linear layers stay transformers' own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer

from lean_kernels.native import huge_pages
from model_hooks.errors import RequestError

from .turn import Turn

SLACK = 256  # tokens of room after the prompt
GROWTH = 1.5  # of the capacity, when it is used up
PAGE = 64  # capacities are multiples of this


@dataclass
class Handed:
    """What a cache layer hands to the attention function along with the keys, as the attribute `_loki` on them.

    Attributes:
        layer: that it comes from.
        keys, values: the buffers [B, Hkv, capacity, D] in which the row's tokens lie first.
        length: tokens in them; None where only the mask knows (static caches).
        fresh: nothing was cached before this call.
        original: the tensor that carries this holds the keys of the call unturned, so that a prompt attends exactly.
    """

    layer: LokiLayer | StaticLokiLayer
    keys: Tensor
    values: Tensor
    length: int | None
    fresh: bool
    original: bool


class LokiLayer(DynamicLayer):
    """Turned keys and values in buffers that grow by half, where the stock layer copies itself for every token.

    `turn` is None for methods that read keys as they are. `state` holds what a method keeps besides (H2O's sums), each
    tensor [B, .., tokens]; `evicts` says that it cannot be rolled back.
    """

    def __init__(self, turn: Turn | None = None, evicts: bool = False) -> None:
        super().__init__()
        self.turn = turn
        self.is_croppable = not evicts
        self.length = 0
        self.state: dict[str, Tensor] = {}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # of the values: under autocast, rotary embeddings give float32 keys, which attention then rounds
        self.dtype, self.device = value_states.dtype, key_states.device
        self._hold(_empty_like(key_states[:, :, :0].to(self.dtype), 0), _empty_like(value_states, 0), 0)
        self.is_initialized = True

    def _hold(self, keys: Tensor, values: Tensor, length: int) -> None:
        self._keys, self._values, self.length = keys, values, length
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]

    def _reserve(self, length: int) -> None:
        capacity = self._keys.shape[2]
        if length <= capacity:
            return
        wanted = max(length, int(GROWTH * capacity)) if capacity else length + SLACK
        wanted = -(-wanted // PAGE) * PAGE
        self._hold(self._grown(self.keys, wanted), self._grown(self.values, wanted), self.length)

    @staticmethod
    def _grown(used: Tensor, capacity: int) -> Tensor:
        """A buffer that starts with `used`."""
        buffer = _empty_like(used, capacity)
        buffer[:, :, : used.shape[2]] = used
        return buffer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.length, self.length + key_states.shape[2]
        self._reserve(end)
        new = key_states.detach()
        self._keys[:, :, start:end] = new if self.turn is None else self.turn.keys(new)
        self._values[:, :, start:end] = value_states.detach()
        self._hold(self._keys, self._values, end)
        handed = Handed(self, self._keys, self._values, end, start == 0, start == 0)
        # views of their own: an attribute on self.keys would tie the buffers into a cycle
        keys = key_states.view(key_states.shape) if start == 0 else self._keys[:, :, :end]
        keys._loki = handed  # type: ignore[attr-defined]
        return keys, value_states if start == 0 else self._values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.length

    def _each_row(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch dimension to everything that is held."""
        if not self.is_initialized or not self.length:
            return
        room = self._keys.shape[2]
        self._hold(self._grown(change(self.keys), room), self._grown(change(self.values), room), self.length)
        self.state = {name: change(tensor) for name, tensor in self.state.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each_row(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each_row(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each_row(lambda t: t[indices.to(t.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget tokens at the end: -n of them, or (as older versions of transformers say it) all after the first n."""
        length = tokens_to_remove if tokens_to_remove > 0 else self.length - abs(tokens_to_remove)
        if not self.is_initialized or length >= self.length:
            return
        if not self.is_croppable:
            raise RequestError("this method evicts tokens for good, so its cache cannot be cropped; use method='loki'")
        self._hold(self._keys, self._values, max(0, length))

    def reset(self) -> None:
        if self.is_initialized:
            self._hold(self._keys, self._values, 0)
        self.state = {}

    def offload(self) -> None:
        self._move("cpu")

    def prefetch(self) -> None:
        if self.is_initialized and self.keys.device != self.device:
            self._move(self.device)

    def _move(self, device: Any) -> None:
        if self.is_initialized:
            keys, values = (t.to(device, non_blocking=True) for t in (self._keys, self._values))
            self._hold(keys, values, self.length)
            self.state = {name: t.to(device, non_blocking=True) for name, t in self.state.items()}


class StaticLokiLayer(StaticLayer):
    """Turned keys in transformers' static buffers, for compiled graphs."""

    def __init__(self, max_cache_len: int, turn: Turn | None = None) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self.turn = turn
        self.filled = False
        self.state: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        turned = key_states if self.turn is None else self.turn.keys(key_states)
        dtype = self.dtype if self.is_initialized else value_states.dtype  # see `LokiLayer.lazy_initialization`
        keys, values = super().update(turned.to(dtype), value_states.to(dtype), *args, **kwargs)
        handed = Handed(self, keys, values, None, not self.filled, False)
        self.filled = True
        keys = keys.view(keys.shape)
        keys._loki = handed
        return keys, values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.state = {name: t.index_select(0, beam_idx.to(t.device)) for name, t in self.state.items()}

    def reset(self) -> None:
        super().reset()
        self.filled = False
        self.state = {}


class LokiCache(DynamicCache):
    """The cache of a model on which `loki.enable` was called; `generate` makes one by itself.

    Args:
        model: with Loki enabled; `RequestError` otherwise.
        offloading, offload_only_non_sliding: as in `DynamicCache`.
    """

    def __init__(self, model: Any, offloading: bool = False, offload_only_non_sliding: bool = False) -> None:
        from .sessions import runtime_of

        config = model.config.get_text_config(decoder=True)
        super().__init__(config=config, offloading=offloading, offload_only_non_sliding=offload_only_non_sliding)
        convert(self, runtime_of(model).new_layer)

    def unrotate(self) -> DynamicCache:
        """A stock cache with the same tokens: keys are turned back (k = k̂ Pᵀ), so any attention can read them."""
        return unrotate(self)


def convert(cache: Cache, new_layer: Callable[[int, Any], Any]) -> None:
    """Put the layers that `new_layer(index, stock layer)` gives in place of the stock ones; None keeps one."""
    for index, layer in enumerate(cache.layers):
        if type(layer) in (DynamicLayer, StaticLayer):
            cache.layers[index] = new_layer(index, layer) or layer


def unrotate(cache: Cache) -> DynamicCache:
    """As `LokiCache.unrotate`, for any cache with Loki's layers."""
    plain = DynamicCache()
    layers = []
    for layer in cache.layers:
        if isinstance(layer, (LokiLayer, StaticLokiLayer)):
            stock = DynamicLayer()
            if layer.is_initialized:
                length = int(layer.get_seq_length())
                keys, values = (t[:, :, :length].to(layer.device) for t in (layer.keys, layer.values))
                stock.update(keys if layer.turn is None else layer.turn.back(keys), values)
            layers.append(stock)
        else:
            layers.append(copy.deepcopy(layer))
    plain.layers = layers
    plain.layer_class_to_replicate = None
    return plain


def _empty_like(states: Tensor, tokens: int) -> Tensor:
    fresh = torch.empty((*states.shape[:2], tokens, states.shape[3]), dtype=states.dtype, device=states.device)
    return huge_pages(fresh)
