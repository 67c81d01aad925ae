"""What merging is for: faster than a mixture, than merging by broadcast, and than nothing much lost against dense."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from meo.bench import Probe, memory, ratios


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_merging_is_faster_than_mixing() -> None:
    """Half of what `meo bench` names as targets, since other work may run beside the tests."""
    found = {
        row["times faster"]: row["ratio"] for row in ratios(Probe(256, 1024, 8, 8, 128), Probe(256, 1024, 8, 1, 1), 5)
    }
    assert found["merge: one product / broadcast"] > 1.5
    assert found["forward: MEO / MoE, k = 4"] > 1
    assert found["forward: MEO / transformers' grouped MoE, k = 4"] > 1
    assert found["training step: MEO / MoE, k = 4"] > 1
    assert found["training step: MEO / transformers' grouped MoE, k = 4"] > 0.8
    assert found["forward: task cached / dense"] > 0.5
    assert found["forward: MEO, k = 8 / k = 2"] > 0.5
    assert found["one token: auto / outputs"] > 0.4


def test_what_is_compared_computes_the_same() -> None:
    """Experts alike make every way of mixing them the dense feed-forward."""
    probe = Probe(16, 24, 8, 3, 4)
    probe.up.copy_(probe.up[:1].expand_as(probe.up))
    probe.down.copy_(probe.down[:1].expand_as(probe.down))
    want = F.linear(F.gelu(F.linear(probe.x, probe.up[0])), probe.down[0])
    for found in (probe.dense(), probe.merged(4)(), probe.vanilla(4)(), probe.grouped(4)(), probe.cached(2)()):
        torch.testing.assert_close(found.view_as(want), want, atol=1e-5, rtol=1e-5)
    first, second = (work() for work in probe.merges(4).values())
    torch.testing.assert_close(first, second[0])


def test_memory_keeps_within_its_targets() -> None:
    merging, broadcast, low_rank = (row["ratio"] for row in memory(Probe(384, 768, 8, 16, 4)))
    assert 0.9 < merging <= 1.1
    assert broadcast >= 4
    assert 1 < low_rank <= 1.3
