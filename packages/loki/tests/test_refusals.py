"""What cannot be done is refused where it is asked for, in one line that names the field."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from loki import LokiConfig, Variance, calibrate, enable, session
from loki.rows import read_mask
from lokimodels import SMALL, basis_of, build, tokens

from model_hooks import RequestError


@pytest.mark.parametrize("name", ["k", "d"])
@pytest.mark.parametrize("value", [0, -1, 0.0, -0.25, 1.01, True, math.nan, math.inf, "0.25", None, [0.25, 0.0]])
def test_amounts_that_mean_nothing(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}="):
        LokiConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("method", "lokki"), ("select", "row"), ("group_reduce", "sum"), ("block", 8), ("prefill", "sparse"),
        ("backend", "cuda"), ("sink", -1), ("recent", 1.5), ("min_k", True), ("min_length", -3), ("stats_every", 0),
        ("mass", 0.0), ("mass", 1.2), ("mass", math.nan),
    ],
)  # fmt: skip
def test_settings_that_do_not_exist(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name):
        LokiConfig(**{name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d": 9}, "d=9.*8"),
        ({"d": [4, 4]}, "d lists 2 layers, the model has 4"),
        ({"k": [0.5] * 5}, "k lists 5 layers, the model has 4"),
        ({"k": [0.5, 0.5, 0.5, Variance(0.9)]}, "k="),
        ({"skip_layers": [4]}, "skip_layers names layer 4"),
        ({"top_k": 4}, "'top_k' is no setting"),
        ({"method": "snapkv", "prefill": "masked"}, "no masked form"),
        ({"method": "quest", "mass": 0.9}, "mass=0.9 is not read by method 'quest'; leave it out, or take topk, loki"),
        ({"method": "h2o", "block": 16}, "block=16 is not read by method 'h2o'.*topk, quest, loki"),
        ({"method": "snapkv", "select": "head"}, "select='head' is not read"),
        ({"method": "pca", "group_reduce": "max"}, "group_reduce='max' is not read"),
    ],
)
def test_settings_that_do_not_fit_leave_the_model_alone(changes: dict[str, Any], message: str) -> None:
    model = build()
    enable(model, basis_of("Llama"), k=0.5)
    with pytest.raises(RequestError, match=message):
        enable(model, basis_of("Llama"), **changes)
    assert model.__dict__["_loki_runtime"].config.k == 0.5
    assert model.config._attn_implementation == "loki"


def test_a_count_above_the_length_is_dense_and_no_error() -> None:
    model, ids = build(), tokens(1, 20)
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    with session(model, basis_of("Llama"), k=10_000, min_length=0):
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)


def test_a_missing_basis_and_one_of_another_shape() -> None:
    with pytest.raises(RequestError, match="'loki' needs a basis"):
        enable(build())
    with pytest.raises(RequestError, match="calibrate on this model"):
        enable(build("Qwen3"), basis_of("Llama"))


UNSUPPORTED: dict[str, tuple[str, dict[str, Any]]] = {
    "T5": ("T5ForConditionalGeneration", {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}),
    "DeepseekV3": (
        "DeepseekV3ForCausalLM",
        {"kv_lora_rank": 8, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
         "num_key_value_heads": 4, "n_routed_experts": 4, "moe_intermediate_size": 16, "first_k_dense_replace": 4,
         "n_group": 1, "topk_group": 1, "head_dim": 8, "num_experts_per_tok": 2},
    ),
    "Mamba": ("MambaForCausalLM", {"state_size": 4}),
}  # fmt: skip


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_models_without_keys_of_their_own_are_named(family: str) -> None:
    name, changes = UNSUPPORTED[family]
    size = {} if family == "T5" else SMALL
    model = getattr(transformers, name)(
        getattr(transformers, f"{family}Config")(**{**size, "vocab_size": 97, **changes})
    )
    for call in (lambda: enable(model, method="topk"), lambda: calibrate(model, tokens(4, 16))):
        with pytest.raises(NotImplementedError, match=name):
            call()


def test_models_with_sliding_windows_alone_are_refused() -> None:
    config = transformers.MistralConfig(**{**SMALL, "sliding_window": 8})
    model = transformers.MistralForCausalLM(config)
    with pytest.raises(RequestError, match="sliding_window to None"):
        enable(model, method="topk")


def test_attention_sinks_are_refused() -> None:
    config = transformers.GptOssConfig(
        **{**SMALL, "head_dim": 8, "num_local_experts": 2, "layer_types": ["full_attention"] * 4}
    )
    model = transformers.GptOssForCausalLM(config).eval()
    with session(model, method="topk"), pytest.raises(NotImplementedError, match="s_aux"):
        model(input_ids=tokens(1, 5))


def test_attention_weights_are_refused() -> None:
    model = build()
    with session(model, basis_of("Llama")), pytest.raises(ValueError, match="eager"):
        model(input_ids=tokens(1, 5), output_attentions=True)


def test_masks_that_loki_cannot_read() -> None:
    device = torch.device("cpu")
    with pytest.raises(RequestError, match="attention_mask of shape"):
        read_mask(torch.ones(1, 4, 1, 9, dtype=torch.bool), 1, 1, 9, device)
    with pytest.raises(NotImplementedError, match="bias"):
        read_mask(torch.linspace(-1, 0, 9).view(1, 1, 1, 9), 1, 1, 9, device)
    additive = torch.zeros(1, 1, 1, 9)
    additive[..., :3] = torch.finfo(torch.float32).min
    rows = read_mask(additive, 1, 1, 9, device)
    assert rows.start is not None
    assert rows.start.tolist() == [3]
    assert rows.mask is None


@pytest.mark.parametrize("method", ["h2o", "snapkv"])
def test_methods_that_evict_need_their_cache_and_cannot_go_back(method: str) -> None:
    model, ids = build(), tokens(1, 12)
    with session(model, method=method, min_length=0):
        with pytest.raises(RequestError, match="LokiCache"):
            model.generate(ids, past_key_values=transformers.DynamicCache(config=model.config), max_new_tokens=2)
        with pytest.raises(RequestError, match="cannot be cropped"):
            model.generate(ids, prompt_lookup_num_tokens=3, max_new_tokens=20)


def test_triton_without_a_gpu_and_an_unchangeable_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    monkeypatch.setattr("lean_kernels._rt.INTERPRET", False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        enable(model, basis_of("Llama"), backend="triton")
    monkeypatch.setattr(type(model.model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(NotImplementedError, match="LlamaForCausalLM"):
        enable(model, basis_of("Llama"))
    assert "_loki_runtime" not in model.__dict__
