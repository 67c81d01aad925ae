"""Merging, saving, auditing and storing: every zero stays, bit for bit."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import vlmodels
from hypothesis import given, settings
from hypothesis import strategies as st
from ressa import attach, dense, find_branches, merge
from ressa.export import accelerate_24, compress, decompress
from ressa.inspecting import inspect
from ressa.layers import SparseLoraLinear
from ressa.merging import SPARSITY, check_zeros, save
from ressa.pruning import Pruning, prune
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from model_hooks import RequestError

UP = "model.language_model.layers.0.mlp.up_proj"


class Setting:
    def __init__(self) -> None:
        self.dense, (self.batch,) = vlmodels.build("llava")
        how = Pruning(sparsity=0.5, pattern="2:4", keep_dense=True)
        self.masks = prune(self.dense, find_branches(self.dense), [self.batch], how).masks

    def logits(self, model: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(**self.batch).logits
        return found

    def student(self, dtype: torch.dtype = torch.float32, **how: Any) -> Any:
        """With factors of a size that matters."""
        model = attach(copy.deepcopy(self.dense).to(dtype), self.masks, **{"rank": 4, **how})
        generator = torch.Generator().manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        return model.eval()


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merged_weights_are_the_formula_rounded_once_with_exact_zeros(setting: Setting, dtype: torch.dtype) -> None:
    student = setting.student(dtype)
    layer = student.base_model.model.get_submodule(UP)
    update = (
        layer.scaling["default"] * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    )
    mask = setting.masks[UP]
    expected = ((layer._weight().double() + update) * mask).detach()
    merged = merge(student)
    check_zeros(merged, setting.masks)
    found = merged.get_submodule(UP).weight
    assert found.dtype == dtype
    assert torch.allclose(found.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    before = setting.dense.get_submodule(UP).weight.to(dtype)
    assert (found != before)[mask].float().mean() > 0.9
    assert (found[~mask].view(torch.int16 if found.element_size() == 2 else torch.int32) == 0).all()


def test_the_merged_model_is_plain_and_gives_the_students_answers(setting: Setting) -> None:
    student = setting.student()
    found = setting.logits(student)
    merged = merge(student)
    assert type(merged) is type(setting.dense)
    assert not any(isinstance(m, SparseLoraLinear) for m in merged.modules())
    assert torch.allclose(setting.logits(merged), found, atol=1e-4)


def test_merge_and_unmerge_in_place_keep_zeros_and_restore_the_base_bit_for_bit(setting: Setting) -> None:
    student = setting.student()
    found, before = setting.logits(student), copy.deepcopy(student.state_dict())
    student.merge_adapter()
    check_zeros(student.base_model.model, setting.masks)
    assert torch.allclose(setting.logits(student), found, atol=1e-4)
    with dense(student):
        assert torch.equal(setting.logits(student), setting.logits(setting.dense))
    student.unmerge_adapter()
    assert all(torch.equal(w, before[n]) for n, w in student.state_dict().items())
    assert torch.equal(setting.logits(student), found)


@pytest.mark.parametrize("family", vlmodels.FAMILIES)
def test_every_family_is_taught_repaired_and_merged(family: str) -> None:
    plain, (batch,) = vlmodels.build(family)
    masks = prune(plain, find_branches(plain), [batch], Pruning(keep_dense=True), image_token_id=vlmodels.IMAGE).masks
    with torch.no_grad():
        expected = plain(**batch).logits
    student = attach(copy.deepcopy(plain), masks, rank={"vision": 2, "connector": 3, "language": 4})
    student.train()
    student(**batch, use_cache=False).logits.square().mean().backward()
    moved = [n for n, p in student.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)]
    branches = {find_branches(plain).of(n.removeprefix("base_model.model.").split(".lora_")[0]) for n in moved}
    assert branches == {"vision", "connector", "language"}
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    with dense(student):
        assert torch.allclose(student(**batch).logits, expected, atol=1e-4)
    student = student.double()  # random models make much of rounding
    batch = {n: t.double() if t.is_floating_point() else t for n, t in batch.items()}
    with torch.no_grad():
        found = student.eval()(**batch).logits
        merged = merge(student)
        assert not torch.allclose(found.float(), expected, atol=1e-3)
        assert torch.allclose(merged(**batch).logits, found, atol=1e-4)
    check_zeros(merged, masks)


def test_adapters_of_one_branch_leave_the_zeros_of_the_other(setting: Setting) -> None:
    merged = merge(setting.student(rank={"language": 4}))
    check_zeros(merged, setting.masks)
    tower = [p for p in setting.masks if "vision" in p]
    assert all(
        torch.equal(merged.get_submodule(p).weight, setting.dense.get_submodule(p).weight * setting.masks[p])
        for p in tower
    )


def test_a_dense_update_is_refused_unless_its_zeros_may_go(setting: Setting) -> None:
    student = setting.student(update="dense")
    found = setting.logits(student)
    with pytest.raises(RequestError, match="a dense update cannot be merged without losing the zeros"):
        merge(student)
    merged = merge(setting.student(update="dense"), lose_zeros=True)
    assert torch.allclose(setting.logits(merged), found, atol=1e-4)
    assert float((merged.get_submodule(UP).weight == 0).float().mean()) < 0.01
    assert not torch.allclose(setting.logits(setting.student()), found, atol=1e-2)


def test_broken_adapters_and_other_models_are_not_merged(setting: Setting) -> None:
    student = setting.student()
    before = copy.deepcopy(student.state_dict())
    layer = student.base_model.model.get_submodule(UP)
    layer.lora_B["default"].weight.data[0] = torch.inf
    with pytest.raises(RequestError, match=rf"{UP}.lora_B.default.weight is NaN or infinite"):
        merge(student)
    with pytest.raises(RequestError, match="merged weights are NaN or infinite"):
        layer.merge()
    same = (torch.equal(w, before[n]) for n, w in student.state_dict().items() if UP not in n or "lora_B" not in n)
    assert all(same)
    with pytest.raises(RequestError, match="has no masked adapters"):
        merge(setting.dense)
    with pytest.raises(RuntimeError, match="has lost zeros"):
        check_zeros(setting.dense, setting.masks)


def test_the_folder_is_ordinary_and_its_audit_agrees(setting: Setting, tmp_path: Path) -> None:
    merged = merge(setting.student())
    folder = save(merged, tmp_path / "out")
    again = AutoModelForImageTextToText.from_pretrained(folder)
    assert all(torch.equal(w, merged.state_dict()[n]) for n, w in again.state_dict().items())
    assert torch.allclose(setting.logits(again.eval()), setting.logits(merged), atol=1e-5)
    said = json.loads((folder / SPARSITY).read_text())
    audit = inspect(folder)
    assert audit["violations"] == []
    assert audit["sparsity"] == said["sparsity"] == 0.5
    assert audit["patterns"] == {"2:4": len(setting.masks)}
    assert said["modules"].keys() == setting.masks.keys()
    assert audit["branches"]["vision"]["zeros"] * 2 == audit["branches"]["vision"]["weights"]
    assert inspect(again)["masks"] == audit["masks"]
    with pytest.raises(RequestError, match="is not empty"):
        save(merged, folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = next(n for n in weights if "layers.0.mlp.up_proj" in n)
    weights[name][0] = 1.0
    save_file(weights, file, metadata={"format": "pt"})
    (line,) = inspect(folder)["violations"]
    assert line.startswith(f"{UP}: pattern is unstructured, sparsity.json says 2:4")


def test_stored_bits_are_smaller_and_lossless(setting: Setting, tmp_path: Path) -> None:
    folder = save(merge(setting.student(torch.bfloat16)), tmp_path / "out", verify=False)
    report = compress(folder, tmp_path / "small")
    assert report["matrices"] == len(setting.masks)
    assert report["bytes"] < report["dense_bytes"]
    back = decompress(tmp_path / "small", tmp_path / "back")
    assert (back / SPARSITY).read_bytes() == (folder / SPARSITY).read_bytes()
    ours, theirs = load_file(folder / "model.safetensors"), load_file(back / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(w.view(torch.uint8), theirs[n].view(torch.uint8)) for n, w in ours.items())
    AutoModelForImageTextToText.from_pretrained(back)
    with pytest.raises(RequestError, match=r"holds no model\*\.bitmask\.safetensors"):
        decompress(folder, tmp_path / "other")


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 999), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.floats(0, 1))
def test_bits_of_any_matrix_come_back(seed: int, dtype: torch.dtype, share: float) -> None:
    from ressa.export import _packed, _unpacked

    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(7, 9, generator=generator).masked_fill(torch.rand(7, 9, generator=generator) < share, 0)
    weight[0, 0] = -0.0
    weight[1, 1] = torch.nan
    weight = weight.to(dtype)
    shapes: dict[str, list[int]] = {}
    packed = _packed("w", weight, shapes)
    back = _unpacked(packed["w:mask"], packed["w:values"], shapes["w"]) if shapes else packed["w"]
    assert torch.equal(back.view(torch.uint8), weight.view(torch.uint8))


def test_without_a_gpu_the_runtime_says_so_and_changes_nothing(setting: Setting) -> None:
    model = copy.deepcopy(setting.dense)
    report = accelerate_24(model)
    assert "CUDA" in report["notice"]
    assert report["converted"] == []
    assert all(torch.equal(w, setting.dense.state_dict()[n]) for n, w in model.state_dict().items())
