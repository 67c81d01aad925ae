"""Branches of tiny models of the families, found by structure."""

from __future__ import annotations

import pytest
import torch
import vlmodels
from ressa.branches import BranchNotFoundError, find_branches, matches
from ressa.pruning import Pruning, prune
from torch import nn

from model_hooks import RequestError

LLAVA = ("model.vision_tower", ("model.multi_modal_projector",), "model.language_model")
SIGLIP = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"}
LLAMA = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
         "mlp.down_proj"}  # fmt: skip
QWEN = ("model.visual", ("model.visual.merger",), "model.language_model")
IDEFICS = ("model.vision_model", ("model.connector",), "model.text_model")
BLIP = ("vision_model", ("query_tokens", "qformer", "language_projection"), "language_model")
EVA = {"self_attn.qkv", "self_attn.projection", "mlp.fc1", "mlp.fc2"}
OPT = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"}
T5 = {f"layer.{i}.{a}.{n}" for i, a in ((0, "SelfAttention"), (1, "EncDecAttention")) for n in "qkvo"}
T5 |= {f"layer.{i}.DenseReluDense.{n}" for i in (1, 2) for n in ("wi_0", "wi_1", "wo")}
# paths of vision, connector and language; leaves of their blocks; blocks of vision and language
EXPECTED = {
    "blip2": (BLIP, EVA, OPT, 2, 2),
    "instructblip": (BLIP, EVA, T5, 2, 4),
    "llava": (LLAVA, SIGLIP, LLAMA, 2, 2),
    "llava_onevision": ((LLAVA[0], ("model.image_newline", *LLAVA[1]), LLAVA[2]), SIGLIP, LLAMA, 2, 2),
    "paligemma": (LLAVA, SIGLIP, LLAMA, 2, 2),
    "idefics3": (IDEFICS, SIGLIP, LLAMA, 2, 2),
    "smolvlm": (IDEFICS, SIGLIP, LLAMA, 2, 2),
    "qwen2_vl": (QWEN, {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}, LLAMA, 2, 2),
    "qwen25_vl": (QWEN, {"attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}, LLAMA, 2, 2),
    "qwen3_vl": ((QWEN[0], ("model.visual.merger", "model.visual.deepstack_merger_list"), QWEN[2]),
                 {"attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2"}, LLAMA, 2, 2),
}  # fmt: skip


@pytest.mark.parametrize("family", vlmodels.FAMILIES)
def test_branches_of_a_family_are_found_and_share_out_every_parameter(family: str) -> None:
    model, _ = vlmodels.build(family)
    found = find_branches(model)
    (vision, connector, language), vision_leaves, language_leaves, towers, decoders = EXPECTED[family]
    assert (found.vision, found.connector, found.language) == (vision, connector, language)
    assert (len(found.blocks["vision"]), len(found.blocks["language"])) == (towers, decoders)
    for branch, leaves in (("vision", vision_leaves), ("language", language_leaves)):
        paths = found.linears(branch)
        names = {p.removeprefix(f"{b}.") for p in paths for b in found.blocks[branch] if p.startswith(f"{b}.")}
        assert names == leaves
    assert all(found.of(name) in ("vision", "connector", "language", "head") for name, _ in model.named_parameters())
    owned = [path for branch in ("vision", "connector", "language") for path in found.linears(branch)]
    assert len(owned) == len(set(owned))
    prunable = {*found.linears("vision"), *found.linears("language")}
    assert not any("lm_head" in p or "merger" in p or "qformer" in p or "embed" in p for p in prunable)
    assert found.linears("connector")


@pytest.mark.parametrize("family", vlmodels.FAMILIES)
def test_wanda_prunes_every_family_to_the_zeros_asked_for(family: str) -> None:
    model, batches = vlmodels.build(family)
    found = find_branches(model)
    report = prune(model, found, batches, Pruning("wanda", 0.5), image_token_id=vlmodels.IMAGE).report
    assert report["dead"] == []
    for branch in ("vision", "language"):
        for path, layer in found.linears(branch).items():
            zeros = (layer.weight == 0).sum(1)
            assert (zeros == layer.in_features // 2).all(), path
    with torch.no_grad():
        assert bool(torch.isfinite(model(**batches[0]).logits).all())


def test_a_model_without_branches_is_refused_with_candidates_and_takes_paths() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.eyes = nn.ModuleList([Block(), Block()])
            self.link = nn.Linear(4, 4)
            self.mind = nn.ModuleList([Block(), Block()])

    with pytest.raises(BranchNotFoundError, match="Own: no vision tower"):
        find_branches(Own())
    with pytest.raises(BranchNotFoundError, match="--vision-path nose"):
        find_branches(Own(), vision="nose")
    found = find_branches(Own(), vision="eyes", language="mind")
    assert found.connector == ("link",)
    assert list(found.linears("language")) == ["mind.0.lin", "mind.1.lin"]
    assert list(found.linears("language", ("mind.0",))) == ["mind.1.lin"]
    with pytest.raises(RequestError, match="branch 'nose'"):
        found.linears("nose")


def test_patterns_are_whole_names_or_globs() -> None:
    path = "model.layers.1.mlp.up_proj"
    assert all(matches(path, name) for name in ("up_proj", "layers.1", "model.layers.*.up_proj"))
    assert not matches(path, "up")
    assert not matches("model.layers.11.mlp", "layers.1")


def test_experts_in_one_tensor_are_refused_with_their_share_unless_skipped() -> None:
    model, batches = vlmodels.build("llava")
    block = model.model.language_model.layers[0]
    block.mlp.experts = nn.Parameter(torch.zeros(4, 32, 32))
    found = find_branches(model)
    with pytest.raises(RequestError, match=r"layers.0.mlp.experts holds .* \d+% of the model: --skip-experts"):
        prune(model, found, batches, Pruning())
    report = prune(model, found, batches, Pruning(skip_experts=True)).report
    assert report["experts"] == 4 * 32 * 32
