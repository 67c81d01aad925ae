"""Stacks of layers (encoders and decoders): found in a model, and hooked so that their banks know of each call."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from model_hooks.errors import RequestError

from .cache import adopt
from .config import MeoConfig
from .context import Frame, Runtime, enter, leave, options

CODES = "meo_tasks"  # buffer of a stack: what task-level gates look at, [tasks, width]
CARRIES = ("prefix", "chunk", "cumulative")  # levels with sums beside the KV cache
WHOLE_TEXT = ("ForSequenceClassification",)  # heads that read the last token only: no output sees a later token


@dataclass(frozen=True)
class StackSpec:
    """A stack in config.json: the module's name, the level that it is gated at, whether tokens see none after them."""

    name: str
    level: str
    causal: bool


def find_stacks(model: Any, config: MeoConfig) -> list[StackSpec]:
    """The encoder and decoder of `model`, or its one stack. Raises `RequestError` for a level that cannot be."""
    names = {id(module): name for name, module in model.named_modules()}
    if model.config.is_encoder_decoder:
        encoder, decoder = names[id(model.get_encoder())], names[id(model.get_decoder())]
        level = config.level if config.level in ("task", "token") else "sequence"
        after = config.decoder_gate or ("task" if level == "task" else "encoder")
        if config.method == "moe" and level == "token":
            after = "token"
        return [StackSpec(encoder, level, False), StackSpec(decoder, after, True)]
    causal = is_causal(model.config)
    level = config.level or ("prefix" if causal else "sequence")
    looks_ahead = level == "sequence" or (level == "token" and config.method == "meo")
    if causal and looks_ahead and not config.allow_future_leak and not type(model).__name__.endswith(WHOLE_TEXT):
        raise RequestError(f"{level}-level gating looks at future tokens; use prefix, chunk or task")
    return [StackSpec(_stack_of_layers(model), level, causal)]


def _stack_of_layers(model: Any) -> str:
    """The innermost module that takes token ids and holds the layers (GPT2Model, OPTDecoder, BertModel, ...)."""
    name = blocks(model, "")[0][0].rpartition(".")[0]
    while name and "input_ids" not in _names_of(model.get_submodule(name)):
        name = name.rpartition(".")[0]
    return name


def blocks(model: Any, stack: str) -> list[tuple[str, nn.Module]]:
    """The layers of a stack by their full names: items of its outermost ModuleLists. Raises `RequestError` for none."""
    found: list[tuple[str, nn.Module]] = []

    def walk(name: str, module: nn.Module) -> None:
        for child, inner in module.named_children():
            full = f"{name}.{child}".lstrip(".")
            if isinstance(inner, nn.ModuleList):
                found.extend((f"{full}.{i}", item) for i, item in enumerate(inner))
            else:
                walk(full, inner)

    walk(stack, model.get_submodule(stack))
    if not found:
        raise RequestError(f"no layers were found in {type(model).__name__}; it is no stack of layers")
    return found


def located(model: Any, name: str) -> str:
    """A module's name of the converted model, as `model` spells it: its body alone, or the body under another head."""
    stem = model.base_model_prefix
    if hasattr(model, stem):
        under = hasattr(model, name.partition(".")[0])
        return name if under or not name else f"{stem}.{name}"
    return name.removeprefix(stem).removeprefix(".") if name.partition(".")[0] == stem else name


def is_causal(config: Any) -> bool:
    """Whether the one stack of a model with this config is a decoder; that of an encoder-decoder is not one."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    if config.is_encoder_decoder:
        return False
    if getattr(config, "is_decoder", False):
        return True
    decoders, encoders = AutoModelForCausalLM._model_mapping, AutoModelForMaskedLM._model_mapping
    return type(config) in decoders and type(config) not in encoders


def hook(module: nn.Module, runtime: Runtime) -> None:
    """Let `runtime` know of every call of the stack `module`. The hooks hold no state, so copies of it work."""
    module.meo_runtime = runtime  # type: ignore[assignment]
    module.register_forward_pre_hook(_before, with_kwargs=True)
    module.register_forward_hook(_after, always_call=True)


def unhook(module: Any) -> None:
    """Take away what `hook` put on, and the tasks."""
    for hooks, own in ((module._forward_pre_hooks, _before), (module._forward_hooks, _after)):
        for key in [key for key, function in hooks.items() if function is own]:
            del hooks[key]
            for about in (module._forward_pre_hooks_with_kwargs, module._forward_hooks_always_called):
                about.pop(key, None)
    del module.meo_runtime
    if hasattr(module, CODES):
        delattr(module, CODES)


def _names_of(module: nn.Module) -> list[str]:
    """Names of what its forward takes, in order."""
    kind: Any = type(module)
    return _names(kind)


@cache
def _names(kind: Any) -> list[str]:
    return [name for name in inspect.signature(kind.forward).parameters if name != "self"]


def _before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    runtime: Runtime = module.meo_runtime
    given = dict(zip(_names_of(module), args)) | kwargs
    x = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
    store = given.get("past_key_values")
    if runtime.level in CARRIES and not module.training:
        if store is None and _wants_cache(module, given):
            store = kwargs["past_key_values"] = _new_cache(module, given)
        store = adopt(store)
    past = 0 if store is None else int(store.get_seq_length())
    mask = given.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise RequestError("attention_mask must be [batch, tokens]: gates must know which tokens are padding")
    frame = Frame(
        runtime, options(), x.shape[0], x.shape[1], x.device, mask, past,
        state=getattr(store, "meo", None) if runtime.level in CARRIES else None,
        documents=_documents(given, past), encoder=_encoded(given) if runtime.level == "encoder" else None,
        codes=getattr(module, CODES, None),
    )  # fmt: skip
    enter(frame, module.training)
    return args, kwargs


def _after(module: Any, args: Any, output: Any) -> None:
    leave(module.meo_runtime)


def _wants_cache(module: Any, given: dict[str, Any]) -> bool:
    use = given.get("use_cache")
    return bool(getattr(module.config, "use_cache", False) if use is None else use)


def _new_cache(module: Any, given: dict[str, Any]) -> Any:
    """The cache that the stack would make by itself."""
    own = DynamicCache(config=module.config)
    if module.config.is_encoder_decoder or given.get("encoder_hidden_states") is not None:
        return EncoderDecoderCache(own, DynamicCache(config=module.config))
    return own


def _documents(given: dict[str, Any], past: int) -> Tensor | None:
    """Documents of packed rows [B, T]: as told, or where positions begin again (and no mask says otherwise)."""
    told = options().documents
    if told is not None:
        return told
    positions = given.get("position_ids")
    if positions is None or past or given.get("attention_mask") is not None or positions.dim() != 2:
        return None
    breaks = torch.diff(positions, dim=1) != 1
    if not bool(breaks.any()):
        return None
    documents = torch.nn.functional.pad(breaks.cumsum(1), (1, 0))
    return documents.expand(_rows(given), -1)


def _rows(given: dict[str, Any]) -> int:
    x = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
    return int(x.shape[0])


def _encoded(given: dict[str, Any]) -> Tensor:
    """Masked mean of the encoder's output, [B, width]."""
    states, mask = given["encoder_hidden_states"], given.get("encoder_attention_mask")
    if mask is None:
        return states.mean(1)
    weight = mask[..., None].bool()
    return torch.where(weight, states.float(), 0).sum(1) / weight.sum(1).clamp_min(1)
