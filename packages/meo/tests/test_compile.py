"""A bank compiles as one graph at each level, with the same values."""

from __future__ import annotations

import pytest
import torch
from test_bank import IN, B, T, bank, frame_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize("level", ["task", "sequence", "token", "prefix", "chunk", "cumulative", "encoder"])
def test_a_bank_is_one_graph(level: str) -> None:
    made = bank(level, bias_rate=0.1).float()
    x = torch.randn(B, T, IN)
    frame = frame_of(made)
    frame.codes, frame.encoder = frame.codes.float(), frame.encoder.float()
    _ = frame.layout, frame.deciding, frame.task_rows  # made once a call, outside of the banks
    want = made.mixed(x, frame)
    torch._dynamo.reset()
    got = torch.compile(made.mixed, fullgraph=True, backend="aot_eager")(x, frame)
    torch.testing.assert_close(got, want)
