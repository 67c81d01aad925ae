"""Token level: every token decides for itself by its own state, so routing is causal with no prompt to pool over.

Chosen tokens are gathered, run through the unit with the positions they have, and scattered back (lean_kernels). A
token that skips a layer's attention leaves no key in it. How many tokens run is only known on the host, so each gated
layer looks at the device once a call, in decoding too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from lean_kernels.ops.mod import route, token_gather, token_scatter_add
from model_hooks.errors import RequestError
from model_hooks.trace import unpack

from .context import Frame
from .router import straight_through


class TokenLayer(DynamicLayer):
    """Keys [B, heads, n, D] of the tokens that ran, each row's packed to its front; n is that of the fullest row.

    Attributes:
        slots: [B, n] int64, the place in the text of each key; -1 where a row has fewer.
        counts: [B] int64. length: tokens of the text, run or not.
        dense: every token has run so far, so that keys lie as in a stock layer.
    """

    routed = True
    static = False
    slots: Tensor | None
    counts: Tensor | None
    length: int
    dense: bool
    is_initialized: bool
    _place: Tensor | None  # where the tokens of the next update go; None where they go to the end
    _seen: int  # keys that the next update returns

    def __init__(self, sliding_window: int | None = None) -> None:
        super().__init__()
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.reset()

    def activate_past_recording(self) -> None:
        """Nothing is forgotten here, so any crop can be done."""

    def plan(self, idx: Tensor, counts: Tensor, dense: bool, tokens: int) -> Tensor:
        """Announce the tokens `idx` [B, k] of a call of `tokens`, `counts` [B] of which count: the slots that will be
        held after the update, [B, n']."""
        self._place, self._seen = None, self.get_mask_sizes(tokens)[0]
        slots = self.length + idx  # [B, k]
        self.length += tokens
        if self.dense and dense:
            self.slots = slots if self.slots is None else torch.cat([self.slots, slots], 1)
            self.counts = counts if self.counts is None else self.counts + counts
            return self.slots
        self.dense = False
        if self.slots is None or self.counts is None:
            self.slots, self.counts = slots[:, :0], torch.zeros_like(counts)
        width = int((self.counts + counts).max())
        place = self.counts[:, None] + torch.arange(idx.shape[1], device=idx.device)
        chosen = torch.arange(idx.shape[1], device=idx.device) < counts[:, None]
        self._place = place.masked_fill(~chosen, width)  # [B, k]; what does not count goes one beyond the end
        self.slots = _packed(self.slots[..., None, :], slots[..., None, :], self._place, width, -1)[..., 0, :]
        self.counts = self.counts + counts
        return self.slots

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self._place is None:
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            return keys[:, :, -self._seen :], values[
                :, :, -self._seen :
            ]  # as wide as the mask, where there is a window
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        assert self.slots is not None
        width = self.slots.shape[1]
        self.keys, self.values = (
            _packed(held.transpose(-1, -2), new.transpose(-1, -2), self._place[:, None], width, 0).transpose(-1, -2)
            for held, new in ((self.keys, key_states), (self.values, value_states))
        )
        self._place = None
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        window = self.sliding_window
        if window is None or self.length < window:
            return self.length + query_length, 0
        return window - 1 + query_length, self.length - window + 1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.slots is not None:
            self._select(torch.arange(self.slots.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices)

    def _select(self, rows: Tensor) -> None:
        if self.slots is not None and self.counts is not None:
            rows = rows.to(self.slots.device)
            self.slots, self.counts = self.slots[rows], self.counts[rows]
            if self.is_initialized:
                self.keys, self.values = self.keys[rows], self.values[rows]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget tokens at the end: -n of them, or (as older versions of transformers say it) all after the first n."""
        remove = max(0, self.length - tokens_to_remove) if tokens_to_remove > 0 else min(-tokens_to_remove, self.length)
        self.length -= remove
        if not remove or self.slots is None:
            return
        if not self.length:
            self.reset()
            return
        self.counts = ((self.slots >= 0) & (self.slots < self.length)).sum(1)
        width = int(self.counts.max())
        self.slots = self.slots[:, :width].masked_fill(
            torch.arange(width, device=self.slots.device) >= self.counts[:, None], -1
        )
        if self.is_initialized:
            self.keys, self.values = self.keys[:, :, :width], self.values[:, :, :width]

    def reset(self) -> None:
        self.slots = self.counts = self._place = None
        self._seen = 0
        self.length, self.dense = 0, True
        self.keys = self.values = None  # type: ignore[assignment]
        self.is_initialized = False


def _packed(held: Tensor, new: Tensor, place: Tensor, width: int, fill: float) -> Tensor:
    """[B, .., width] from held [B, .., n] and new [B, .., k] at `place` [B, k] (or [B, 1, k]); place == width drops."""
    out = held.new_full((*held.shape[:-1], width + 1), fill)
    out[..., : held.shape[-1]] = held
    index = place if place.dim() == new.dim() else place.unsqueeze(1)
    return out.scatter_(-1, index.expand(new.shape), new)[..., :width]


def run_tokens(
    module: Any, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, frame: Frame
) -> Any:
    """One call of a module with a token-level gate, x [B, T, H]."""
    named = _by_name(forward, module, args, kwargs)
    if frame.options.train:
        return _train(module, forward, named, x, frame)
    return _infer(module, forward, named, x, frame)


def _probabilities(module: Any, x: Tensor, frame: Frame) -> Tensor:
    """p, [B, T] float32."""
    z = module.depth_router(x, pool="token")
    if frame.options.noise:
        z = z + frame.options.noise * torch.randn_like(z)
    return torch.sigmoid(z)


def _train(module: Any, forward: Callable[..., Any], named: dict[str, Any], x: Tensor, frame: Frame) -> Any:
    """All tokens compute, so that closed gates get a gradient; what they would not leave in the cache is not seen."""
    from .gate import pack, skipped

    runtime, spec = module._gate
    p = _probabilities(module, x, frame)
    gate = straight_through(p, runtime.config.tau)
    if frame.seen is not None:
        frame.seen.real = frame.real
        frame.seen.probabilities[spec.layer], frame.seen.gates[spec.layer] = p, gate
    if runtime.config.unit != "mlp":
        visible = _visible(named.get("attention_mask"), x, frame)
        own = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        named["attention_mask"] = _restricted(visible, (gate.detach() > 0.5)[:, None, None] | own)
    y, returns = unpack(forward(module, **named))
    assert y is not None
    scale = gate.to(x.dtype)[..., None]
    otherwise = skipped(module, spec, x)
    return pack(otherwise + scale * (y - otherwise), returns)


def _infer(module: Any, forward: Callable[..., Any], named: dict[str, Any], x: Tensor, frame: Frame) -> Any:
    from .gate import pack, skipped

    runtime, spec = module._gate
    tokens = x.shape[1]
    scores, tau = _scores(module, x, frame)
    routing = route(scores, threshold=tau)
    *counts, bad = torch.cat([routing.counts, scores.isnan().any()[None].long()]).tolist()  # the look at the device
    if bad:
        raise FloatingPointError(f"the router of layer {spec.layer} gave a logit that is no number (NaN)")
    if frame.seen is not None:
        frame.seen.real = frame.real
        frame.seen.gates[spec.layer] = scores >= tau
    k = max(counts)
    idx = routing.idx[:, :k]
    layer = None if frame.cache is None else frame.cache.layers[spec.layer]
    layer = layer if isinstance(layer, TokenLayer) else None
    everything = min(counts) == tokens
    dense = everything and (layer is None or layer.dense)
    slots = layer.plan(idx, routing.counts, everything, tokens) if layer is not None else frame.past + idx
    if dense:
        return forward(module, **named)
    if not k:
        return pack(skipped(module, spec, x), spec.returns)
    rows = token_gather(x, idx, counts=routing.counts)  # [B, k, H]
    chosen = torch.arange(k, device=x.device) < routing.counts[:, None]
    named = _gathered(named, x, rows, idx)
    if runtime.config.unit != "mlp":
        held = slots if layer is not None else slots.masked_fill(~chosen, -1)
        named["attention_mask"] = _mask(named.get("attention_mask"), x, frame, idx, held)
    y, returns = unpack(forward(module, **named))
    assert y is not None
    onto = skipped(module, spec, x).contiguous()
    delta = y - skipped(module, spec, rows)  # so that what is added to `onto` gives y
    return pack(token_scatter_add(onto, delta.contiguous(), idx, counts=routing.counts), returns)


def _scores(module: Any, x: Tensor, frame: Frame) -> tuple[Tensor, float]:
    """[B, T] and the threshold; decisions that are forced are scores of 1 and 0."""
    runtime, spec = module._gate
    forced = (frame.options.forced or {}).get(spec.layer)
    if forced is not None:
        return forced[:, frame.past : frame.past + x.shape[1]].to(x.device).float(), 0.5
    p = _probabilities(module, x, frame)
    if frame.seen is not None:
        frame.seen.probabilities[spec.layer] = p
    return p, runtime.config.tau


@lru_cache(maxsize=256)
def _signature(forward: Any) -> inspect.Signature:
    return inspect.signature(forward)


def _by_name(forward: Any, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    if not args:
        return dict(kwargs)
    bound = _signature(forward).bind(module, *args, **kwargs).arguments
    rest = next((n for n, p in _signature(forward).parameters.items() if p.kind is p.VAR_KEYWORD), "")
    named = {**bound, **bound.get(rest, {})}
    return {name: value for name, value in named.items() if value is not module and name != rest}


def _gathered(named: dict[str, Any], x: Tensor, rows: Tensor, idx: Tensor) -> dict[str, Any]:
    """Arguments of a call on the chosen tokens: whatever has a value for each token is gathered."""
    batch, tokens = x.shape[:2]

    def take(value: Any) -> Any:
        if value is x:
            return rows
        if isinstance(value, tuple):
            return tuple(take(v) for v in value)
        if (
            not isinstance(value, Tensor)
            or value.dim() < 2
            or value.shape[1] != tokens
            or value.shape[0] not in (1, batch)
        ):
            return value
        whole = value.expand(batch, *value.shape[1:])
        index = idx.view(*idx.shape, *([1] * (value.dim() - 2))).expand(*idx.shape, *value.shape[2:])
        return whole.gather(1, index)

    return {name: value if name == "attention_mask" else take(value) for name, value in named.items()}


def _visible(mask: Any, x: Tensor, frame: Frame) -> Tensor:
    """What each of the call's tokens may see, [B, 1 or heads, T, S], over the last S slots: bool, or a bias."""
    if mask is None:
        queries = torch.arange(x.shape[1], device=x.device) + frame.past
        seen = torch.arange(frame.past + x.shape[1], device=x.device) <= queries[:, None]
        return seen.expand(x.shape[0], 1, *seen.shape)
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        raise RequestError(
            "token level needs masks of all token pairs; load the model with attn_implementation='sdpa' or 'eager'"
        )
    return mask.expand(x.shape[0], *mask.shape[1:])


def _restricted(mask: Tensor, allowed: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask & allowed
    return mask.masked_fill(~allowed, torch.finfo(mask.dtype).min)


def _mask(mask: Any, x: Tensor, frame: Frame, idx: Tensor, slots: Tensor) -> Tensor:
    """The mask between the chosen tokens idx [B, k] and the keys in `slots` [B, n]: [B, 1 or heads, k, n].

    Every token sees itself, so that no row of it is empty (padding's are otherwise, and would not be numbers).
    """
    visible = _visible(mask, x, frame)
    heads, width = visible.shape[1], visible.shape[-1]
    columns = slots - (frame.past + x.shape[1] - width)  # the last column is the last slot
    valid = ((slots >= 0) & (columns >= 0))[:, None, None]  # [B, 1, 1, n]
    rows = visible.gather(2, idx[:, None, :, None].expand(-1, heads, -1, width))  # [B, heads, k, S]
    index = columns.clamp_min(0)[:, None, None].expand(-1, heads, idx.shape[1], -1)
    found = _restricted(rows.gather(3, index), valid)
    own = (slots[:, None, :] == (frame.past + idx)[..., None])[:, None]  # [B, 1, k, n]
    if found.dtype == torch.bool:
        return found | own | ~own.any(-1, keepdim=True)
    return found.masked_fill(own, 0)
