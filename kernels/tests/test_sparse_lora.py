"""LoRA on pruned weights: both backends against the materialised product in float64, gradients, merging, memory."""

from __future__ import annotations

import pytest
import torch
from helpers_kernels import DEVICE, DTYPES, ON_DEVICE, assert_close_to_oracle, with_gradients
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lean_kernels.ops.sparse_lora import apply_mask_, merge_sparse_lora, pack_mask, sparse_lora_matmul, unpack_mask
from lean_kernels.ref import sparse_lora as ref

pytestmark = ON_DEVICE  # pytest.mark.gpu where a GPU is
BACKENDS = ("torch", "triton")
# M, N, K, r
SHAPES = [(1, 1, 1, 1), (17, 63, 65, 3), (5, 129, 17, 8), (65, 20, 129, 17)]


def problem(shape: tuple[int, int, int, int], dtype: torch.dtype, strided: bool = False) -> dict[str, Tensor]:
    rows, columns, depth, rank = shape
    random = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(rows, depth, generator=random)
    w = torch.randn(columns, depth, generator=random) / depth**0.5
    a = torch.randn(rank, depth, generator=random) / depth**0.5
    b = torch.randn(columns, rank, generator=random) / rank**0.5
    bias = torch.randn(columns, generator=random)
    found = {name: t.to(DEVICE, dtype) for name, t in {"x": x, "w": w, "a": a, "b": b, "bias": bias}.items()}
    if strided:
        found = {name: t.T.contiguous().T if t.dim() == 2 else t for name, t in found.items()}
    return found


def pruning(shape: tuple[int, int, int, int]) -> Tensor:
    mask = torch.rand(shape[1], shape[2], generator=torch.Generator().manual_seed(5)) < 0.5
    mask[0] = False  # a row without any weight is allowed
    mask[-1, -1] = True
    return mask.to(DEVICE)


def materialised(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, mask: Tensor, bias: Tensor | None = None, scale: float = 0.7
) -> Tensor:
    return torch.nn.functional.linear(x, (w + scale * (b @ a)) * mask, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(backend, shape, strided, dtype):
    given, mask = problem(shape, dtype, strided), pruning(shape)
    out = sparse_lora_matmul(**given, mask=mask, scale=0.7, backend=backend)
    oracle = materialised(**{name: t.double() for name, t in given.items()}, mask=mask)
    assert_close_to_oracle(out, oracle, torch_result=materialised(**given, mask=mask))
    assert torch.equal(out, sparse_lora_matmul(**given, mask=pack_mask(mask), scale=0.7, backend=backend))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(17, 63, 65, 3), (3, 20, 129, 17)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_against_float64(backend, shape, dtype):
    given, mask = problem(shape, dtype), pruning(shape)
    w = given.pop("w")
    packed = pack_mask(mask) if backend == "torch" else mask
    _, found = with_gradients(lambda **t: sparse_lora_matmul(**t, w=w, mask=packed, scale=0.7, backend=backend), given)
    wide = {name: t.double() for name, t in given.items()}
    _, oracle = with_gradients(lambda **t: materialised(**t, w=w.double(), mask=mask), wide)
    _, plain = with_gradients(lambda **t: materialised(**t, w=w, mask=mask), given)
    for name, gradient in found.items():
        assert gradient.dtype == dtype
        assert_close_to_oracle(gradient, oracle[name], "gradient", plain[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(17, 63, 65, 3), (3, 20, 129, 17)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_straight_through_gradients_against_float64(backend, shape, dtype):
    """The factors' are plain LoRA's, all others and the output those of the exact mode."""
    given, mask = problem(shape, dtype), pruning(shape)
    w = given.pop("w")

    def ours(straight_through, **t):
        return sparse_lora_matmul(
            **t, w=w, mask=mask, scale=0.7, straight_through=straight_through, backend=backend
        )  # fmt: skip

    def plain(x, a, b, bias):
        return x @ w.to(x.dtype).T + 0.7 * (x @ a.T) @ b.T + bias

    out, found = with_gradients(lambda **t: ours(True, **t), given)
    exact, exact_gradients = with_gradients(lambda **t: ours(False, **t), given)
    assert torch.equal(out, exact)
    _, oracle = with_gradients(plain, {name: t.double() for name, t in given.items()})
    _, reference = with_gradients(plain, given)
    for name, gradient in found.items():
        assert gradient.dtype == dtype
        if name in ("a", "b"):
            assert_close_to_oracle(gradient, oracle[name], "gradient", reference[name])
        else:
            assert torch.equal(gradient, exact_gradients[name])


def test_many_blocks_and_splits(monkeypatch):
    """Blocks of one row on the torch path, several programs' partial sums on the other."""
    from lean_kernels.triton import sparse_lora as kernels

    monkeypatch.setattr(ref, "CHUNK", 1)
    monkeypatch.setattr(ref, "MIN_ROWS", 3)
    monkeypatch.setattr(kernels, "TILES", 1)
    shape = (4, 150, 140, 4)
    given, mask = problem(shape, torch.float32), pruning(shape)
    w = given.pop("w")
    oracle, gradients = with_gradients(lambda **t: materialised(**t, w=w, mask=mask), given)
    for backend in BACKENDS:
        out, found = with_gradients(
            lambda backend=backend, **t: sparse_lora_matmul(**t, w=w, mask=mask, scale=0.7, backend=backend), given
        )
        torch.testing.assert_close(out, oracle)
        torch.testing.assert_close(found, gradients)


def test_ranks_over_the_kernels_go_to_torch(monkeypatch):
    from lean_kernels.triton import sparse_lora as kernels

    monkeypatch.setattr(kernels, "MAX_RANK", 2)
    given, mask = problem((5, 6, 7, 3), torch.float32), pruning((5, 6, 7, 3))
    out = sparse_lora_matmul(**given, mask=mask, backend="triton")
    assert torch.equal(out, sparse_lora_matmul(**given, mask=mask, backend="torch"))


def test_gradcheck():
    shape = (3, 4, 5, 2)
    given, mask = problem(shape, torch.float64), pruning(shape)
    w = given.pop("w")
    leaves = [t.requires_grad_() for t in given.values()]
    assert torch.autograd.gradcheck(lambda x, a, b, bias: sparse_lora_matmul(x, w, a, b, mask, 0.7, bias), leaves)


def test_merging_keeps_the_zeros_and_the_outputs():
    shape = (9, 40, 33, 4)
    given, mask = problem(shape, torch.float64), pruning(shape)
    w, a, b = (given[name] for name in ("w", "a", "b"))
    merged = merge_sparse_lora(w * mask, a, b, mask, 0.7)
    assert not (merged[~mask] != 0).any()
    assert torch.equal(merged, merge_sparse_lora(w, a, b, pack_mask(mask), 0.7))  # w may be dense
    unmerged = sparse_lora_matmul(given["x"], w, a, b, mask, 0.7)
    torch.testing.assert_close(given["x"] @ merged.T, unmerged)
    assert torch.equal(merge_sparse_lora(w, a, b, mask, 0.0), w * mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["bool", "bits"])
def test_masking_leaves_zeros_whatever_was_there(packed, dtype, monkeypatch):
    monkeypatch.setattr(ref, "CACHED", 1)  # many blocks
    shape = (1, 2 * ref.MIN_ROWS + 3, 33, 1)
    x, mask = problem(shape, dtype)["w"], pruning(shape)
    x[::3], x[1::3] = float("nan"), -float("inf")
    wanted = x.masked_fill(~mask, 0)
    found = apply_mask_(x, pack_mask(mask) if packed else mask)
    assert found is x
    torch.testing.assert_close(x, wanted, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ValueError, match=r"mask is \[259, 1\] torch.bool; for x \[259, 33\]"):
        apply_mask_(x, mask[:, :1])


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 129])
def test_masks_pack_and_unpack(columns):
    mask = torch.rand(7, columns, device=DEVICE) < 0.5
    mask[0] = True  # the sign bit of every word
    packed = pack_mask(mask)
    assert packed.shape == (7, -(-columns // 32))
    assert packed.dtype == torch.int32
    assert torch.equal(unpack_mask(packed, columns), mask)
    assert [bool(packed[3, k // 32] >> (k % 32) & 1) for k in range(columns)] == mask[3].tolist()


def test_leading_dimensions_and_only_the_wanted_gradients():
    given, mask = problem((6, 5, 4, 2), torch.float32), pruning((6, 5, 4, 2))
    x, w, a, b = (given[name] for name in ("x", "w", "a", "b"))
    b.requires_grad_()
    out = sparse_lora_matmul(x.view(2, 3, 4), w, a, b, mask)
    assert out.shape == (2, 3, 5)
    out.square().sum().backward()
    oracle = torch.autograd.grad(materialised(x, w, a, b, mask, scale=1.0).square().sum(), b)[0]
    torch.testing.assert_close(b.grad, oracle)
    assert a.grad is None


def test_the_product_is_never_held(monkeypatch):
    """No step of training makes a tensor of N·K values, as the materialised path does: one block is the largest."""
    monkeypatch.setattr(ref, "CHUNK", 1)
    shape = (2, 4 * ref.MIN_ROWS, 64, 4)
    given, mask = problem(shape, torch.float32), pack_mask(pruning(shape))
    x, w, a, b = (given[name] for name in ("x", "w", "a", "b"))
    grad = torch.ones(2, shape[1], device=DEVICE)
    with LargestMade(*given.values(), mask, grad) as ours:
        ref.sparse_lora_matmul(x, w, a, b, mask, 0.7, None)
        ref.sparse_lora_backward(grad, x, w, a, b, mask, 0.7, True, True)
    with LargestMade(*given.values()) as plain:
        materialised(x, w, a, b, unpack_mask(mask, 64))
    assert plain.numel >= w.numel()
    assert ours.numel <= w.numel() / 4


class LargestMade(TorchDispatchMode):
    """Values in the largest tensor that was made, views of the `known` ones not counted."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known, self.numel = {t.untyped_storage().data_ptr() for t in known}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in self.known:
            self.numel = max(self.numel, out.numel())
        return out


def test_operators_are_registered_right_and_compile_whole():
    for shape in SHAPES[1:]:
        given, mask = problem(shape, torch.float32), pruning(shape)
        w = given.pop("w")
        x, a, b, bias = (t.requires_grad_() for t in given.values())
        for through in (False, True):
            given = (x, w, a, b, mask, 0.7, bias, through, "auto")
            torch.library.opcheck(torch.ops.lean_kernels.sparse_lora_matmul, given)
    compiled = torch.compile(sparse_lora_matmul, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in SHAPES[1:3]:
        given, mask = problem(shape, torch.float32), pruning(shape)
        w = given.pop("w")
        out, found = with_gradients(lambda w=w, mask=mask, **t: compiled(**t, w=w, mask=mask), given)
        eager, wanted = with_gradients(lambda w=w, mask=mask, **t: sparse_lora_matmul(**t, w=w, mask=mask), given)
        torch.testing.assert_close(out, eager)
        torch.testing.assert_close(found, wanted)


def test_wrong_requests():
    given, mask = problem((2, 3, 4, 1), torch.float32), pruning((2, 3, 4, 1))
    good = {name: t.cpu() for name, t in given.items()} | {"mask": mask.cpu()}
    for change, error, text in (
        ({"mask": good["mask"][:2]}, ValueError, r"it must be \[3, 4\]"),
        ({"mask": pack_mask(good["mask"])[:, :0]}, ValueError, r"it must be \[3, 1\]"),
        ({"mask": good["mask"].float()}, TypeError, "bool, or int32"),
        ({"a": good["a"][:, :2]}, ValueError, r"\[N, K\], \[r, K\] and \[N, r\]"),
        ({"b": good["b"].half()}, TypeError, "b is torch.float16"),
        ({"x": good["x"][:, :3]}, ValueError, r"\[..., 4\]"),
        ({"bias": good["bias"][:2]}, ValueError, "bias is"),
        ({"w": good["w"].int()}, TypeError, "w is torch.int32; it must be float32"),
        ({"w": good["w"].clone().requires_grad_()}, ValueError, "frozen"),
    ):
        with pytest.raises(error, match=text):
            sparse_lora_matmul(**good | change)
