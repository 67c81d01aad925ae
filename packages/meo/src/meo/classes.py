"""Models with banks as transformers classes: built from the section `meo` of config.json, whatever the head.

`MeoBertConfig` and `MeoBertForMaskedLM` (made on demand from any stock pair, model type `meo_bert`) load by the Auto
classes after `import meo`; without it these refuse the type.
"""

from __future__ import annotations

import functools
from functools import cache
from typing import Any

from model_hooks.errors import RequestError

PREFIX = "meo_"
HEADS = (
    "AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForQuestionAnswering",
    "AutoModelForSeq2SeqLM", "AutoModelForSequenceClassification", "AutoModelForTokenClassification",
)  # fmt: skip


def is_merged(model: Any) -> bool:
    """Whether a model has been converted."""
    return hasattr(type(model), "meo_base")


@cache
def config_class(base: Any) -> Any:
    """`BertConfig` -> `MeoBertConfig`, whose attribute `meo` says what was converted."""
    return type(f"Meo{base.__name__}", (base,), {"__module__": __name__, "model_type": PREFIX + base.model_type})


@cache
def model_class(base: Any) -> Any:
    """`BertForMaskedLM` -> `MeoBertForMaskedLM`: banks for linears; takes `task_ids`, [B], beside its inputs."""
    from model_hooks.lean import register_conversions

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        from .converting import install

        base.__init__(self, config, *args, **kwargs)
        install(self)

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, task_ids: Any = None, **kwargs: Any) -> Any:
        from .context import options, with_options

        labels = None if self.config.is_encoder_decoder else kwargs.get("labels")
        with with_options(task_ids=options().task_ids if task_ids is None else task_ids, labels=labels):
            return base.forward(self, *args, **kwargs)

    def generate(self: Any, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        from .context import with_options

        with with_options(prompt_slots=_prompt_slots(self, inputs, kwargs)):
            return base.generate(self, inputs, *args, **kwargs)

    def from_pretrained(cls: Any, /, source: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        _refuse_tensor_parallel(kwargs)
        loaded, info = super(made, cls).from_pretrained(source, *args, output_loading_info=True, **kwargs)
        refuse_mismatch(loaded, info, source)
        return (loaded, info) if output_loading_info else loaded

    register_conversions(base.config_class.model_type, PREFIX)
    body: dict[str, Any] = {
        "__init__": __init__, "forward": forward, "from_pretrained": classmethod(from_pretrained), "meo_base": base,
        "config_class": config_class(base.config_class), "__module__": base.__module__,
    }  # fmt: skip
    if hasattr(base, "generate"):
        body["generate"] = generate
    made: Any = type(f"Meo{base.__name__}", (base,), body)
    return made


def _refuse_tensor_parallel(given: dict[str, Any]) -> None:
    """The plans of stock models would cut a bank's experts, biases and gates as if they were one linear's."""
    distributed = given.get("distributed_config")
    if any(given.get(name) or getattr(distributed, name, None) for name in ("tp_plan", "tp_size")):
        raise RequestError("banks of experts cannot be cut by tensor parallelism; take device_map, ZeRO-3 or FSDP")


def _prompt_slots(model: Any, inputs: Any, kwargs: dict[str, Any]) -> int:
    """Places of the prompt that generation starts from."""
    settings = kwargs.get("generation_config") or model.generation_config
    if kwargs.get("prefill_chunk_size") or getattr(settings, "prefill_chunk_size", None):
        raise RequestError("prefill_chunk_size would let a part of the prompt decide; leave it out")
    if model.config.is_encoder_decoder:
        inputs = kwargs.get("decoder_input_ids")
    else:
        named = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        inputs = next((t for t in named if t is not None), None)
    return 1 if inputs is None else int(inputs.shape[1])


def refuse_mismatch(model: Any, info: dict[str, Any], source: Any) -> None:
    """Raise `RequestError`, naming the tensor, where a bank's are missing, left over or of another shape."""
    banks = tuple(bank["name"] for bank in model.config.meo["banks"])
    said = {
        "missing_keys": "missing", "unexpected_keys": "not in the config", "mismatched_keys": "of another shape"
    }  # fmt: skip
    for key, meaning in said.items():
        names = sorted(str(k[0] if isinstance(k, tuple) else k) for k in info.get(key) or ())
        wrong = [n for n in names if any(f"{bank}." in n for bank in banks) or "experts" in n]
        if wrong:
            raise RequestError(f"{source}: {len(wrong)} tensors of banks are {meaning}, first {wrong[0]}")


@cache
def make_classes(base_model_type: str) -> Any:
    """The config class for a stock model type; its model classes are registered with the Auto classes."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    base = CONFIG_MAPPING[base_model_type]
    made = config_class(base)
    transformers.AutoConfig.register(PREFIX + base_model_type, made, exist_ok=True)
    for name in HEADS:
        auto = getattr(transformers, name)
        if base in auto._model_mapping:
            stock = auto._model_mapping[base]
            for kind in stock if isinstance(stock, tuple) else (stock,):
                auto.register(made, model_class(kind), exist_ok=True)
    return made


def become_merged(model: Any) -> None:
    """Turn a stock model object with banks into its class, so that `save_pretrained` writes the truth."""
    make_classes(model.config.model_type)
    stock, kind = type(model), type(model.config)  # type: Any, Any
    model.config.__class__ = config_class(kind)
    model.__class__ = model_class(stock)
    model.config.architectures = [type(model).__name__]
