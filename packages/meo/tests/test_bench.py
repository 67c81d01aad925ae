"""What merging is for: faster than a mixture, than merging by broadcast, and than nothing much lost against dense."""

from __future__ import annotations

import pytest
from meo.bench import Probe, ratios

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_merging_is_faster_than_mixing() -> None:
    """Half of what `meo bench` names as targets, since other work may run beside the tests."""
    found = {
        row["times faster"]: row["ratio"] for row in ratios(Probe(256, 1024, 8, 8, 128), Probe(256, 1024, 8, 1, 1), 5)
    }
    assert found["merge: one product / broadcast"] > 1.5
    assert found["forward: MEO / MoE, k = 4"] > 1
    assert found["training step: MEO / MoE, k = 4"] > 1
    assert found["forward: task cached / dense"] > 0.5
    assert found["forward: MEO, k = 8 / k = 2"] > 0.5
    assert found["one token: auto / outputs"] > 0.4
