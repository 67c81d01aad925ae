"""Models that lost a sublayer, as transformers classes.

`lean` in a checkpoint's config.json says what was done (`edits`); `LeanLlamaConfig` and `LeanLlamaForCausalLM` (made on
demand from any stock pair) build the stock model and apply those edits, so that `from_pretrained`, `save_pretrained`,
`generate`, Trainer and PEFT work as on any model. The model type is `lean_<base>`, which the Auto classes refuse
without `import model_hooks`. The stock class itself (`LlamaForCausalLM.from_pretrained`) would only warn about the type
and fill dropped layers with random weights; so config.json also holds a fuse that no stock configuration accepts.
"""

from __future__ import annotations

from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from . import kv
from .errors import RequestError
from .registration import PREFIX
from .trace import first_tensor

VERSION = 1  # of the `lean` section

# Stands in config.json where the dtype does, which every configuration looks up in torch. The error that a stock class
# raises shows the value, so the value says what to do. The real dtype is in the `lean` section meanwhile.
FUSE = "import model_hooks and load with AutoModelForCausalLM: layers were dropped"


class Zero(nn.Module):
    """Stands where a feed-forward was: adds nothing to the residual stream, or `bias` [hidden_size] to every token."""

    def __init__(self, returns: int, bias: Tensor | None = None) -> None:
        super().__init__()
        self.returns = returns
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = torch.zeros_like(hidden_states)
        return _pack(out if self.bias is None else out + self.bias, self.returns)


def _pack(hidden_states: Tensor, returns: int) -> Any:
    return hidden_states if returns == 0 else (hidden_states, *([None] * (returns - 1)))


@cache
def attention_free_class(base: type[nn.Module]) -> type[nn.Module]:
    """The decoder layer class `base` with a forward that runs the feed-forward half alone.

    It keeps its name, since device maps and FSDP find layers by it. `lean_edit` on the instance is the edit.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        edit = self.lean_edit
        kept = edit["kept"]
        x = first_tensor(args, kwargs)  # [batch, T, hidden]
        assert x is not None
        residual = x if self.lean_bias is None else x + self.lean_bias
        h = x if edit["layout"] == "parallel" else residual
        for name in (*kept["pre"], kept["name"], *kept["post"]):
            h = self._modules[name](h)
            h = h if isinstance(h, Tensor) else h[0]
        h = h.reshape(x.shape)
        return _pack(residual + (h if kept["scale"] == 1.0 else kept["scale"] * h), edit["returns"])

    return type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__, "lean_base": base})


def apply_edit(block: Any, edit: dict[str, Any], bias: Tensor | None) -> None:
    """Take the sublayer that `edit` names out of `block`, in place; `bias` [hidden_size] takes its place if given."""
    if edit["kept"]["kind"] == "mlp":
        for name in (edit["name"], *edit["norms"]):
            delattr(block, name)
        stock: Any = type(block)
        block.__class__ = attention_free_class(stock)
        if "_old_forward" in vars(block):  # what accelerate's hooks call in a model spread over devices
            block._old_forward = MethodType(type(block).forward, block)
        block.lean_edit = edit
        block.register_parameter("lean_bias", None if bias is None else nn.Parameter(bias))
        return
    setattr(block, edit["name"], Zero(edit["drops_returns"], bias))
    for name in edit["norms"]:
        setattr(block, name, nn.Identity())


def apply_lean(model: Any) -> None:
    """Apply all edits of `model.config.lean` to a freshly built stock model."""
    lean = model.config.lean
    if lean["version"] != VERSION:
        raise RequestError(
            f"this checkpoint's lean section has version {lean['version']}, this model_hooks reads {VERSION}: "
            "upgrade it"
        )
    stack = model.get_submodule(lean["stack"])
    weight = model.get_input_embeddings().weight
    for edit in lean["edits"]:
        width = lean["hidden_size"]
        bias = torch.zeros(width, dtype=weight.dtype, device=weight.device) if edit["bias"] else None
        apply_edit(stack[edit["block"]], edit, bias)
    if lean.get("experts"):
        from .expert_surgery import resize

        resize(stack, lean["experts"])
    install_cache_rules(model)


def needs_lean(lean: dict[str, Any] | None) -> bool:
    """Whether a model with this lean section is other than what stock transformers builds from its config."""
    return bool(lean and (lean.get("edits") or any(lean.get("experts") or ())))


def install_cache_rules(model: Any) -> None:
    lean = model.config.lean
    without = [e["block"] for e in lean["edits"] if e["kept"]["kind"] == "mlp"]
    kv.install(model.get_submodule(lean["stack"].rpartition(".")[0]), without)


@cache
def lean_config_class(base: type) -> Any:
    """`LlamaConfig` -> `LeanLlamaConfig`, with model type `lean_llama`; its config.json holds the fuse."""

    def to_diff_dict(self: Any) -> dict[str, Any]:  # what is written to config.json
        values = base.to_diff_dict(self)  # type: ignore[attr-defined]
        return {**values, "dtype": FUSE, "lean": {**self.lean, "dtype": values.get("dtype")}}

    def from_dict(cls: Any, config_dict: dict[str, Any], /, **kwargs: Any) -> Any:
        known = dict(config_dict)
        if known.get("dtype") == FUSE:
            known["lean"] = {k: v for k, v in known["lean"].items() if k != "dtype"}
            known["dtype"] = config_dict["lean"].get("dtype")
        return base.from_dict.__func__(cls, known, **kwargs)  # type: ignore[attr-defined]

    body = {"to_diff_dict": to_diff_dict, "from_dict": classmethod(from_dict), "__module__": __name__}
    model_type = PREFIX + base.model_type  # type: ignore[attr-defined]
    return type(f"Lean{base.__name__}", (base,), {**body, "model_type": model_type})


@cache
def lean_model_class(base: type) -> Any:
    """`LlamaForCausalLM` -> `LeanLlamaForCausalLM`, which applies the config's edits after building the stock model."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)  # type: ignore[misc]
        apply_lean(self)

    config_class = lean_config_class(base.config_class)  # type: ignore[attr-defined]
    register_conversions(base.config_class.model_type)  # type: ignore[attr-defined]
    body = {"__init__": __init__, "config_class": config_class, "__module__": base.__module__, "lean_base": base}
    return type(f"Lean{base.__name__}", (base,), body)


def register_conversions(model_type: str, prefix: str = PREFIX) -> None:
    """Checkpoints of some types (Mixtral) are laid out otherwise than their modules: the rules go by model type."""
    from transformers import conversion_mapping as rules

    known = rules.get_checkpoint_conversion_mapping(model_type)
    if known is not None:
        rules.register_checkpoint_conversion_mapping(prefix + model_type, known, overwrite=True)


@cache
def make_lean_classes(base_model_type: str) -> Any:
    """The lean config class for a stock model type; its model classes are registered with the Auto classes."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    base_config = CONFIG_MAPPING[base_model_type]
    config_class = lean_config_class(base_config)
    AutoConfig.register(PREFIX + base_model_type, config_class, exist_ok=True)
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if base_config in auto._model_mapping:
            auto.register(config_class, lean_model_class(auto._model_mapping[base_config]), exist_ok=True)
    return config_class


def become_lean(model: Any) -> None:
    """Turn a stock model object, edited in place, into its lean class: `save_pretrained` then writes the truth."""
    stock: Any = type(model)
    if not hasattr(stock, "lean_base"):
        make_lean_classes(model.config.model_type)
        model.config.__class__ = lean_config_class(model.config.__class__)
        model.__class__ = lean_model_class(stock)
    model.config.architectures = [type(model).__name__]
    install_cache_rules(model)


def become_stock(model: Any) -> None:
    """Turn a model object back into its stock class once no edit is left: the edited blocks have gone altogether."""
    if not hasattr(type(model), "lean_base"):
        return
    install_cache_rules(model)
    model.__class__ = type(model).lean_base
    model.config.__class__ = type(model).config_class
    model.config.architectures = [type(model).__name__]
