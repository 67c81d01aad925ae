"""A call of a sequence-level gate that has something to find out: which rows are open, and to run those alone.

Decoding with rows that are all open, or all closed, does not come here (see `gate.run`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model_hooks.errors import RequestError
from model_hooks.trace import unpack

from .cache import is_routed
from .context import Frame
from .gate import ROUTER, GateSpec, Runtime, pack, skipped
from .router import straight_through


@dataclass
class Call:
    """A call of a sequence-level gate with inputs x [B, T, H]."""

    module: Any
    runtime: Runtime
    spec: GateSpec
    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    x: Tensor
    frame: Frame

    def probabilities(self) -> Tensor:
        """p, [B] float32."""
        z = self.module.get_submodule(ROUTER)(self.x, self.frame.deciding, self.runtime.config.pool)
        if self.frame.options.noise:
            z = z + self.frame.options.noise * torch.randn_like(z)
        return torch.sigmoid(z)

    def train(self) -> Any:
        p = self.probabilities()  # [B]
        gate = straight_through(p, self.runtime.config.tau)
        seen = self.frame.seen
        if seen is not None:
            seen.probabilities[self.spec.layer], seen.gates[self.spec.layer] = p, gate
        scale = gate.to(self.x.dtype)
        if not self.runtime.config.cheap_train:
            y, returns = unpack(self.forward(self.module, *self.args, **self.kwargs))
            return pack(self._gated(y, scale[:, None, None], self._skipped()), returns)
        rows, _ = self._rows(p.detach())
        if not len(rows):  # zero, yet in the graph: DDP waits for a gradient of every parameter
            return pack(self._skipped() + scale.sum() * 0.0, self.spec.returns)
        index = torch.tensor(rows, device=self.x.device)
        y, returns = unpack(self.forward(self.module, *self._take(self.args, index), **self._take(self.kwargs, index)))
        otherwise = self._skipped()
        y = self._gated(y, scale[index, None, None], otherwise[index])
        return pack(otherwise.index_copy(0, index, y.to(otherwise.dtype)), returns)

    def _skipped(self) -> Tensor:
        return skipped(self.module, self.spec, self.x)

    def _gated(self, y: Tensor | None, gate: Tensor, otherwise: Tensor) -> Tensor:
        assert y is not None
        if self.spec.block or self.runtime.config.repair != "none":
            return otherwise + gate * (y - otherwise)
        return gate * y

    def infer(self) -> Any:
        layer = self._cache_layer()
        if layer is not None and layer.static:
            return self._select(layer)
        if layer is not None and layer.decision is not None:  # no look at the device
            decision, rows, count = layer.decision, layer.rows, layer.count
        else:
            decision, open_rows = self._decide()
            count = len(open_rows)
            if layer is not None:
                layer.decide(decision, open_rows)
                rows = layer.rows
            else:
                rows = None if count == len(decision) else torch.tensor(open_rows, device=self.x.device)
        if self.frame.seen is not None:
            self.frame.seen.gates[self.spec.layer] = decision
        if decision.shape[0] != self.x.shape[0]:
            raise RequestError(f"the cache holds decisions of {decision.shape[0]} rows, the batch has {len(self.x)}")
        if not count:
            if layer is not None and layer.packed:
                layer.skip(self.x.shape[1])
            return pack(self._skipped(), self.spec.returns)
        if layer is not None:
            layer.expect()
        if rows is None:
            return self.forward(self.module, *self.args, **self.kwargs)
        y, returns = unpack(self.forward(self.module, *self._take(self.args, rows), **self._take(self.kwargs, rows)))
        assert y is not None
        otherwise = self._skipped()
        return pack(otherwise.index_copy(0, rows, y.to(otherwise.dtype)), returns)

    def _select(self, layer: Any) -> Any:
        """With a cache of fixed size all rows run, so that its shapes stay; what a closed row gave is left out."""
        if layer.decision is None:
            layer.decide(*self._decide())
        if self.frame.seen is not None:
            self.frame.seen.gates[self.spec.layer] = layer.decision
        if layer.batch != self.x.shape[0]:
            raise RequestError(f"the cache holds decisions of {layer.batch} rows, the batch has {len(self.x)}")
        y, returns = unpack(self.forward(self.module, *self.args, **self.kwargs))
        assert y is not None
        return pack(torch.where(layer.decision[:, None, None], y, self._skipped()), returns)

    def _decide(self) -> tuple[Tensor, list[int]]:
        """[B] bool and the open rows: the one look at the device."""
        forced = (self.frame.options.forced or {}).get(self.spec.layer)
        if forced is not None:
            decision = forced.to(device=self.x.device, dtype=torch.bool).expand(self.frame.batch)
            return decision, [i for i, is_open in enumerate(decision.tolist()) if is_open]
        p = self.probabilities()
        if self.frame.seen is not None:
            self.frame.seen.probabilities[self.spec.layer] = p
        rows, decision = self._rows(p)
        return decision, rows

    def _rows(self, p: Tensor) -> tuple[list[int], Tensor]:
        """Open rows and [B] bool. Raises FloatingPointError for a probability that is no number."""
        tau = self.runtime.config.tau
        codes = torch.where(p.isnan(), 2, (p >= tau).long()).tolist()
        if 2 in codes:
            raise FloatingPointError(f"the router of layer {self.spec.layer} gave a logit that is no number (NaN)")
        return [i for i, code in enumerate(codes) if code], p >= tau

    def _cache_layer(self) -> Any:
        cache = self.frame.cache
        layer = None if cache is None else cache.layers[self.spec.layer]
        return layer if is_routed(layer) else None

    def _take(self, value: Any, rows: Tensor) -> Any:
        """Arguments of a call on `rows` alone. Tensors that are the same for all rows (dim 0 is 1) stay."""
        if isinstance(value, (tuple, list)):
            return type(value)(self._take(v, rows) for v in value)
        if isinstance(value, Mapping):
            return {k: self._take(v, rows) for k, v in value.items()}
        if not isinstance(value, Tensor) or value.dim() < 2:
            return value
        dim = self.runtime.row_dim if self._has_axes(value) else 0
        return value.index_select(dim, rows) if value.shape[dim] == self.frame.batch else value

    def _has_axes(self, value: Tensor) -> bool:
        """Positions [3, B, T] or their embeddings [3, B, T, D]."""
        positions = value.dim() >= 4 or (value.dim() == 3 and not value.is_floating_point())
        return positions and value.shape[0] == 3 and value.shape[1] == self.frame.batch
