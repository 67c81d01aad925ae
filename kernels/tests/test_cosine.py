"""Cosines of hidden-state streams: both backends against float64, zero vectors, masks, streaming."""

from __future__ import annotations

import pytest
import torch
from helpers_kernels import DEVICE, DTYPES, ON_DEVICE, assert_close_to_oracle
from torch import Tensor

from lean_kernels.ops.cosine import CosineAccumulator, cosine_adjacent, cosine_gram, cosine_stream
from lean_kernels.ref import cosine as ref

pytestmark = ON_DEVICE  # pytest.mark.gpu where a GPU is
BACKENDS = ("torch", "triton")
# Lp, T, H
SHAPES = [(2, 1, 1), (3, 17, 63), (17, 5, 129), (2, 33, 17), (4, 3, 1000)]


def streams(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32, strided: bool = False) -> Tensor:
    """Neighbouring streams are alike, as those of a model are."""
    random = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(*shape, generator=random).cumsum(0).to(dtype)
    if strided:  # tokens outside, every second hidden value
        x = torch.stack([x, x], -1).transpose(0, 1).contiguous().transpose(0, 1)[..., 0]
    return x.to(DEVICE)


def masked(shape: tuple[int, int, int]) -> Tensor:
    mask = torch.rand(shape[1], generator=torch.Generator().manual_seed(3)) < 0.7
    mask[0] = True
    return mask.to(DEVICE)


def naive(x: Tensor) -> Tensor:
    """Cosines of all pairs, [Lp, Lp, T], float64; 0 where a vector is zero."""
    x = x.double()
    norm = x.norm(dim=-1)
    size = norm[:, None] * norm[None]
    return torch.where(size == 0, 0, (x[:, None] * x[None]).sum(-1) / size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(backend, shape, strided, dtype):
    x = streams(shape, dtype, strided)
    for mask in (None, masked(shape)):
        kept = torch.ones(shape[1], device=DEVICE) if mask is None else mask
        oracle = naive(x) * kept
        found = cosine_stream(x[0], x[1], mask, per_token=True, backend=backend)
        plain = torch.cosine_similarity(x[0], x[1], dim=-1) * kept
        assert_close_to_oracle(found.per_token, oracle[0, 1], "reduction", plain, dtype)
        assert_close_to_oracle(found.mean, oracle[0, 1].sum() / kept.sum(), "reduction", dtype=dtype)
        assert int(found.count) == int(kept.sum())
        pairs = cosine_adjacent(x, mask, per_token=True, backend=backend)
        assert_close_to_oracle(pairs.per_token, oracle.diagonal(1).T, "reduction", dtype=dtype)
        assert_close_to_oracle(pairs.mean, oracle.diagonal(1).T.sum(1) / kept.sum(), "reduction", dtype=dtype)
        gram = cosine_gram(x, mask, backend=backend)
        assert_close_to_oracle(gram, oracle.sum(-1) / kept.sum(), "reduction", dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_vectors_are_excluded_and_counted_apart(backend):
    x = streams((3, 9, 20))
    x[1, 4] = 0
    mask = torch.ones(9, dtype=torch.int64, device=DEVICE)
    mask[7] = 0
    found = cosine_stream(x[0], x[1], mask, per_token=True, backend=backend)
    assert (int(found.count), int(found.excluded)) == (7, 1)
    assert found.per_token[4] == 0
    assert found.per_token[7] == 0
    torch_mean = torch.cosine_similarity(x[0], x[1], dim=-1)[mask.bool()].mean()  # which counts it, as 0
    torch.testing.assert_close((found.sum / (found.count + found.excluded)).float(), torch_mean)
    pairs = cosine_adjacent(x, mask, backend=backend)
    assert pairs.count.tolist() == [7, 7]
    accumulator = CosineAccumulator("gram", backend=backend)
    accumulator.update(x, mask)
    sums = accumulator.result()
    assert sums.count.tolist() == [[8, 7, 8], [7, 7, 7], [8, 7, 8]]
    assert sums.excluded.tolist() == [[0, 1, 0], [1, 1, 1], [0, 1, 0]]
    alone = cosine_gram(x[:, 4:5], backend=backend)
    assert alone[0, 1].isnan()
    assert abs(alone[0, 0] - 1) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_half_precision_values_and_the_cosine_with_oneself(backend):
    x = streams((2, 6, 300)).clamp(-3, 3)
    big = (x * 1e4).half()  # squares are far over what fp16 holds
    oracle = naive(big)[0, 1]
    found = cosine_stream(big[0], big[1], per_token=True, backend=backend)
    torch.testing.assert_close(found.per_token.double(), oracle, rtol=1e-3, atol=0)
    own = cosine_stream(x[0], x[0], per_token=True, backend=backend).per_token
    assert (own - 1).abs().max() <= 1e-6
    huge = torch.full((1, 4), 1e18, device=DEVICE)  # the product of the squared norms is infinite in float32
    assert abs(float(cosine_stream(huge, huge, backend=backend).sum) - 1) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_with_its_token(backend):
    x = streams((2, 4, 8))
    x[1, 2, 3] = float("nan")
    found = cosine_stream(x[0], x[1], per_token=True, backend=backend)
    assert found.per_token.isnan().tolist() == [False, False, True, False]
    mask = torch.tensor([True, True, False, True], device=DEVICE)
    assert cosine_stream(x[0], x[1], mask, backend=backend).sum.isfinite()
    assert cosine_gram(x, mask, backend=backend).isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["stream", "adjacent", "gram"])
def test_accumulated_in_pieces_equals_all_at_once_and_merges(kind, backend):
    x, mask = streams((4, 21, 40), torch.bfloat16), masked((4, 21, 40))
    arguments = (x[0], x[2]) if kind == "stream" else (x,)
    whole = CosineAccumulator(kind, backend=backend)
    whole.update(*arguments, mask)
    first, second = CosineAccumulator(kind, backend=backend), CosineAccumulator(kind, backend=backend)
    for start, end in ((0, 1), (1, 8), (8, 21)):
        part = (first, second)[start % 2]
        part.update(*(t[..., start:end, :] for t in arguments), mask[start:end])
    first.merge(second)
    first.merge(CosineAccumulator(kind))  # one that has seen nothing
    assert torch.equal(first.result().count, whole.result().count)
    tolerance = 1e-14 if kind != "gram" else 1e-6  # gram's tokens are summed in float32 within a chunk
    torch.testing.assert_close(first.result().mean, whole.result().mean, rtol=0, atol=tolerance)


def test_leading_dimensions_and_tokens_in_many_chunks(monkeypatch):
    x = streams((3, 24, 10), torch.float64)
    mask = masked((3, 24, 10))
    whole = cosine_adjacent(x, mask), cosine_gram(x, mask)
    monkeypatch.setattr(ref, "CHUNK", 70)  # 7 tokens of one stream, 2 of all three
    torch.testing.assert_close(cosine_adjacent(x, mask).sum, whole[0].sum, rtol=0, atol=1e-12)
    torch.testing.assert_close(cosine_gram(x, mask), whole[1], rtol=0, atol=1e-12)
    found = cosine_stream(x[0].view(2, 3, 4, 10), x[1].view(2, 3, 4, 10), mask.view(2, 3, 4), per_token=True)
    assert found.per_token.shape == (2, 3, 4)
    assert torch.equal(found.sum, whole[0].sum[0])


def test_long_rows_and_many_streams_leave_the_registers(monkeypatch):
    from lean_kernels.triton import cosine as kernels

    x, mask = streams((5, 4, 50)), masked((5, 4, 50))
    wanted = cosine_adjacent(x, mask, backend="torch"), cosine_gram(x, mask, backend="torch")
    monkeypatch.setattr(kernels, "MAX_ROW", 49)
    monkeypatch.setattr(kernels, "MAX_LAYERS", 4)
    torch.testing.assert_close(cosine_adjacent(x, mask, backend="triton").sum, wanted[0].sum, rtol=0, atol=1e-5)
    assert torch.equal(cosine_gram(x, mask, backend="triton"), wanted[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_equal_bit_for_bit(backend):
    x = streams((3, 33, 70), torch.float16)
    for run in (lambda: cosine_adjacent(x, backend=backend).sum, lambda: cosine_gram(x, backend=backend)):
        assert torch.equal(run(), run())


def test_operators_are_registered_right_and_compile_whole():
    for shape in SHAPES[1:4]:
        x, mask = streams(shape), masked(shape)
        torch.library.opcheck(torch.ops.lean_kernels.cosine_stream, (x[0], x[1], mask, "auto"))
        torch.library.opcheck(torch.ops.lean_kernels.cosine_adjacent, (x, None, "auto"))
        torch.library.opcheck(torch.ops.lean_kernels.cosine_gram, (x, mask, "auto"))

    def all_three(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return cosine_stream(x[0], x[1], mask).mean, cosine_adjacent(x, mask).mean, cosine_gram(x, mask)

    compiled = torch.compile(all_three, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in SHAPES[1:4]:
        x, mask = streams(shape), masked(shape)
        for found, wanted in zip(compiled(x, mask), all_three(x, mask)):
            torch.testing.assert_close(found, wanted)


def test_wrong_requests():
    x = torch.ones(2, 3, 4)
    for call, error, text in (
        (lambda: cosine_stream(x[0], x[1, :2]), ValueError, "one shape"),
        (lambda: cosine_stream(x[0], x[1].half()), TypeError, "torch.float16"),
        (lambda: cosine_stream(x[0], x[1], torch.ones(2, dtype=torch.bool)), ValueError, r"must be \[3\]"),
        (lambda: cosine_stream(x[0], x[1], torch.ones(3)), TypeError, "bool or an integer"),
        (lambda: cosine_stream(x[0], x[1], torch.zeros(3, dtype=torch.bool)), ValueError, "leaves out every token"),
        (lambda: cosine_stream(x[0, :0], x[1, :0]), ValueError, "no token"),
        (lambda: cosine_adjacent(x[:1]), ValueError, "at least 2"),
        (lambda: cosine_gram(x[0]), ValueError, "streams of hidden states"),
        (lambda: cosine_gram(x.long()), TypeError, "torch.int64"),
        (lambda: cosine_gram(x.double(), backend="triton"), TypeError, "float64"),
        (lambda: cosine_gram(x, backend="cuda"), ValueError, "auto, torch, triton"),
        (lambda: CosineAccumulator("pairs"), ValueError, "stream, adjacent, gram"),
        (lambda: CosineAccumulator().result(), ValueError, "no token"),
        (lambda: CosineAccumulator().merge(CosineAccumulator("gram")), ValueError, "kind"),
    ):
        with pytest.raises(error, match=text):
            call()
    accumulator = CosineAccumulator("adjacent")
    accumulator.update(x)
    with pytest.raises(ValueError, match="another number of streams"):
        accumulator.update(torch.ones(4, 3, 4))
