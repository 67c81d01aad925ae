"""KV caches for models some of whose layers have no attention.

transformers reads a cache's length and mask sizes off one layer, by default the first. A layer that never writes would
answer 0 there and restart the positions, silently. So the slots of dropped layers hold a placeholder that is not a
`CacheLayerMixin`: `Cache.get_seq_length` and `Cache.get_mask_sizes` then look at the first layer that does write. This
module is the one place that knows how transformers' caches work; `self_check` guards it against upgrades.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch

from .errors import RequestError

try:  # where transformers has a slot of its own for layers without keys, it knows that mask sizes are not asked of it
    from transformers.cache_utils import DummyLayer as _Slot
except ImportError:
    _Slot = object


class NoKV(_Slot):  # type: ignore[misc]
    """A cache slot that stores nothing. `is_sliding` is None: neither of the two mask look-ups may pick this slot."""

    is_sliding = None
    is_compileable = True
    is_croppable = True
    is_initialized = True
    supports_early_init = False
    keys = None
    values = None

    def get_max_length(self) -> int:
        return -1

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    offload = prefetch = reset = crop = reorder_cache = batch_repeat_interleave = batch_select_indices = _nothing

    def __repr__(self) -> str:
        return "NoKV()"


def reserve(cache: Any, dropped: Iterable[int]) -> None:
    """Put placeholders into the slots `dropped` of `cache`, in place; doing it again changes nothing."""
    for index in sorted(dropped):
        while index >= len(cache.layers):
            cache.layers.append(cache.layer_class_to_replicate())
        layer = cache.layers[index]
        if isinstance(layer, NoKV):
            continue
        if layer.is_initialized and layer.get_seq_length() > 0:
            raise RequestError(
                f"the KV cache given holds keys for layer {index}, which has no attention: it was filled by another "
                "model; pass a fresh cache"
            )
        cache.layers[index] = NoKV()
    if all(isinstance(layer, NoKV) for layer in cache.layers):  # a cache whose layers appear as they are written
        cache.layers.append(cache.layer_class_to_replicate())


def install(decoder: Any, dropped: Iterable[int]) -> None:
    """Make `decoder` (the module that owns the stack) put placeholders into every cache it is given or makes.

    The indices lie on the module and the hook is one function, so that copies of the model carry both.
    """
    if "_no_kv" not in decoder.__dict__:
        decoder.register_forward_pre_hook(_before_forward, with_kwargs=True)
    decoder.__dict__["_no_kv"] = tuple(dropped)


def supply(decoder: Any, make: Callable[[], Any]) -> Any:
    """Have `decoder` use `make()` where it would make a cache of its own; the hook's handle, to remove it."""
    return intercept(decoder, lambda _, cache, wanted, kwargs: make() if cache is None and wanted else cache)


def intercept(decoder: Any, choose: Callable[[Any, Any, bool, dict[str, Any]], Any]) -> Any:
    """Have every call of `decoder` use the cache `choose(decoder, cache, wanted, kwargs)`; the hook's handle.

    `cache` is the one given or None, `wanted` whether the decoder would then make its own, `kwargs` the call's other
    arguments by name. None leaves the call without a cache argument.
    """

    def before_forward(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs, name, cache = _arguments(decoder, args, kwargs)
        named = {"input_ids": args[0], **kwargs} if args else kwargs
        cache = choose(decoder, cache, _uses_cache(decoder, kwargs), named)
        if cache is not None:
            kwargs[name] = cache
        return args, kwargs

    return decoder.register_forward_pre_hook(before_forward, with_kwargs=True, prepend=True)


def _before_forward(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not decoder._no_kv:
        return None
    args, kwargs, name, cache = _arguments(decoder, args, kwargs)
    if cache is None and _uses_cache(decoder, kwargs):
        from transformers import DynamicCache

        cache = DynamicCache(config=decoder.config)
    if cache is not None:
        reserve(cache, decoder._no_kv)
        kwargs[name] = cache
    return args, kwargs


def _arguments(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any], str, Any]:
    """The arguments of a call to `decoder.forward`, its cache argument's name, and the cache taken out of them."""
    if len(args) > 1:  # input_ids alone may come by position; the rest is easier to see by name
        bound = inspect.signature(type(decoder).forward).bind_partial(decoder, *args, **kwargs).arguments
        kwargs = {**bound.pop("kwargs", {}), **{k: v for k, v in bound.items() if k != "self"}}
        args = ()
    name = _cache_argument(type(decoder).forward)
    cache = kwargs.get(name)
    if cache is None:
        cache = kwargs.pop("past_key_values", None)
    return args, kwargs, name, cache


@lru_cache(maxsize=64)
def _cache_argument(forward: Any) -> str:
    """How a decoder's `forward` calls its cache: `cache` from transformers 5.24 on, `past_key_values` before."""
    parameters = inspect.signature(forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def _uses_cache(decoder: Any, kwargs: dict[str, Any]) -> bool:
    use_cache = kwargs.get("use_cache")
    use_cache = decoder.config.use_cache if use_cache is None else use_cache
    return bool(use_cache) and not (decoder.training and getattr(decoder, "gradient_checkpointing", False))


def kv_bytes(cache: Any) -> int:
    """Bytes that the keys and values of `cache` occupy (allocated, so a static cache counts its full length)."""
    total = 0
    for layer in cache.layers:
        for states in (layer.keys, layer.values) if getattr(layer, "is_initialized", False) else ():
            total += states.numel() * states.element_size() if isinstance(states, torch.Tensor) else 0
    return total


_checked: set[tuple[type, tuple[int, ...]]] = set()


def check_once(model: Any) -> None:
    """`self_check`, once a process for each class and choice of layers: it is about transformers, not the weights."""
    key = (type(model), tuple(edit["block"] for edit in model.config.lean["edits"]))
    if key not in _checked:
        self_check(model)
        _checked.add(key)


@torch.no_grad()
def self_check(model: Any) -> None:
    """Two tokens, then two more through the cache, must equal four at once. Raises RuntimeError where they do not."""
    import transformers

    from .trace import eval_mode, small_input

    ids = small_input(model)[:, :4]
    with eval_mode(model):
        whole = model(input_ids=ids, use_cache=False).logits[:, 2:]
        first = model(input_ids=ids[:, :2], use_cache=True)
        cache = first.past_key_values
        length = cache.get_seq_length()
        parts = model(input_ids=ids[:, 2:], past_key_values=cache, use_cache=True).logits
    exact = whole.dtype in (torch.float32, torch.float64)
    error = float((whole - parts).abs().max() / whole.abs().max().clamp_min(1e-30))
    if length != 2 or (exact and error > 1e-3):
        raise RuntimeError(
            f"cached and uncached logits differ by {error:.1e} (cache length {length}, expected 2): the cache rules of "
            f"transformers {transformers.__version__} are not those known here (5.15 to 5.24); please report it"
        )
