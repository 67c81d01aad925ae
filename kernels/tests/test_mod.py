"""Routing, gathering and scattering of tokens: the torch path against loops, the Triton kernels against float64."""

from __future__ import annotations

import pytest
import torch
from helpers_kernels import DEVICE, DTYPES, ON_DEVICE, assert_close_to_oracle, with_gradients
from torch import Tensor

from lean_kernels.ops.mod import route, token_gather, token_scatter_add

pytestmark = ON_DEVICE  # pytest.mark.gpu where a GPU is
BACKENDS = ("torch", "triton")
# B, S, H, k
SHAPES = [(1, 1, 1, 1), (2, 17, 63, 5), (3, 9, 129, 9), (2, 5, 1000, 3)]


def problem(shape: tuple[int, int, int, int], dtype: torch.dtype, strided: bool = False) -> dict[str, Tensor]:
    batch, tokens, hidden, k = shape
    random = torch.Generator().manual_seed(sum(shape))
    wide = torch.randn(batch, tokens, hidden, generator=random).to(dtype)
    y = torch.randn(batch, hidden, k, generator=random).to(dtype).transpose(1, 2)
    gate = torch.rand(batch, k, generator=random).to(dtype)
    idx = torch.stack([torch.randperm(tokens, generator=random)[:k] for _ in range(batch)])
    weight = torch.randn(hidden, generator=random).to(dtype)
    if strided:  # every second hidden value, sequences inside
        wide = torch.stack([wide, wide], -1).transpose(0, 1).contiguous().transpose(0, 1)[..., 0]
    else:
        y = y.contiguous()
    found = {"x": wide, "y": y, "gate": gate, "idx": idx, "weight": weight}
    return {name: t.to(DEVICE) for name, t in found.items()}


def naive_gather(x: Tensor, idx: Tensor, counts: list[int], weight: Tensor | None = None) -> Tensor:
    out = torch.zeros(*idx.shape, x.shape[2], dtype=x.dtype, device=x.device)
    for b, count in enumerate(counts):
        for j in range(count):
            row = x[b, idx[b, j]]
            out[b, j] = row if weight is None else weight * row / (row.square().mean() + 1e-6).sqrt()
    return out


def naive_scatter(x: Tensor, y: Tensor, idx: Tensor, gate: Tensor | None, counts: list[int]) -> Tensor:
    rows = list(x.flatten(0, 1))
    for b, count in enumerate(counts):
        for j in range(count):
            at = b * x.shape[1] + int(idx[b, j])
            rows[at] = rows[at] + (1 if gate is None else gate[b, j]) * y[b, j]
    return torch.stack(rows).view(x.shape)


def wide(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}


def ragged(shape: tuple[int, int, int, int], counted: bool) -> tuple[list[int], Tensor | None]:
    counts = [(b + 1) % (shape[3] + 1) for b in range(shape[0])] if counted else [shape[3]] * shape[0]
    return counts, torch.tensor(counts, device=DEVICE) if counted else None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gather_and_scatter_against_loops(backend, shape, strided, dtype):
    given = problem(shape, dtype, strided)
    x, y, gate, idx, weight = (given[name] for name in ("x", "y", "gate", "idx", "weight"))
    for counted in (False, True):
        counts, tensor = ragged(shape, counted)
        assert torch.equal(token_gather(x, idx, counts=tensor, backend=backend), naive_gather(x, idx, counts))
        normed = token_gather(x, idx.int(), counts=tensor, norm_weight=weight, backend=backend)
        assert_close_to_oracle(normed, naive_gather(x.double(), idx, counts, weight.double()))
        for g in (gate, None):
            oracle = naive_scatter(x.double(), y.double(), idx, None if g is None else g.double(), counts)
            plain = naive_scatter(x, y, idx, g, counts)
            out = token_scatter_add(x, y, idx, g, counts=tensor, backend=backend)
            assert_close_to_oracle(out, oracle, torch_result=plain)
            onto = x.clone()
            with torch.no_grad():
                same = token_scatter_add(onto, y, idx, g, counts=tensor, inplace=True, backend=backend)
            assert same is onto
            assert_close_to_oracle(onto, oracle, torch_result=plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counted", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_against_loops(backend, counted, dtype):
    given = problem((2, 7, 65, 4), dtype)
    idx, (counts, tensor) = given.pop("idx"), ragged((2, 7, 65, 4), counted)
    weight = given.pop("weight")
    runs = {
        "scatter": (
            lambda x, y, gate: token_scatter_add(x, y, idx, gate, counts=tensor, backend=backend),
            lambda x, y, gate: naive_scatter(x, y, idx, gate, counts),
            given,
        ),
        "ungated": (
            lambda x, y: token_scatter_add(x, y, idx, counts=tensor, backend=backend),
            lambda x, y: naive_scatter(x, y, idx, None, counts),
            {"x": given["x"], "y": given["y"]},
        ),
        "gather": (
            lambda x: token_gather(x, idx, counts=tensor, backend=backend),
            lambda x: naive_gather(x, idx, counts),
            {"x": given["x"]},
        ),
        "normed": (
            lambda x, weight: token_gather(x, idx, counts=tensor, norm_weight=weight, backend=backend),
            lambda x, weight: naive_gather(x, idx, counts, weight),
            {"x": given["x"], "weight": weight},
        ),
    }
    for ours, naive, tensors in runs.values():
        _, found = with_gradients(ours, tensors)
        _, oracle = with_gradients(naive, wide(tensors))
        for name, gradient in found.items():
            assert gradient.dtype == tensors[name].dtype
            assert_close_to_oracle(gradient, oracle[name], "gradient")


def test_gradcheck():
    given = wide(problem((2, 4, 3, 2), torch.float32))
    idx, counts = given["idx"], torch.tensor([2, 1], device=DEVICE)
    x, y, gate, weight = (given[name].requires_grad_() for name in ("x", "y", "gate", "weight"))
    for count in (None, counts):

        def scatter(x: Tensor, y: Tensor, gate: Tensor, count: Tensor | None = count) -> Tensor:
            return token_scatter_add(x, y, idx, gate, counts=count)

        def gather(x: Tensor, weight: Tensor, count: Tensor | None = count) -> Tensor:
            return token_gather(x, idx, counts=count, norm_weight=weight)

        assert torch.autograd.gradcheck(scatter, (x, y, gate))
        assert torch.autograd.gradcheck(gather, (x, weight))


@pytest.mark.parametrize("backend", BACKENDS)
def test_round_trip_repeats_bit_for_bit(backend):
    given = problem((2, 17, 63, 6), torch.bfloat16)
    x, idx = given["x"], given["idx"]
    taken = token_gather(x, idx, backend=backend)
    back = token_scatter_add(torch.zeros_like(x), taken, idx, backend=backend)
    assert torch.equal(token_gather(back, idx, backend=backend), taken)
    assert torch.equal(token_scatter_add(back, -taken, idx, backend=backend), torch.zeros_like(x))
    args = (x, given["y"], idx, given["gate"])
    assert torch.equal(token_scatter_add(*args, backend=backend), token_scatter_add(*args, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequence_mode_is_the_same_on_one_row_of_sequences(backend):
    x = torch.randn(5, 3, 16, device=DEVICE)
    chosen = route(torch.tensor([[0.2, 0.5, 0.9, 0.1, 0.7]], device=DEVICE), threshold=0.5)
    k = int(chosen.counts)
    idx = chosen.idx[:, :k]
    rows = token_gather(x.view(1, 5, -1), idx, backend=backend)
    assert torch.equal(rows.view(3, 3, 16), x[[1, 2, 4]])
    out = token_scatter_add(x.view(1, 5, -1), 2 * rows, idx, backend=backend).view_as(x)
    assert torch.equal(out[[0, 3]], x[[0, 3]])
    torch.testing.assert_close(out[[1, 2, 4]], 3 * x[[1, 2, 4]])


def test_route_takes_the_highest_in_order_and_equal_scores_by_index():
    nan = float("nan")
    scores = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0], [nan, 2.0, -1.0, nan, nan]], device=DEVICE)
    best = route(scores, capacity=3)
    assert best.idx[0].tolist() == [1, 2, 4]
    assert best.idx[1, :2].tolist() == [1, 2]
    assert best.counts.tolist() == [3, 2]
    assert best.gate.tolist() == [[3.0, 3.0, 3.0], [2.0, -1.0, 0.0]]
    assert route(scores, capacity=2).idx[0].tolist() == [1, 2]
    above = route(scores, threshold=1.0)
    assert above.idx[:, :4].tolist() == [[0, 1, 2, 4], [1, 0, 2, 3]]
    assert above.counts.tolist() == [4, 1]
    assert all(sorted(row) == [0, 1, 2, 3, 4] for row in above.idx.tolist())  # padding repeats nothing
    assert route(scores, capacity=1, threshold=5.0).counts.tolist() == [0, 0]
    assert route(scores, capacity=0).idx.shape == (2, 0)


def test_route_agrees_with_topk_and_carries_the_gradient():
    scores = torch.randn(3, 40, dtype=torch.float64, device=DEVICE, requires_grad=True)
    chosen = route(scores, capacity=7)
    assert torch.equal(chosen.idx, scores.topk(7).indices.sort().values)
    chosen.gate.sum().backward()
    assert torch.equal(scores.grad, torch.zeros_like(scores).scatter(1, chosen.idx, 1.0))


def test_positions_and_mask_gathered_alike_make_attention_over_the_chosen_tokens_only():
    """The layer on k tokens equals the layer on S tokens whose unchosen keys are hidden: no key or value is left."""
    batch, tokens, dim = 2, 12, 8
    x = torch.randn(batch, tokens, dim, dtype=torch.float64, device=DEVICE)
    idx = route(torch.randn(batch, tokens, device=DEVICE), capacity=5).idx
    position = torch.arange(tokens, device=DEVICE).expand(batch, tokens)

    def attend(h: Tensor, at: Tensor, visible: Tensor) -> Tensor:
        turned = h * torch.cos(at)[..., None] + h.roll(dim // 2, -1) * torch.sin(at)[..., None]
        return torch.nn.functional.scaled_dot_product_attention(turned, turned, h, attn_mask=visible)

    causal = position[:, :, None] >= position[:, None, :]
    at = token_gather(position[..., None], idx)[..., 0]
    rows = token_gather(causal, idx)  # [B, k, S]
    visible = token_gather(rows.transpose(1, 2), idx).transpose(1, 2)
    inner = attend(token_gather(x, idx), at.double(), visible)
    chosen = torch.zeros(batch, tokens, dtype=torch.bool, device=DEVICE).scatter(1, idx, True)
    full = attend(x, position.double(), causal & chosen[:, None, :])
    torch.testing.assert_close(inner, token_gather(full, idx))


def test_operators_are_registered_right_and_compile_whole():
    for shape in SHAPES[1:]:
        given = problem(shape, torch.float32)
        counts = torch.ones(shape[0], dtype=torch.int64, device=DEVICE)
        x, y, gate, weight = (given[name].requires_grad_() for name in ("x", "y", "gate", "weight"))
        ops = torch.ops.lean_kernels
        torch.library.opcheck(ops.token_gather, (x, given["idx"], counts, weight, 1e-6, "auto"))
        torch.library.opcheck(ops.token_scatter_add, (x, y, given["idx"], gate, counts, "auto"))
        args = (x.detach(), y.detach(), given["idx"], gate.detach(), None, "auto")
        torch.library.opcheck(ops.token_scatter_add_, args)

    def routed(x: Tensor, scores: Tensor, weight: Tensor) -> Tensor:
        chosen = route(scores, capacity=4)
        rows = token_gather(x, chosen.idx, counts=chosen.counts, norm_weight=weight)
        return token_scatter_add(x, rows * 2, chosen.idx, chosen.gate, counts=chosen.counts)

    compiled = torch.compile(routed, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (7, 12):
        tensors = {"x": torch.randn(2, tokens, 8), "scores": torch.rand(2, tokens), "weight": torch.rand(8)}
        tensors = {name: t.to(DEVICE) for name, t in tensors.items()}
        eager, eager_gradients = with_gradients(routed, tensors)
        out, gradients = with_gradients(compiled, tensors)
        torch.testing.assert_close(out, eager)
        torch.testing.assert_close(gradients, eager_gradients)


def test_wrong_requests():
    x, y = torch.zeros(1, 4, 2), torch.zeros(1, 2, 2)
    idx = torch.tensor([[0, 2]])
    for bad, error, text in (
        ([[1, 1]], ValueError, "duplicate index 1"),
        ([[0, 4]], ValueError, "index 4 is outside 0..3"),
        ([[-1, 0]], ValueError, "index -1 is outside"),
        ([[0, 1, 2, 3, 0]], ValueError, "chooses 5 of 4 tokens"),
        ([[0.0, 1.0]], TypeError, "int32 or int64"),
        ([0, 1], ValueError, r"must be \[1, k\]"),
    ):
        with pytest.raises(error, match=text):
            token_gather(x, torch.tensor(bad))
    with pytest.raises(ValueError, match="duplicate index 2"):
        token_scatter_add(x, y, torch.tensor([[2, 2]]))
    with pytest.raises(ValueError, match="counts"):
        token_gather(x, idx, counts=torch.tensor([3]))
    padded = torch.tensor([[3, 5]])
    assert token_gather(x, padded, counts=torch.tensor([1])).shape == (1, 2, 2)  # what padding holds does not matter
    with pytest.raises(RuntimeError, match="no gradient"):
        token_scatter_add(x, y.requires_grad_(), idx, inplace=True)
    with pytest.raises(ValueError, match="gate"):
        token_scatter_add(x, y, idx, torch.zeros(1, 3))
    with pytest.raises(TypeError, match=r"y is torch\.float16"):
        token_scatter_add(x, y.half(), idx)
    with pytest.raises(ValueError, match="capacity is 5"):
        route(torch.zeros(1, 4), capacity=5)
    with pytest.raises(ValueError, match="neither"):
        route(torch.zeros(1, 4))
    assert token_scatter_add(x, y[:, :0], idx[:, :0]) is x
