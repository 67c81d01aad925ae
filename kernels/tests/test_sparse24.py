"""2:4 sparse weights: packing there and back, and the product of both backends against float64."""

from __future__ import annotations

import pytest
import torch
from helpers_kernels import DEVICE, DTYPES, ON_DEVICE, assert_close_to_oracle
from torch import Tensor

from lean_kernels.ops.sparse24 import check_24, matmul_24, pack_24, unpack_24
from lean_kernels.ref import sparse24 as ref

pytestmark = ON_DEVICE  # pytest.mark.gpu where a GPU is
BACKENDS = ("torch", "triton")
# M, N, K
SHAPES = [(1, 1, 4), (17, 33, 68), (3, 63, 128), (65, 5, 36)]


def sparse(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random 2:4 weights; some groups have fewer than two nonzero."""
    random = torch.Generator().manual_seed(rows + columns)
    w = torch.randn(rows, columns // 4, 4, generator=random)
    drop = torch.rand(w.shape, generator=random).argsort(-1)[..., :2]
    w.scatter_(-1, drop, 0.0)
    w[torch.rand(w.shape, generator=random) < 0.1] = 0
    return w.view(rows, columns).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("columns", [4, 28, 32, 36, 128])
def test_packs_and_unpacks_exactly(columns, dtype):
    w = sparse(9, columns, dtype)
    packed = pack_24(w)
    assert packed.values.shape == (9, columns // 2)
    assert packed.places.shape == (9, -(-columns // 32))
    assert torch.equal(unpack_24(packed), w)
    assert torch.equal(unpack_24(pack_24(torch.zeros_like(w))), torch.zeros_like(w))


def test_packed_bytes_are_nine_sixteenths_in_half_precision():
    packed = pack_24(sparse(8, 256, torch.bfloat16))
    assert sum(t.nbytes for t in packed) / (8 * 256 * 2) == 9 / 16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_product_against_float64(backend, shape, dtype, monkeypatch):
    monkeypatch.setattr(ref, "CHUNK", 1)
    monkeypatch.setattr(ref, "MIN_ROWS", 7)
    rows, columns, depth = shape
    random = torch.Generator().manual_seed(0)
    x = torch.randn(depth, rows, generator=random).to(DEVICE, dtype).T  # not contiguous
    bias = torch.randn(columns, generator=random).to(DEVICE, dtype)
    w = sparse(columns, depth, dtype)
    packed = pack_24(w)
    for added in (bias, None):
        oracle = torch.nn.functional.linear(x.double(), w.double(), None if added is None else added.double())
        out = matmul_24(x, packed, added, backend=backend)
        assert_close_to_oracle(out, oracle, torch_result=torch.nn.functional.linear(x, w, added))
        assert torch.equal(out, matmul_24(x, packed, added, backend=backend))


def test_operator_is_registered_right_and_compiles_whole():
    compiled = torch.compile(matmul_24, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, columns, depth in SHAPES[1:]:
        x, packed = torch.randn(2, rows, depth, device=DEVICE), pack_24(sparse(columns, depth))
        torch.library.opcheck(torch.ops.lean_kernels.matmul_24, (x[0], *packed, None, "auto"))
        torch.testing.assert_close(compiled(x, packed), matmul_24(x, packed))


def test_wrong_requests():
    w = sparse(6, 12)
    w[4, 8:11] = 1
    w[5, :4] = 1
    for call, error, text in (
        (lambda: check_24(w), ValueError, r"row 4, group 2 \(columns 8 to 11\)"),
        (lambda: pack_24(w), ValueError, "row 4"),
        (lambda: check_24(w[:, :6]), ValueError, "multiple of 4"),
        (lambda: matmul_24(torch.ones(1, 8), pack_24(w[:4].cpu())), ValueError, r"\[..., 12\]"),
        (lambda: matmul_24(torch.ones(1, 12).half(), pack_24(w[:4].cpu())), TypeError, "torch.float16"),
        (lambda: matmul_24(torch.ones(1, 12), pack_24(w[:4].cpu()), torch.ones(3)), ValueError, "bias"),
    ):
        with pytest.raises(error, match=text):
            call()
    check_24(w[:4])
