"""The objective, against its formulas in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ressa.distill import Objective, has_features
from torch import Tensor
from vlmodels import FAMILIES, build

from model_hooks import RequestError

B, T, V = 2, 6, 11


def outputs(seed: int, **others: Any) -> Any:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, T, V, generator=generator, dtype=torch.float64) * 3
    return SimpleNamespace(logits=logits.requires_grad_(), **others)


def labels() -> Tensor:
    found = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(9))
    found[0, :3] = -100
    found[1, :2] = -100
    found[1, 5] = -100
    return found


def kl(teacher: Tensor, student: Tensor) -> float:
    """Of two vectors of logits."""
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    return (p * (p.log() - q.log())).sum().item()


def test_our_loss_is_the_mean_over_answers_with_temperature_squared() -> None:
    student, teacher, wanted = outputs(0), outputs(1), labels()
    loss, parts = Objective(0.3, temperature=2.0)(student, teacher, wanted)
    places = [(b, t) for b in range(B) for t in range(1, T) if wanted[b, t] != -100]
    task = -sum(student.logits[b, t - 1].log_softmax(-1)[wanted[b, t]].item() for b, t in places) / len(places)
    kd = 4 * sum(kl(teacher.logits[b, t - 1] / 2, student.logits[b, t - 1] / 2) for b, t in places) / len(places)
    assert float(parts["task"]) == pytest.approx(task, rel=1e-5)
    assert float(parts["kd"]) == pytest.approx(kd, rel=1e-5)
    assert loss.item() == pytest.approx(0.7 * task + 0.3 * kd, rel=1e-5)


def test_the_original_loss_sums_over_all_positions_and_divides_by_the_batch() -> None:
    student, teacher = outputs(0), outputs(1)
    _, parts = Objective(0.5, temperature=2.0, loss_mode="original")(student, teacher, labels())
    expected = sum(kl(teacher.logits[b, t] / 2, student.logits[b, t] / 2) for b in range(B) for t in range(T)) / B
    assert float(parts["kd"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("positions", "count"), [("text", 5), ("all", 9)])
def test_positions_are_real_tokens_with_or_without_images(positions: str, count: int) -> None:
    student, teacher = outputs(0), outputs(1)
    inputs = {"input_ids": torch.arange(T).repeat(B, 1), "attention_mask": torch.ones(B, T)}
    inputs["attention_mask"][1, 5] = 0
    inputs["input_ids"][:, 1:3] = 99
    _, parts = Objective(positions=positions, image_token_id=99)(student, teacher, labels(), inputs)
    skipped = {1, 2} if positions == "text" else set()
    places = [(b, t) for b in range(B) for t in range(1, T) if t not in skipped and (b, t) != (1, 5)]
    assert len(places) == count
    kd = 4 * sum(kl(teacher.logits[b, t - 1] / 2, student.logits[b, t - 1] / 2) for b, t in places) / count
    assert float(parts["kd"]) == pytest.approx(kd, rel=1e-5)


def test_positions_of_a_decoder_are_those_with_a_label() -> None:
    """The inputs are the text encoder's, which is of another length."""
    model, (batch,) = build("instructblip")
    wanted = batch.pop("decoder_input_ids")
    wanted[0, 3:] = -100
    assert batch["attention_mask"].shape[1] != wanted.shape[1]
    with torch.no_grad():
        student = model(**batch, labels=wanted)
    teacher = SimpleNamespace(logits=student.logits + torch.randn(student.logits.shape))
    found = {p: Objective(positions=p, image_token_id=90, shift=False)(student, teacher, wanted, batch)[1]["kd"]
             for p in ("target", "text", "all")}  # fmt: skip
    assert found["text"] == found["all"] == found["target"] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_what_an_output_has_is_known_without_one(family: str) -> None:
    model, (batch,) = build(family)
    with torch.no_grad():
        assert has_features(model) == hasattr(model(**batch), "image_hidden_states")


def test_equal_logits_cost_nothing_and_the_teacher_gets_no_gradient() -> None:
    student, teacher = outputs(0), outputs(0)
    loss, parts = Objective(1.0)(student, teacher, labels())
    assert abs(float(parts["kd"])) < 1e-6
    student, teacher = outputs(0), outputs(1)
    loss, parts = Objective(1.0)(student, teacher, labels())
    loss.backward()
    assert teacher.logits.grad is None
    assert float(student.logits.grad.abs().sum()) > 0


def test_the_gradient_keeps_its_size_when_the_temperature_changes() -> None:
    norms = []
    for temperature in (1.0, 2.0, 4.0):
        student, teacher = outputs(0), outputs(1)
        for output in (student, teacher):
            output.logits.data.div_(6)  # differences of the size of trained models'
        loss, _ = Objective(1.0, temperature=temperature)(student, teacher, labels())
        loss.backward()
        norms.append(float(student.logits.grad.norm()))
    assert max(norms) < 2 * min(norms)


def test_features_cost_one_minus_their_cosine_and_a_text_encoder_is_not_shifted() -> None:
    ours, theirs = torch.tensor([[[1.0, 0.0]]], requires_grad=True), torch.tensor([[[1.0, 1.0]]])
    student, teacher = outputs(0, image_hidden_states=ours), outputs(1, image_hidden_states=theirs)
    plain, _ = Objective(0.5)(student, teacher, labels())
    loss, parts = Objective(0.5, feature_weight=2.0)(student, teacher, labels())
    assert float(parts["feature"]) == pytest.approx(1 - 0.5**0.5, rel=1e-5)
    assert (loss - plain).item() == pytest.approx(2 * (1 - 0.5**0.5), rel=1e-5)
    _, parts = Objective(shift=False)(student, None, labels())
    wanted = labels()
    places = (wanted != -100).nonzero().tolist()
    task = -sum(student.logits[b, t].log_softmax(-1)[wanted[b, t]].item() for b, t in places) / len(places)
    assert float(parts["task"]) == pytest.approx(task, rel=1e-5)
    with pytest.raises(RequestError, match="no image_hidden_states"):
        Objective(feature_weight=1.0)(outputs(0), outputs(1), labels())


def test_wrong_requests_are_one_line() -> None:
    other = SimpleNamespace(logits=torch.zeros(B, T, V + 2))
    with pytest.raises(RequestError, match=f"teacher's vocabulary has {V + 2} words and the student's {V}"):
        Objective()(outputs(0), other, labels())
    with pytest.raises(RequestError, match="all labels of a batch are -100"):
        Objective()(outputs(0), outputs(1), torch.full((B, T), -100))
    with pytest.raises(RequestError, match="positions text needs"):
        Objective(positions="text")(outputs(0), outputs(1), labels())
    with pytest.raises(RequestError, match="kl_weight 2"):
        Objective(kl_weight=2)
    with pytest.raises(RequestError, match="positions 'some'"):
        Objective(positions="some")
