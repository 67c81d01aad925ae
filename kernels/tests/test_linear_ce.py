"""`linear_ce` against logits formed in float64."""

import pytest
import torch
from helpers_kernels import DEVICE, DTYPES, assert_close_to_oracle
from torch import Tensor

from lean_kernels import linear_ce

BACKENDS = ("torch", "triton")


def case(dtype: torch.dtype, tokens: int, width: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(tokens + vocab)
    h = torch.randn(tokens, width, generator=g).to(dtype)
    weight = (torch.randn(vocab, width, generator=g) / width**0.5).to(dtype)
    return h.to(DEVICE), weight.to(DEVICE), torch.randint(vocab, (tokens,), generator=g).to(DEVICE)


def logits(h: Tensor, weight: Tensor) -> Tensor:
    return h.double() @ weight.double().T


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tokens", "width", "vocab"), [(1, 64, 17), (17, 80, 129), (63, 32, 1000)])
def test_all_numbers_equal_the_oracle(backend: str, dtype: torch.dtype, tokens: int, width: int, vocab: int) -> None:
    h, weight, target = case(dtype, tokens, width, vocab)
    found = linear_ce(h, weight, target, backend=backend)
    z = logits(h, weight)
    p = z.log_softmax(-1)
    own = z.gather(1, target[:, None])[:, 0]
    for name, expected in {
        "loss": -p.gather(1, target[:, None])[:, 0],
        "lse": z.logsumexp(-1),
        "target_logit": own,
        "entropy": -(p.exp() * p).sum(-1),
    }.items():
        assert_close_to_oracle(getattr(found, name), expected, "reduction", dtype=dtype)
    rank = (z > own[:, None]).sum(-1)
    assert (found.rank - rank).abs().max() <= (1 if dtype != torch.float32 else 0)  # type: ignore[operator]
    assert torch.equal(found.argmax, z.argmax(-1))  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_cost_nothing_and_give_zero(backend: str) -> None:
    h, weight, target = case(torch.float32, 9, 32, 50)
    target[::2] = -100
    found = linear_ce(h, weight, target, return_=("loss",), backend=backend)
    whole = linear_ce(h[1::2].contiguous(), weight, target[1::2], return_=("loss",), backend=backend)
    assert found.loss is not None
    assert whole.loss is not None
    assert not found.loss[::2].any()
    assert torch.allclose(found.loss[1::2], whole.loss, atol=1e-6)
    nothing = linear_ce(h, weight, torch.full_like(target, -100), return_=("loss",), backend=backend)
    assert nothing.loss is not None
    assert not nothing.loss.any()
    assert not nothing.counted.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_logits_and_the_cap(backend: str) -> None:
    h, weight, target = case(torch.float32, 5, 32, 70)
    found = linear_ce(h * 1e4, weight, target, return_=("loss", "entropy"), backend=backend)
    assert found.loss is not None
    assert found.loss.isfinite().all()
    capped = linear_ce(h, weight, target, softcap=3.0, logit_scale=2.0, return_=("loss",), backend=backend).loss
    z = 3.0 * (2.0 * logits(h, weight) / 3.0).tanh()
    assert_close_to_oracle(capped, torch.nn.functional.cross_entropy(z, target, reduction="none"), "reduction")  # type: ignore[arg-type]


def test_gradients_equal_those_of_plain_cross_entropy() -> None:
    h, weight, target = (t.double() if t.is_floating_point() else t for t in case(torch.float32, 6, 16, 30))
    h.requires_grad_(), weight.requires_grad_()
    loss = linear_ce(h, weight, target, return_=("loss",)).loss
    assert loss is not None
    mine = torch.autograd.grad(loss.sum(), (h, weight))
    plain = torch.autograd.grad(torch.nn.functional.cross_entropy(h @ weight.T, target, reduction="sum"), (h, weight))
    for a, b in zip(mine, plain):
        assert torch.allclose(a, b, atol=1e-10)


def test_wrong_requests_are_named() -> None:
    h, weight, target = (t.cpu() for t in case(torch.float32, 4, 16, 30))
    with pytest.raises(IndexError):
        linear_ce(h, weight, target + 30)
    with pytest.raises(ValueError):
        linear_ce(h[:, :8], weight, target)
    with pytest.raises(ValueError, match="auto, torch, triton"):
        linear_ce(h, weight, target, backend="cuda")


@pytest.mark.gpu
def test_compiled_kernel_equals_torch() -> None:
    h, weight, target = case(torch.bfloat16, 300, 512, 32000)
    mine = linear_ce(h, weight, target, return_=("loss",), backend="triton").loss
    plain = linear_ce(h, weight, target, return_=("loss",), backend="torch").loss
    assert torch.allclose(mine, plain, atol=1e-3)  # type: ignore[arg-type]
