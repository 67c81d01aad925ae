"""The gated unit: asks the router, runs the rows that are open, and leaves the residual stream of the others alone.

A gated module keeps its place, its name and its weights; only its class becomes a subclass whose forward is gated, and
the router its child `depth_router`. So state dicts, LoRA targets and device maps find what they look for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from model_hooks.errors import RequestError
from model_hooks.trace import first_tensor, unpack

from .cache import convert, is_routed
from .config import RouterConfig
from .context import Frame, frame_of
from .router import Router, straight_through

ROUTER = "depth_router"  # the name of the router in its module


@dataclass(frozen=True)
class GateSpec:
    """Where a gate is: layer number, module path from the model, whether its input is a raw residual stream (`rms`),
    whether it gates a whole block, and how many values its module returns (0: a tensor)."""

    layer: int
    module: str
    rms: bool
    block: bool
    returns: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Runtime:
    """What all gates of a model share. It holds no module, so that copies of a model have their own."""

    config: RouterConfig
    specs: tuple[GateSpec, ...]
    depth: int
    decoder: str
    hidden_size: int
    row_dim: int = 0  # of position embeddings: 1 where they are [3, B, T, D] (multimodal rotary embeddings)
    tau: dict[int, float] = field(default_factory=dict)
    last: Frame | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(spec.layer for spec in self.specs)

    def convert(self, cache: Any) -> None:
        kind = None
        if self.config.level == "token" and self.config.unit != "mlp":
            from .tokens import TokenLayer

            kind = TokenLayer
        convert(cache, dict.fromkeys(self.layers, kind), self.depth, packed=self.config.unit != "mlp")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": None}  # a frame holds tensors with a graph, which cannot be copied


def runtime_of(model: Any) -> Runtime:
    """What `attach` left on the model. Raises `RequestError` if there is nothing."""
    runtime: Runtime | None = getattr(model, "__dict__", {}).get("_mod_router")
    base = getattr(model, "get_base_model", None)
    if runtime is None and base is not None and base() is not model:
        return runtime_of(base())
    if runtime is None:
        raise RequestError(f"no routers on this {type(model).__name__}; call mod_router.attach(model) first")
    return runtime


@functools.cache
def gated_class(base: Any) -> type[nn.Module]:
    """The module class `base` with a gated forward. It keeps its name, since device maps and FSDP find layers by it."""

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run(self, base.forward, args, kwargs)

    return type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__, "ungated": base})


def install(module: Any, spec: GateSpec, runtime: Runtime) -> None:
    """Gate `module` in place, its router at zero."""
    parameter = next(module.parameters(), None)
    router = Router(runtime.hidden_size, spec.rms, None if parameter is None else parameter.device)
    module.add_module(ROUTER, router)
    module.__dict__["_gate"] = (runtime, spec)
    stock: Any = type(module)
    module.__class__ = gated_class(stock)
    _rebind(module)


def uninstall(module: Any) -> None:
    module.__class__ = type(module).ungated
    delattr(module, ROUTER)
    del module.__dict__["_gate"]
    _rebind(module)


def _rebind(module: Any) -> None:
    if "_old_forward" in vars(module):  # what accelerate's hooks call in a model spread over devices
        module._old_forward = MethodType(type(module).forward, module)


def run(module: Any, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One call of a gated module."""
    runtime, _ = module._gate
    frame = frame_of(runtime)
    x = first_tensor(args, kwargs)  # [B, T, H]
    if frame is None or frame.options.off or x is None:
        return forward(module, *args, **kwargs)
    if runtime.config.level == "token":
        from .tokens import run_tokens

        return run_tokens(module, forward, args, kwargs, x, frame)
    call = Call(module, forward, args, kwargs, x, frame)
    return call.train() if frame.options.train else call.infer()


@dataclass
class Call:
    """A call of a sequence-level gate with inputs x [B, T, H]."""

    module: Any
    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    x: Tensor
    frame: Frame

    @property
    def runtime(self) -> Runtime:
        return self.module._gate[0]

    @property
    def spec(self) -> GateSpec:
        return self.module._gate[1]

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
            assert y is not None
            return pack(self._gated(y, scale[:, None, None]), returns)
        rows, _ = self._rows(p.detach())
        if not len(rows):  # zero, yet in the graph: DDP waits for a gradient of every parameter
            return self._nothing(scale.sum() * 0.0)
        index = torch.tensor(rows, device=self.x.device)
        y, returns = unpack(self.forward(self.module, *self._take(self.args, index), **self._take(self.kwargs, index)))
        assert y is not None
        own = self.x[index] if self.spec.block else 0.0
        delta = (y - own) * scale[index, None, None]
        return pack(self._spread(delta, index), returns)

    def _gated(self, y: Tensor, gate: Tensor) -> Tensor:
        return self.x + gate * (y - self.x) if self.spec.block else gate * y

    def infer(self) -> Any:
        layer = self._cache_layer()
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
            return self._nothing()
        if layer is not None:
            layer.expect()
        if rows is None:
            return self.forward(self.module, *self.args, **self.kwargs)
        y, returns = unpack(self.forward(self.module, *self._take(self.args, rows), **self._take(self.kwargs, rows)))
        assert y is not None
        if self.spec.block:
            return pack(self.x.index_copy(0, rows, y), returns)
        return pack(self._spread(y, rows), returns)

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

    def _nothing(self, zero: Tensor | float = 0.0) -> Any:
        y = self.x + zero if self.spec.block else torch.zeros_like(self.x) + zero
        return pack(y, self.spec.returns)

    def _spread(self, y: Tensor, rows: Tensor) -> Tensor:
        base = self.x if self.spec.block else torch.zeros_like(self.x)
        return base.index_add(0, rows, y.to(base.dtype))

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


def pack(hidden_states: Tensor, returns: int) -> Any:
    return hidden_states if returns == 0 else (hidden_states, *([None] * (returns - 1)))
