"""Facility location on a GPU chooses what it chooses on the CPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pyarrow", reason="superfiltering needs pyarrow, which this Python lacks")

from superfiltering.facility import facility_location


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["exp-euclidean/d", "cosine", "rbf"])
@pytest.mark.parametrize("change", [{}, {"cache_bytes": 0}, {"neighbours": 60}])
def test_the_same_choice_on_both(kernel, change):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(100, 64, generator=draw)[torch.randint(100, (600,), generator=draw)]
    x = torch.nn.functional.normalize(x + torch.randn(600, 64, generator=draw), dim=1)
    cpu, gpu = (facility_location(x, 60, kernel=kernel, device=device, **change) for device in ("cpu", "cuda"))
    assert gpu.chosen.tolist() == cpu.chosen.tolist()
    assert gpu.covered.objective == pytest.approx(cpu.covered.objective, rel=1e-9)
