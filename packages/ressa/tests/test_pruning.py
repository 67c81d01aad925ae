"""Pruning a whole model, against float64 references that watch the model themselves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import vlmodels
from ressa.branches import find_branches
from ressa.pruning import Pruned, Pruning, prune
from torch import Tensor, nn

from model_hooks import RequestError
from model_hooks import pruning as matrices

BLOCK = "model.language_model.layers.1"
Batches = list[dict[str, Tensor]]


def pruned(model: Any, batches: Batches, how: Pruning, **others: Any) -> Pruned:
    return prune(model, find_branches(model), batches, how, image_token_id=vlmodels.IMAGE, **others)


def inputs_of(model: Any, batches: Batches, path: str) -> dict[str, Tensor]:
    """Real tokens that a language layer reads, float64 [tokens, width], those of images apart."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    parts: dict[str, list[Tensor]] = {"image": [], "text": []}
    for batch, x in zip(batches, seen, strict=True):
        real, image = batch["attention_mask"].bool(), batch["input_ids"] == vlmodels.IMAGE
        parts["image"].append(x[real & image])
        parts["text"].append(x[real & ~image])
    return {kind: torch.cat(rows).double() for kind, rows in parts.items()}


def wanda_reference(weight: Tensor, moment: Tensor, sparsity: float) -> Tensor:
    """The mask: per row without the floor(d s) least |w| |x|."""
    scores = weight.double().abs() * moment.sqrt()
    mask = torch.ones_like(scores, dtype=torch.bool)
    return mask.scatter_(1, scores.argsort(1)[:, : int(weight.shape[1] * sparsity)], False)


def padded(batches: Batches, extra: int) -> Batches:
    """The same examples with padding on the left."""
    found = []
    for batch in batches:
        rows = len(batch["input_ids"])
        zeros = torch.zeros(rows, extra, dtype=torch.long)
        both = {name: torch.cat([zeros, batch[name]], 1) for name in ("input_ids", "attention_mask")}
        found.append(batch | both)
    return found


@pytest.mark.parametrize("inputs", ["pruned", "dense"])
@pytest.mark.parametrize("balance", ["none", "equal"])
def test_wanda_masks_are_the_reference_on_what_the_block_reads(inputs: str, balance: str) -> None:
    dense, batches = vlmodels.build("llava")
    batches = [*batches, *padded(batches, 3)]
    model = copy.deepcopy(dense)
    masks = pruned(model, batches, Pruning(sparsity=0.6, calibration_inputs=inputs, token_balance=balance)).masks
    before = dense
    if inputs == "pruned":  # all before the block is pruned, itself not yet
        before = copy.deepcopy(model)
        before.get_submodule(BLOCK).load_state_dict(dense.get_submodule(BLOCK).state_dict())
    for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"):
        seen = inputs_of(before, batches, f"{BLOCK}.{name}")
        squares = {kind: x.square() for kind, x in seen.items()}
        moment = torch.cat(list(squares.values())).mean(0)
        if balance == "equal":
            moment = (squares["image"].mean(0) + squares["text"].mean(0)) / 2
        expected = wanda_reference(dense.get_submodule(f"{BLOCK}.{name}").weight, moment, 0.6)
        assert torch.equal(masks[f"{BLOCK}.{name}"], expected), name


def test_sparsegpt_weights_are_the_reference_on_what_the_block_reads() -> None:
    dense, batches = vlmodels.build("llava")
    model = copy.deepcopy(dense)
    made = pruned(model, batches, Pruning("sparsegpt", 0.5, "2:4"), hold_dense=True)
    before = copy.deepcopy(model)
    before.get_submodule(BLOCK).load_state_dict(dense.get_submodule(BLOCK).state_dict())
    path = f"{BLOCK}.mlp.gate_proj"
    x = torch.cat(list(inputs_of(before, batches, path).values()))
    hessian = 2 / len(x) * x.T @ x
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    weight = dense.get_submodule(path).weight.double().clone()
    expected = torch.zeros_like(weight)
    for i in range(weight.shape[1]):
        if i % 4 == 0:
            scores = weight[:, i : i + 4] ** 2 / upper.diagonal()[i : i + 4] ** 2
            gone = torch.zeros_like(scores, dtype=torch.bool).scatter_(
                1, scores.topk(2, 1, largest=False).indices, True
            )
        expected[:, i] = weight[:, i].masked_fill(gone[:, i % 4], 0)
        weight[:, i:] -= torch.outer((weight[:, i] - expected[:, i]) / upper[i, i], upper[i, i:])
    found = model.get_submodule(path).weight.double()
    assert (found != 0).eq(expected != 0).float().mean() > 0.98  # a group may tie
    assert (found - expected).abs().median() < 1e-4
    assert torch.equal(made.dense[path], dense.get_submodule(path).weight)


def test_sparsegpt_harms_the_output_less_than_wanda_on_correlated_inputs() -> None:
    better = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(100, 6, generator=generator) @ torch.randn(6, 32, generator=generator)
        x += 0.2 * torch.randn(100, 32, generator=generator)
        weight = torch.randn(16, 32, generator=generator)
        wanda = matrices.wanda(weight, x.square().mean(0), 0.5, 0, 0)
        sparsegpt = matrices.sparsegpt(weight, 2 / len(x) * x.T @ x, 0.5, 0, 0)
        better += bool(((sparsegpt - weight) @ x.T).norm() <= ((wanda - weight) @ x.T).norm())
    assert better >= 19


def test_one_block_is_worked_on_at_a_time() -> None:
    """Beyond the weights and the masks: two blocks and the calibration activations, however deep the model is."""
    from ressa.bench import example_batch, probe_llava

    from paper_tables.memory import peak_tensor_bytes

    found = []
    for layers in (2, 6):
        model = probe_llava(64, 256, layers)
        batches = [{k: v for k, v in example_batch(model, 1).items() if k != "labels"}] * 4
        result: dict[str, Any] = {}

        def work(model: Any = model, batches: Any = batches, result: Any = result) -> None:
            result["masks"] = prune(model, find_branches(model), batches, Pruning("wanda", 0.5)).masks

        peak = peak_tensor_bytes(work) - sum(mask.nbytes for mask in result["masks"].values())
        block = sum(p.nbytes for p in model.model.language_model.layers[0].parameters())
        activations = sum(b["input_ids"].numel() * model.config.text_config.hidden_size * 4 for b in batches)
        assert peak <= 2 * block + activations
        found.append(peak)
    assert found[1] <= found[0]


def test_padding_changes_no_mask() -> None:
    dense, batches = vlmodels.build("llava")
    plain = pruned(copy.deepcopy(dense), batches, Pruning()).masks
    report = pruned(model := copy.deepcopy(dense), padded(batches, 7), Pruning())
    assert report.report["tokens"] == {"image": 8, "text": 14, "padding": 14}
    assert all(torch.equal(report.masks[path], mask) for path, mask in plain.items())
    assert all(torch.equal(model.get_submodule(p).weight != 0, m) for p, m in plain.items())


def test_a_text_model_with_an_encoder_has_a_mask_on_either_side() -> None:
    dense, (batch,) = vlmodels.build("instructblip")
    masks = pruned(copy.deepcopy(dense), [batch], Pruning()).masks
    length = batch["input_ids"].shape[1]  # both sides as long, so that shapes do not tell them apart
    rows, extra = batch["input_ids"].shape[0], length - batch["decoder_input_ids"].shape[1]
    ids = torch.cat([batch["decoder_input_ids"], torch.zeros(rows, extra, dtype=torch.long)], 1)
    mask = torch.cat([torch.ones_like(batch["decoder_input_ids"]), torch.zeros(rows, extra, dtype=torch.long)], 1)
    longer = batch | {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    again = pruned(copy.deepcopy(dense), [longer], Pruning()).masks
    assert any("EncDecAttention.k" in path for path in masks)
    assert all(torch.equal(again[path], mask) for path, mask in masks.items())


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "random"])
@pytest.mark.parametrize(("pattern", "kept", "of"), [("2:4", 2, 4), ("4:8", 4, 8)])
def test_every_group_keeps_as_many_as_the_pattern_says(method: str, pattern: str, kept: int, of: int) -> None:
    model, batches = vlmodels.build("llava")
    made = pruned(model, batches, Pruning(method, 0.5, pattern))
    for path, mask in made.masks.items():
        assert (mask.view(mask.shape[0], -1, of).sum(-1) == kept).all()
        assert torch.equal(model.get_submodule(path).weight != 0, mask)
    assert made.report["sparsity"] == 0.5


def test_masks_alone_leave_the_model_bit_for_bit_and_are_the_same() -> None:
    dense, batches = vlmodels.build("llava")
    model, other = copy.deepcopy(dense), copy.deepcopy(dense)
    steps: list[tuple[int, int]] = []
    made = prune(
        model, find_branches(model), batches, Pruning(keep_dense=True), progress=lambda *step: steps.append(step)
    )
    in_place = pruned(other, batches, Pruning())
    assert all(torch.equal(w, dense.state_dict()[n]) for n, w in model.state_dict().items())
    assert made.masks.keys() == in_place.masks.keys()
    assert all(torch.equal(made.masks[path], mask) for path, mask in in_place.masks.items())
    assert made.report["branches"] == in_place.report["branches"]
    assert steps == [(i, 26) for i in range(1, 27)]
    for module in (*model.modules(), *other.modules()):  # nothing of the watching is left
        assert "forward" not in vars(module)
    assert torch.equal(other(**batches[0]).logits, in_place_logits(dense, in_place.masks, batches[0]))


def in_place_logits(dense: Any, masks: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    model = copy.deepcopy(dense)
    for path, mask in masks.items():
        model.get_submodule(path).weight.data[~mask] = 0
    logits: Tensor = model(**batch).logits
    return logits


def test_a_branch_at_zero_stays_dense_and_a_budget_is_met() -> None:
    dense, batches = vlmodels.build("llava")
    model = copy.deepcopy(dense)
    report = pruned(model, batches, Pruning(vision=0.0)).report
    assert report["branches"]["vision"]["zeros"] == 0
    tower = dense.model.vision_tower.state_dict()
    assert all(torch.equal(w, tower[n]) for n, w in model.model.vision_tower.state_dict().items())
    assert report["branches"]["language"]["sparsity"] == 0.5
    how = Pruning("magnitude", 0.5, vision=0.25, allocation="parameter_budget")
    report = pruned(copy.deepcopy(dense), [], how).report
    assert report["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert report["branches"]["vision"]["sparsity"] == pytest.approx(0.25, abs=1e-3)
    assert report["branches"]["language"]["sparsity"] > 0.55


def test_owl_gives_blocks_their_own_sparsity_with_the_mean_asked_for() -> None:
    model, batches = vlmodels.build("llava")
    with torch.no_grad():
        model.get_submodule(BLOCK).mlp.up_proj.weight[:, 0] *= 30  # many outliers here
    report = pruned(model, batches, Pruning(sparsity=0.6, allocation="owl")).report
    assert 0.6 - 1 / 16 < report["sparsity"] <= 0.6  # rows of 16 give up whole weights
    assert report["block_sparsity"][BLOCK] < report["block_sparsity"]["model.language_model.layers.0"] - 0.01


def test_a_layer_that_no_data_reaches_is_reported_and_left() -> None:
    model, batches = vlmodels.build("llava")
    block = model.get_submodule(BLOCK)
    block.unused = nn.Linear(32, 8)
    made = pruned(model, batches, Pruning())
    assert made.report["dead"] == [f"{BLOCK}.unused"]
    assert f"{BLOCK}.unused" not in made.masks
    assert bool((block.unused.weight != 0).all())
    assert f"{BLOCK}.unused" in pruned(model, [], Pruning("magnitude")).masks


def test_vision_blocks_that_nothing_reads_are_reported() -> None:
    model, batches = vlmodels.build("llava")
    assert pruned(copy.deepcopy(model), batches, Pruning()).report["unused"] == []
    model.config.vision_feature_layer = -2
    assert pruned(model, batches, Pruning()).report["unused"] == ["model.vision_tower.encoder.layers.1"]


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "magnitude"])
def test_pruning_again_keeps_the_zeros_there_are(method: str) -> None:
    model, batches = vlmodels.build("llava")
    first = pruned(model, batches, Pruning(method, 0.3)).masks
    second = pruned(model, batches, Pruning(method, 0.6)).masks
    assert all(bool((mask | ~second[path]).all()) for path, mask in first.items())
    assert sum(int(m.sum()) for m in second.values()) < 0.75 * sum(int(m.sum()) for m in first.values())


def test_half_precision_models_are_pruned_in_their_own_dtype() -> None:
    model, batches = vlmodels.build("llava")
    model = model.bfloat16()
    for method in ("wanda", "sparsegpt"):
        half = copy.deepcopy(model)
        made = pruned(half, [{**b, "pixel_values": b["pixel_values"].bfloat16()} for b in batches], Pruning(method))
        assert {half.get_submodule(path).weight.dtype for path in made.masks} == {torch.bfloat16}
        assert made.report["sparsity"] == pytest.approx(0.5, abs=0.01)  # SparseGPT takes all that tie


def test_nan_activations_name_the_module_and_masks_alone_leave_the_model() -> None:
    model, batches = vlmodels.build("llava")
    norm = model.get_submodule(BLOCK).input_layernorm.weight
    norm.data[0] = torch.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RequestError, match=r"layers\.1\.self_attn\.q_proj reads NaN or infinite"):
        pruned(model, batches, Pruning(keep_dense=True))
    same = (torch.equal(w, before[n]) or bool(w.isnan().any()) for n, w in model.state_dict().items())
    assert all(same)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"sparsity": 70}, r"--sparsity 70 is not accepted.*did you mean 0\.70\?"),
        ({"sparsity": -0.1}, "--sparsity -0.1"),
        ({"vision": 1.0}, "--vision 1 is"),
        ({"pattern": "5:4"}, "pattern '5:4' is not accepted"),
        ({"pattern": "0:4"}, "pattern '0:4' is not accepted"),
        ({"pattern": "1:4"}, "pattern 1:4 means sparsity 0.75, not 0.5"),
        ({"pattern": "2:4", "allocation": "owl"}, "--pattern 2:4 fixes every group's zeros"),
        ({"method": "wander"}, "method 'wander' is not accepted; give magnitude, wanda"),
        ({"token_balance": "some"}, "token_balance 'some'"),
    ],
)
def test_a_request_that_makes_no_sense_is_one_line(how: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Pruning(**how)


def test_what_cannot_be_pruned_is_refused_before_anything_changes() -> None:
    model, batches = vlmodels.build("llava")
    before = copy.deepcopy(model.state_dict())
    path = "model.language_model.layers.0.mlp.down_proj"
    with pytest.raises(RequestError, match=rf"{path}: in_features=48 is not divisible by M=32; skip it with --ignore"):
        pruned(model, batches, Pruning("magnitude", 0.5, "16:32", vision=0))
    assert path not in pruned(copy.deepcopy(model), [], Pruning("magnitude", 0.5, "16:32", vision=0, ignore=("down_proj",))).masks  # fmt: skip  # noqa: E501
    with pytest.raises(RequestError, match="--ignore nose fits no matrix; one is model"):
        pruned(model, batches, Pruning(ignore=("nose",)))
    with pytest.raises(RequestError, match="nothing is left to prune"):
        pruned(model, batches, Pruning(vision=0.0, language=0.0))
    with pytest.raises(RequestError, match="no calibration data"):
        pruned(model, [], Pruning())
    assert all(torch.equal(w, before[n]) for n, w in model.state_dict().items())
    layers = model.model.language_model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(
        RequestError, match=r"layers.0.mlp.up_proj.weight and .*layers.1.mlp.up_proj.weight are one tied"
    ):
        pruned(model, batches, Pruning())
