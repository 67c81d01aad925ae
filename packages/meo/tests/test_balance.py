"""The balance loss is the closed formula, counts once, and two processes give what one gives."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from meo import convert, gating, load, move_biases, save
from meo.config import MeoConfig
from meo.converting import banks
from meo.gate import Decision, balance_loss, decide
from mergedmodels import dense, ids, merged
from processes import calling, ranks


def cv_squared(values: list[float]) -> float:
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return variance / (mean * mean + 1e-10)


@pytest.mark.parametrize("n", [2, 5, 16])
@pytest.mark.parametrize("groups", [2, 7])
def test_the_loss_is_the_closed_formula(n: int, groups: int) -> None:
    config = MeoConfig(experts=n, k=max(1, n // 2), balance_coef=0.3, z_coef=0.2)
    torch.manual_seed(n)
    clean, spread = torch.randn(groups, n).double(), torch.rand(groups, n).double() + 0.1
    torch.manual_seed(0)
    found = decide(clean, spread, config, True)
    torch.manual_seed(0)
    noisy = clean + torch.randn(groups, n, dtype=torch.float64) * spread
    importance, load, z = [0.0] * n, [0.0] * n, 0.0
    for b in range(groups):
        row = noisy[b].tolist()
        kept = sorted(range(n), key=lambda i: -row[i])[: config.k]
        total = sum(math.exp(row[i]) for i in kept)
        for i in range(n):
            others = sorted((row[j] for j in range(n) if j != i), reverse=True)
            chance = (clean[b, i].item() - others[config.k - 1]) / spread[b, i].item()
            load[i] += 0.5 * (1 + math.erf(chance / math.sqrt(2)))
        for i in kept:
            importance[i] += math.exp(row[i]) / total
        z += math.log(sum(map(math.exp, row))) ** 2 / groups
    expected = 0.3 * (cv_squared(importance) + cv_squared(load)) + 0.2 * z
    assert balance_loss(found, config).item() == pytest.approx(expected, rel=1e-10)


def test_one_group_cannot_be_balanced() -> None:
    z = torch.randn(1, 4, requires_grad=True)
    loss = balance_loss(decide(z, torch.ones(1, 4), MeoConfig(experts=4), True), MeoConfig(experts=4))
    assert loss.item() == 0
    loss.backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_all_experts_selected_means_no_load_to_balance() -> None:
    config = MeoConfig(experts=3, k=3)
    found = decide(torch.randn(4, 3), torch.ones(4, 3), config, True)
    assert torch.equal(found.load, torch.ones(4, 3))
    equal = Decision(found.idx, torch.full((4, 3), 1 / 3), found.logits, found.load, found.chosen)
    assert balance_loss(equal, config).item() == pytest.approx(0, abs=1e-9)


def test_it_is_given_in_training_and_once_under_checkpointing() -> None:
    model = merged("llama", level="chunk", gate="noisy-topk")
    with gating() as seen:
        model(input_ids=ids(2, 8))
    assert seen.loss == 0
    model.train()
    losses, gradients = [], []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        with gating() as seen:
            out = model(input_ids=ids(2, 8), labels=ids(2, 8), use_cache=False)
        assert set(seen.balance) == set(banks(model))
        (out.loss + seen.loss).backward()
        losses.append(float(seen.loss))
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    assert losses[0] > 0
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("init", ["noise", "split", "lora", "copy"])
def test_gates_learn_from_the_first_step_on_unless_experts_are_alike(init: str) -> None:
    model = convert(dense("bert"), init=init, gate="topk", balance_coef=0.0).train()
    model(input_ids=ids(4, 8), labels=ids(4, 8)).loss.backward()
    largest = max(float(bank.w_gate.grad.abs().max()) for bank in banks(model).values())
    assert largest < 1e-5 if init == "copy" else largest > 1e-5


def test_biases_count_for_the_selection_alone() -> None:
    """Of equal logits the least used expert wins, and its weight is what its logit says."""
    z = torch.tensor([[3.0, 2.0, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    config = MeoConfig(experts=4, k=2, gate="topk", bias_rate=0.1)
    found = decide(z, None, config, False, torch.tensor([0.0, -5.0, 0.0, 2.5]))
    assert found.idx.tolist() == [[0, 3]]
    torch.testing.assert_close(found.g, z[:, [0, 3]].softmax(-1))
    assert found.chosen.tolist() == [[1, 0, 0, 1]]
    plain = decide(z, None, config, False)
    assert plain.idx.tolist() == [[0, 1]]
    found.g[0, 0].backward()
    assert z.grad is not None
    assert z.grad[0, [1, 2]].tolist() == [0, 0]


def test_moves_without_a_loss_bring_every_expert_into_use() -> None:
    """Gates that prefer two of four experts for all that comes."""
    model = merged("bert", gate="topk", balance_coef=0.0, bias_rate=0.05).train()
    with torch.no_grad():
        for bank in banks(model).values():
            bank.w_gate.mul_(0.05)
            bank.w_gate[:, :2] += 0.01
    tokens = ids(32, 8)

    def shares() -> torch.Tensor:
        with torch.no_grad(), gating() as seen:
            model(input_ids=tokens)
        assert seen.loss == 0
        found = torch.stack(list(seen.chosen.values())) / 64
        move_biases(seen)
        return found.max(1).values

    first = shares()
    for _ in range(60):
        last = shares()
    assert float(first.mean()) > 0.4
    assert float(last.max()) < 0.35  # of 0.25 in balance
    assert all(int(bank.moves.abs().max()) > 0 for bank in banks(model).values())


def test_biases_are_kept_in_every_precision_and_one_group_moves_nothing(tmp_path: Path) -> None:
    model = merged("llama", level="prefix", bias_rate=0.001, gate="topk").train()
    with gating() as one:
        model(input_ids=ids(1, 6))
    move_biases(one)
    assert not any(bool(bank.moves.any()) for bank in banks(model).values())
    with gating() as one, torch.no_grad():
        model(input_ids=ids(3, 6))
    for _ in range(700):
        move_biases(one)
    model.bfloat16()
    assert all(int(bank.moves.abs().max()) == 700 for bank in banks(model).values())
    save(model.eval(), tmp_path / "m")
    again = banks(load(tmp_path / "m", tokenizer=False)[0])
    assert all(torch.equal(bank.moves, again[name].moves) for name, bank in banks(model).items())


def test_a_steps_batches_move_once_together_and_padding_is_not_counted() -> None:
    model = merged("bert", method="moe", level="token", gate="topk", bias_rate=0.1).train()
    tokens, mask = ids(2, 6), torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    seen = []
    for row in range(2):
        with gating() as one:
            model(input_ids=tokens[row : row + 1], attention_mask=mask[row : row + 1])
        assert all(int(counts.sum()) == 2 * int(mask[row].sum()) for counts in one.chosen.values())
        seen.append(one)
    move_biases(*seen)
    assert all(bank.moves.abs().max() == 1 for bank in banks(model).values())


def process(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", world_size=2, rank=rank)
    loss, gradient = _balance(slice(rank, None, 2))
    torch.distributed.all_reduce(gradient)  # as DDP: the mean of the gradients
    torch.save((loss, gradient / 2), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def _balance(rows: slice) -> tuple[float, Any]:
    torch.manual_seed(0)
    logits, weight = torch.randn(6, 4), torch.randn(4, 4, requires_grad=True)
    config = MeoConfig(experts=4, gate="topk")
    loss = balance_loss(decide(logits[rows] @ weight, None, config, True), config)
    loss.backward()
    return loss.item(), weight.grad


@pytest.mark.slow
def test_two_processes_balance_as_one(tmp_path: Path) -> None:
    ranks("-c", calling(__file__, f"process(rank, {str(tmp_path)!r})"), log=tmp_path / "log").finish()
    loss, gradient = _balance(slice(None))
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found[0] == pytest.approx(loss, rel=1e-6)
        torch.testing.assert_close(found[1], gradient)
