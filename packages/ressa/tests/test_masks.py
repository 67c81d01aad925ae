"""Masks: bits on disk, hashes, patterns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ressa import masks
from ressa.allocation import budget, outlier_share, owl
from torch import Tensor, nn

from model_hooks import RequestError


def drawn(seed: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, columns, generator=generator) > 0.5, torch.randn(rows, columns, generator=generator)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 99), st.integers(1, 9), st.integers(1, 21))
def test_masks_come_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, seed: int, r: int, c: int) -> None:
    file = tmp_path_factory.mktemp("m") / "masks.safetensors"
    mask, weight = drawn(seed, r, c)
    masks.save_masks(file, {"a.b": mask, "c": ~mask}, {"a.b": weight, "c": weight})
    found = masks.load_masks(file)
    assert found.keys() == {"a.b", "c"}
    assert torch.equal(found["a.b"], mask)
    assert torch.equal(found["c"], ~mask)
    assert masks.mask_digest(found) == masks.mask_digest({"c": ~mask, "a.b": mask})
    assert masks.mask_digest(found) != masks.mask_digest({"a.b": ~mask, "c": mask})


def test_a_mask_file_is_small_and_a_changed_bit_is_found(tmp_path: Path) -> None:
    mask, weight = drawn(0, 256, 512)
    file = masks.save_masks(tmp_path, {"x": mask}, {"x": weight})
    assert file.name == "masks.safetensors"
    assert file.stat().st_size < 256 * 512 / 8 + 1000
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(masks.MaskMismatchError, match="the mask of x has hash"):
        masks.load_masks(file)
    file.write_bytes(b"nothing")
    with pytest.raises(RequestError, match="is not a file of masks"):
        masks.load_masks(file)
    with pytest.raises(RequestError, match="no file"):
        masks.load_masks(tmp_path / "other.safetensors")


def test_hashes_know_dense_and_pruned_as_one_and_any_other_model_as_another() -> None:
    mask, weight = drawn(1, 8, 16)
    found = masks.weight_digest(weight, mask)
    assert masks.weight_digest(weight.masked_fill(~mask, 0), mask) == found
    assert masks.weight_digest(-((-weight).masked_fill(~mask, 0)), mask) == found  # zeros with a sign
    assert masks.weight_digest(weight.bfloat16(), mask) == found
    assert masks.weight_digest(weight.double(), mask) == found
    assert masks.weight_digest(weight + mask * 0.1, mask) != found
    model = nn.Sequential(nn.Linear(16, 8))
    with pytest.raises(masks.MaskMismatchError, match=r"^0: the weights have hash \w{64}, the masks were made"):
        masks.verify(model, {"0": mask}, {"0": {"weight": found}})
    with pytest.raises(masks.MaskMismatchError, match=r"^7: masks name this module"):
        masks.verify(model, {"7": mask}, {"7": {"weight": found}})
    with pytest.raises(masks.MaskMismatchError, match=r"the mask is \[8, 4\], the weight \[8, 16\]"):
        masks.verify(model, {"0": mask[:, :4]}, {"0": {"weight": found}})


def test_patterns_are_told_and_broken_groups_named() -> None:
    weight = torch.ones(4, 16)
    assert masks.pattern_of(weight) == ""
    weight[:, ::2] = 0
    assert masks.pattern_of(weight) == "2:4"
    weight[0, :8] = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0])
    assert masks.pattern_of(weight) == "4:8"
    masks.check({"w": weight}, "4:8")
    with pytest.raises(ValueError, match="w: row 0, inputs 0 to 3 keep more than 2"):
        masks.check({"w": weight}, "2:4")
    weight[1, :8] = 1
    assert masks.pattern_of(weight) == "unstructured"


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 10**6)), min_size=1, max_size=12),
    st.floats(0.01, 0.99),
)
def test_owl_keeps_the_mean_and_gives_blocks_with_more_outliers_less(blocks: list[tuple[float, int]], s: float) -> None:
    outliers = {str(i): o for i, (o, _) in enumerate(blocks)}
    weights = {str(i): w for i, (_, w) in enumerate(blocks)}
    found = owl(outliers, weights, s)
    mean = sum(found[b] * weights[b] for b in found) / sum(weights.values())
    assert mean == pytest.approx(s, abs=1e-9)
    assert all(0 <= v < 1 for v in found.values())
    most = max(outliers, key=lambda b: outliers[b])
    assert found[most] <= min(found.values()) + 1e-12


def test_outliers_are_counted_in_scores() -> None:
    weight = torch.ones(2, 10)
    norms = torch.ones(10)
    norms[3] = 400.0  # a score of 20 where the mean is 2.9
    assert outlier_share(weight, norms) == (2, 20)


@settings(deadline=None, max_examples=50)
@given(st.floats(0.0, 0.99), st.floats(0.01, 0.9), st.integers(1, 10**6), st.integers(1, 10**6))
def test_a_budget_is_met_or_refused(given_share: float, total: float, vision: int, language: int) -> None:
    weights = {"vision": vision, "language": language}
    needed = (total * (vision + language) - given_share * vision) / language
    if not 0 <= needed < 1:
        with pytest.raises(RequestError, match="would need language at"):
            budget(total, weights, given_share, None)
        return
    found = budget(total, weights, given_share, None)
    assert found["vision"] == given_share
    assert sum(found[b] * weights[b] for b in weights) == pytest.approx(total * (vision + language))


def test_a_budget_wants_exactly_one_branch() -> None:
    with pytest.raises(RequestError, match="only it"):
        budget(0.5, {"vision": 1, "language": 1}, None, None)
    with pytest.raises(RequestError, match="only it"):
        budget(0.5, {"vision": 1, "language": 1}, 0.1, 0.2)
