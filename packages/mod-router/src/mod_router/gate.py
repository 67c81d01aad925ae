"""The gated unit: asks the router, runs the rows that are open, and leaves the residual stream of the others alone.

A gated module keeps its place, its name and its weights; only its class becomes a subclass whose forward is gated, and
the router its child `depth_router`. So state dicts, LoRA targets and device maps find what they look for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from model_hooks.errors import RequestError
from model_hooks.trace import first_tensor

from .cache import convert
from .config import RouterConfig
from .context import Frame, frame_of
from .router import Router

ROUTER = "depth_router"  # the name of the router in its module


@dataclass(frozen=True)
class GateSpec:
    """Where a gate is: layer number, module path from the model, whether its input is a raw residual stream (`rms`),
    whether it gates a whole block, how many values its module returns (0: a tensor), and the paths of the norms that
    nothing but this unit reads or passes through (`norms`)."""

    layer: int
    module: str
    rms: bool
    block: bool
    returns: int
    norms: tuple[str, ...] = ()

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

    @cached_property
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


@functools.cache
def hushed_class(base: Any) -> type[nn.Module]:
    """The norm class `base` with a forward that does nothing where the unit that it belongs to is closed for all rows.

    Its output would not be read, or it would be given zeros (and none of these norms has a bias).
    """

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        runtime, index = self._hushed
        frame = frame_of(runtime)
        if args and frame is not None and frame.settled is not None:
            layer = frame.settled[index]
            if layer.decision is not None and not layer.count:
                return args[0]
        return base.forward(self, *args, **kwargs)

    return type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__, "ungated": base})


def install(model: Any, spec: GateSpec, runtime: Runtime) -> None:
    """Gate a module of `model` in place, its router at zero."""
    module = model.get_submodule(spec.module)
    parameter = next(module.parameters(), None)
    device = None if parameter is None else parameter.device
    repair = runtime.config.repair == "mean"
    module.add_module(ROUTER, Router(runtime.hidden_size, spec.rms, device, repair))
    module.__dict__["_gate"] = (runtime, spec)
    stock: Any = type(module)
    _become(module, gated_class(stock))
    for name in spec.norms:
        norm = model.get_submodule(name)
        norm.__dict__["_hushed"] = (runtime, spec.layer)
        stock = type(norm)
        _become(norm, hushed_class(stock))


def uninstall(model: Any, runtime: Runtime) -> None:
    """Undo `install` for all gates of `runtime`."""
    for spec in runtime.specs:
        module = model.get_submodule(spec.module)
        delattr(module, ROUTER)
        del module.__dict__["_gate"]
        _become(module, type(module).ungated)
    for norm in model.modules():  # PEFT may have put them elsewhere
        if vars(norm).pop("_hushed", None) is not None:
            _become(norm, type(norm).ungated)


def _become(module: Any, kind: Any) -> None:
    module.__class__ = kind
    if "_old_forward" in vars(module):  # what accelerate's hooks call in a model spread over devices
        module._old_forward = MethodType(kind.forward, module)


def run(module: Any, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One call of a gated module."""
    runtime, spec = module._gate
    frame = frame_of(runtime)
    if frame is None:
        return forward(module, *args, **kwargs)
    if frame.settled is not None:  # the way of all decoding: what was decided is done, and no more
        layer = frame.settled[spec.layer]
        if layer.decision is not None and layer.rows is None and layer.batch == frame.batch:
            if frame.options.seen is not None:
                frame.options.seen.gates[spec.layer] = layer.decision
            if layer.count:
                layer.expected = layer.batch
                return forward(module, *args, **kwargs)
            if layer.packed:
                layer.skip(frame.tokens)
            return pack(skipped(module, spec, _inputs(args, kwargs)), spec.returns)
    x = first_tensor(args, kwargs)  # [B, T, H]
    if frame.options.off or x is None:
        return forward(module, *args, **kwargs)
    if runtime.config.level == "token":
        from .tokens import run_tokens

        return run_tokens(module, forward, args, kwargs, x, frame)
    from .calls import Call

    call = Call(module, runtime, spec, forward, args, kwargs, x, frame)
    return call.train() if frame.options.train else call.infer()


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x = kwargs.get("hidden_states")
    found = x if x is not None else first_tensor(args, kwargs)
    assert found is not None
    return found


def skipped(module: Any, spec: GateSpec, x: Tensor) -> Tensor:
    """What a gated module gives for tokens [.., H] that it does not run on: nothing for the residual stream (all of the
    input for a block), or the mean of what it would give, where the routers hold that."""
    delta = getattr(module, ROUTER).delta  # [H]
    if delta is not None:
        delta = delta.to(x.dtype)
        return x + delta if spec.block else delta.expand_as(x)
    return x if spec.block else torch.zeros_like(x)


def pack(hidden_states: Tensor, returns: int) -> Any:
    return hidden_states if returns == 0 else (hidden_states, *([None] * (returns - 1)))
