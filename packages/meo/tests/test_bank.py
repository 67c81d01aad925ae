"""A bank equals a naive loop in float64 at every level, with every gate and in both orders, values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from meo.bank import BankSpec, MergedLinear, TokenBlock, make_bank
from meo.config import GATES, MeoConfig
from meo.context import Frame, Options, Runtime
from meo.gate import decide, top
from meo.merging import mix

from model_hooks import RequestError
from paper_tables.memory import peak_tensor_bytes

IN, OUT, N, B, T = 6, 5, 8, 3, 8
LEVELS = ("task", "sequence", "token", "prefix", "chunk", "cumulative", "encoder")


def bank(level: str = "sequence", bias: bool = True, causal: bool = False, **changes: Any) -> MergedLinear:
    """A random bank in float64."""
    config = MeoConfig(**{"experts": N, "k": 3, "gate": "topk", "chunk": 4, "reduce": 3, "tasks": {"a": "", "b": ""},
                          "level": "" if level == "encoder" else level, **changes})  # fmt: skip
    runtime = Runtime(config, level, causal)
    router = {"task": 4, "encoder": 7}.get(level, IN)
    made = make_bank(BankSpec("x", 0, IN, OUT, bias, router, "x"), config, runtime).double()
    torch.manual_seed(1)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made.eval()


def frame_of(made: MergedLinear, mask: torch.Tensor | None = None, **more: Any) -> Frame:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randn(2, 4, generator=generator).double()
    encoder = torch.randn(B, 7, generator=generator).double()
    told = Options(task=["a", "b", "a"], prompt_lens=torch.tensor([2, 5, 1]))
    return Frame(made.runtime, told, B, T, "cpu", mask, codes=codes, encoder=encoder, **more)


def router_inputs(made: MergedLinear, x: torch.Tensor, frame: Frame, b: int, t: int) -> torch.Tensor | None:
    """What decides for token t of row b, by the definitions; None at the beginning of a chunked text."""
    level, size = made.runtime.level, made.config.chunk
    if level == "task":
        return frame.codes[[0, 1, 0][b]]
    if level == "encoder":
        return frame.encoder[b]
    if level == "token" and made.config.method == "moe":
        return x[b, t]
    real = [i for i in range(T) if frame.mask is None or frame.mask[b, i]]
    place = real.index(t)
    chosen = {
        "prefix": real[: [2, 5, 1][b]], "chunk": real[: place // size * size], "cumulative": real[: place + 1],
    }.get(level, real)  # fmt: skip
    return x[b, chosen].mean(0) if chosen else None


def naive_gates(z: torch.Tensor, config: MeoConfig) -> dict[int, torch.Tensor]:
    order = sorted(range(N), key=lambda i: (-z[i].item(), i))
    chosen = order if config.gate == "softmax" else order[: config.k]
    if config.gate in ("gumbel-st", "hash"):
        return {i: torch.tensor(1 / len(chosen), dtype=torch.float64) for i in chosen}
    size = z.sigmoid() if config.gate == "sigmoid" else (z - z.max()).exp()
    return {i: size[i] / sum(size[j] for j in chosen) for i in chosen}


def naive(made: MergedLinear, x: torch.Tensor, frame: Frame) -> torch.Tensor:
    """Token by token: gates, merged matrix, product."""
    if made.token is not None:
        block = made.token
        hidden = (x @ block.down.weight.T + block.down.bias).clamp_min(0)
        x = x + hidden @ block.up.weight.T + block.up.bias
    rows = []
    for b in range(B):
        for t in range(T):
            if frame.mask is not None and not frame.mask[b, t]:
                continue
            r = router_inputs(made, x, frame, b, t)
            table = made.projection if made.config.gate == "hash" else made.w_gate
            z = made.first if r is None else r @ table.double()
            gates = naive_gates(z, made.config)
            matrix = sum(g * expert(made, i) for i, g in gates.items())
            y = matrix @ x[b, t]
            if made.bias is not None:
                y = y + sum(g * made.bias[i] for i, g in gates.items())
            rows.append(y)
    return torch.stack(rows)


def expert(made: MergedLinear, i: int) -> torch.Tensor:
    return made.weight[i] if made.weight.dim() == 3 else made.weight + made.up[i] @ made.down[i]


def compare(made: MergedLinear, frame: Frame, mask: torch.Tensor | None = None) -> None:
    """Values, and gradients of the input and of all parameters."""
    x = torch.randn(B, T, IN, generator=torch.Generator().manual_seed(2)).double().requires_grad_()
    real = torch.ones(B, T, dtype=torch.bool) if mask is None else mask.bool()
    got, want = made.mixed(x, frame)[real], naive(made, x, frame)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(4)).double()
    tensors = [x, *made.parameters()]
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), tensors, allow_unused=True),
        torch.autograd.grad((want * weight).sum(), tensors, allow_unused=True),
    ):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("order", ["auto", "merge", "output"])
@pytest.mark.parametrize("level", LEVELS)
def test_levels_and_orders(level: str, order: str) -> None:
    made = bank(level, order=order)
    compare(made, frame_of(made))


@pytest.mark.parametrize("level", ["sequence", "prefix", "chunk", "cumulative"])
def test_padding_on_both_sides(level: str) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0]])
    made = bank(level)
    compare(made, frame_of(made, mask), mask)


@pytest.mark.parametrize("k", range(1, N + 1))
def test_every_k_with_and_without_bias(k: int) -> None:
    for bias in (True, False):
        made = bank(k=k, bias=bias)
        compare(made, frame_of(made))


@pytest.mark.parametrize("gate", [gate for gate in GATES if gate != "gumbel-st"])
def test_gates(gate: str) -> None:
    made = bank(gate=gate)
    compare(made, frame_of(made))


def test_gumbels_gate_weighs_equally_and_learns_as_a_softmax() -> None:
    made = bank(gate="gumbel-st")
    frame = frame_of(made)
    x = torch.randn(B, T, IN, generator=torch.Generator().manual_seed(2)).double()
    torch.testing.assert_close(made.mixed(x, frame).flatten(0, 1), naive(made, x, frame), atol=1e-10, rtol=1e-10)
    z = torch.randn(2, N, dtype=torch.float64, requires_grad=True)
    found, weight = decide(z, None, made.config, False), torch.randn(2, 3).double()
    (found.g * weight).sum().backward()
    soft = z.detach().clone().requires_grad_()
    (soft.softmax(-1).gather(-1, found.idx) * weight).sum().backward()
    torch.testing.assert_close(z.grad, soft.grad)


@pytest.mark.parametrize("changes", [{"method": "moe", "level": "token"}, {"method": "moe"}, {"init": "lora"},
                                     {"init": "lora", "level": "task"}, {"init": "lora", "level": "cumulative"},
                                     {"temperature": 3.0}])  # fmt: skip
def test_vanilla_mixtures_and_low_rank_experts(changes: dict[str, Any]) -> None:
    made = bank(**changes)
    frame = frame_of(made)
    if made.config.temperature != 1:
        with torch.no_grad():
            made.w_gate *= 3.0
        expected = bank()
        assert torch.allclose(made.mixed(x := torch.ones(B, T, IN).double(), frame),
                              expected.mixed(x, frame_of(expected)))  # fmt: skip
        return
    compare(made, frame)


def test_one_token_is_the_same_in_every_order() -> None:
    x, weight, bias = torch.randn(3, 1, IN).double(), torch.randn(N, OUT, IN).double(), torch.randn(N, OUT).double()
    idx, g = torch.rand(3, N).argsort(1)[:, :2], torch.rand(3, 2).double()
    auto, *others = (mix(x, weight, bias, idx, g, order) for order in ("auto", "merge", "output"))
    for other in others:
        torch.testing.assert_close(auto, other, atol=1e-12, rtol=1e-12)


def test_half_precision_is_near_float32() -> None:
    made = bank().float()
    x = torch.randn(B, T, IN)
    with torch.no_grad():
        want = made.mixed(x, frame_of(made))
        with torch.autocast("cpu", torch.bfloat16):
            under = made.mixed(x, frame_of(made))
        halves = [made.to(dtype).mixed(x.to(dtype), frame_of(made)) for dtype in (torch.float16, torch.bfloat16)]
    assert [y.dtype for y in (under, *halves)] == [torch.bfloat16, torch.float16, torch.bfloat16]
    for y in (under, *halves):
        torch.testing.assert_close(y.float(), want, atol=0.08, rtol=0.05)
    torch.testing.assert_close(halves[0].float(), want, atol=0.01, rtol=0.01)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e4])
def test_extreme_logits_give_exactly_k_experts(gate: str, scale: float) -> None:
    z = torch.linspace(-1, 1, N).expand(2, N) * scale
    config = MeoConfig(experts=N, k=3, gate=gate)
    found, again = decide(z, None, config, False), decide(z, None, config, False)
    assert found.idx.shape[1] == (N if gate == "softmax" else 3)
    assert all(len(set(row)) == len(row) for row in found.idx.tolist())
    assert found.g.isfinite().all()
    assert (found.g >= 0).all()
    torch.testing.assert_close(found.g.sum(1), torch.ones(2))
    assert torch.equal(found.idx, again.idx)
    if scale == 0:
        assert found.idx[0, :3].tolist() == [0, 1, 2]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=12), st.data())
def test_ties_go_to_the_lowest_index(values: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    assert top(torch.tensor(values, dtype=torch.float32), k).tolist() == expected


def test_the_gates_gradient_is_the_softmaxs() -> None:
    """dL/dz_i = G_i (dL/dG_i - sum_j G_j dL/dG_j) for the selected, zero for the others (and for equal experts)."""
    made = bank()
    made.w_gate.grad = None
    x = torch.randn(B, T, IN).double()
    made.mixed(x, frame_of(made)).sum().backward()
    z = x.mean(1) @ made.w_gate.detach()
    idx = top(z, 3)
    g = z.gather(1, idx).softmax(1)
    each = torch.stack([(x @ made.weight[i].T + made.bias[i]).sum((1, 2)) for i in range(N)], 1).detach()  # dL/dG
    kept = each.gather(1, idx)
    dz = torch.zeros(B, N).double().scatter(1, idx, g * (kept - (g * kept).sum(1, keepdim=True)))
    torch.testing.assert_close(made.w_gate.grad, x.mean(1).T @ dz)
    with torch.no_grad():
        made.weight.copy_(made.weight[:1].expand_as(made.weight))
        made.bias.copy_(made.bias[:1].expand_as(made.bias))
    made.w_gate.grad = None
    made.mixed(x, frame_of(made)).sum().backward()
    assert float(made.w_gate.grad.abs().max()) < 1e-12


def test_straight_through_reaches_all_experts() -> None:
    plain, through = bank(), bank(straight_through=True)
    x = torch.randn(B, T, IN).double()
    y = [m.mixed(x, frame_of(m)) for m in (plain, through)]
    torch.testing.assert_close(y[0], y[1], atol=1e-6, rtol=1e-6)
    unused = []
    for made, out in zip((plain, through), y):
        made.w_gate.grad = None
        out.square().sum().backward()
        unused.append((made.w_gate.grad.abs().sum(0) == 0).sum().item())
    assert unused[1] == 0
    assert unused[0] >= unused[1]


def test_noise_is_drawn_in_training_alone_and_is_its_seeds() -> None:
    made = bank(gate="noisy-topk")
    x = torch.randn(B, T, IN).double()
    assert torch.equal(made.mixed(x, frame_of(made)), made.mixed(x, frame_of(made)))
    made.train()
    torch.manual_seed(5)
    first = made.mixed(x, frame_of(made))
    assert not torch.equal(first, made.mixed(x, frame_of(made)))
    torch.manual_seed(5)
    assert torch.equal(first, made.mixed(x, frame_of(made)))


def test_the_token_block_is_the_identity_at_first_and_counts_as_the_paper_says() -> None:
    block = TokenBlock(96, 16)
    x = torch.randn(2, 3, 96)
    assert torch.equal(block(x), x)
    assert sum(p.numel() for p in block.parameters()) == 2 * 96 * 96 // 16 + 96 + 96 // 16
    block(x).sum().backward()
    assert float(block.up.weight.grad.abs().sum()) > 0
    for width, reduce in ((32, 64), (96, 64)):
        with pytest.raises(RequestError, match="divides"):
            TokenBlock(width, reduce)


def test_merge_chunk_bounds_the_merged_matrices() -> None:
    wide, chunk = 96, 2
    config = MeoConfig(experts=8, k=4, gate="topk", merge_chunk=chunk)
    weight, w_gate = torch.randn(8, wide, wide), torch.randn(wide, 8)
    x = torch.randn(16, 2, wide)
    decision = decide(x.mean(1) @ w_gate, None, config, False)

    def peak(work: Callable[[], Any]) -> float:
        with torch.no_grad():
            return peak_tensor_bytes(work)

    matrix, rest = wide * wide * 4, 3 * 16 * 2 * wide * 4 + 4096  # rest: the output, twice, and the gates
    merge = peak(lambda: mix(x, weight, None, decision.idx, decision.g, "auto", chunk))
    assert merge <= 1.1 * chunk * matrix + rest

    def original() -> torch.Tensor:  # broadcast, then sum: all selected matrices of all sequences at once
        return x @ (weight[decision.idx] * decision.g[..., None, None]).sum(1).mT

    assert peak(original) >= 4 * merge


@pytest.mark.parametrize("distinct", [1, 3, 8])
def test_groups_with_equal_gates_share_a_matrix(distinct: int) -> None:
    """Values and all gradients, those of each group's own gates too; and as many matrices as gates differ."""
    groups, wide = 8, 64
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(N, wide, wide, generator=generator).double().requires_grad_()
    x = torch.randn(groups, 3, wide, generator=generator).double().requires_grad_()
    row = torch.arange(groups) % distinct
    idx = torch.stack([torch.randperm(N, generator=generator)[:3] for _ in range(distinct)])[row]
    g = torch.rand(distinct, 3, generator=generator).double()[row].requires_grad_()
    out = mix(x, weight, None, idx, g, "merge", merge_chunk=groups)
    want = torch.einsum("gli,gkoi,gk->glo", x, weight[idx], g)
    torch.testing.assert_close(out, want, atol=1e-10, rtol=1e-10)
    for a, b in zip(torch.autograd.grad(out.sin().sum(), (x, weight, g)),
                    torch.autograd.grad(want.sin().sum(), (x, weight, g))):  # fmt: skip
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
    with torch.no_grad():
        peak = peak_tensor_bytes(lambda: mix(x, weight, None, idx, g, "merge", merge_chunk=groups))
    assert (distinct - 0.5) * wide * wide * 8 < peak < (distinct + 1.5) * wide * wide * 8
