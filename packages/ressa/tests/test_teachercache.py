"""A teacher asked before training: the divergence against float64, the run with it beside the run with a live one,
and a kill while it is asked."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import started
from ressa.data import BadRow
from ressa.distill import IGNORED, Objective
from ressa.teachercache import KEYS, NONE, Answers, Cache, answers_of, targets_of
from ressa.train import RepairConfig, repair
from torch import Tensor

from model_hooks.errors import RequestError

pytest.importorskip("datasets", reason="needs the extra [train]")

PLACES, V = 5, 17
HOW: dict[str, Any] = {
    "samples": 48, "batch_size": 8, "max_steps": 5, "learning_rate": 5e-3, "rank": 4, "log_every": 1,
}  # fmt: skip
Run = Callable[..., Any]


def divergence(teacher: Tensor, student: Tensor, top: int) -> float:
    """KL over the teacher's `top` tokens and one event for all others, place by place in float64."""
    total = 0.0
    for p, q in zip(teacher.double().softmax(-1), student.double().softmax(-1), strict=True):
        kept = p.argsort(descending=True)[:top]
        total += float((p[kept] * (p[kept] / q[kept]).log()).sum())
        if top < len(p):
            rest = [float(x.sum() - x[kept].sum()) for x in (p, q)]
            total += rest[0] * float(torch.tensor(rest[0] / rest[1], dtype=torch.float64).log())
    return total


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, V), st.sampled_from([0.5, 1.0, 2.0]))
def test_the_divergence_is_that_of_the_kept_tokens_and_the_rest(seed: int, top: int, temperature: float) -> None:
    drawn = torch.Generator().manual_seed(seed)
    teacher, student = (3 * torch.randn(PLACES, V, generator=drawn) for _ in range(2))
    student.requires_grad_(True)
    found = answers_of(teacher, temperature, top).divergence(student, temperature)
    assert float(found.detach()) == pytest.approx(
        divergence(teacher / temperature, student.detach() / temperature, top), rel=1e-4, abs=1e-5
    )
    whole = answers_of(teacher, temperature, V).divergence(student.detach(), temperature)
    assert float(found.detach()) <= float(whole) + 1e-5  # merging events never adds divergence
    found.backward()
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())


def test_a_teacher_that_is_sure_leaves_no_nan() -> None:
    teacher = torch.full((2, V), -torch.inf)
    teacher[:, 3] = 0.0
    said = answers_of(teacher, 1.0, 2)
    assert said.rest.tolist() == [NONE, NONE]
    student = torch.zeros(2, V, requires_grad=True)
    said.divergence(student, 1.0).backward()
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())


def test_the_objective_takes_answers_for_a_teacher() -> None:
    drawn = torch.Generator().manual_seed(0)
    student, teacher = (SimpleNamespace(logits=torch.randn(2, 6, V, generator=drawn)) for _ in range(2))
    labels = torch.randint(0, V, (2, 6), generator=drawn)
    labels[0, :3] = labels[1, 4:] = IGNORED
    for shift in (True, False):
        objective = Objective(0.3, temperature=2.0, shift=shift)
        said = answers_of(targets_of(teacher.logits, labels, shift), 2.0, V)
        live, cached = objective(student, teacher, labels), objective(student, said, labels)
        assert float(cached[0]) == pytest.approx(float(live[0]), rel=1e-5)
        assert float(cached[1]["kd"]) == pytest.approx(float(live[1]["kd"]), rel=1e-5)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory, command: Run) -> Path:
    """Every token of the vocabulary at every place."""
    folder = tmp_path_factory.mktemp("cache") / "taught"
    done = command("teacher-cache", "zoo:llava", "-o", folder, "--samples", 48, "--top", 1000, "--dtype", "float32",
                   "--json")  # fmt: skip
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["examples"] == 48
    assert said["bytes"] == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return folder


def losses(folder: Path) -> list[float]:
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in log if "loss" in entry]


def test_a_repair_by_the_cache_is_that_by_the_teacher(pruned: Path, sparse: Path, taught: Path, tmp_path: Path) -> None:
    live = RepairConfig(model=str(pruned), output=tmp_path / "live", **HOW)
    repair(live)
    repair(replace(live, model=str(sparse), output=tmp_path / "cached", teacher_cache=str(taught)))
    repair(replace(live, output=tmp_path / "alone", teacher="none"))
    one, two, alone = (losses(tmp_path / name) for name in ("live", "cached", "alone"))
    assert two == pytest.approx(one, rel=1e-4)
    assert two[0] != pytest.approx(alone[0], rel=1e-3)


def test_full_finetuning_learns_from_the_cache(sparse: Path, taught: Path, tmp_path: Path) -> None:
    config = RepairConfig(
        model=str(sparse), output=tmp_path / "out", method="full", teacher_cache=str(taught), **HOW | {"max_steps": 2}
    )
    assert repair(config)["steps"] == 2
    assert "kd" in (config.output / "training_log.jsonl").read_text()


# `ressa teacher-cache` with shards of 16 examples, killed while the third is asked about.
KILLED = """
import os, signal, sys
from pathlib import Path
from ressa import teachercache
whole, calls = teachercache._asked, []
def asked(*args):
    calls.append(1)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*args)
teachercache._asked = asked
request = teachercache.Request("zoo:llava", "zoo:shapes", 48, 0, 0, 2.0, 4, "float32")
teachercache.write(request, Path(sys.argv[1]), shard=16)
print("shards asked:", len(calls))
"""


def test_a_killed_cache_goes_on(tmp_path: Path, command: Run) -> None:
    folder = tmp_path / "taught"
    killed = started("-c", KILLED, folder, 3, log=tmp_path / "log")
    assert killed.wait() == -signal.SIGKILL, killed.said
    assert not folder.exists()
    done = command("teacher-cache", "zoo:llava", "-o", folder, "--samples", 48, "--top", 5, "--dtype", "float32")
    assert done.exit_code == 2
    assert "was begun with top 4, now 5" in done.output
    again = started("-c", KILLED, folder, 0, log=tmp_path / "log")
    assert again.wait() == 0, again.said
    assert "shards asked: 1" in again.said
    whole = started("-c", KILLED, tmp_path / "whole", 0, log=tmp_path / "log")
    assert whole.wait() == 0, whole.said
    assert "shards asked: 3" in whole.said
    names = sorted(file.name for file in folder.iterdir())
    assert names == sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert len(names) == 4
    assert all((folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)


def test_a_shard_of_bad_rows_alone_is_written_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every three examples the last is too long; a shard is one example."""
    from ressa import teachercache
    from safetensors.torch import load_file

    request = teachercache.Request("zoo:llava", "zoo:shapes", 6, 0, 24, 2.0, 4, "float32")
    whole, calls = teachercache._asked, []

    def stops(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(teachercache, "_asked", stops)
    with pytest.raises(KeyboardInterrupt):
        teachercache.write(request, tmp_path / "taught", shard=1, skip_bad_rows=1)
    with pytest.raises(BadRow, match="row 5: 27 tokens"):  # the second, with the one before the stop
        teachercache.write(request, tmp_path / "taught", shard=1, skip_bad_rows=1)
    teachercache.write(request, tmp_path / "taught", shard=1, skip_bad_rows=2)
    shapes = [[list(load_file(file)[key].shape) for key in KEYS] for file in sorted(tmp_path.glob("taught/*0*"))]
    assert shapes[2] == shapes[5] == [[0, 4], [0, 4], [0]]
    assert shapes[0] == shapes[3] == [[2, 4], [2, 4], [2]]
    assert [int(load_file(tmp_path / f"taught/0000000{i}.safetensors")["ends"]) for i in (1, 2)] == [2, 0]


def test_what_does_not_fit_is_refused(sparse: Path, taught: Path, tmp_path: Path) -> None:
    right = RepairConfig(model=str(sparse), output=tmp_path / "out", teacher_cache=str(taught), **HOW)
    for changes, says in (
        ({"seed": 1}, r"was made with --seed 0, now 1; give 0"),
        ({"samples": 40}, r"was made with --samples 48, now 40"),
        ({"temperature": 1.0}, r"was made with --temperature 2.0, now 1.0"),
        ({"teacher_cache": str(sparse)}, r"has no teacher.json; give a folder that `ressa teacher-cache` wrote"),
    ):
        with pytest.raises(RequestError, match=says):
            repair(replace(right, **changes))
    for changes, says in (
        ({"teacher": "zoo:llava"}, "teacher and teacher_cache both name a teacher"),
        ({"positions": "all"}, "positions all needs a teacher that runs"),
        ({"feature_weight": 1.0}, "feature_weight 1.0 needs a teacher that runs"),
    ):
        with pytest.raises(RequestError, match=says):
            replace(right, **changes)
    assert not list(tmp_path.iterdir())


def test_another_vocabulary_or_other_examples_are_refused(sparse: Path, taught: Path, tmp_path: Path) -> None:
    from ressa.data import read
    from ressa.encoding import Encoder

    from model_hooks.processors import load_processor

    record = json.loads((taught / "teacher.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "teacher.json").write_text(json.dumps(record | {"vocabulary": 7}))
    config = RepairConfig(model=str(sparse), output=tmp_path / "out", teacher_cache=str(other), **HOW)
    with pytest.raises(
        RequestError, match=rf"its teacher has 7 words in its vocabulary, .* has {record['vocabulary']}"
    ):
        repair(config)
    cache, encoder = Cache(taught), Encoder(load_processor("zoo:llava"))
    first, second = (encoder.encode(one) for one in read("zoo:shapes", 48)[:2])
    assert isinstance(Answers(*cache.of(1, second).values()), Answers)
    with pytest.raises(RequestError, match="example 1 of zoo:shapes is not what its teacher was shown"):
        cache.of(0, second)
    with pytest.raises(RequestError, match="example 1 of"):
        cache.of(0, {**first, "pixel_values": first["pixel_values"] + 1})
