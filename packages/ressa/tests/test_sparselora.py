"""Masked adapters as a PEFT method: forward, gradients, teacher, files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import vlmodels
from peft import PeftModel
from processes import started
from ressa import attach, dense, find_branches, load_adapters
from ressa.layers import SparseLoraLinear, masked_linear
from ressa.masks import MaskMismatchError
from ressa.pruning import Pruning, prune
from ressa.sparselora import SparseLoraConfig, set_backward
from torch import Tensor, nn

from model_hooks import RequestError

UP = "model.language_model.layers.0.mlp.up_proj"
RANKS = {"vision": 4, "connector": 2, "language": 3}


class Setting:
    """A dense model, its masks, and a student trained for some steps on the dense base."""

    def __init__(self) -> None:
        self.dense, (self.batch,) = vlmodels.build("llava")
        self.masks = prune(self.dense, find_branches(self.dense), [self.batch], Pruning(keep_dense=True)).masks
        self.sparse = copy.deepcopy(self.dense)
        for path, mask in self.masks.items():
            self.sparse.get_submodule(path).weight.data[~mask] = 0
        self.student = train(attach(copy.deepcopy(self.dense), self.masks, rank=RANKS, alpha=8))

    def logits(self, model: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(**self.batch).logits
        return found


def train(model: Any, steps: int = 50) -> Any:
    """Random gradients: every factor moves."""
    generator = torch.Generator().manual_seed(0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 5e-3)
    for _ in range(steps):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting()


def case(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """x, w, a, b, mask, bias of a layer."""
    g = torch.Generator().manual_seed(seed)
    x, w, a, b, bias = (torch.randn(s, generator=g, dtype=dtype) for s in ((2, 3, 12), (8, 12), (3, 12), (8, 3), (8,)))
    return x, w, a, b, torch.rand(8, 12, generator=g) > 0.5, bias


def test_the_exact_backward_is_the_gradient_of_the_formula() -> None:
    x, w, a, b, mask, bias = case()
    leaves = [t.requires_grad_() for t in (x, a, b, bias)]
    assert torch.autograd.gradcheck(lambda x, a, b, c: masked_linear(x, w, a, b, mask, 0.7, c, "exact"), leaves)
    naive = F.linear(x, (w + 0.7 * b @ a) * mask, bias)
    assert torch.allclose(masked_linear(x, w, a, b, mask, 0.7, bias, "exact"), naive, rtol=1e-12)


def test_straight_through_has_the_same_output_and_unmasked_factor_gradients() -> None:
    x, w, a, b, mask, bias = case()
    grad = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    leaves = [t.requires_grad_() for t in (x, a, b, bias)]
    out = masked_linear(x, w, a, b, mask, 0.7, bias, "ste")
    assert torch.allclose(out, masked_linear(x, w, a, b, mask, 0.7, bias, "exact"), rtol=1e-12)
    found = torch.autograd.grad(out, leaves, grad)
    plain = F.linear(x, (w * mask)) + 0.7 * F.linear(F.linear(x, a), b)  # LoRA's own gradients of a and b
    unmasked = torch.autograd.grad(plain, [a, b], grad)
    exact = torch.autograd.grad(masked_linear(x, w, a, b, mask, 0.7, bias, "exact"), leaves, grad)
    assert torch.allclose(found[1], unmasked[0])
    assert torch.allclose(found[2], unmasked[1])
    assert torch.allclose(found[0], exact[0])
    assert torch.allclose(found[3], exact[3])
    assert all(
        float(F.cosine_similarity(f.flatten(), e.flatten(), dim=0)) > 0 for f, e in zip(found, exact, strict=True)
    )


@pytest.mark.parametrize("backward", ["exact", "ste"])
def test_no_effective_weight_is_kept_for_the_backward_pass(backward: str) -> None:
    x, w, a, b, mask, _ = case(dtype=torch.float32)
    for leaf in (a, b):
        leaf.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        masked_linear(x, w, a, b, mask, 1.0, None, backward).sum().backward()
    assert kept
    assert all(t.data_ptr() in (w.data_ptr(), mask.data_ptr()) for t in kept if t.shape == w.shape)


def test_new_adapters_change_nothing_and_the_teacher_is_the_dense_model(setting: Setting) -> None:
    student = attach(copy.deepcopy(setting.dense), setting.masks, rank=4)
    assert torch.equal(setting.logits(student), setting.logits(setting.sparse))
    with dense(student):
        assert torch.equal(setting.logits(student), setting.logits(setting.dense))
    assert torch.equal(setting.logits(student), setting.logits(setting.sparse))
    names = {n for n, p in student.named_parameters() if p.requires_grad}
    assert names == {n for n, _ in student.named_parameters() if "lora_" in n}


def test_the_teacher_stays_the_dense_model_after_training_connectors_too(setting: Setting) -> None:
    student = setting.student
    assert not torch.allclose(setting.logits(student), setting.logits(setting.sparse), atol=1e-2)
    moved = [p for n, p in student.named_parameters() if "multi_modal_projector" in n and "lora_B" in n]
    assert all(float(p.detach().abs().max()) > 0 for p in moved)
    student.train()
    with dense(student):
        assert not student.training
        assert torch.equal(student(**setting.batch).logits, setting.logits(setting.dense))
        assert not student(**setting.batch).logits.requires_grad
    assert student.training
    student.eval()


@pytest.mark.parametrize(("kind", "towers"), [("DS", "language_model"), ("SD", "vision_tower")])
def test_mixed_teachers_prune_the_other_branch_without_adapters(setting: Setting, kind: str, towers: str) -> None:
    mixed = copy.deepcopy(setting.dense)
    for path, mask in setting.masks.items():
        if towers in path:
            mixed.get_submodule(path).weight.data[~mask] = 0
    with dense(setting.student, kind):
        found = setting.logits(setting.student)
    assert torch.equal(found, setting.logits(mixed))
    assert not torch.equal(found, setting.logits(setting.dense))


def test_disabled_adapters_leave_the_pruned_model(setting: Setting) -> None:
    with setting.student.disable_adapter():
        assert torch.equal(setting.logits(setting.student), setting.logits(setting.sparse))


def test_the_forward_pass_is_the_formula_in_every_branch(setting: Setting) -> None:
    by_hand = copy.deepcopy(setting.dense)
    for path, module in setting.student.base_model.model.named_modules():
        if isinstance(module, SparseLoraLinear):
            weight = by_hand.get_submodule(path).weight.data
            update = module.scaling["default"] * module.lora_B["default"].weight @ module.lora_A["default"].weight
            weight.add_(update.detach())
            if path in setting.masks:
                weight[~setting.masks[path]] = 0
            rank = RANKS["vision" if "vision" in path else "connector" if "projector" in path else "language"]
            assert module.scaling["default"] == 8 / rank
            assert module.lora_A["default"].weight.shape[0] == rank
    assert torch.allclose(setting.logits(setting.student), setting.logits(by_hand), atol=1e-4)


def test_adapters_come_back_bit_for_bit_on_the_dense_and_on_the_pruned_base(setting: Setting, tmp_path: Path) -> None:
    setting.student.save_pretrained(tmp_path)
    weights = setting.student.state_dict()
    for base in (setting.dense, setting.sparse):
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        lora = {n: w for n, w in again.state_dict().items() if "lora_" in n}
        assert lora
        assert all(torch.equal(w, weights[n]) for n, w in lora.items())
        assert torch.allclose(setting.logits(again), setting.logits(setting.student), atol=1e-5)
    with pytest.raises(RequestError, match="dense weights are not available: pass --teacher DIR"), dense(again):
        pass
    wrong = copy.deepcopy(setting.dense)
    wrong.get_submodule(UP).weight.data *= 1.1
    with pytest.raises(MaskMismatchError, match=rf"{UP}: the weights have hash \w+, the masks were made for \w+"):
        load_adapters(wrong, tmp_path)


@pytest.mark.slow
def test_a_process_that_does_not_know_the_method_fails(setting: Setting, tmp_path: Path) -> None:
    setting.student.save_pretrained(tmp_path)
    code = f"from peft import PeftConfig; PeftConfig.from_pretrained({str(tmp_path)!r})"
    unaware = started("-c", code, log=tmp_path / "log")
    assert unaware.wait() == 1
    assert "KeyError: 'SPARSELORA'" in unaware.said


def test_several_adapters_share_the_mask_and_add_up(setting: Setting, tmp_path: Path) -> None:
    setting.student.save_pretrained(tmp_path)
    model = load_adapters(copy.deepcopy(setting.dense), tmp_path)
    one = setting.logits(model)
    model.load_adapter(str(tmp_path), "other")
    assert torch.equal(setting.logits(model), one)
    model.set_adapter("other")
    assert torch.allclose(setting.logits(model), one, atol=1e-5)
    model.base_model.set_adapter(["default", "other"])
    both = setting.logits(model)
    for module in model.modules():
        if isinstance(module, SparseLoraLinear):
            module.scaling["default"] *= 2
    model.set_adapter("default")
    assert torch.allclose(setting.logits(model), both, atol=1e-4)
    other = SparseLoraConfig(r=2, target_modules=[UP])
    other.masks = {**setting.masks, UP: ~setting.masks[UP]}
    with pytest.raises(MaskMismatchError, match=f"{UP}: adapter third has mask"):
        model.add_adapter("third", other)


def test_branches_without_adapters_are_pruned_all_the_same(setting: Setting) -> None:
    student = attach(copy.deepcopy(setting.dense), setting.masks, rank={"language": 4})
    assert torch.equal(setting.logits(student), setting.logits(setting.sparse))
    with dense(student):
        assert torch.equal(setting.logits(student), setting.logits(setting.dense))
    assert torch.equal(setting.logits(student), setting.logits(setting.sparse))
    assert not any("vision" in n or "projector" in n for n, p in student.named_parameters() if p.requires_grad)
    assert torch.equal(setting.logits(student.unload()), setting.logits(setting.dense))


def test_a_dense_weight_held_apart_teaches_where_the_base_has_moved(setting: Setting) -> None:
    model = copy.deepcopy(setting.dense)
    how = Pruning("sparsegpt", 0.5)
    made = prune(model, find_branches(model), [setting.batch], how, image_token_id=vlmodels.IMAGE, hold_dense=True)
    moved = model.get_submodule(UP).weight[made.masks[UP]]
    assert not torch.equal(moved, setting.dense.get_submodule(UP).weight[made.masks[UP]])
    pruned = setting.logits(model)
    for ranks in (4, {"language": 4}):
        student = attach(copy.deepcopy(model), made.masks, rank=ranks, dense=made.dense)
        assert torch.equal(setting.logits(student), pruned)
        with dense(student):
            assert torch.equal(setting.logits(student), setting.logits(setting.dense))


def test_dropout_acts_on_the_update_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8))
    mask = case()[4]
    config = SparseLoraConfig(r=3, lora_alpha=3, lora_dropout=0.5, target_modules=["0"])
    config.masks = {"0": mask}
    layer = SparseLoraLinear(model[0], "default", config=config, mask=mask, r=3, lora_alpha=3)
    layer.lora_B["default"].weight.data.normal_()
    x = torch.randn(5, 12)
    torch.manual_seed(1)
    found = layer.train()(x)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5)
    update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * mask
    expected = F.linear(x, model[0].weight * mask, model[0].bias) + F.linear(dropped, update)
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_half_precision_base_with_wide_factors_gives_its_own_dtype(setting: Setting) -> None:
    model = copy.deepcopy(setting.dense).bfloat16()
    student = attach(model, setting.masks, rank=4)
    layer = student.base_model.model.get_submodule(UP)
    assert layer.lora_A["default"].weight.dtype == torch.float32
    x = torch.randn(2, 5, 32, dtype=torch.bfloat16, requires_grad=True)
    out = layer(x)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert layer.lora_B["default"].weight.grad.dtype == torch.float32
    assert float(layer.lora_B["default"].weight.grad.abs().sum()) > 0


@pytest.mark.parametrize("backward", ["exact", "ste"])
def test_autocast_leaves_a_float32_base_its_own_gradients(setting: Setting, backward: str) -> None:
    found = {}
    for on in (False, True):
        student = attach(copy.deepcopy(setting.dense), setting.masks, rank=4, backward=backward)
        layer = student.base_model.model.get_submodule(UP)
        x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            loss = layer(x).square().sum()
        loss.backward()
        found[on] = layer.lora_B["default"].weight.grad
    assert torch.equal(found[True], found[False])
    assert float(found[True].abs().sum()) > 0


def test_backward_can_be_changed_while_training(setting: Setting) -> None:
    student = attach(copy.deepcopy(setting.dense), setting.masks, rank=4, backward="auto")
    set_backward(student, "exact")
    assert {m.backward for m in student.modules() if isinstance(m, SparseLoraLinear)} == {"exact"}
    with pytest.raises(RequestError, match="backward 'some'"):
        set_backward(student, "some")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"rank": 0}, "rank 0 of 'vision'"),
        ({"rank": {"nose": 4}}, "rank 4 of 'nose'"),
        ({"alpha": 0}, "alpha is 0"),
        ({"targets": ["nose"]}, "target 'nose' fits no layer"),
        ({"rank": {"vision": 4}, "targets": ["mlp.up_proj"]}, "target 'mlp.up_proj' fits no layer of vision"),
        ({"rank": {}}, "no masked or connector layer"),
        ({"backward": "some"}, "backward 'some'"),
        ({"update": "some"}, "update 'some'"),
    ],
)
def test_a_wrong_request_is_one_line_and_leaves_the_model(setting: Setting, request_: Any, message: str) -> None:
    model = copy.deepcopy(setting.dense)
    with pytest.raises(RequestError, match=message):
        attach(model, setting.masks, **request_)
    assert not any(isinstance(m, SparseLoraLinear) for m in model.modules())


def test_what_does_not_go_with_masks_is_refused(setting: Setting, tmp_path: Path) -> None:
    for wrong in ({"use_dora": True}, {"lora_bias": True}, {"modules_to_save": ["lm_head"]}):
        with pytest.raises(RequestError, match="does not go with masked adapters"):
            SparseLoraConfig(r=2, target_modules=[UP], **wrong)
    quantised = copy.deepcopy(setting.dense)
    weight = quantised.get_submodule(UP).weight
    quantised.get_submodule(UP).weight = nn.Parameter(weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(RequestError, match=f"{UP} holds torch.int8; load the base without quantisation"):
        attach(quantised, setting.masks)
    with pytest.raises(MaskMismatchError, match=r"the mask is \[8, 4\], the weight \[48, 32\]"):
        attach(copy.deepcopy(setting.dense), {UP: torch.ones(8, 4, dtype=torch.bool)})
    with pytest.raises(RequestError, match=r"has no adapter_config\.json"):
        load_adapters(setting.dense, tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(RequestError, match="holds LORA adapters; SPARSELORA is needed"):
        load_adapters(setting.dense, tmp_path)
    with pytest.raises(RequestError, match="has no masked adapters"), dense(setting.dense):
        pass
    with pytest.raises(RequestError, match="teacher 'SS'"), dense(setting.student, "SS"):
        pass
