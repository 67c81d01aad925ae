"""Loki decode in C against its twin in plain torch, and how its library is made."""

import math
import os
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lean_kernels import dense_decode, loki_decode, native
from lean_kernels.ref import loki as ref

pytestmark = pytest.mark.skipif(native.library() is None, reason="needs a C compiler")
DTYPES = (torch.float32, torch.bfloat16)


def cache(
    rows: int, kv_heads: int, group: int, tokens: int, width: int, queries: int = 1, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Queries and a cache with room left over, so that its rows are no single piece."""
    lot = torch.Generator().manual_seed(rows + tokens)
    k, v = torch.randn(2, rows, kv_heads, tokens + 5, width, generator=lot).to(dtype)[:, :, :, :tokens]
    q = torch.randn(rows, kv_heads * group, queries, width, generator=lot).to(dtype)
    lens = torch.tensor([tokens, max(queries, tokens // 2), tokens][:rows], dtype=torch.int32)
    return {"q": q, "k": k, "v": v, "lens": lens}


def both(tensors: dict[str, Tensor], **rule: Any) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Output and log-sum-exp in C, and of the twin in float64."""
    wide = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    found = loki_decode(**tensors, **rule, return_lse=True, backend="native")
    wanted = ref.loki_decode(**wide, **rule, return_lse=True)
    assert isinstance(found, tuple)
    assert isinstance(wanted, tuple)
    return found, wanted


def assert_alike(tensors: dict[str, Tensor], **rule: Any) -> None:
    (out, lse), (wanted, sums) = both(tensors, **rule)
    rounding = 2e-6 if out.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), wanted, atol=rounding, rtol=2 * rounding, equal_nan=True)
    torch.testing.assert_close(lse.double(), sums, atol=2e-5, rtol=1e-6, equal_nan=True)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 3), kv_heads=st.integers(1, 3), group=st.integers(1, 9), tokens=st.integers(1, 300),
    width=st.sampled_from([8, 24, 64, 128]), queries=st.integers(1, 3), share=st.floats(0.01, 1.2),
    low=st.integers(1, 128), by=st.sampled_from(["group", "head"]), reduced=st.sampled_from(["softmax_mean", "max"]),
    sink=st.integers(0, 20), recent=st.integers(0, 20), softcap=st.sampled_from([None, 2.0]),
)  # fmt: skip
def test_any_rule_is_the_twins(
    rows: int, kv_heads: int, group: int, tokens: int, width: int, queries: int, share: float, low: int, by: str,
    reduced: str, sink: int, recent: int, softcap: float | None,
) -> None:  # fmt: skip
    tensors = cache(rows, kv_heads, group, max(tokens, queries), width, queries)
    start = torch.tensor([3, 0, 1][:rows], dtype=torch.int32)
    assert_alike(
        tensors, d=min(low, width), topk=max(1, int(share * tokens)), scale=width**-0.5, select=by, reduce=reduced,
        sink=sink, recent=recent, softcap=softcap, start=start,
    )  # fmt: skip


def test_bfloat16_rounds_once() -> None:
    """The same tokens are read as in float32 from the same numbers, and the result is rounded at the end."""
    tensors = cache(2, 2, 4, 700, 64, dtype=torch.bfloat16)
    rule: dict[str, Any] = {"d": 16, "topk": 100, "scale": 0.125, "backend": "native"}
    found = loki_decode(**tensors, **rule)
    wide = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    wanted = loki_decode(**wide, **rule)
    assert isinstance(wanted, Tensor)
    assert torch.equal(found, wanted.to(torch.bfloat16))


def test_ties_go_to_the_lowest_token_and_each_row_has_its_own_count() -> None:
    tensors = cache(2, 1, 2, 40, 8)
    tensors["k"] = torch.zeros_like(tensors["k"])
    tensors["v"] = torch.arange(40.0)[None, None, :, None].expand(2, 1, 40, 8).contiguous()
    tensors["lens"] = torch.tensor([40, 40], dtype=torch.int32)
    out = loki_decode(**tensors, d=4, topk=torch.tensor([5, 7]), scale=1.0, recent=1, backend="native")
    assert out[:, 0, 0, 0].tolist() == pytest.approx([(0 + 1 + 2 + 3 + 39) / 5, (0 + 1 + 2 + 3 + 4 + 5 + 39) / 7])


@pytest.mark.parametrize("reduced", ["softmax_mean", "max"])
@pytest.mark.parametrize("by", ["group", "head"])
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_odd_scores_are_what_they_are_to_the_twin(odd: float, by: str, reduced: str) -> None:
    tensors = cache(1, 2, 3, 60, 8)
    tensors["k"][0, 0, 11, 2] = odd  # of all heads of the first group
    tensors["q"][0, 4, 0, 1] = odd  # of one head of the second
    assert_alike(tensors, d=4, topk=20, scale=0.3, select=by, reduce=reduced)


def test_a_query_that_sees_nothing_gets_zero() -> None:
    tensors = cache(2, 1, 2, 9, 8, queries=3)
    tensors["lens"] = torch.tensor([2, 0], dtype=torch.int32)
    out, lse = loki_decode(**tensors, d=4, topk=3, scale=1.0, return_lse=True, backend="native")
    assert out[1].abs().sum() == 0
    assert bool((lse[1] == -math.inf).all())
    assert out[0, :, 0].abs().sum() == 0
    assert bool(out[0, :, 1:].abs().sum() > 0)


def test_threads_change_no_bit() -> None:
    tensors = cache(2, 3, 4, 500, 64)
    threads = torch.get_num_threads()
    found = []
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        found.append(loki_decode(**tensors, d=16, topk=60, scale=0.1, backend="native"))
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_reading_all_is_attention(dtype: torch.dtype) -> None:
    tensors = cache(2, 2, 4, 130, 64, queries=2, dtype=dtype)
    wanted = ref.dense_decode(**{n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}, scale=0.1)
    assert isinstance(wanted, Tensor)
    rounding = 2e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(dense_decode(**tensors, scale=0.1).double(), wanted, atol=rounding, rtol=rounding)


def test_it_takes_one_dtype_alone() -> None:
    tensors = cache(1, 1, 2, 33, 16)
    states = [tensors[name] for name in "qkv"]
    assert native.takes(*states)
    for i in range(3):
        assert not native.takes(*(t.bfloat16() if j == i else t for j, t in enumerate(states)))


def test_auto_takes_it_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = native.loki_decode
    monkeypatch.setattr(native, "loki_decode", lambda *a, **k: calls.append(1) or real(*a, **k))
    monkeypatch.delenv("LEAN_KERNELS_BACKEND", raising=False)
    tensors = cache(1, 1, 2, 33, 16)
    rule: dict[str, Any] = {"d": 4, "topk": 8, "scale": 0.25}
    loki_decode(**tensors, **rule)
    assert calls == [1]
    loki_decode(**tensors, **rule, block=16)  # what it cannot do, plain torch does
    loki_decode(**{n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}, **rule)
    loki_decode(**tensors, **rule, backend="torch")
    monkeypatch.setenv("LEAN_KERNELS_BACKEND", "torch")
    loki_decode(**tensors, **rule)
    assert calls == [1]
    with pytest.raises(RuntimeError, match="no pages, blocks"):
        loki_decode(**tensors, **rule, block=16, backend="native")


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache folder, and no library made so far."""
    monkeypatch.setenv("LEAN_KERNELS_CACHE", str(tmp_path / "cache"))
    native.library.cache_clear()
    yield tmp_path
    native.library.cache_clear()


def test_without_a_compiler_torch_does_it_after_one_warning(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(anew))
    tensors = cache(1, 1, 2, 33, 16)
    with pytest.warns(UserWarning, match="no C compiler was found"):
        found = loki_decode(**tensors, d=4, topk=8, scale=0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(found, loki_decode(**tensors, d=4, topk=8, scale=0.25, backend="torch"))


def test_a_compiler_that_fails_is_named_with_what_it_said(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = anew / "brokencc"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit 0\necho no such target >&2\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.warns(UserWarning, match="brokencc made no library.*no such target"):
        assert native.library() is None
    assert list((anew / "cache").iterdir()) == []


def test_switched_off(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEAN_KERNELS_NATIVE", "0")
    assert native.library() is None


def test_the_plainest_flags_do_too(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler without OpenMP and without knowledge of this processor."""
    monkeypatch.setattr(native, "FLAGS", (("-march=none-such",), ()))
    assert_alike(cache(2, 2, 4, 90, 64), d=16, topk=30, scale=0.1)
    assert len(list((anew / "cache").iterdir())) == 1


def test_those_that_build_at_once_leave_one_file(anew: Path) -> None:
    compiler = os.environ.get("CC") or shutil.which("cc") or "gcc"
    with ThreadPoolExecutor(3) as pool:
        paths = set(pool.map(native._build, [compiler] * 3))
    assert len(paths) == 1
    assert len(list((anew / "cache").iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_passed_over(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (anew / "file").write_text("")
    monkeypatch.setenv("LEAN_KERNELS_CACHE", str(anew / "file" / "below"))
    monkeypatch.setattr("tempfile.tempdir", str(anew))
    assert native.library() is not None
    assert len(list(anew.glob("lean_kernels-*/loki-*.so"))) == 1


def test_large_new_memory_is_asked_for_in_huge_pages() -> None:
    before = torch.empty(native.LARGE // 4 + 1000)
    assert native.huge_pages(before) is before
    before.fill_(1.0)
    assert float(before.double().sum()) == len(before)
    maps = Path("/proc/self/smaps")
    if maps.exists():  # the advice is noted where the kernel knows huge pages
        inside, flags = False, []
        for line in maps.read_text().splitlines():
            bounds = line.split(" ", 1)[0].split("-")
            if len(bounds) == 2:
                inside = int(bounds[0], 16) <= before.data_ptr() + before.nbytes // 2 < int(bounds[1], 16)
            elif inside and line.startswith("VmFlags"):
                flags = line.split()
        assert "hg" in flags
