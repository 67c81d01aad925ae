"""Pruning and quantisation of one matrix, against plain float64 references written from the papers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_compress import packing, quantising
from moe_compress.quantising import Codes
from torch import Tensor

from model_hooks import RequestError, pruning


def correlated(seed: int, tokens: int = 200, width: int = 64) -> Tensor:
    """Inputs [tokens, width] that share a few directions, and unequal sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, 8, generator=generator) @ torch.randn(8, width, generator=generator)
    sizes = torch.rand(width, generator=generator) * 2 + 0.1
    return (mixed + 0.3 * torch.randn(tokens, width, generator=generator)) * sizes


def matrix(seed: int, rows: int = 24, width: int = 64) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(100 + seed))


def hessian(x: Tensor) -> Tensor:
    return 2 / len(x) * x.T @ x


def output_error(weight: Tensor, other: Tensor, x: Tensor) -> float:
    return float(((other - weight).double() @ x.double().T).square().sum())


def inverse_factor(h: Tensor, damping: float = 0.01) -> Tensor:
    """Upper Cholesky factor of the damped inverse, float64."""
    h = h.double().clone()
    h += damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    return torch.linalg.cholesky(torch.linalg.inv(h), upper=True)


def sparsegpt_reference(weight: Tensor, h: Tensor, zeros: int, of: int) -> Tensor:
    """One column after another over the whole row, N:M masks."""
    w, u = weight.double().clone(), inverse_factor(h)
    kept = torch.zeros_like(w)
    for i in range(w.shape[1]):
        if i % of == 0:
            score = w[:, i : i + of] ** 2 / u.diagonal()[i : i + of] ** 2
            gone = torch.zeros_like(score, dtype=torch.bool)
            gone.scatter_(1, score.topk(zeros, 1, largest=False).indices, True)
        kept[:, i] = w[:, i].masked_fill(gone[:, i % of], 0)
        w[:, i:] -= torch.outer((w[:, i] - kept[:, i]) / u[i, i], u[i, i:])
    return kept


def gptq_reference(weight: Tensor, h: Tensor, scale: Tensor, bits: int, group: int) -> Tensor:
    w, u, s = weight.double().clone(), inverse_factor(h), scale.double()
    found = torch.zeros_like(w)
    for i in range(w.shape[1]):
        step = s[:, i // group]
        found[:, i] = (w[:, i] / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step
        w[:, i:] -= torch.outer((w[:, i] - found[:, i]) / u[i, i], u[i, i:])
    return found


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000), st.sampled_from([0.25, 0.5, 0.7]))
def test_magnitude_keeps_the_largest_and_exactly_as_many(seed: int, sparsity: float) -> None:
    weight = matrix(seed, 6, 16)
    found = pruning.magnitude(weight, sparsity, 0, 0)
    gone = found == 0
    assert int(gone.sum()) == int(weight.numel() * sparsity)
    assert weight[gone].abs().max() <= weight[~gone].abs().min()
    assert torch.equal(found[~gone], weight[~gone])


@pytest.mark.parametrize(("pattern", "of", "zeros"), [("2:4", 4, 2), ("4:8", 8, 4)])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_every_group_of_a_pattern_has_exactly_its_zeros(method: str, pattern: str, of: int, zeros: int) -> None:
    x, weight = correlated(0), matrix(0)
    assert pruning.parse_pattern(pattern, 0.5) == (zeros, of)
    found = {
        "magnitude": lambda: pruning.magnitude(weight, 0.5, zeros, of),
        "wanda": lambda: pruning.wanda(weight, x.square().mean(0), 0.5, zeros, of),
        "sparsegpt": lambda: pruning.sparsegpt(weight, hessian(x), 0.5, zeros, of),
    }[method]()
    assert ((found.view(24, -1, of) == 0).sum(-1) == zeros).all()


def test_wanda_equals_its_definition() -> None:
    x, weight = correlated(1), matrix(1)
    found = pruning.wanda(weight, x.square().mean(0), 0.5, 0, 0)
    score = weight.double().abs() * x.double().norm(dim=0)
    for row in range(24):
        lowest = set(score[row].argsort()[:32].tolist())
        assert set((found[row] == 0).nonzero().flatten().tolist()) == lowest


def test_sparsegpt_equals_its_definition() -> None:
    x, weight = correlated(2), matrix(2)
    found = pruning.sparsegpt(weight, hessian(x), 0.5, 2, 4)
    reference = sparsegpt_reference(weight, hessian(x), 2, 4)
    same = ((found == 0) == (reference == 0)).float().mean()
    assert same > 0.99  # float32 and float64 may break a near tie otherwise, and then go on otherwise in that row
    rows = ((found == 0) == (reference == 0)).all(1)
    torch.testing.assert_close(found[rows].double(), reference[rows], atol=1e-3, rtol=1e-3)
    unstructured = pruning.sparsegpt(weight, hessian(x), 0.5, 0, 0)
    assert abs(int((unstructured == 0).sum()) - weight.numel() // 2) <= 1


def test_a_dead_input_costs_nothing() -> None:
    x, weight = correlated(3), matrix(3)
    x[:, 5] = 0
    found = pruning.sparsegpt(weight, hessian(x), 0.5, 0, 0)
    assert (found[:, 5] == 0).all()
    assert found.isfinite().all()


def test_better_methods_lose_less_of_the_output() -> None:
    lost: dict[str, float] = {"magnitude": 0.0, "wanda": 0.0, "sparsegpt": 0.0}
    for seed in range(5):
        x, weight = correlated(seed), matrix(seed)
        lost["magnitude"] += output_error(weight, pruning.magnitude(weight, 0.5, 0, 0), x)
        lost["wanda"] += output_error(weight, pruning.wanda(weight, x.square().mean(0), 0.5, 0, 0), x)
        lost["sparsegpt"] += output_error(weight, pruning.sparsegpt(weight, hessian(x), 0.5, 0, 0), x)
    assert lost["sparsegpt"] < lost["wanda"] < lost["magnitude"]


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.sampled_from([3, 4, 8]), st.sampled_from([16, 32]))
def test_rounding_is_to_the_nearest_and_packing_loses_nothing(seed: int, bits: int, group: int) -> None:
    weight = matrix(seed, 8)
    found = quantising.rtn(weight, Codes(bits, group))
    step = weight.view(8, -1, group).abs().amax(-1) / ((2**bits - 1) / 2)
    torch.testing.assert_close(found.scale, step)
    wide = step.repeat_interleave(group, 1)
    reference = (weight / wide).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * wide
    torch.testing.assert_close(found.weight, reference, atol=1e-5, rtol=1e-5)
    parts = packing.packed(found.weight, found.grid, Codes(bits, group))
    assert parts["_packed"].nbytes == 8 * 64 * bits // 8
    assert torch.equal(packing.unpacked(parts, Codes(bits, group)), found.weight)


@pytest.mark.parametrize("bits", [4, 8])
def test_bfloat16_codes_are_exact(bits: int) -> None:
    weight = matrix(9, 64, 256).bfloat16()
    found = quantising.rtn(weight, Codes(bits, 64))
    assert found.weight.dtype == torch.bfloat16
    parts = packing.packed(found.weight, found.grid, Codes(bits, 64))
    assert torch.equal(packing.unpacked(parts, Codes(bits, 64)), found.weight)


def test_gptq_equals_its_definition_and_beats_rounding() -> None:
    better = 0
    for seed in range(10):
        x, weight = correlated(seed), matrix(seed)
        found = quantising.gptq(weight, hessian(x), Codes(4, 32))
        reference = gptq_reference(weight, hessian(x), found.scale, 4, 32)
        same = (found.weight.double() - reference).abs() < 1e-4
        assert same.float().mean() > 0.98
        plain = quantising.rtn(weight, Codes(4, 32))
        better += output_error(weight, found.weight, x) < output_error(weight, plain.weight, x)
        again = quantising.gptq(weight, hessian(x), Codes(4, 32))
        assert torch.equal(found.weight, again.weight)
    assert better == 10


def test_clipping_never_loses_to_rounding_on_its_inputs() -> None:
    for seed in range(4):
        x, weight = correlated(seed), matrix(seed)
        weight[:, ::16] *= 6  # outliers
        grouped = torch.zeros_like(x)
        grouped[:, :32] = x[:, :32]  # each group's own part of the output is what clipping looks at
        plain, clipped = quantising.rtn(weight, Codes(3, 32)), quantising.clipped(weight, grouped, Codes(3, 32))
        assert output_error(weight, clipped.weight, grouped) <= output_error(weight, plain.weight, grouped)


@pytest.mark.parametrize(
    ("pattern", "sparsity", "message"),
    [("2:4", 0.6, "means sparsity 0.5, not 0.6"), ("", 1.0, "sparsity 1.0"), ("4:2", 0.5, "pattern '4:2'"),
     ("half", 0.5, "pattern 'half'")],
)  # fmt: skip
def test_patterns_that_cannot_be_are_refused(pattern: str, sparsity: float, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        pruning.parse_pattern(pattern, sparsity)
