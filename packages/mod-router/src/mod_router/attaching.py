"""Routers on a model and off again: any decoder family, found by structure; nothing is rebuilt, nothing copied."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from model_hooks import kv
from model_hooks.errors import RequestError, UnsupportedArchitectureError
from model_hooks.structure import Anatomy, Block, Sublayer, anatomy

from .config import RouterConfig, make_config
from .context import Frame, Seen, enter, leave, options, routing_context, with_options
from .gate import ROUTER, GateSpec, Runtime, install, runtime_of, uninstall
from .merged import become_stock


def base_of(model: Any) -> Any:
    """The transformers model itself where PEFT has wrapped it."""
    unwrapped = getattr(model, "get_base_model", None)
    return model if unwrapped is None else unwrapped()


def attach(model: Any, config: RouterConfig | None = None, **changes: Any) -> Any:
    """Put untrained routers on `model`, in place, and return it: it computes what it did, bit for bit.

    Args:
        model: a decoder-only transformers model; LoRA adapters may be on it, or come later.
        config: settings; `changes` are settings by name (layers="last:16", unit="attention", ...).

    Raises:
        RequestError: settings do not fit, or routers are attached already.
        UnsupportedArchitectureError: encoder-decoders, recurrent models, parts that were not recognised.
    """
    settings = make_config(config, changes)
    target = base_of(model)
    if "_mod_router" in target.__dict__:
        raise RequestError("this model has routers already; detach(model) first")
    parts = anatomy(target)
    specs = find_gates(parts, settings)
    width = target.get_submodule(parts.embeddings).weight.shape[-1]
    row_dim = _row_dim(target)
    if row_dim and settings.level == "token":
        raise UnsupportedArchitectureError(
            f"{type(target).__name__} has positions of three axes, which tokens cannot take along; use level='sequence'"
        )
    install_all(target, Runtime(settings, specs, len(parts.blocks), parts.decoder_name, width, row_dim))
    return model


def _row_dim(model: Any) -> int:
    """Multimodal rotary embeddings have their three axes before the rows."""
    rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    return 1 if "mrope_section" in rope else 0


def find_gates(parts: Anatomy, config: RouterConfig) -> tuple[GateSpec, ...]:
    """Where the gates of `config` go. Raises `RequestError` where a layer lacks the unit."""
    return tuple(_gate(parts, parts.blocks[layer], config) for layer in config.resolved(len(parts.blocks)))


def _gate(parts: Anatomy, block: Block, config: RouterConfig) -> GateSpec:
    unit = config.unit
    if unit == "block":
        return GateSpec(block.index, block.name, True, True, block.returns)
    sublayer = block.attention if unit == "attention" else block.mlp
    if sublayer is None:
        raise RequestError(f"layer {block.index} has no {unit}: it was dropped; leave it out of layers")
    _refuse(parts, block, sublayer)
    if config.repair == "mean":
        _refuse_repair(parts, block, sublayer)
    raw = not any(_weighted(block, name) for name in sublayer.pre)
    norms = tuple(f"{block.name}.{name}" for name in sublayer.own_norms if _weighted(block, name))
    return GateSpec(block.index, f"{block.name}.{sublayer.name}", raw, False, sublayer.returns, norms)


def _weighted(block: Block, name: str) -> bool:
    return any(True for _ in block.module.get_submodule(name).parameters())


def _refuse_repair(parts: Anatomy, block: Block, sublayer: Sublayer) -> None:
    """A norm on the way to the residual stream would not keep the mean."""
    behind = [name for name in sublayer.post if _weighted(block, name)]
    if behind:
        raise UnsupportedArchitectureError(
            f"{type(parts.model).__name__} has {behind[0]} after {sublayer.name}, which would change the mean that "
            "repair='mean' adds; gate unit='block', or leave repair out"
        )


def _refuse(parts: Anatomy, block: Block, sublayer: Sublayer) -> None:
    """Zero must stay zero on its way to the residual stream, and the input must be as wide as the stream."""
    name = type(parts.model).__name__
    for post in sublayer.post:
        if getattr(block.module.get_submodule(post), "bias", None) is not None:
            raise UnsupportedArchitectureError(
                f"{name}: {post} of block {block.index} adds a bias after {sublayer.name}, so a skipped "
                f"{sublayer.kind} would not be skipped; gate unit='block'"
            )
    inside = [n for n in sublayer.pre if any(p.dim() > 1 for p in block.module.get_submodule(n).parameters())]
    if inside:
        raise UnsupportedArchitectureError(
            f"{name} has no module around its {sublayer.kind} ({', '.join(inside)} stands in the block itself); gate "
            "unit='attention' or unit='block'"
        )


def install_all(model: Any, runtime: Runtime) -> None:
    """Gates, hooks and `generate` of a model that may have no weights yet; `attach` without the looking."""
    for spec in runtime.specs:
        install(model, spec, runtime)
    decoder = model.get_submodule(runtime.decoder)
    decoder.__dict__["_mod_router"] = model.__dict__["_mod_router"] = runtime
    decoder.__dict__["_mod_router_hooks"] = (
        kv.intercept(decoder, _begin), decoder.register_forward_hook(_end, always_call=True)
    )  # fmt: skip
    if hasattr(model, "generate"):
        model.__dict__["generate"] = MethodType(_generate, model)


def detach(model: Any) -> Any:
    """Take the routers off `model`, in place: every module is the object and the class that it was before."""
    target = base_of(model)
    runtime = runtime_of(target)
    uninstall(target, runtime)
    decoder = target.get_submodule(runtime.decoder)
    for hook in decoder.__dict__.pop("_mod_router_hooks"):
        hook.remove()
    for owner in (decoder, target):
        owner.__dict__.pop("_mod_router", None)
    target.__dict__.pop("generate", None)
    become_stock(target)
    return model


@contextmanager
def session(model: Any, config: RouterConfig | None = None, **changes: Any) -> Iterator[Any]:
    """`attach` for the length of a with block."""
    attach(model, config, **changes)
    try:
        yield model
    finally:
        detach(model)


def routers(model: Any) -> dict[int, Any]:
    """layer -> its `Router`."""
    target = base_of(model)
    return {s.layer: target.get_submodule(f"{s.module}.{ROUTER}") for s in runtime_of(target).specs}


def set_tau(model: Any, tau: float) -> None:
    """Move the threshold of an attached model: one trained router gives every capacity."""
    runtime = runtime_of(model)
    runtime.config = make_config(runtime.config, {"tau": tau})


@torch.no_grad()
def decide(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, prompt_lens: Any = None
) -> dict[int, Tensor]:
    """Decisions on prompts [B, T], layer -> [B] bool, from one forward pass without a cache."""
    target = base_of(model)
    with routing_context(prompt_lens=prompt_lens) as seen:
        _prompt_forward(target.get_submodule(runtime_of(target).decoder), input_ids, attention_mask)
    return dict(seen.gates)


def _prompt_forward(decoder: Any, input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """The decoder over a prompt, positions counted as `generate` counts them."""
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if attention_mask is not None and "position_ids" in inspect.signature(type(decoder).forward).parameters:
        inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
    decoder(**inputs)


def _begin(decoder: Any, cache: Any, wanted: bool, kwargs: dict[str, Any]) -> Any:
    """Before a call of the decoder: its cache, with routed layers, and the frame that its gates look at."""
    runtime: Runtime = decoder.__dict__["_mod_router"]
    current = options()
    if not current.off:
        cache = _routed(runtime, decoder, cache, wanted)
    first = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    if first is None:
        return cache
    past = 0 if cache is None else _past(runtime, cache)
    mask = kwargs.get("attention_mask")
    batch, tokens = first.shape[:2]
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        mask = _prompt_mask(batch, past)
    if cache is not None and not past and not current.off:
        _decide_on_all_of_the_prompt(runtime, decoder, cache, batch, tokens)
    frame = Frame(runtime, current, cache, batch, tokens, past, mask, first.device)
    if past and runtime.config.level == "sequence" and not (current.off or current.train):
        frame.settled = None if cache.layers[runtime.specs[0].layer].static else cache.layers
    enter(frame)
    return cache


def _prompt_mask(batch: int, past: int) -> Tensor | None:
    """[B, T] of the prompt that `generate` was given, which makes masks of all token pairs of it for static caches."""
    ids, mask = options().prompt or (None, None)
    if ids is None or mask is None or mask.dim() != 2 or past >= mask.shape[1] or batch % len(mask):
        return None
    return mask.repeat_interleave(batch // len(mask), 0)


def _past(runtime: Runtime, cache: Any) -> int:
    """Tokens in the cache. A static one counts on the device: once all is decided, that it is not empty is enough."""
    layer: Any = cache.layers[runtime.layers[0]] if len(cache.layers) > runtime.layers[0] else None
    if getattr(layer, "static", False) and layer.decision is not None:
        return 1
    return int(cache.get_seq_length())


def _end(decoder: Any, args: Any, output: Any) -> None:
    leave(decoder.__dict__["_mod_router"])


def _routed(runtime: Runtime, decoder: Any, cache: Any, wanted: bool) -> Any:
    """The cache with routed layers. Raises TypeError for one that cannot hold decisions."""
    from transformers import DynamicCache, StaticCache

    from .cache import convert_static, is_routed

    if cache is None:
        if not wanted:
            return None
        cache = DynamicCache(config=decoder.config)
    if cache.layers and all(i < len(cache.layers) and is_routed(cache.layers[i]) for i in runtime.layers):
        return cache
    if isinstance(cache, StaticCache) and runtime.config.level == "sequence" and not int(cache.get_seq_length()):
        convert_static(cache, runtime.layers)
        return cache
    if not isinstance(cache, DynamicCache) or cache.get_seq_length():
        what = f"{type(cache).__name__} with {int(cache.get_seq_length())} tokens"
        raise TypeError(
            f"a {what} cannot hold the decisions of routers; give an empty DynamicCache, a RoutedCache, or none"
        )
    runtime.convert(cache)
    return cache


def _decide_on_all_of_the_prompt(runtime: Runtime, decoder: Any, cache: Any, batch: int, tokens: int) -> None:
    """Where `generate` feeds its prompt in chunks: decide on the whole of it first, in one pass without a cache."""
    prompt = options().prompt
    config = runtime.config
    if prompt is None or prompt[0].shape[1] <= tokens or config.route_on != "full-prompt" or config.level != "sequence":
        return
    seen = Seen()
    with with_options(prompt=None, seen=seen), torch.no_grad():
        _prompt_forward(decoder, *prompt)
    repeats = batch // prompt[0].shape[0]  # beams
    for layer, decision in seen.gates.items():
        decision = decision.repeat_interleave(repeats)
        cache.layers[layer].decide(decision, [i for i, is_open in enumerate(decision.tolist()) if is_open])


def _generate(self: Any, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
    """transformers' generate, whose gates decide on the prompt and on nothing that is generated."""
    ids = inputs if inputs is not None else kwargs.get("input_ids")
    prompt = None if ids is None else (ids, kwargs.get("attention_mask"))
    with with_options(prompt=prompt):
        return type(self).generate(self, inputs, *args, **kwargs)
