"""A base and its routers in one checkpoint: transformers classes that put the gates on when they are built.

`RoutedLlamaConfig` and `RoutedLlamaForCausalLM` (made on demand from any stock pair, model type `routed_llama`) load by
the Auto classes after `import mod_router`. The stock class would leave the routers out, with a warning, and run the
whole model: right, and unrouted.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from model_hooks.errors import RequestError

from .config import RouterConfig

PREFIX = "routed_"
KEY = "routing"  # of config.json
USE = """```python
import mod_router  # teaches transformers this checkpoint's model type
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this folder")
```"""


@cache
def routed_config_class(base: Any) -> Any:
    """`LlamaConfig` -> `RoutedLlamaConfig`, whose attribute `routing` says what is gated."""
    body = {"__module__": __name__, "model_type": PREFIX + base.model_type}
    return type(f"Routed{base.__name__}", (base,), body)


@cache
def routed_model_class(base: Any) -> Any:
    """`LlamaForCausalLM` -> `RoutedLlamaForCausalLM`."""
    from model_hooks.lean import register_conversions

    from .gate import ROUTER

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        _install(self)

    strict = {*(getattr(base, "_keep_in_fp32_modules_strict", None) or ()), ROUTER}
    register_conversions(base.config_class.model_type, PREFIX)
    body = {
        "__init__": __init__, "config_class": routed_config_class(base.config_class), "__module__": base.__module__,
        "routed_base": base, "_keep_in_fp32_modules_strict": strict,
    }  # fmt: skip
    return type(f"Routed{base.__name__}", (base,), body)


def _install(model: Any) -> None:
    from .attaching import install_all
    from .gate import GateSpec, Runtime

    record = model.config.routing
    settings = {**record["config"], "layers": tuple(record["config"]["layers"])}
    specs = tuple(GateSpec(**spec) for spec in record["gates"])
    where = {k: record[k] for k in ("depth", "decoder", "hidden_size", "row_dim")}
    install_all(model, Runtime(RouterConfig(**settings), specs, **where))


def describe(runtime: Any) -> dict[str, Any]:
    """What config.json says of the gates: all that building them takes."""
    return {
        "config": {**runtime.config.to_dict(), "layers": list(runtime.layers), "scores": ""},
        "gates": [spec.to_dict() for spec in runtime.specs],
        **{k: getattr(runtime, k) for k in ("depth", "decoder", "hidden_size", "row_dim")},
    }


@cache
def make_routed_classes(base_model_type: str) -> Any:
    """The routed config class for a stock model type; its model classes are registered with the Auto classes."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    base_config = CONFIG_MAPPING[base_model_type]
    config_class = routed_config_class(base_config)
    AutoConfig.register(PREFIX + base_model_type, config_class, exist_ok=True)
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if base_config in auto._model_mapping:
            auto.register(config_class, routed_model_class(auto._model_mapping[base_config]), exist_ok=True)
    return config_class


def become_routed(model: Any) -> None:
    """Turn a stock model object with routers into its routed class: `save_pretrained` then writes the truth."""
    from .gate import runtime_of

    runtime = runtime_of(model)
    if not hasattr(type(model), "routed_base"):
        if hasattr(type(model), "lean_base"):
            raise RequestError(
                "a model with dropped layers cannot be merged with routers; keep the adapter folder beside it"
            )
        make_routed_classes(model.config.model_type)
        stock, config_class = type(model), type(model.config)  # type: Any, Any
        model.config.__class__ = routed_config_class(config_class)
        model.__class__ = routed_model_class(stock)
    model.config.routing = describe(runtime)
    model.config.architectures = [type(model).__name__]


def become_stock(model: Any) -> None:
    """Turn a model whose routers were taken off back into its stock class."""
    if hasattr(type(model), "routed_base"):
        model.__class__ = type(model).routed_base
        model.config.__class__ = type(model).config_class
        model.config.architectures = [type(model).__name__]
        del model.config.routing


def merge(
    model: Any, folder: str | Path, tokenizer: Any = None, *, base: str = "", overwrite: bool = False,
    source: str | Path | None = None, verify: bool = True,
) -> Path:  # fmt: skip
    """Write base and routers as one checkpoint that loads by the Auto classes after `import mod_router`.

    Arguments as of `model_hooks.save`. Raises `RequestError` where the base has dropped layers.
    """
    from model_hooks import Card, save

    from .gate import runtime_of

    become_routed(model)
    runtime = runtime_of(model)
    layers = ", ".join(map(str, runtime.layers))
    method = f"mod-router: routers on the {runtime.config.unit} of layers {layers}; `import mod_router` before loading"
    card = Card(base or "a model", method, "arXiv 2410.13184", settings=runtime.config.to_dict(), use=USE)
    return save(model, folder, tokenizer, card=card, overwrite=overwrite, source=source, verify=verify)
