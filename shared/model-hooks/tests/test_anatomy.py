"""The anatomy of every layout is right, and what cannot be read is refused by name with nothing changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, LAYERS, SMALL, VOCAB, build, parent, small, spread, vlm
from torch import nn

from model_hooks import RequestError, UnsupportedArchitectureError, anatomy, drop
from model_hooks.structure import Sublayer


def norms(block: nn.Module, sublayer: Sublayer) -> tuple[str, ...]:
    """The sublayer's own norms, without dropouts."""
    return tuple(n for n in sublayer.own_norms if not isinstance(block.get_submodule(n), nn.Dropout))


@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "opt"])
def test_layout_norms_and_sublayers(name: str) -> None:
    family, model = FAMILIES[name], parent(name)
    a = anatomy(model)
    assert len(a.blocks) == a.num_original_layers == LAYERS
    assert a.layout == family.layout
    for block in a.blocks:
        attention, mlp = block.attention, block.mlp
        assert attention is not None
        assert mlp is not None
        assert hasattr(attention.module, "layer_idx")
        assert norms(block.module, attention) == family.attention
        assert norms(block.module, mlp) == family.mlp
        assert (
            tuple(n for n in attention.shared if "norm" in n)
            == family.shared
            == tuple(n for n in mlp.shared if "norm" in n)
        )
        assert attention.scale == mlp.scale == family.scale
        assert model.get_submodule(f"{block.name}.{attention.name}") is attention.module
    assert [bool(b.experts) for b in a.blocks][-1] is bool(family.experts)
    assert model.get_submodule(a.head).weight.shape[0] == VOCAB
    assert model.get_submodule(a.embeddings) is model.get_input_embeddings()
    assert "norm" in a.final_norm or "ln" in a.final_norm
    assert a.vision_tower is None


def test_the_two_matrices_of_opt_are_one_feed_forward() -> None:
    mlp = anatomy(parent("opt")).blocks[0].mlp
    assert mlp is not None
    assert (mlp.pre, mlp.name) == (("final_layer_norm", "fc1", "activation_fn"), "fc2")


@pytest.mark.parametrize("name", [n for n in FAMILIES if FAMILIES[n].experts])
def test_experts_router_and_shared_experts(name: str) -> None:
    a = anatomy(parent(name))
    block = a.blocks[-1]
    assert block.experts is not None
    assert block.mlp is not None
    assert block.experts.num_experts == FAMILIES[name].experts
    router = next(p for p in block.mlp.module.get_submodule(block.experts.router).parameters() if p.dim() == 2)
    assert router.shape == (FAMILIES[name].experts, 32)
    has_shared = name in {"qwen2_moe", "deepseek_v2", "deepseek_v3"}
    assert bool(block.experts.shared) is has_shared
    if name.startswith("deepseek"):
        assert a.blocks[0].experts is None  # first_k_dense_replace = 1


VLMS = {
    "llava": ("model.vision_tower", "model.multi_modal_projector", "model.language_model"),
    "qwen2_vl": ("model.visual", "model.visual.merger", "model.language_model"),
    "paligemma": ("model.vision_tower", "model.multi_modal_projector", "model.language_model"),
    "idefics3": ("model.vision_model", "model.connector", "model.text_model"),
}


@pytest.mark.parametrize("name", VLMS)
def test_vision_tower_connector_and_language_model(name: str) -> None:
    a = anatomy(vlm(name))
    assert (a.vision_tower, a.connector, a.decoder_name) == VLMS[name]
    assert a.stack_name == f"{a.decoder_name}.layers"


def test_a_model_without_a_head_and_a_model_in_training_are_read_too() -> None:
    bare = copy.deepcopy(parent("llama").model)
    assert anatomy(bare).stack_name == "layers"
    assert anatomy(bare).head is None
    model = build("llama").train()
    assert anatomy(model).layout == "pre_norm"
    assert model.training
    half = build("gemma2").to(torch.bfloat16)
    assert anatomy(half).layout == "sandwich"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
def test_16_bits_are_read_as_32_are(name: str, dtype: torch.dtype) -> None:
    whole, half = anatomy(parent(name)), anatomy(build(name).to(dtype))
    assert half.layout == whole.layout
    for one, other in zip(half.blocks, whole.blocks, strict=True):
        assert [(s.name, s.scale, s.pre, s.post) for s in one.sublayers] == [
            (s.name, s.scale, s.pre, s.post) for s in other.sublayers
        ]


def test_one_large_channel_hides_no_residual_multiplier() -> None:
    model = build("granite").to(torch.bfloat16)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 1000.0
    assert {s.scale for b in anatomy(model).blocks for s in b.sublayers} == {0.25}
    for layer in model.model.layers:
        layer.residual_multiplier = torch.tensor(0.9)  # no float that the block owns: nothing explains it
    with pytest.raises(UnsupportedArchitectureError, match="around a residual stream"):
        anatomy(model)


def test_reading_leaves_no_trace() -> None:
    model = build("mixtral")
    before = {n: p.clone() for n, p in model.state_dict().items()}
    anatomy(model)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "_traced_input" not in module.__dict__


def test_the_text_form_names_each_block() -> None:
    text = str(anatomy(parent("gemma2")))
    assert text.startswith("Gemma2ForCausalLM: 4 blocks in model.layers, sandwich")
    assert "attention self_attn(input_layernorm+post_attention_layernorm)" in text


HYBRID = {"mamba_d_state": 4, "use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1}
GEMMA4 = {"head_dim": 8, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
          "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": VOCAB, "sliding_window": 8}  # fmt: skip
GEMMA3N = GEMMA4 | {"hidden_size_per_layer_input": 8, "laurel_rank": 4, "intermediate_size": 48,
                    "activation_sparsity_pattern": [0.0] * 4}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCAB}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": VOCAB}  # fmt: skip
REFUSED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "t5": ("T5ForConditionalGeneration", "T5Config", T5, "encoder-decoder"),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART, "encoder-decoder"),
    "mamba": ("MambaForCausalLM", "MambaConfig", SMALL, "mixer \\(MambaMixer\\)"),
    "rwkv": ("RwkvForCausalLM", "RwkvConfig", SMALL | {"attention_hidden_size": 32}, "RwkvSelfAttention"),
    "jamba": ("JambaForCausalLM", "JambaConfig", SMALL | HYBRID, "Mamba"),
    "recurrent_gemma": ("RecurrentGemmaForCausalLM", "RecurrentGemmaConfig", SMALL, "RecurrentBlock"),
    "gemma3n": ("Gemma3nForCausalLM", "Gemma3nTextConfig", SMALL | GEMMA3N, "block"),
    "gemma4": ("Gemma4ForCausalLM", "Gemma4TextConfig", SMALL | GEMMA4, "KV cache, 0 did|KV cache failed"),
    "bloom": ("BloomForCausalLM", "BloomConfig", SMALL | {"n_layer": 4, "n_head": 4}, "around a residual stream"),
    "bert": ("BertLMHeadModel", "BertConfig", SMALL | {"is_decoder": True}, "expected|residual"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_recognised_is_refused_with_its_name(name: str) -> None:
    model_class, config_class, settings, reason = REFUSED[name]
    model = spread(getattr(transformers, model_class)(getattr(transformers, config_class)(**settings)))
    before = {n: p.clone() for n, p in model.state_dict().items()}
    for act in (anatomy, lambda m: drop(m, attention=[1])):
        with pytest.raises(UnsupportedArchitectureError, match=reason) as caught:
            act(model)
        assert str(caught.value).startswith(model_class)
        assert "\n" not in str(caught.value)
    assert isinstance(caught.value, RequestError)
    assert type(model).__name__ == model_class
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert not hasattr(model.config, "lean")


def test_a_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(small("LlamaConfig"))
    with pytest.raises(UnsupportedArchitectureError, match="LlamaForCausalLM has no weights"):
        anatomy(model)


def test_arithmetic_that_is_none_of_the_layouts_is_refused() -> None:
    model = build("llama")

    class Doubling(type(model.model.layers[2])):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().forward(*args, **kwargs)

    model.model.layers[2].__class__ = Doubling
    with pytest.raises(UnsupportedArchitectureError, match=r"block 2 \(Doubling\) is not x \+ self_attn"):
        anatomy(model)
