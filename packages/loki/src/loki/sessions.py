"""Switching Loki on and off: the attention name, the caches that the model makes, and the refusals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import nn

from model_hooks.errors import RequestError, UnsupportedArchitectureError

from .attention import NAME, LayerHandler, Runtime, register
from .basis import Basis, shape_of
from .config import Amount, LokiConfig, Variance, dimensions, make_config
from .method import method_of
from .turn import Turn

ATTENTION = {"full_attention", "sliding_attention", "chunked_attention", "hybrid", "hybrid_sliding"}


def enable(
    model: Any,
    basis: Basis | None = None,
    config: LokiConfig | None = None,
    *,
    allow_mismatch: bool = False,
    **changes: Any,
) -> None:
    """Make `model` attend as `config` says when it decodes; `generate` and all else stay as they are.

    Args:
        model: a decoder-only transformers model. Enabling again replaces the former settings.
        basis: of its keys. Not needed for method="full", "topk", "h2o", "quest" and "snapkv".
        config: settings; `changes` are settings by name (k=0.25, d=0.25, ...), see `LokiConfig`.
        allow_mismatch: take a basis that was made on a model with another rotary embedding or type.

    Raises:
        RequestError: settings or basis do not fit.
        NotImplementedError: encoder-decoders, latent attention (MLA), models without full attention.
        RuntimeError: backend="triton" where the kernels cannot run.
    """
    settings = make_config(config, changes).on(model.device.type)
    method = method_of(settings)
    decoder = check_model(model)
    layers, _, width = shape_of(model)
    settings.for_layers(layers)
    if settings.prefill == "masked" and not method.masked:
        raise RequestError(f"prefill='masked': method {settings.method!r} has no masked form, it decides once a prompt")
    _check_backend(settings.backend, model)
    if basis is None and method.needs_basis:
        raise RequestError(f"method {settings.method!r} needs a basis: Basis.load(file) or loki.calibrate(model, ...)")
    if basis is not None:
        basis.check(model, allow_mismatch)
    modules = attention_modules(model, decoder)
    runtime = Runtime(settings, method, "")
    for index in modules:
        if index not in settings.skip_layers:
            runtime.layers[index] = _handler(index, runtime, basis, width)
    if settings.stats:
        from .telemetry import Telemetry

        runtime.telemetry = Telemetry(settings.stats_every)
    disable(model)
    attach(model, decoder, {i: (modules[i], h) for i, h in runtime.layers.items()}, runtime)
    _arm(model, decoder)


def disable(model: Any) -> None:
    """Give `model` back its own attention; nothing of Loki stays on it. Without Loki on it nothing happens."""
    runtime: Runtime | None = model.__dict__.pop("_loki_runtime", None)
    if runtime is None:
        return
    model.__dict__.pop("_prepare_cache_for_generation", None)
    decoder = decoder_of(model)
    handle = decoder.__dict__.pop("_loki_hook", None)
    if handle is not None:
        handle.remove()
    detach(decoder, runtime.former)


@contextmanager
def session(
    model: Any,
    basis: Basis | None = None,
    config: LokiConfig | None = None,
    *,
    allow_mismatch: bool = False,
    **changes: Any,
) -> Iterator[Any]:
    """`enable` for the length of a with block; what was there before is back afterwards, an earlier `enable` too."""
    before = model.__dict__.get("_loki_runtime")
    enable(model, basis, config, allow_mismatch=allow_mismatch, **changes)
    try:
        yield model
    finally:
        disable(model)
        if before is not None:
            decoder = decoder_of(model)
            modules = attention_modules(model, decoder)
            attach(model, decoder, {i: (modules[i], h) for i, h in before.layers.items()}, before)
            _arm(model, decoder)


def runtime_of(model: Any) -> Runtime:
    """What `enable` left on the model. Raises `RequestError` if there is nothing."""
    runtime: Runtime | None = model.__dict__.get("_loki_runtime")
    if runtime is None:
        raise RequestError(f"Loki is not enabled on this {type(model).__name__}; call loki.enable(model, basis) first")
    return runtime


def decoder_of(model: Any) -> Any:
    """The module that owns the stack of layers, whose config names the attention."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    return model if decoder is None else decoder


def check_model(model: Any) -> Any:
    """The decoder of a model on which Loki works. Raises NotImplementedError, naming the class, for others."""
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    if getattr(model.config, "is_encoder_decoder", False):
        raise NotImplementedError(f"{name} is an encoder-decoder; Loki works on decoder-only models")
    if getattr(config, "kv_lora_rank", None):
        raise NotImplementedError(f"{name} caches latents (MLA), not keys; Loki needs keys of its own for each head")
    if getattr(config, "num_attention_heads", None) is None:
        raise NotImplementedError(f"{name} has no attention; Loki works on softmax attention")
    if getattr(config, "num_kv_shared_layers", 0):
        raise NotImplementedError(f"{name} has layers that read the keys of others; Loki needs a cache for each layer")
    types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not types & ATTENTION:
        raise NotImplementedError(f"{name} has layers of {', '.join(sorted(types))} only; Loki needs full attention")
    decoder = decoder_of(model)
    can = getattr(type(decoder), "_can_set_attn_implementation", None)
    if can is None or not decoder._can_set_attn_implementation():
        raise NotImplementedError(f"{name} does not let its attention be chosen (AttentionInterface of transformers)")
    return decoder


def attention_modules(model: Any, decoder: Any, sliding: bool = False) -> dict[int, list[nn.Module]]:
    """The attention modules that read all tokens, by layer index; those with a sliding window too if asked for.

    Raises `UnsupportedArchitectureError` where there are none.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers  # empty: all of them are ordinary
    found: dict[int, list[nn.Module]] = {}
    for module in decoder.modules():
        index = getattr(module, "layer_idx", None)
        if type(index) is not int or "attention" not in type(module).__name__.lower():
            continue
        layer = layers[index] if layers else DynamicLayer()
        if type(layer) is DynamicLayer or (sliding and getattr(layer, "is_sliding", False)):
            found.setdefault(index, []).append(module)
    if not found:
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} has no layer whose attention reads all tokens; where windows are longer than your "
            "texts, set config.sliding_window to None before the model is made"
        )
    return found


def attach(model: Any, decoder: Any, handlers: dict[int, tuple[list[nn.Module], Any]], runtime: Any) -> None:
    """Choose the attention "loki", and give the modules what it looks for on them. On failure all is as before."""
    register()
    runtime.former = decoder.config._attn_implementation or "sdpa"
    decoder.set_attn_implementation(NAME)
    if decoder.config._attn_implementation != NAME:
        raise NotImplementedError(f"{type(model).__name__} did not take another attention function")
    for modules, handler in handlers.values():
        for module in modules:
            module.__dict__["_loki"] = handler
    model.__dict__["_loki_runtime"] = runtime


def detach(decoder: Any, former: str) -> None:
    for module in decoder.modules():
        module.__dict__.pop("_loki", None)
    decoder.set_attn_implementation(former)


def _arm(model: Any, decoder: Any) -> None:
    """Have `generate`, and calls with use_cache but no cache, make a LokiCache."""
    from model_hooks.kv import supply

    if hasattr(model, "_prepare_cache_for_generation"):
        model.__dict__["_prepare_cache_for_generation"] = MethodType(_prepare_cache, model)
    decoder.__dict__["_loki_hook"] = supply(decoder, MethodType(_own_cache, model))


def _own_cache(model: Any) -> Any:
    from .cache import LokiCache

    return LokiCache(model)


def _prepare_cache(model: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """transformers' own preparation; a cache that it makes new gets Loki's layers, one that the user gave does not."""
    from transformers import DynamicCache

    from .cache import LokiCache, convert

    given = {name for name, value in model_kwargs.items() if value is not None}
    result = type(model)._prepare_cache_for_generation(model, generation_config, model_kwargs, *args, **kwargs)
    for name in ("past_key_values", "cache"):
        made = model_kwargs.get(name)
        if made is None or name in given or not hasattr(made, "layers"):
            continue
        if type(made) is DynamicCache:
            offloading = {"offloading": made.offloading}
            if made.offloading:
                offloading["offload_only_non_sliding"] = made.only_non_sliding
            model_kwargs[name] = LokiCache(model, **offloading)
        else:
            convert(made, runtime_of(model).new_layer)
    return result


def _handler(index: int, runtime: Runtime, basis: Basis | None, width: int) -> LayerHandler:
    settings, method = runtime.config, runtime.method
    turn, projection = None, None
    d = width
    if method.needs_basis:
        assert basis is not None
        d = dimensions(_counted(settings.d_of(index), basis, index), width)
        turn = Turn.of(basis, index)
        projection = basis.truncated(basis.row(index), d)
    return LayerHandler(index, runtime, turn, settings.k_of(index), d, projection)


def _counted(d: Amount | Variance, basis: Basis, index: int) -> Amount:
    if isinstance(d, Variance):
        return int(basis.rank(d.share)[basis.row(index)].max())
    return d


def _check_backend(backend: str, model: Any) -> None:
    if backend == "triton":
        from lean_kernels import choose_backend

        choose_backend("triton", next(model.parameters()))
