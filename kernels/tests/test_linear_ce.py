"""Token losses of a linear head: both backends against float64, shards, ignored rows, gradients, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers_kernels import DEVICE, DTYPES, ON_DEVICE, assert_close_to_oracle
from torch import Tensor

from lean_kernels.ops.linear_ce import FIELDS, linear_ce, merge_shards
from lean_kernels.ref import linear_ce as ref

pytestmark = ON_DEVICE  # pytest.mark.gpu where a GPU is
BACKENDS = ("torch", "triton")
SHAPES = [(1, 1, 1), (17, 63, 129), (63, 17, 1000), (129, 64, 17)]  # T, H, V
SETTINGS: dict[str, dict[str, float]] = {"plain": {}, "capped": {"softcap": 5.0, "logit_scale": 0.5}}


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, strided: bool = False, scale: float = 1.0) -> Any:
    """Logits of about `scale`; a third of the rows is ignored, but never the first."""
    T, H, V = shape
    random = torch.Generator().manual_seed(T + H + V)
    h = torch.randn(T, 2 * H, generator=random)[:, ::2] * scale
    weight = torch.randn(H, V, generator=random).T * H**-0.5
    bias = torch.randn(V, generator=random)
    target = torch.randint(V, (T,), generator=random)
    target[2::3] = -100
    h, weight, bias = (t.to(dtype).to(DEVICE) for t in (h, weight, bias))
    if not strided:
        h, weight = h.contiguous(), weight.contiguous()
    return h, weight, bias, target.to(DEVICE)


def naive(
    h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, softcap: float | None = None, logit_scale: float = 1
) -> dict[str, Tensor]:
    z = h.double() @ weight.double().T
    z = (z if bias is None else z + bias.double()) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    at = z.gather(1, target.clamp(min=0)[:, None])[:, 0]
    found = {
        "loss": z.logsumexp(-1) - at,
        "lse": z.logsumexp(-1),
        "target_logit": at,
        "entropy": -(z.softmax(-1) * z.log_softmax(-1)).sum(-1),
        "rank": (z > at[:, None]).sum(-1),
        "argmax": z.argmax(-1),
    }
    return {name: torch.where(target == -100, 0, value) for name, value in found.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(backend, shape, settings, dtype):
    h, weight, bias, target = inputs(shape, dtype, strided=True)
    bias = bias if settings else None
    found = linear_ce(h, weight, target, bias=bias, backend=backend, **settings)
    oracle = naive(h, weight, bias, target, **settings)
    for name in FIELDS[:4]:
        assert getattr(found, name).dtype == torch.float32
        assert_close_to_oracle(getattr(found, name), oracle[name], "reduction", dtype=dtype)
    assert torch.equal(found.rank, oracle["rank"])
    assert torch.equal(found.argmax, oracle["argmax"])
    assert torch.equal(found.counted, target != -100)


def test_float64_stays_float64():
    h, weight, bias, target = inputs((17, 63, 129), torch.float64)
    found, oracle = linear_ce(h, weight, target, bias=bias), naive(h, weight, bias, target)
    for name in FIELDS[:4]:
        assert getattr(found, name).dtype == torch.float64
        assert_close_to_oracle(getattr(found, name), oracle[name])


def test_many_tiles_give_what_one_gives(monkeypatch):
    h, weight, bias, target = inputs((63, 17, 1000), torch.bfloat16)
    whole = linear_ce(h, weight, target, bias=bias, backend="torch")
    monkeypatch.setattr(ref, "TILE_BYTES", 4096)
    monkeypatch.setattr(ref, "MAX_ROWS", 5)
    monkeypatch.setattr(ref, "CONVERTED", 17 * 100)
    cut = linear_ce(h, weight, target, bias=bias, backend="torch")
    for name in FIELDS:
        torch.testing.assert_close(getattr(cut, name), getattr(whole, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_are_not_rounded_to_the_dtype_of_the_operands(backend):
    h, weight, _, target = inputs((63, 129, 1000), torch.bfloat16, scale=4.0)
    target[2::3] = 5
    oracle = naive(h, weight, None, target)["loss"]
    found = linear_ce(h, weight, target, return_=("loss",), backend=backend).loss
    plain = torch.nn.functional.cross_entropy((h @ weight.T).float(), target, reduction="none")
    assert (found - oracle).abs().max() < 1e-4 < (plain - oracle).abs().max() / 20


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e4, 1e-4])
def test_extreme_logits_stay_finite(backend, size):
    weight = torch.eye(16, device=DEVICE) * size
    target = torch.arange(16, device=DEVICE)
    h = -torch.eye(16, device=DEVICE)
    found = linear_ce(h, weight, target, backend=backend)
    oracle = naive(h, weight, None, target)
    for name in FIELDS[:4]:
        assert_close_to_oracle(getattr(found, name), oracle[name], "long")
    assert torch.equal(found.rank, oracle["rank"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_forbidden_token_counts_nothing(backend):
    h, weight, bias, target = inputs((17, 63, 129), torch.float32)
    target[:] = 3
    bias[64:] = -torch.inf
    found = linear_ce(h, weight, target, bias=bias, backend=backend)
    oracle = naive(h, weight[:64], bias[:64], target)
    for name in FIELDS[:4]:
        assert_close_to_oracle(getattr(found, name), oracle[name], "reduction")


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_are_zero_even_if_their_states_are_nan(backend):
    h, weight, _, target = inputs((17, 63, 129), torch.float32)
    h[target == -100] = torch.nan
    found = linear_ce(h, weight, target, backend=backend)
    assert all(not getattr(found, name)[target == -100].any() for name in FIELDS)
    assert torch.isfinite(found.loss).all()
    target[:] = -100
    found = linear_ce(h, weight, target, backend=backend)
    assert not found.counted.any()
    assert not found.loss.any()
    assert len(linear_ce(h[:0], weight, target[:0], backend=backend).loss) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_state_gives_a_nan_loss_in_its_row_alone(backend):
    h, weight, _, target = inputs((17, 63, 129), torch.float32)
    h[0, 5] = torch.nan
    loss = linear_ce(h, weight, target, return_=("loss",), backend=backend).loss
    assert loss[0].isnan()
    assert torch.isfinite(loss[1:]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_shards_of_the_vocabulary_merge_to_the_whole(backend):
    h, weight, bias, target = inputs((17, 63, 1000), torch.float32)
    fields = ("loss", "lse", "target_logit", "entropy")
    shards = [
        linear_ce(
            h, weight[at:to], target, bias=bias[at:to], vocab_start=at, vocab_size=1000, return_=fields, backend=backend
        )
        for at, to in ((0, 300), (300, 301), (301, 1000))
    ]
    merged, oracle = merge_shards(shards), naive(h, weight, bias, target)
    for name in fields:
        assert_close_to_oracle(getattr(merged, name), oracle[name], "reduction")
    assert merged.rank is None
    # only one shard holds a target, the others cannot tell its loss
    assert sum(torch.isfinite(shard.target_logit[0]).item() for shard in shards) == 1
    with pytest.raises(ValueError, match="lse and target_logit"):
        merge_shards([linear_ce(h, weight, target, return_=("loss",))])


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_gradients(settings):
    h, weight, bias, target = inputs((5, 7, 11), torch.float64)
    leaves = [t.requires_grad_() for t in (h, weight, bias)]

    def run(h, weight, bias):
        found = linear_ce(h, weight, target, bias=bias, **settings)
        return found.loss, found.lse, found.target_logit, found.entropy

    assert torch.autograd.gradcheck(run, leaves)
    loss = linear_ce(h, weight, target, bias=bias, return_=("loss",), **settings).loss
    (alone,) = torch.autograd.grad(loss.sum(), h)
    (wanted,) = torch.autograd.grad(naive(h, weight, bias, target, **settings)["loss"].sum(), h)
    torch.testing.assert_close(alone, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_halves(backend, monkeypatch):
    monkeypatch.setattr(ref, "CONVERTED", 100)
    h, weight, bias, target = inputs((17, 63, 129), torch.bfloat16)
    leaves = [t.requires_grad_() for t in (h, weight, bias)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    found = torch.autograd.grad(linear_ce(*leaves[:2], target, bias=bias, backend=backend).loss.sum(), leaves)
    oracle = torch.autograd.grad(naive(*exact, target)["loss"].sum(), exact)
    for one, other in zip(found, oracle):
        assert one.dtype == torch.bfloat16
        assert_close_to_oracle(one, other, "gradient")


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_equal_bit_for_bit(backend):
    h, weight, bias, target = inputs((63, 17, 1000), torch.float32)
    first, second = (linear_ce(h, weight, target, bias=bias, backend=backend) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second))


@pytest.mark.parametrize("shape", [(5, 7, 11), (1, 3, 2), (17, 16, 33)], ids=str)
def test_registration(shape):
    h, weight, bias, target = inputs(shape, torch.float32)
    arguments = (h.requires_grad_(), weight, target, bias, -100, None, 1.0, 0, shape[2], True, True, False, "torch")
    torch.library.opcheck(torch.ops.lean_kernels.linear_ce.default, arguments)


def test_compiles_without_a_graph_break():
    def run(h, weight, target):
        found = linear_ce(h * 2, weight, target, return_=("loss", "rank"))
        return found.loss + 1, found.rank

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((17, 63, 129), (5, 7, 11)):
        h, weight, _, target = inputs(shape, torch.float32)
        for one, other in zip(compiled(h, weight, target), run(h, weight, target)):
            assert torch.equal(one, other)


def test_errors_name_the_argument():
    h, weight, bias, target = inputs((5, 7, 11), torch.float32)
    wrong = target.clone()
    wrong[1] = 11
    if DEVICE == "cpu":
        with pytest.raises(IndexError, match=r"target\[1\] is 11; it must be 0 to 10, or -100"):
            linear_ce(h, weight, wrong)
    for error, text, arguments in [
        (ValueError, r"h \(5, 6\) and weight \(11, 7\)", {"h": h[:, 1:]}),
        (ValueError, r"target is \(4,\)", {"target": target[1:]}),
        (ValueError, r"bias is \(10,\)", {"bias": bias[1:]}),
        (ValueError, "return_ names perplexity; it may name loss", {"return_": ("perplexity",)}),
        (ValueError, "softcap is 0", {"softcap": 0}),
        (ValueError, "tokens 5 to 16 are no part of a vocabulary of 15", {"vocab_start": 5, "vocab_size": 15}),
        (ValueError, "rank and argmax need the whole vocabulary", {"vocab_size": 15}),
        (ValueError, "auto, torch, triton", {"backend": "cuda"}),
        (TypeError, "weight is torch.float64, but h is torch.float32", {"weight": weight.double()}),
        (TypeError, "target is torch.float32", {"target": target.float()}),
        (TypeError, "h is torch.int64", {"h": target[:, None].expand(5, 7)}),
        (RuntimeError, "bias is on meta, but h is on", {"bias": bias.to("meta")}),
    ]:
        with pytest.raises(error, match=text):
            linear_ce(**{"h": h, "weight": weight, "target": target, **arguments})
