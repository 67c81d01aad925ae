"""`loki_decode` against a naive float64 oracle that selects and attends token by token."""

import math

import pytest
import torch
from helpers_kernels import DEVICE, DTYPES, assert_close_to_oracle
from torch import Tensor

from lean_kernels import loki_decode

BACKENDS = ("torch", "triton")


def case(
    dtype: torch.dtype, groups: int, tokens: int, width: int, queries: int = 1, rows: int = 2, heads: int = 2
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(groups * 1000 + tokens + width)
    shapes = {"q": (rows, heads * groups, queries, width), "k": (rows, heads, tokens, width)}
    made = {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}
    made["v"] = torch.randn(shapes["k"], generator=g).to(dtype)
    made["lens"] = torch.tensor([tokens, max(queries, tokens // 2)][:rows], dtype=torch.int32)
    return {name: t.to(DEVICE) for name, t in made.items()}


def oracle(
    q: Tensor, k: Tensor, v: Tensor, lens: Tensor, *, d: int, topk: int, scale: float, select: str = "group",
    reduce: str = "softmax_mean", sink: int = 0, recent: int = 0, start: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Selection and attention in float64, one query head at a time."""
    q, k, v = (t.double().cpu() for t in (q, k, v))
    rows, heads, queries, _width = q.shape
    groups = heads // k.shape[1]
    out = torch.zeros_like(q)
    for b in range(rows):
        first = int(start[b]) if start is not None else 0
        for i in range(queries):
            seen = list(range(first, int(lens[b]) - queries + 1 + i))
            for h in range(k.shape[1]):
                group = range(h * groups, (h + 1) * groups)
                low = torch.stack([k[b, h, seen, :d] @ q[b, g, i, :d] * scale for g in group])  # [G, seen]
                shared = low.softmax(-1).mean(0) if reduce == "softmax_mean" else low.amax(0)
                for row, g in enumerate(group):
                    score = (shared if select == "group" else low[row]).clone()
                    score[:sink] = score[len(seen) - recent :] = math.inf
                    count = min(max(topk, sink + recent), len(seen))
                    chosen = [seen[j] for j in score.sort(descending=True, stable=True).indices[:count].tolist()]
                    weights = (k[b, h, chosen] @ q[b, g, i] * scale).softmax(-1)
                    out[b, g, i] = weights @ v[b, h, chosen]
    return out


def settings(width: int, d: int, topk: int, **more: object) -> dict[str, object]:
    return {"d": d, "topk": topk, "scale": width**-0.5, **more}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("groups", "tokens", "width", "d", "topk", "more"),
    [
        (1, 17, 64, 8, 4, {}),
        (4, 129, 64, 24, 33, {"sink": 2, "recent": 5}),
        (5, 63, 96, 32, 9, {"reduce": "max"}),
        (2, 65, 64, 64, 16, {"select": "head"}),
        (4, 1, 64, 16, 3, {}),
    ],
)
def test_float32_equals_the_oracle(
    backend: str, groups: int, tokens: int, width: int, d: int, topk: int, more: dict[str, object]
) -> None:
    given = case(torch.float32, groups, tokens, width)
    rule = settings(width, d, topk, **more)
    found = loki_decode(**given, **rule, backend=backend)  # type: ignore[arg-type]
    assert_close_to_oracle(found, oracle(**given, **rule))  # type: ignore[arg-type]
    assert torch.equal(found, loki_decode(**given, **rule, backend=backend))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_tokens_selected_is_dense_attention(backend: str, dtype: torch.dtype) -> None:
    given = case(dtype, 4, 63, 64)
    found = loki_decode(**given, **settings(64, 16, 63), backend=backend)  # type: ignore[arg-type]
    assert_close_to_oracle(found, oracle(**given, **settings(64, 64, 63)))  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_of_a_draft_see_their_own_past(backend: str) -> None:
    given = case(torch.float32, 2, 40, 64, queries=3)
    rule = settings(64, 16, 12)
    found = loki_decode(**given, **rule, backend=backend)  # type: ignore[arg-type]
    assert_close_to_oracle(found, oracle(**given, **rule))  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_on_the_left_is_never_read(backend: str) -> None:
    given = case(torch.float32, 2, 48, 64)
    start = torch.tensor([7, 3], dtype=torch.int32, device=DEVICE)
    rule = settings(64, 16, 10, sink=2, start=start)
    found = loki_decode(**given, **rule, backend=backend)  # type: ignore[arg-type]
    assert_close_to_oracle(found, oracle(**given, **rule))  # type: ignore[arg-type]
    given["k"][0, :, :7], given["v"][0, :, :7] = 1e4, 1e4
    assert torch.equal(found, loki_decode(**given, **rule, backend=backend))  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_in_any_order_give_what_a_contiguous_cache_gives(backend: str) -> None:
    given = case(torch.float32, 2, 64, 64)
    rule = settings(64, 16, 20)
    found = loki_decode(**given, **rule, backend=backend)  # type: ignore[arg-type]
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))  # two rows of four pages of 16 tokens
    paged = {}
    for name in ("k", "v"):
        pages = given[name].view(2, 2, 4, 16, 64).transpose(1, 2).reshape(8, 2, 16, 64)
        paged[name] = torch.empty_like(pages)
        paged[name][order.to(DEVICE)] = pages
    table = order.view(2, 4).to(torch.int32).to(DEVICE)
    again = loki_decode(given["q"], paged["k"], paged["v"], given["lens"], **rule, block_table=table, backend=backend)  # type: ignore[arg-type]
    assert torch.equal(found, again)


def test_blocks_are_read_whole() -> None:
    """With values that number the tokens, one block of 16 gives the mean of its numbers where all keys are alike."""
    q = torch.ones(1, 1, 1, 64, device=DEVICE)
    k = torch.zeros(1, 1, 64, 64, device=DEVICE)
    k[0, 0, 37] = 1e-3
    v = torch.arange(64.0, device=DEVICE)[None, None, :, None].expand(1, 1, 64, 64).contiguous()
    lens = torch.tensor([64], dtype=torch.int32, device=DEVICE)
    found = loki_decode(q, k, v, lens, d=64, topk=16, scale=1.0, block=16, backend="torch")
    assert found.mean().item() == pytest.approx(sum(range(32, 48)) / 16, abs=0.1)


def test_compiles_whole() -> None:
    given = case(torch.float32, 2, 33, 64)

    def run(q: Tensor, k: Tensor, v: Tensor, lens: Tensor) -> Tensor:
        found = loki_decode(q, k, v, lens, d=16, topk=8, scale=0.125)
        assert isinstance(found, Tensor)
        return found * 2

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**given), run(**given))


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"d": 65}, ValueError, "d is 65"),
        ({"topk": 0}, ValueError, "topk is 0"),
        ({"lens": torch.tensor([99, 3], dtype=torch.int32)}, ValueError, "capacity of 33"),
        ({"select": "all"}, ValueError, "group, head"),
        ({"block_table": torch.full((2, 3), 9, dtype=torch.int32)}, IndexError, "the pages 0 to 1"),
    ],
)
def test_wrong_requests_are_named(change: dict[str, object], error: type[Exception], said: str) -> None:
    given = {name: t.cpu() for name, t in case(torch.float32, 2, 33, 64).items()}
    with pytest.raises(error, match=said):
        loki_decode(**{**given, **settings(64, 16, 8), **change})  # type: ignore[arg-type]


@pytest.mark.gpu
def test_bfloat16_compiled_stays_within_its_tolerance() -> None:
    given = case(torch.bfloat16, 4, 1000, 128)
    rule = settings(128, 32, 250)
    found = loki_decode(**given, **rule, backend="triton")  # type: ignore[arg-type]
    plain = loki_decode(**given, **rule, backend="torch")  # type: ignore[arg-type]
    assert (found - plain).abs().mean().item() < 0.02
