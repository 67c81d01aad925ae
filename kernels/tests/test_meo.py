"""Products with merged experts: both backends against merge-then-multiply in float64, gradients, deduplication."""

from __future__ import annotations

import pytest
import torch
from helpers_kernels import DEVICE, DTYPES, ON_DEVICE, assert_close_to_oracle, with_gradients
from torch import Tensor

from lean_kernels.ops.meo import merged_matmul
from lean_kernels.ref import meo as ref

pytestmark = ON_DEVICE  # pytest.mark.gpu where a GPU is
BACKENDS = ("torch", "triton")
# Bg, L, K, N, E, e
SHAPES = [
    (1, 1, 17, 63, 1, 1),
    (3, 17, 63, 17, 4, 2),
    (2, 1, 1, 129, 3, 3),
    (2, 5, 129, 1, 5, 2),
    (1, 300, 20, 24, 3, 3),
]
GRADIENT_SHAPES = [(3, 17, 33, 17, 4, 2), (2, 1, 20, 65, 3, 3)]


def problem(shape: tuple[int, ...], dtype: torch.dtype, strided: bool = False) -> dict[str, Tensor]:
    batch, length, depth, columns, number, chosen = shape
    random = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(batch, length, depth, generator=random).to(dtype)
    w = (torch.randn(number, depth, columns, generator=random) / depth**0.5).to(dtype)
    if strided:
        x = torch.stack([x, x], -1)[..., 0]
        w = w.transpose(1, 2).contiguous().transpose(1, 2)
    g = torch.rand(batch, chosen, generator=random).to(dtype)
    bias = torch.randn(number, columns, generator=random).to(dtype)
    return {name: t.to(DEVICE) for name, t in {"x": x, "w": w, "g": g, "bias": bias}.items()}


def experts(shape: tuple[int, ...]) -> Tensor:
    batch, _, _, _, number, chosen = shape
    random = torch.Generator().manual_seed(1)
    return torch.stack([torch.randperm(number, generator=random)[:chosen] for _ in range(batch)]).to(DEVICE)


def merge_then_multiply(x: Tensor, w: Tensor, idx: Tensor, g: Tensor, bias: Tensor | None = None) -> Tensor:
    out = torch.bmm(x, (g[:, :, None, None] * w[idx]).sum(1))
    return out if bias is None else out + (g[..., None] * bias[idx]).sum(1, keepdim=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(backend, shape, strided, dtype):
    given, idx = problem(shape, dtype, strided), experts(shape)
    wide = {name: t.double() for name, t in given.items()}
    out = merged_matmul(**given, idx=idx, backend=backend)
    assert out.dtype == dtype
    assert_close_to_oracle(
        out, merge_then_multiply(**wide, idx=idx), torch_result=merge_then_multiply(**given, idx=idx)
    )
    given.pop("bias"), wide.pop("bias")
    out = merged_matmul(**given, idx=idx.int(), backend=backend)
    assert_close_to_oracle(out, merge_then_multiply(**wide, idx=idx))
    assert torch.equal(out, merged_matmul(**given, idx=idx, backend=backend))  # two runs, bit for bit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", GRADIENT_SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_against_float64(backend, shape, dtype):
    given, idx = problem(shape, dtype), experts(shape)
    idx[-1, -1] = idx[-1, 0]  # one expert twice in a group
    _, found = with_gradients(lambda **t: merged_matmul(**t, idx=idx, backend=backend), given)
    wide = {name: t.double() for name, t in given.items()}
    _, oracle = with_gradients(lambda **t: merge_then_multiply(**t, idx=idx), wide)
    _, plain = with_gradients(lambda **t: merge_then_multiply(**t, idx=idx), given)
    for name, gradient in found.items():
        assert gradient.dtype == dtype
        assert_close_to_oracle(gradient, oracle[name], "gradient", plain[name])


def test_gradcheck():
    shape = (3, 2, 3, 2, 3, 2)
    given, idx = problem(shape, torch.float64), experts(shape)
    idx[1] = idx[0]
    given["g"][1] = given["g"][0]  # merged together, and still each with its own gradient
    leaves = [t.requires_grad_() for t in given.values()]

    def run(x: Tensor, w: Tensor, g: Tensor, bias: Tensor) -> Tensor:
        return merged_matmul(x, w, idx, g, bias, act="silu")

    assert torch.autograd.gradcheck(run, leaves)


def test_only_the_gradients_that_are_wanted():
    given, idx = problem((2, 3, 4, 5, 3, 2), torch.float32), experts((2, 3, 4, 5, 3, 2))
    x, w, g = given["x"], given["w"], given["g"].requires_grad_()
    merged_matmul(x, w, idx, g).sum().backward()
    oracle = torch.autograd.grad(merge_then_multiply(x, w, idx, g).sum(), g)[0]
    torch.testing.assert_close(g.grad, oracle)
    assert w.grad is None


def test_one_expert_with_gate_one_is_a_plain_product():
    given = problem((1, 33, 40, 24, 1, 1), torch.float32)
    one, zero = torch.ones(1, 1, device=DEVICE), torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    out = merged_matmul(given["x"], given["w"], zero, one, backend="torch")
    assert torch.equal(out[0], given["x"][0] @ given["w"][0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_order_of_experts_does_not_matter(backend):
    shape = (2, 20, 32, 16, 5, 4)
    given, idx = problem(shape, torch.float32), experts(shape)
    out = merged_matmul(given["x"], given["w"], idx, given["g"], backend=backend)
    turned = merged_matmul(given["x"], given["w"], idx.flip(1), given["g"].flip(1), backend=backend)
    torch.testing.assert_close(out, turned, rtol=0, atol=2e-6)


def test_half_precision_is_rounded_once():
    w = problem((1, 1, 40, 24, 3, 1), torch.bfloat16)["w"]
    gates = [0.3, 0.5, 0.2]
    wide = torch.mul(w[0].float(), gates[0]).add_(w[1], alpha=gates[1]).add_(w[2], alpha=gates[2])
    assert torch.equal(ref.merge_experts(w, [0, 1, 2], gates), wide.bfloat16())


def test_equal_groups_are_merged_once(monkeypatch):
    calls = []
    merge = ref.merge_experts
    monkeypatch.setattr(ref, "merge_experts", lambda *args, **kw: calls.append(args[1]) or merge(*args, **kw))
    given = problem((5, 4, 6, 7, 3, 2), torch.float32)
    idx = torch.tensor([[0, 1], [2, 1], [0, 1], [0, 1], [2, 1]], device=DEVICE)
    g = torch.tensor([[0.5, 0.5], [0.3, 0.7], [0.5, 0.5], [0.4, 0.6], [0.3, 0.7]], device=DEVICE)
    out = merged_matmul(given["x"], given["w"], idx, g, backend="torch")
    assert calls == [[0, 1], [2, 1], [0, 1]]
    torch.testing.assert_close(out, merge_then_multiply(given["x"], given["w"], idx, g))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_expanded_group_is_one_product(backend):
    given, idx = problem((3, 5, 8, 9, 4, 2), torch.float32), torch.tensor([[3, 1]], device=DEVICE)
    gates = torch.tensor([[0.2, 0.8]], device=DEVICE, requires_grad=True)
    out = merged_matmul(given["x"], given["w"], idx.expand(3, 2), gates.expand(3, 2), given["bias"], backend=backend)
    wanted = merge_then_multiply(given["x"], given["w"], idx.expand(3, 2), gates.expand(3, 2), given["bias"])
    torch.testing.assert_close(out, wanted)
    ours, theirs = (torch.autograd.grad(y.square().sum(), gates)[0] for y in (out, wanted))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_comes_after_the_merge_and_nan_gates_show(backend):
    given, idx = problem((2, 3, 8, 9, 4, 2), torch.float32), experts((2, 3, 8, 9, 4, 2))
    out = merged_matmul(**given, idx=idx, act="relu", backend=backend)
    torch.testing.assert_close(out, merge_then_multiply(**given, idx=idx).relu())
    given["g"][1, 0] = float("nan")
    out = merged_matmul(**given, idx=idx, backend=backend)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


def test_operators_are_registered_right_and_compile_whole():
    for shape in [*GRADIENT_SHAPES, (2, 40, 8, 8, 3, 2)]:
        given, idx = problem(shape, torch.float32), experts(shape)
        x, w, g = (given[name].requires_grad_() for name in ("x", "w", "g"))
        shift = torch.randn(shape[0], shape[3], device=DEVICE, requires_grad=True)
        torch.library.opcheck(torch.ops.lean_kernels.merged_matmul, (x, w, idx, g, shift, "auto"))
    compiled = torch.compile(merged_matmul, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in GRADIENT_SHAPES:
        given, idx = problem(shape, torch.float32), experts(shape)
        out, found = with_gradients(lambda idx=idx, **t: compiled(**t, idx=idx), given)
        eager, wanted = with_gradients(lambda idx=idx, **t: merged_matmul(**t, idx=idx), given)
        torch.testing.assert_close(out, eager)
        torch.testing.assert_close(found, wanted)


def test_wrong_requests():
    x, w = torch.zeros(2, 3, 4), torch.zeros(5, 4, 6)
    idx, g = torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2)
    for call, error, text in (
        (lambda: merged_matmul(x, w.mT, idx, g), ValueError, r"\[Bg, L, K\] and \[E, K, N\]"),
        (lambda: merged_matmul(x.half(), w, idx, g), TypeError, "one floating dtype"),
        (lambda: merged_matmul(x, w, idx.float(), g), TypeError, "int32 or int64"),
        (lambda: merged_matmul(x, w, idx[:1], g), ValueError, r"must be \[2, e\]"),
        (lambda: merged_matmul(x, w, idx, g[:, :1]), ValueError, "g is"),
        (lambda: merged_matmul(x, w, idx, idx), TypeError, "g is torch.int64; gates have a floating dtype"),
        (lambda: merged_matmul(x, w, idx + 5, g), IndexError, "expert 5, but there are 5"),
        (lambda: merged_matmul(x, w, idx + 5, g, w[:, 0]), IndexError, "expert 5, but there are 5"),
        (lambda: merged_matmul(x, w, idx - 1, g), IndexError, "expert -1"),
        (lambda: merged_matmul(x, w, idx, g, w[0]), ValueError, "bias"),
        (lambda: merged_matmul(x, w, idx, g, act="tanh"), ValueError, "relu, gelu, silu"),
        (lambda: merged_matmul(x, w.to("meta"), idx, g), RuntimeError, "w is on meta"),
    ):
        with pytest.raises(error, match=text):
            call()
