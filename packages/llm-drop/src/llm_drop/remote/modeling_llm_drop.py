"""A model without some of its attention or feed-forward sublayers, for `trust_remote_code=True`.

One file for every architecture: it builds the stock transformers model that `config.lean` names and takes out the
sublayers listed there. It needs transformers and nothing else. Sublayers were chosen by LLM-Drop (arXiv 2406.15786).
"""

import inspect

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig, conversion_mapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


class NoKV:
    """A cache slot that stores nothing, so that the cache's length is read off a layer that does."""

    is_sliding = None
    is_compileable = is_croppable = is_initialized = True
    supports_early_init = False
    keys = values = None

    def get_max_length(self):
        return -1

    def _nothing(self, *args, **kwargs):
        return None

    offload = prefetch = reset = crop = reorder_cache = batch_repeat_interleave = batch_select_indices = _nothing


class Constant(nn.Module):
    """Stands where a feed-forward was: adds nothing, or a constant vector."""

    def __init__(self, returns, bias):
        super().__init__()
        self.returns, self.bias = returns, bias

    def forward(self, hidden_states, *args, **kwargs):
        out = torch.zeros_like(hidden_states)
        return pack(out if self.bias is None else out + self.bias, self.returns)


def pack(hidden_states, returns):
    return hidden_states if returns == 0 else (hidden_states, *([None] * (returns - 1)))


def attention_free(base):
    """The decoder layer class with a forward that runs the feed-forward half alone."""

    def forward(self, *args, **kwargs):
        edit, kept = self.lean_edit, self.lean_edit["kept"]
        given = (*args, kwargs.get("hidden_states"), *kwargs.values())
        x = next(t for t in given if isinstance(t, torch.Tensor) and t.is_floating_point())
        residual = x if self.lean_bias is None else x + self.lean_bias
        h = x if edit["layout"] == "parallel" else residual
        for name in (*kept["pre"], kept["name"], *kept["post"]):
            h = self._modules[name](h)
            h = h if isinstance(h, torch.Tensor) else h[0]
        return pack(residual + kept["scale"] * h.reshape(x.shape), edit["returns"])

    return type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__})


def take_out(block, edit, bias):
    if edit["kept"]["kind"] == "mlp":
        for name in (edit["name"], *edit["norms"]):
            delattr(block, name)
        block.__class__ = attention_free(type(block))
        block.lean_edit = edit
        block.register_parameter("lean_bias", bias)
        return
    setattr(block, edit["name"], Constant(edit["drops_returns"], bias))
    for name in edit["norms"]:
        setattr(block, name, nn.Identity())


def reserve_cache(decoder, dropped):
    """Let every cache that `decoder` is given, or makes, hold empty slots for the layers without attention."""
    signature = inspect.signature(type(decoder).forward)

    def before_forward(module, args, kwargs):
        if len(args) > 1:
            bound = signature.bind_partial(module, *args, **kwargs).arguments
            kwargs = {**bound.pop("kwargs", {}), **{k: v for k, v in bound.items() if k != "self"}}
            args = ()
        name = "cache" if "cache" in signature.parameters else "past_key_values"  # renamed in transformers 5.24
        cache, wanted = kwargs.get(name), kwargs.get("use_cache")
        if cache is None:
            cache = kwargs.pop("past_key_values", None)
        if cache is None and (module.config.use_cache if wanted is None else wanted):
            cache = DynamicCache(config=module.config)
        if cache is not None:
            kwargs[name] = cache
            for index in dropped:
                while index >= len(cache.layers):
                    cache.layers.append(cache.layer_class_to_replicate())
                if not isinstance(cache.layers[index], NoKV):
                    cache.layers[index] = NoKV()
        return args, kwargs

    decoder.register_forward_pre_hook(before_forward, with_kwargs=True)


def model_class(base):
    def __init__(self, config, *args, **kwargs):
        base.__init__(self, config, *args, **kwargs)
        lean = config.lean
        stack = self.get_submodule(lean["stack"])
        like = self.get_input_embeddings().weight
        for edit in lean["edits"]:
            bias = torch.zeros(lean["hidden_size"], dtype=like.dtype, device=like.device) if edit["bias"] else None
            take_out(stack[edit["block"]], edit, None if bias is None else nn.Parameter(bias))
        without = sorted(e["block"] for e in lean["edits"] if e["kept"]["kind"] == "mlp")
        reserve_cache(self.get_submodule(lean["stack"].rpartition(".")[0]), without)

    return type(f"LLMDrop{base.__name__}", (base,), {"__init__": __init__, "__module__": base.__module__})


class LLMDropConfig(PretrainedConfig):
    """Reads as the configuration class of the stock model."""

    model_type = "llm_drop"

    @classmethod
    def from_pretrained(cls, path, **kwargs):
        values, kwargs = PretrainedConfig.get_config_dict(path, **kwargs)
        base = CONFIG_MAPPING[values["lean"]["base_model_type"]]
        values["dtype"] = values["lean"].pop("dtype")  # in its place is a text that no stock class accepts
        kwargs.pop("trust_remote_code", None)
        own = type(f"LLMDrop{base.__name__}", (base,), {"model_type": values["model_type"], "__module__": __name__})
        return own.from_dict(values, **kwargs)  # type: ignore[attr-defined]


class LLMDropForCausalLM:
    """Loads as the stock model without the sublayers that left it."""

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModelForCausalLM"):
        return None

    @classmethod
    def from_pretrained(cls, path, *args, config, **kwargs):
        kwargs.pop("trust_remote_code", None)
        stock = config.lean["base_model_type"]
        base = AutoModelForCausalLM._model_mapping[CONFIG_MAPPING[stock]]
        rules = conversion_mapping.get_checkpoint_conversion_mapping(stock)
        if rules is not None:  # checkpoints of some types (Mixtral) are laid out otherwise than their modules
            conversion_mapping.register_checkpoint_conversion_mapping(config.model_type, rules, overwrite=True)
        return model_class(base).from_pretrained(path, *args, config=config, **kwargs)
