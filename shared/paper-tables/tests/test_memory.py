"""What work needs at its peak: by the system's count and by that of tensors."""

from __future__ import annotations

import pytest
import torch

from paper_tables.memory import peak_memory, peak_tensor_bytes


def test_peak_memory_sees_what_work_needs_and_nothing_of_the_work_before() -> None:
    small, large = (peak_memory(lambda n=n: torch.ones(n).sum()) for n in (1 << 20, 1 << 26))
    if not large:
        pytest.skip("this system does not tell the peak")
    assert 0.9 < large / (4 << 26) < 1.3
    assert small < large / 16


def test_live_tensors_are_counted_until_they_are_freed() -> None:
    old = torch.ones(1 << 16)
    one, kept, views = (
        peak_tensor_bytes(work)
        for work in (
            lambda: [old.add(i).sum() for i in range(8)],
            lambda: [old.add(i) for i in range(8)],
            lambda: [old.view(2, -1), old[:5]],
        )
    )
    assert one == (4 << 16) + 4 * 8  # the last sum is made while its summand and the earlier sums live
    assert kept == 8 * (4 << 16)
    assert views == 0
