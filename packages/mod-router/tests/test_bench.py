"""What routing is for: time and bytes that closed layers do not need."""

from __future__ import annotations

import pytest
import torch
from mod_router import bench

from paper_tables import probe


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_closed_layers_save_time_and_open_ones_cost_little() -> None:
    """At least 0.97x with all gates open on an idle machine (`mod-router bench`); here others may be busy."""
    rows = bench.bench_speed(probe.probe_model(12, 256), "last:10", context=256, new_tokens=16, rounds=7)
    found = {row["capacity"]: row for row in rows}
    assert found["1"]["decode"] > 0.85
    assert found["1"]["prefill"] > 0.85
    assert found["0"]["decode"] > 1.1
    assert found["0"]["prefill"] > 1.1
    assert found["0"]["decode_of_static"] > 0.85
    assert [found[name]["kv_bytes"] for name in ("1", "0.5", "0")] == pytest.approx([1, 7 / 12, 2 / 12])


def test_a_cheap_step_and_a_whole_one_train_the_same_state() -> None:
    found = bench.bench_training(probe.probe_model(4, 64), "last:2", batch=2, length=16, rounds=3)
    assert found["optimizer_bytes"] == 2 * found["router_bytes"] == 2 * 2 * 64 * 4
    assert found["step_over_forward"] > 1


def test_a_ragged_batch_trains_as_its_examples_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    base = probe.probe_model(4, 64)
    training = bench.Training(base, "last:2", batch=3, length=16, ragged=True)
    assert training.mask.sum(-1).tolist() == [8, 12, 16]
    assert int((training.labels != -100).sum()) == 4 + 8 + 12
    assert all(p.requires_grad for p in training.routers)
    before = [w.detach().clone() for w in training.routers]
    gradients: list[list[torch.Tensor]] = []
    monkeypatch.setattr(training.optimizer, "zero_grad", lambda: gradients.append([w.grad for w in training.routers]))
    for rows in (3, 1):
        for weight, old in zip(training.routers, before):
            weight.data.copy_(old)
            weight.grad = None
        with training:
            training.step(True, rows)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert all(float(g.abs().max()) > 0 for g in gradients[0])
    assert all(p.requires_grad and p.grad is None for p in base.parameters())
    found = bench.bench_batching(base, "last:2", batch=3, lengths=[8, 16], rounds=3)
    assert list(found) == ["8", "16"]
