"""The attention function that transformers calls, and the mask function that goes with it.

Both are registered in `register`, because a name without a mask function gets no mask at all: left padding and sliding
windows would be ignored without a word.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .cache import Handed, LokiLayer, StaticLokiLayer
from .config import Amount, LokiConfig
from .method import FEW, Method, Step, attention_weights
from .rows import MaskReader, Rows, read_mask
from .telemetry import Telemetry
from .turn import Turn

NAME = "loki"


@dataclass
class Call:
    """The arguments of one call of the attention function, as transformers gives them."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None
    dropout: float
    rest: dict[str, Any]


class Handler(Protocol):
    """What an attention module carries as `_loki` while Loki, or the calibration, is at work on its model."""

    def __call__(self, module: nn.Module, call: Call) -> Tensor | None:
        """[B, Hq, Q, D], or None for ordinary attention."""


def register() -> None:
    """Make the name "loki" known to transformers; doing it again changes nothing."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """The attention function "loki": query [B, Hq, Q, D], key and value [B, Hkv, S, D], output [B, Q, Hq, D].

    Raises ValueError for `output_attentions`, NotImplementedError for attention sinks and position biases.
    """
    if rest.get("output_attentions"):
        raise ValueError('output_attentions=True: Loki makes no attention matrix; use attn_implementation="eager"')
    for name in ("s_aux", "position_bias"):
        if rest.get(name) is not None:
            raise NotImplementedError(f"{type(module).__name__} passes {name}, which Loki does not know; disable it")
    call = Call(query, key, value, attention_mask, scaling or query.shape[-1] ** -0.5, softcap, dropout, rest)
    handler: Handler | None = module.__dict__.get("_loki")
    out = None if handler is None else handler(module, call)
    if out is None:
        out = dense(module, call)
    return out.transpose(1, 2).to(query.dtype).contiguous(), None


def dense(module: nn.Module, call: Call) -> Tensor:
    """Ordinary attention, [B, Hq, Q, D]: torch's own, which knows no softcap, or else the plain formula."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if call.softcap is None:
        out, _ = sdpa_attention_forward(
            module, call.query, call.key, call.value, call.mask, call.dropout, call.scaling, **call.rest
        )
        return out.transpose(1, 2)
    return softcapped(call)


def softcapped(call: Call) -> Tensor:
    """Attention with the scores s put as c·tanh(s/c), in runs of queries; differentiable."""
    b, _, queries, width = call.query.shape
    tokens = call.key.shape[2]
    if call.mask is None and queries > 1:  # a first prompt, maybe in the longer buffer of a static cache
        tokens = queries
    key, value = call.key[:, :, :tokens], call.value[:, :, :tokens]
    rows = read_mask(call.mask, b, queries, tokens, call.query.device)
    step = Step(call.query, key, value, rows, 1.0, width, call.scaling, call.softcap, LokiConfig(), True)
    parts = []
    for _, weights in attention_weights(step):
        if call.dropout:
            weights = nn.functional.dropout(weights, call.dropout)
        mixed = weights.to(value.dtype).flatten(2, 3) @ value
        parts.append(mixed.view(*weights.shape[:4], -1).flatten(1, 2))
    return torch.cat(parts, dim=2)


@dataclass
class Runtime:
    """What the layers of one model share.

    Attributes:
        former: the attention implementation to restore.
        layers: by the model's layer index; those that attend to all tokens are not among them.
    """

    config: LokiConfig
    method: Method
    former: str
    layers: dict[int, LayerHandler] = field(default_factory=dict)
    masks: MaskReader = field(default_factory=MaskReader)
    telemetry: Telemetry | None = None
    warned: set[str] = field(default_factory=set)

    def warn_once(self, text: str) -> None:
        if text not in self.warned:
            self.warned.add(text)
            warnings.warn(text, stacklevel=2)

    def new_layer(self, index: int, stock: Any) -> Any:
        """Loki's cache layer in place of a stock one; None for a layer that is not Loki's."""
        handler = self.layers.get(index)
        if handler is None or self.config.backend == "projected":
            return None
        turn = handler.turn if self.method.turned else None
        if hasattr(stock, "max_cache_len"):
            return StaticLokiLayer(stock.max_cache_len, turn)
        return LokiLayer(turn, self.method.evicts)


@dataclass
class LayerHandler:
    """One layer: decides between ordinary attention, the method, and its masked form."""

    index: int
    runtime: Runtime
    turn: Turn | None
    k: Amount
    d: int
    projection: Tensor | None = None  # [Hkv, D, D], for keys that lie in a foreign cache as they are

    def __call__(self, module: nn.Module, call: Call) -> Tensor | None:
        runtime = self.runtime
        handed: Handed | None = getattr(call.key, "_loki", None)
        dtype = (handed.keys if handed else call.key).dtype
        if not call.query.dtype == call.value.dtype == dtype:  # autocast, where rotary embeddings give float32
            call = replace(call, query=call.query.to(dtype), value=call.value.to(dtype))
        queries = call.query.shape[2]
        first = handed.fresh if handed else call.key.shape[2] == queries
        if module.training or (torch.is_grad_enabled() and call.query.requires_grad):
            if not first or runtime.config.prefill == "masked":
                runtime.warn_once("Loki attends to all tokens while gradients are recorded; use torch.no_grad()")
            return self.exact(module, call, handed)
        if first and runtime.config.prefill == "dense":
            return self.prompt(call, handed) if runtime.method.evicts else self.exact(module, call, handed)
        if runtime.config.prefill == "dense" and queries > FEW:
            return self.prompt(call, handed) if runtime.method.evicts else self.exact(module, call, handed)
        rows = runtime.masks(call.mask, len(call.query), queries, self.length(call, handed), call.query.device)
        if not runtime.method.evicts and self.reads_all(rows):
            return self.exact(module, call, handed, rows)
        step = self.step(call, handed, rows, first)
        if runtime.telemetry is not None:
            runtime.telemetry.see(self.index, step, runtime.method)
        return runtime.method.decode(step) if queries <= FEW else runtime.method.attend(step)

    def length(self, call: Call, handed: Handed | None) -> int:
        """Tokens to look at: with a static cache the whole buffer, unless this is its first prompt."""
        tokens = call.key.shape[2]
        return call.query.shape[2] if handed and handed.fresh and call.mask is None else tokens

    def reads_all(self, rows: Rows) -> bool:
        """The method would read every token, as far as can be said without asking the device."""
        config = self.runtime.config
        if self.runtime.method.reads_all or rows.tokens <= (config.min_length or 0):
            return True
        if self.runtime.method.approximates:
            return False
        least = max(config.min_k, config.sink + config.recent, 1)
        if config.mass is not None:  # may read fewer than k
            return rows.tokens <= least
        if isinstance(self.k, float):
            return self.k == 1.0 or rows.tokens <= least
        return rows.tokens <= max(self.k, least)

    def step(self, call: Call, handed: Handed | None, rows: Rows, first: bool) -> Step:
        query, keys, values, projection = call.query, call.key, call.value, None
        turn = self.turn if self.runtime.method.turned else None
        if handed is not None:
            # of the layer that cached the keys, which in models with shared caches is another one
            keys, values, turn = handed.keys, handed.values, handed.layer.turn
        elif turn is not None and first:  # no cache, or one that only starts: a whole text at once
            keys = turn.keys(keys)
        elif turn is not None:
            projection, turn = self.projected(call), None
        if turn is not None:
            query = turn.queries(query)
        return Step(
            query, keys, values, rows, self.k, self.d, call.scaling, call.softcap, self.runtime.config, first,
            None if handed is None else handed.layer.state, projection,
        )  # fmt: skip

    def projected(self, call: Call) -> Tensor:
        """Keys lie in a cache that is not Loki's, unturned."""
        if self.runtime.config.backend != "projected":
            self.runtime.warn_once(
                "this cache holds keys as they are: Loki projects the queries instead, which picks the same tokens "
                "but saves no time; leave the cache to `generate`, or make a loki.LokiCache(model)"
            )
        assert self.projection is not None
        if self.projection.device != call.query.device:
            self.projection = self.projection.to(call.query.device)
        return self.projection

    def exact(self, module: nn.Module, call: Call, handed: Handed | None, rows: Rows | None = None) -> Tensor | None:
        """Attention to all tokens; None where the keys are as the model made them and torch's own function does it."""
        turn = None if handed is None or handed.original else handed.layer.turn
        if turn is not None:
            call = replace(call, query=turn.queries(call.query))
        if rows is not None and handed is not None and call.query.shape[2] <= FEW and not call.query.is_cuda:
            from lean_kernels import dense_decode  # several times quicker on a CPU than torch's own

            return dense_decode(
                call.query, handed.keys, handed.values, rows.lens, scale=call.scaling, start=rows.start, mask=rows.mask,
                softcap=call.softcap,
            )  # fmt: skip
        return None if turn is None else dense(module, call)

    def prompt(self, call: Call, handed: Handed | None) -> Tensor | None:
        """A prompt, for a method that keeps something of it."""
        rows = self.runtime.masks(
            call.mask, len(call.query), call.query.shape[2], self.length(call, handed), call.query.device
        )
        return self.runtime.method.prompt(self.step(call, handed, rows, handed.fresh if handed else True))
