"""Slimming a checkpoint layer by layer: what changed, what did not, what was under-covered, and what is read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_compress import formats, packing
from moe_compress.awq import smooth
from moe_compress.moments import Moments, matrices_of
from moe_compress.quantising import Codes, gptq, rtn
from moe_compress.slimming import PRUNING, Slimming
from moe_compress.streaming import slim
from moemodels import FAMILIES, build, logits, save_with_tokenizer
from safetensors.torch import load_file, save_file

import model_hooks
from model_hooks import RequestError, UnsupportedArchitectureError, anatomy
from model_hooks.experts import moe_layers
from model_hooks.layerwise import map_layers
from model_hooks.text import load_sequences
from model_hooks.watch import watch

OF = {"min_tokens": 8, "group": 32}


def banks(model: Any) -> list[Any]:
    return [layer.bank for layer in moe_layers(anatomy(model))]


@pytest.mark.parametrize("method", PRUNING)
@pytest.mark.parametrize("pattern", ["", "2:4"])
def test_pruned_experts_and_nothing_else(
    method: str, pattern: str, folder: Path, sequences: torch.Tensor, tmp_path: Path
) -> None:
    slim(folder, tmp_path / "s", sequences, Slimming(method, pattern=pattern, **OF))
    before, after = (model_hooks.load(f, tokenizer=False)[0].state_dict() for f in (folder, tmp_path / "s"))
    for name, weight in before.items():
        if ".experts." not in name:
            assert torch.equal(after[name], weight), name
            continue
        for expert in after[name]:
            assert int((expert == 0).sum()) == pytest.approx(expert.numel() // 2, abs=2)
            if pattern:
                assert ((expert.view(-1, 4) == 0).sum(-1) == 2).all()


QUICK = {("gptq", "mixtral"), ("awq", "deepseek_v3")}


@pytest.mark.parametrize(
    ("method", "family"),
    [
        pytest.param(method, family, marks=() if (method, family) in QUICK else pytest.mark.slow)
        for method in ("gptq", "awq") for family in FAMILIES
    ],
)  # fmt: skip
def test_quantised_families_load_as_what_they_were_rounded_to(
    method: str, family: str, sequences: torch.Tensor, tmp_path: Path
) -> None:
    source = save_with_tokenizer(build(family), tmp_path / "m")
    how = Slimming(method, **OF)
    report = slim(source, tmp_path / "packed", sequences, how)
    slim(source, tmp_path / "dense", sequences, how, form="dense")
    packed, _ = packing.load(tmp_path / "packed")
    dense, _ = model_hooks.load(tmp_path / "dense", tokenizer=False)
    by_transformers, _ = model_hooks.load(tmp_path / "packed", tokenizer=False)
    for name, weight in dense.state_dict().items():
        assert torch.equal(packed.state_dict()[name], weight), name
    for model in (packed, by_transformers):
        torch.testing.assert_close(logits(model), logits(dense), atol=1e-5, rtol=1e-5)
    for bank in banks(dense):
        assert all(len(row.unique()) <= 16 for row in bank.down_proj.flatten(0, 1))
    mixtures = 4 - family.startswith("deepseek")
    shared = family in ("qwen2_moe", "deepseek_v2", "deepseek_v3")
    assert len(report["quantised"]) == mixtures * (8 * 3 + 3 * shared)
    assert set(report["quantised"].values()) == {4}


@pytest.mark.parametrize(
    ("family", "how"),
    [
        ("mixtral", {"symmetric": True}),
        ("mixtral", {"symmetric": False}),
        ("deepseek_v3", {"layer_bits": {1: 8, 2: 3}, "scope": "block", "group": 8}),
    ],
)
def test_every_key_is_what_compressed_tensors_defines(
    family: str, how: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    """Names, dtypes, shapes and bits of the written files by its matching rules, compressor and decompressor."""
    source = folder if family == "mixtral" else save_with_tokenizer(build(family), tmp_path / "m")
    report = slim(source, tmp_path / "p", None, Slimming("rtn", **{**OF, **how}))
    model, _ = packing.load(tmp_path / "p")
    stored = {k.removesuffix(".weight"): v for k, v in as_stored(model).items()}
    found = {name: (weight, scheme) for name, weight, scheme in formats.decompressed(tmp_path / "p")}
    assert {name: scheme.weights.num_bits for name, (_, scheme) in found.items()} == report["quantised"]
    assert len(found) >= (4 * 8 * 3 if family == "mixtral" else 3 * (8 * 3 + 3) + 3)
    for name, (weight, scheme) in found.items():
        assert torch.equal(weight, stored[name]), name
        assert scheme.weights.symmetric == how.get("symmetric", True)
    assert not any(name.endswith((".gate", "lm_head", "embed_tokens")) for name in found)
    checked = formats.check(tmp_path / "p")
    assert (checked["quantised"], checked["bits"]) == (len(found), sorted(set(report["quantised"].values())))


def test_a_tied_head_is_named_as_dense(sequences: torch.Tensor, tmp_path: Path) -> None:
    """No file holds it, but plain transformers makes a module of it: it would look for packed weights there."""
    from transformers import AutoModelForCausalLM

    source = save_with_tokenizer(build(tie_word_embeddings=True), tmp_path / "m")
    slim(source, tmp_path / "p", sequences, Slimming("gptq", **OF))
    ignored = json.loads((tmp_path / "p/config.json").read_text())["quantization_config"]["ignore"]
    assert "lm_head" in ignored
    assert len(ignored) == len(set(ignored)) == 1 + 1 + 4 * 5  # embeddings, head, attention and routers
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "p", output_loading_info=True)
    assert not info["missing_keys"]
    torch.testing.assert_close(logits(plain), logits(packing.load(tmp_path / "p")[0]), atol=1e-5, rtol=1e-5)


def as_stored(model: Any) -> dict[str, torch.Tensor]:
    """The weights under the names that files have."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, model.state_dict()))


def test_files_that_are_not_the_format_are_found(folder: Path, tmp_path: Path) -> None:
    slim(folder, tmp_path / "p", None, Slimming("rtn", **OF))
    file = min((tmp_path / "p").glob("*.safetensors"))
    good, config = load_file(file), json.loads((tmp_path / "p/config.json").read_text())
    key = "model.layers.0.block_sparse_moe.experts.0.w1"

    def said(changes: dict[str, torch.Tensor], **section: Any) -> str:
        save_file({**good, **changes}, file, metadata={"format": "pt"})
        own = {**config, "quantization_config": {**config["quantization_config"], **section}}
        (tmp_path / "p/config.json").write_text(json.dumps(own))
        with pytest.raises(formats.WrongFormat) as error:
            formats.check(tmp_path / "p")
        return str(error.value)

    packed = good[f"{key}.weight_packed"]
    assert "does not say what is in the files" in said({f"{key}.weight_zero_point": packed.clone()})
    assert f"{key} cannot be decompressed" in said({f"{key}.weight_shape": torch.tensor([32, 31])})
    assert f"{key}.weight_packed is not what" in said({f"{key}.weight_packed": packed[:, :3].clone()})
    assert f"{key} cannot be decompressed" in said({f"{key}.weight_packed": torch.cat([packed, packed[:1]])})
    assert f"{key} has" in said({}, ignore=[*config["quantization_config"]["ignore"], key])
    assert "has ['weight'] where config.json asks for ['weight_packed'" in said({}, ignore=["lm_head"])
    with pytest.raises(RequestError, match="is not quantised"):
        formats.check(folder)


@pytest.mark.parametrize("method", ["gptq", pytest.param("awq", marks=pytest.mark.slow)])
def test_zero_points_fit_what_is_not_centred(
    method: str, folder: Path, sequences: torch.Tensor, tmp_path: Path
) -> None:
    def shift(index: int, layer: Any) -> None:
        layer.mlp.experts.down_proj.add_(0.3)

    map_layers(folder, tmp_path / "m", shift)
    whole = banks(model_hooks.load(tmp_path / "m", tokenizer=False)[0])
    error = {}
    for symmetric in (True, False):
        out = tmp_path / str(symmetric)
        how = Slimming(method, symmetric=symmetric, **OF)
        report = slim(tmp_path / "m", out, sequences, how)
        found = banks(packing.load(out)[0])
        assert all(len(row.unique()) <= 16 for row in found[1].down_proj.flatten(0, 1))
        error[symmetric] = report["layers"]["1"]["error"]["down_proj"]
        assert (found[1].gate_up_proj - whole[1].gate_up_proj).norm() > 0
    assert error[False] < 0.7 * error[True]


def test_layers_with_bits_of_their_own(folder: Path, sequences: torch.Tensor, tmp_path: Path) -> None:
    how = Slimming("gptq", layer_bits={0: 8, 2: 16}, **OF)
    report = slim(folder, tmp_path / "p", sequences, how)
    assert set(report["quantised"].values()) == {4, 8}
    before, after = model_hooks.load(folder, tokenizer=False)[0], packing.load(tmp_path / "p")[0]
    assert torch.equal(banks(before)[2].down_proj, banks(after)[2].down_proj)
    errors = [(banks(before)[i].down_proj - banks(after)[i].down_proj).norm().item() for i in (0, 1)]
    assert errors[0] < errors[1] / 8
    groups = json.loads((tmp_path / "p/config.json").read_text())["quantization_config"]["config_groups"]
    assert sorted(g["weights"]["num_bits"] for g in groups.values()) == [4, 8]


@pytest.mark.slow
def test_attention_is_slimmed_where_asked(sequences: torch.Tensor, tmp_path: Path) -> None:
    source = save_with_tokenizer(build("deepseek_v2"), tmp_path / "m")
    report = slim(source, tmp_path / "p", sequences, Slimming("rtn", scope="block", **OF | {"group": 8}))
    names = set(report["quantised"])
    assert "model.layers.0.mlp.gate_proj" in names  # a dense feed-forward
    assert any("self_attn.o_proj" in n for n in names)
    assert not any(n.endswith("mlp.gate") or "lm_head" in n for n in names)
    model, _ = packing.load(tmp_path / "p")
    by_transformers, _ = model_hooks.load(tmp_path / "p", tokenizer=False)
    torch.testing.assert_close(logits(by_transformers), logits(model), atol=1e-5, rtol=1e-5)


def starved(folder: Path) -> Any:
    """The tiny model with an expert 5 in layer 3 that is never chosen: of two opposite pairs two are always ahead."""
    model, _ = model_hooks.load(folder, tokenizer=False)
    with torch.no_grad():
        gate = model.model.layers[3].mlp.gate.weight
        gate[1], gate[3], gate[5] = -gate[0], -gate[2], 0
    return model


@pytest.mark.parametrize(
    ("method", "policy"),
    [
        pytest.param(method, policy, marks=() if (method, policy) == ("sparsegpt", "shrink") else pytest.mark.slow)
        for method in ("sparsegpt", "gptq", "wanda") for policy in ("shrink", "all-tokens", "plain")
    ],
)  # fmt: skip
def test_an_expert_without_tokens_is_dealt_with_and_named(
    method: str, policy: str, folder: Path, sequences: torch.Tensor, tmp_path: Path
) -> None:
    source = save_with_tokenizer(starved(folder), tmp_path / "m")
    report = slim(source, tmp_path / "s", sequences, Slimming(method, policy=policy, **OF), form="dense")
    layer = report["layers"]["3"]
    assert layer["tokens"]["5"] == 0
    assert layer["under_covered"]["5"] == policy
    weight = banks(model_hooks.load(tmp_path / "s", tokenizer=False)[0])[3].down_proj[5]
    assert weight.isfinite().all()
    assert int((weight != 0).sum()) > weight.numel() // 3


def test_a_starved_expert_can_be_an_error_that_leaves_nothing(
    folder: Path, sequences: torch.Tensor, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=r"layer 0 expert \d: \d+ calibration tokens, 5000 are wanted"):
        slim(folder, tmp_path / "s", sequences, Slimming("gptq", policy="error", group=32, min_tokens=5000))
    assert list(tmp_path.iterdir()) == []
    source = save_with_tokenizer(starved(folder), tmp_path / "m")
    with pytest.raises(RequestError, match="layer 3 expert 5: 0 calibration tokens, 1 are wanted"):
        slim(source, tmp_path / "s", sequences, Slimming("wanda", policy="error", min_tokens=1))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_awq_scales_leave_outputs_and_routing_as_they_were(family: str, sequences: torch.Tensor) -> None:
    model = build(family)
    with torch.no_grad():
        for layer in moe_layers(anatomy(model)):  # channels of very unequal sizes, as in trained models
            layer.bank.gate_up_proj[..., :4] *= 5
    parts = anatomy(model)
    layer = moe_layers(parts)[1]
    block = parts.blocks[layer.block]
    seen: dict[str, Any] = {}
    layer.router.register_forward_hook(lambda m, a, out: seen.update(logits=out[0], chosen=out[2]))
    before = logits(model)
    routed = dict(seen)
    watcher = Moments(matrices_of(block.module, layer, everything=False), outer=False, sample_tokens=64)
    with watcher.watching(model, block.module, layer):
        watch(model, sequences[:2], watcher)
    found = smooth(block, layer, watcher.sample, Codes(4, 32))
    assert found["ratio"] > 0
    assert found["gain"] < 1
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen["logits"], routed["logits"], atol=1e-5, rtol=1e-5)
    assert torch.equal(seen["chosen"].sort(-1).values, routed["chosen"].sort(-1).values)


def test_awq_refuses_where_something_else_reads_the_norm(sequences: torch.Tensor) -> None:
    model = build("qwen2_moe")
    parts = anatomy(model)
    layer = moe_layers(parts)[0]
    layer.module.shared_expert.register_forward_pre_hook(lambda m, a: (a[0].sin(),))
    layer.bank.gate_up_proj.data[..., :4] *= 9
    with pytest.raises(UnsupportedArchitectureError, match="cannot be folded"):
        smooth(parts.blocks[0], layer, torch.randn(64, 32) * torch.linspace(0.1, 9, 32), Codes(4, 32))


@pytest.mark.slow
def test_waves_propagation_and_batches(folder: Path, sequences: torch.Tensor, tmp_path: Path) -> None:
    """Experts in waves give what they give at once; dense propagation the same first layer and other later ones."""
    runs = {
        "whole": {}, "waves": {"workspace": 20_000}, "batches": {"batch_size": 3},
    }  # fmt: skip
    for name, options in runs.items():
        slim(folder, tmp_path / name, sequences, Slimming("gptq", **OF), form="dense", **options)
    slim(folder, tmp_path / "dense", sequences, Slimming("gptq", propagate="dense", **OF), form="dense")
    found = {n: banks(model_hooks.load(tmp_path / n, tokenizer=False)[0]) for n in (*runs, "dense")}
    for layer in range(4):
        assert torch.equal(found["waves"][layer].down_proj, found["whole"][layer].down_proj)
        same = found["batches"][layer].down_proj == found["whole"][layer].down_proj
        assert same.float().mean() > 0.97  # sums in another order may round a weight otherwise
    assert torch.equal(found["dense"][0].down_proj, found["whole"][0].down_proj)
    assert not torch.equal(found["dense"][3].down_proj, found["whole"][3].down_proj)


def test_the_same_request_gives_the_same_bytes(folder: Path, sequences: torch.Tensor, tmp_path: Path) -> None:
    for name in ("a", "b"):
        slim(folder, tmp_path / name, sequences, Slimming("gptq", **OF))
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


@pytest.mark.slow
def test_gptq_loses_less_than_rounding_on_nearly_every_matrix_of_a_trained_model() -> None:
    model, tokenizer = model_hooks.load("zoo:mixtral", dtype="float32")
    better = []
    parts, how = anatomy(model), Codes(4, 32)
    for layer in (moe_layers(parts)[0], moe_layers(parts)[3]):
        block = parts.blocks[layer.block].module
        matrices = matrices_of(block, layer, everything=False)
        moments = Moments(matrices, outer=True, sample_tokens=0)
        with moments.watching(model, block, layer):
            watch(model, load_sequences(tokenizer, "zoo:calibration", samples=8, length=256), moments)
        moments.finish()
        for m in (m for m in matrices if moments.found[m.key].n):  # some experts of the model are never chosen
            hessian = moments.found[m.key].outer
            assert hessian is not None
            found = (gptq(m.weight, hessian.clone(), how).weight, rtn(m.weight, how).weight)
            lost = [float((((w - m.weight) @ hessian) * (w - m.weight)).sum()) for w in found]
            better.append(lost[0] < lost[1])
    assert len(better) > 30
    assert sum(better) >= 0.95 * len(better)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "gptk"}, "method 'gptk' is not accepted; did you mean 'gptq'"),
        ({"method": "wanda", "sparsity": 1.2}, "sparsity 1.2"),
        ({"method": "wanda", "sparsity": 0.6, "pattern": "2:4"}, "means sparsity 0.5, not 0.6"),
        ({"bits": 1}, "bits 1"),
        ({"method": "sparsegpt", "workspace": 1e3}, "a workspace of 1e-06 GB is too small.*--workspace 1.64e-05"),
        ({"policy": "x"}, "policy 'x'"),
        ({"method": "rtn", "group": 24}, "group 24 does not divide the 32 inputs of mlp.experts.0.gate_proj"),
        ({"method": "wanda", "pattern": "24:48"}, "pattern 24:48 does not divide the 32 inputs"),
        ({"method": "rtn", "group": 32, "exclude": ("experts.3",)}, "all of a layer's or none"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    settings: dict[str, Any], message: str, folder: Path, sequences: torch.Tensor, tmp_path: Path
) -> None:
    workspace = settings.pop("workspace", 4e9)
    with pytest.raises(RequestError, match=message):
        slim(folder, tmp_path / "s", sequences, Slimming(**settings), workspace=workspace)
    assert list(tmp_path.iterdir()) == []


def test_sources_that_cannot_be_slimmed(folder: Path, sequences: torch.Tensor, tmp_path: Path) -> None:
    slim(folder, tmp_path / "p", None, Slimming("rtn", **OF))
    with pytest.raises(RequestError, match="is quantised already"):
        slim(tmp_path / "p", tmp_path / "q", None, Slimming("rtn", **OF))
    with pytest.raises(RequestError, match="exists already"):
        slim(folder, tmp_path / "p", None, Slimming("rtn", **OF))
    with pytest.raises(RequestError, match="needs calibration data"):
        slim(folder, tmp_path / "q", None, Slimming("gptq", **OF))
    with pytest.raises(RequestError, match="no MoE layers found in LlamaForCausalLM"):
        slim("zoo:llama", tmp_path / "q", None, Slimming("rtn"))
    (tmp_path / "p/slimming.json").unlink()
    with pytest.raises(RequestError, match="not by moe-compress"):
        packing.load(tmp_path / "p")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM's kernels need a GPU")
def test_vllm_generates_what_transformers_does(tmp_path: Path) -> None:
    vllm = pytest.importorskip("vllm", reason="needs vllm, which this project does not install")
    source = save_with_tokenizer(
        build(hidden_size=256, intermediate_size=256, num_attention_heads=4).to(torch.bfloat16), tmp_path / "m"
    )
    slim(source, tmp_path / "q", None, Slimming("rtn"))
    engine = vllm.LLM(str(tmp_path / "q"), enforce_eager=True, gpu_memory_utilization=0.2, max_model_len=64)
    ids = list(range(20, 36))
    sampled = vllm.SamplingParams(temperature=0, max_tokens=1)
    (answer,) = engine.generate([vllm.TokensPrompt(prompt_token_ids=ids)], sampled)
    model, _ = packing.load(tmp_path / "q")
    with torch.no_grad():
        top = model(torch.tensor([ids])).logits[0, -1].topk(3).indices.tolist()  # rounding may swap near ties
    assert answer.outputs[0].token_ids[0] in top
