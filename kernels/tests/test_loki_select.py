"""Which tokens `loki_decode` reads, and what it gives, in every mode and dtype, against a float64 oracle."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from helpers_kernels import DEVICE, DTYPES, ON_DEVICE, assert_close_to_oracle
from torch import Tensor

from lean_kernels import _rt
from lean_kernels.ops.loki import loki_decode
from lean_kernels.ref import loki as ref

pytestmark = ON_DEVICE  # pytest.mark.gpu where a GPU is
BACKENDS = ("torch", "triton")


def cache(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype = torch.float32, queries: int = 1, strided: bool = False
) -> dict[str, Tensor]:
    """q, k, v and lens for (rows, KV heads, group, tokens, width); every row but the first is half as long."""
    rows, heads, group, tokens, width = shape
    random = torch.Generator().manual_seed(sum(shape) + queries)
    made = {"q": torch.randn(rows, heads * group, queries, width, generator=random)}
    for name in ("k", "v"):  # a view of a larger cache, which keeps tokens before heads, if strided
        whole = torch.randn(rows, tokens + 3, heads, width + 8, generator=random).transpose(1, 2)
        made[name] = whole[:, :, 2 : tokens + 2, :width]
    made = {name: (t if strided else t.contiguous()).to(dtype) for name, t in made.items()}
    made["lens"] = torch.tensor([tokens] + [max(queries, tokens // 2)] * (rows - 1), dtype=torch.int32)
    return {name: t.to(DEVICE) for name, t in made.items()}


def oracle(
    q: Tensor, k: Tensor, v: Tensor, lens: Tensor, *, d: int, topk: int | Tensor, scale: float, select: str = "group",
    reduce: str = "softmax_mean", sink: int = 0, recent: int = 0, block: int = 1, start: Tensor | None = None,
    softcap: float | None = None, mask: Tensor | None = None, dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and log-sum-exp, one query head at a time; scores in float64, the attention itself in `dtype`."""
    group = q.shape[1] // k.shape[1]
    out, lse = torch.zeros_like(q, dtype=dtype), torch.full(q.shape[:3], -torch.inf, dtype=torch.float64)
    for b, head, i in [(b, h, i) for b in range(len(q)) for h in range(q.shape[1]) for i in range(q.shape[2])]:
        h, first = head // group, 0 if start is None else int(start[b])
        seen = [j for j in range(first, int(lens[b]) - q.shape[2] + 1 + i) if mask is None or bool(mask[b, 0, i, j])]
        if not seen:
            continue
        low = q[b, h * group : (h + 1) * group, i, :d].double() @ k[b, h, seen, :d].double().T * scale
        score = low.softmax(-1).mean(0) if reduce == "softmax_mean" else low.amax(0)
        score = low[head % group].clone() if select == "head" else score
        count = min(max(int(topk[b]) if isinstance(topk, Tensor) else topk, sink + recent), len(seen))
        score[:sink] = torch.inf
        score[max(0, len(seen) - recent) :] = torch.inf
        if block > 1 and count < len(seen):
            numbers = torch.tensor(seen) // block
            kinds = numbers.unique()
            best = torch.stack([score[(numbers == kind).to(score.device)].amax() for kind in kinds])
            wanted = max(-(-count // block), int((best == torch.inf).sum()))
            kept = kinds[best.cpu().sort(descending=True, stable=True).indices[:wanted]]
            chosen = [j for j in seen if j // block in kept]
        else:
            chosen = [seen[j] for j in score.sort(descending=True, stable=True).indices[:count].sort().values]
        logits = q[b, head, i].to(dtype) @ k[b, h, chosen].to(dtype).T * scale
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        out[b, head, i] = logits.softmax(-1) @ v[b, h, chosen].to(dtype)
        lse[b, head, i] = logits.double().logsumexp(-1)
    return out, lse


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "d"),
    [((1, 1, 1, 1, 64), 8), ((2, 1, 4, 17, 64), 24), ((1, 2, 5, 63, 96), 32), ((1, 1, 8, 129, 128), 128),
     ((1, 1, 2, 1000, 256), 8), ((1, 1, 3, 65, 80), 40), ((1, 1, 2, 150, 256), 256)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_size_and_dtype(backend, shape, d, dtype):
    given = cache(shape, dtype, strided=True)
    rule: dict[str, Any] = {"d": d, "topk": max(1, shape[3] // 3), "scale": shape[4] ** -0.5, "sink": 1, "recent": 2}
    found, lse = loki_decode(**given, **rule, return_lse=True, backend=backend)
    wanted, sums = oracle(**given, **rule)
    assert_close_to_oracle(found, wanted, "output", oracle(**given, **rule, dtype=dtype)[0])
    assert lse.dtype == torch.float32
    assert (lse.cpu().double() - sums).abs().max() < 2e-5


MODES: dict[str, dict[str, Any]] = {
    "max": {"reduce": "max"},
    "head": {"select": "head", "recent": 3},
    "softcap": {"softcap": 2.0},
    "rows": {"topk": torch.tensor([5, 40])},
    "start": {"start": torch.tensor([7, 20], dtype=torch.int32), "sink": 3},
    "forced": {"topk": 1, "sink": 5, "recent": 6},
    "block": {"block": 16, "topk": 20, "sink": 1, "recent": 1},
    "block_max_start": {"block": 16, "reduce": "max", "start": torch.tensor([7, 20], dtype=torch.int32), "recent": 17},
    "block_head": {"block": 16, "select": "head", "topk": 17},
}


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_mode(backend, mode, masked):
    given = cache((2, 1, 4, 70, 64), queries=2)
    rule = {"d": 16, "topk": 12, "scale": 0.125, **MODES[mode]}
    rule = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in rule.items()}
    if masked:
        rule["mask"] = (torch.rand(2, 1, 2, 70, generator=torch.Generator().manual_seed(1)) < 0.6).to(DEVICE)
    found, lse = loki_decode(**given, **rule, return_lse=True, backend=backend)
    wanted, sums = oracle(**given, **rule)
    assert_close_to_oracle(found, wanted)
    torch.testing.assert_close(lse.cpu().double(), sums, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["max", "head", "start", "block", "forced"])
def test_a_set_in_many_programs_is_the_set_of_one(mode, monkeypatch):
    """The long path of the radix select, with parts of 16 tokens: 70 tokens are five parts."""
    kernels = _rt.kernels("loki")
    given = cache((2, 1, 4, 70, 64))
    # ties, which go to the lowest tokens; products of small whole numbers are exact in any order
    given["q"], given["k"] = given["q"].round(), given["k"].round()
    given["k"][0, 0, ::2] = given["k"][0, 0, :1]
    rule = {"d": 16, "topk": 12, "scale": 0.125, **MODES[mode]}
    rule = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in rule.items()}
    once = loki_decode(**given, **rule, backend="triton")
    monkeypatch.setattr(kernels, "choose", partial(kernels.choose, one_program=64))
    assert torch.equal(loki_decode(**given, **rule, backend="triton"), once)
    assert_close_to_oracle(once, oracle(**given, **rule)[0])


@pytest.mark.parametrize("queries", range(1, 9))
def test_queries_of_a_draft(queries):
    given = cache((2, 1, 2, 33, 64), queries=queries)
    rule: dict[str, Any] = {"d": 16, "topk": 7, "scale": 0.125}
    for backend in BACKENDS if queries in (1, 8) else ("torch",):
        assert_close_to_oracle(loki_decode(**given, **rule, backend=backend), oracle(**given, **rule)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_rows_give_zero(backend):
    given = cache((2, 1, 2, 33, 64), queries=2)
    given["lens"] = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)  # the second row's last query sees one token
    out, lse = loki_decode(**given, d=16, topk=7, scale=0.125, return_lse=True, backend=backend)
    assert not out[0].any()
    assert not out[1, :, 0].any()
    assert torch.isneginf(lse[0]).all()
    torch.testing.assert_close(out[1, :, 1], given["v"][1, :, 0].expand(2, 64))


@pytest.mark.parametrize("reduce", ["softmax_mean", "max"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_score_never_selects(backend, reduce):
    given = cache((1, 1, 2, 33, 64))
    rule: dict[str, Any] = {"d": 16, "topk": 7, "scale": 0.125, "reduce": reduce}
    alone = {**given, "k": given["k"][:, :, 3:], "v": given["v"][:, :, 3:], "lens": given["lens"] - 3}
    given["k"][0, 0, :3] = torch.nan
    found = loki_decode(**given, **rule, backend=backend)
    torch.testing.assert_close(found, loki_decode(**alone, **rule, backend=backend))
    whole = loki_decode(**given, **{**rule, "topk": 33}, backend=backend)  # values do carry NaN on
    assert whole.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lowest_tokens(backend):
    given = cache((1, 1, 2, 64, 64))
    given["k"][:] = 1.0
    given["v"][0, 0] = torch.arange(64.0, device=DEVICE)[:, None]
    found = loki_decode(**given, d=8, topk=10, scale=1e-3, recent=1, backend=backend)
    torch.testing.assert_close(found, torch.full_like(found, (sum(range(9)) + 63) / 10))


@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_change_nothing(backend):
    given = cache((2, 2, 2, 64, 64))
    rule: dict[str, Any] = {"d": 16, "topk": 20, "scale": 0.125, "backend": backend}
    found = loki_decode(**given, **rule)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def pages(plane: Tensor) -> Tensor:
        """[2, 2, 64, D] as eight pages of 16 tokens in another order."""
        shuffled = torch.empty(8, 2, 16, plane.shape[-1], device=DEVICE)
        shuffled[order] = plane.view(2, 2, 4, 16, -1).transpose(1, 2).reshape(8, 2, 16, -1)
        return shuffled

    paged = {**given, "k": pages(given["k"]), "v": pages(given["v"]), "block_table": order.view(2, 4).int()}
    assert torch.equal(loki_decode(**paged, **rule), found)


@pytest.mark.parametrize("select", ["group", "head"])
def test_selected_lists_what_is_read(select):
    given = cache((2, 2, 2, 40, 64), queries=2)
    rule: dict[str, Any] = {"d": 16, "topk": 9, "scale": 0.125, "select": select, "sink": 2, "recent": 3}
    sets = ref.selected(given["q"], given["k"], given["lens"], **rule).cpu()
    assert sets.shape == (2, 2 if select == "group" else 4, 2, 9)
    out = loki_decode(**given, **rule, backend="torch")
    for b, head, i in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(2)).tolist():
        tokens = sets[b, head // 2 if select == "group" else head, i]
        seen = int(given["lens"][b]) - 1 + i
        assert tokens.tolist() == sorted({*tokens.tolist()})
        assert {0, 1, seen - 3, seen - 2, seen - 1} <= {*tokens.tolist()}
        weights = (given["k"][b, head // 2, tokens] @ given["q"][b, head, i] * 0.125).softmax(-1)
        torch.testing.assert_close(out[b, head, i], weights @ given["v"][b, head // 2, tokens], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_dense_decode_is_attention_to_all(dtype):
    given = cache((2, 2, 4, 70, 64), dtype, queries=2, strided=True)
    found, lse = ref.dense_decode(**given, scale=0.125, softcap=9.0, return_lse=True)
    wanted, sums = oracle(**given, d=64, topk=70, scale=0.125, softcap=9.0)
    assert_close_to_oracle(found, wanted)
    torch.testing.assert_close(lse.cpu().double(), sums, atol=2e-5, rtol=0)


@pytest.mark.parametrize("shape", [(2, 1, 2, 17, 16), (1, 2, 1, 5, 64), (1, 1, 4, 33, 32)], ids=str)
def test_registration(shape):
    given = cache(shape)
    rows = torch.full((shape[0],), 3, device=DEVICE)
    arguments = (*given.values(), rows, None, None, None, 8, 0, 0.1, "group", "max", 0, 1, 1, None, "torch")
    torch.library.opcheck(torch.ops.lean_kernels.loki_decode.default, arguments)


def test_compiles_for_any_size():
    def run(q, k, v, lens):
        return loki_decode(q, k, v, lens, d=8, topk=4, scale=0.1) * 2

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (17, 33):
        given = cache((1, 1, 2, tokens, 16))
        assert torch.equal(compiled(**given), run(**given))


@pytest.mark.parametrize(
    ("error", "text", "change"),
    [
        (TypeError, "v is torch.float64, but q is torch.float32", {"v": torch.zeros(1, 1, 9, 16, dtype=torch.float64)}),
        (TypeError, "lens is torch.float32", {"lens": torch.ones(1)}),
        (TypeError, "mask is torch.float32", {"mask": torch.zeros(1, 1, 1, 9)}),
        (ValueError, "q holds 9 queries a row; give 1 to 8", {"q": torch.zeros(1, 2, 9, 16)}),
        (ValueError, "v is .*, but k is .*; they must be alike", {"v": torch.zeros(1, 1, 8, 16)}),
        (ValueError, "topk is \\[0\\]", {"topk": torch.tensor([0])}),
        (ValueError, "scale is 0", {"scale": 0.0}),
        (ValueError, "block is 8; it must be one of 1, 16, 32, 64", {"block": 8}),
        (ValueError, "reduce is 'mean'; it must be one of softmax_mean, max", {"reduce": "mean"}),
        (ValueError, "sink is -1", {"sink": -1}),
        (ValueError, "softcap is 0", {"softcap": 0.0}),
        (ValueError, "start is \\[-1\\]", {"start": torch.tensor([-1])}),
        (RuntimeError, "start is on meta, but q is on cpu", {"start": torch.ones(1, device="meta").int()}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_name_the_argument(error, text, change):
    given = {name: t.cpu() for name, t in cache((1, 1, 2, 9, 16)).items()}
    with pytest.raises(error, match=text):
        loki_decode(**{**given, "d": 8, "topk": 4, "scale": 0.1, **change})


def test_float64_needs_torch():
    given = cache((1, 1, 2, 9, 16), torch.float64)
    with pytest.raises(TypeError, match="use backend 'torch'"):
        loki_decode(**given, d=8, topk=4, scale=0.1, backend="triton")
