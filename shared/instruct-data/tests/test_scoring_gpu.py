"""Scores on a GPU are those of the CPU."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("pyarrow", reason="instruct_data needs pyarrow, which this Python lacks")

import scoring_reference as reference

from instruct_data.scoring import score


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_gives_what_the_cpu_gives(dtype: torch.dtype) -> None:
    pairs, tolerance = reference.some_pairs(60), 1e-4 if dtype == torch.float32 else 5e-2
    expected = score(reference.model(), reference.tokenizer(), pairs, max_length=128)
    model = copy.deepcopy(reference.model()).to("cuda", dtype)
    found = score(model, reference.tokenizer(), pairs, max_length=128)
    assert found.facts["budget"] == 32768
    assert "padded batches" in found.facts["how"]
    for row, other in zip(found, expected, strict=True):
        assert row["status"] == other["status"]
        for side in ("cond", "direct"):
            if other[f"loss_{side}_sum"] is not None:
                difference = abs(row[f"loss_{side}_sum"] - other[f"loss_{side}_sum"]) / row[f"n_{side}"]
                assert difference <= tolerance
