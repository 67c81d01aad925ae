"""Repair: better than no repair and with every zero, resumed bit for bit, stopped by a loss that is no number."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import flags, ranks, started
from ressa.train import RepairConfig, repair
from safetensors.torch import load_file

from model_hooks.errors import RequestError
from paper_tables.errors import WorkFailed

pytest.importorskip("datasets", reason="needs the extra [train]")

HOW: dict[str, Any] = {
    "samples": 320, "batch_size": 16, "max_steps": 20, "learning_rate": 5e-3, "rank": 8, "log_every": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def adapters(pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("repaired") / "adapters"
    return folder, repair(RepairConfig(model=str(pruned), output=folder, **HOW))


def exact(model: Any) -> float:
    from model_hooks.zoo import llava, shapes

    return llava.exact_match(model, shapes.items("heldout", 192))["all"]


def test_a_repaired_model_is_better_and_has_every_zero(
    adapters: tuple[Path, dict[str, Any]], pruned: Path, sparse: Path, command: Callable[..., Any], tmp_path: Path
) -> None:
    from ressa.masks import load_masks
    from transformers import AutoModelForImageTextToText

    from model_hooks import load

    folder, result = adapters
    assert result["steps"] == 20
    assert result["trainable"] > 0
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    assert {"task", "kd"} <= set(log[0])
    assert log[19]["loss"] < log[0]["loss"]
    assert log[19]["learning_rate"] < 0.2 * max(entry["learning_rate"] for entry in log[:20])
    assert not folder.with_name("adapters.training").exists()
    done = command("merge", folder, "-o", tmp_path / "merged")
    assert done.exit_code == 0, done.output
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    for path, mask in load_masks(pruned).items():
        assert not bool((merged.get_submodule(path).weight[~mask] != 0).any()), path
    before = exact(load(sparse, dtype="float32", tokenizer=False)[0])
    assert exact(merged) > before + 0.2
    rows = json.loads(command("eval", folder, tmp_path / "merged", "--samples", 48, "--json").stdout)["figures"]
    by_model: dict[str, list[float]] = {}
    for row in rows:
        by_model.setdefault(row["model"], []).append(row["value"])
    unmerged, plain = by_model.values()
    assert unmerged == pytest.approx(plain, rel=1e-4)


# `python -m ressa.train`, killed before its 14th step.
KILLED = """
import os, signal
from ressa import train
from ressa.repairing import RessaTrainer
whole = RessaTrainer.training_step
def training_step(self, *args, **kwargs):
    if self.state.global_step == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, *args, **kwargs)
RessaTrainer.training_step = training_step
train.main()
"""


def test_a_killed_run_ends_in_the_same_bits(
    adapters: tuple[Path, dict[str, Any]], pruned: Path, tmp_path: Path
) -> None:
    config = RepairConfig(model=str(pruned), output=tmp_path / "again", save_every=8, **HOW)
    options = flags(HOW | {"save_every": 8, "model": pruned, "output": config.output})
    killed = started("-c", KILLED, *options, log=tmp_path / "log")
    assert killed.wait() == -signal.SIGKILL, killed.said
    assert not config.output.exists()
    assert (config.work / "checkpoint-8").is_dir()
    with pytest.raises(RequestError, match=r"unfinished run with rank 8, now 4"):
        repair(replace(config, rank=4))
    repair(config)
    first, second = (load_file(f / "adapter_model.safetensors") for f in (adapters[0], config.output))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(float(first[name].abs().sum()) > 0 for name in first if "lora_B" in name or name.endswith(".b"))
    log = [json.loads(line) for line in (config.output / "training_log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "loss" in entry] == list(range(1, 21))


def test_a_loss_that_is_no_number_stops_and_keeps_the_checkpoint(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ressa.distill import Objective

    config = RepairConfig(model=str(pruned), output=tmp_path / "out", save_every=2, **HOW | {"max_steps": 6})
    calls, whole = [0], Objective.__call__

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss, parts = whole(self, *args, **kwargs)
        calls[0] += 1
        return loss * (float("nan") if calls[0] == 4 else 1.0), parts

    monkeypatch.setattr(Objective, "__call__", broken)
    with pytest.raises(
        WorkFailed, match=r"loss became nan in step 4; checkpoints up to step 2 are kept in .*out.training"
    ):
        repair(config)
    assert not config.output.exists()
    assert (config.work / "checkpoint-2" / "trainable.safetensors").is_file()


def test_a_zeroed_base_needs_a_teacher(sparse: Path, pruned: Path, tmp_path: Path) -> None:
    config = RepairConfig(model=str(sparse), output=tmp_path / "out", **HOW | {"max_steps": 1})
    with pytest.raises(RequestError, match="dense weights are not available: pass --teacher DIR"):
        repair(config)
    assert not list(tmp_path.iterdir())
    with pytest.raises(RequestError, match=r"--teacher zoo:llava-wide (has|is not)"):
        repair(replace(config, teacher="zoo:llava-wide"))
    assert repair(replace(config, teacher="none"))["steps"] == 1
    losses = {
        kind: repair(replace(config, model=str(pruned), teacher_kind=kind, overwrite=True))["loss"]
        for kind in ("DD", "DS", "SD")
    }
    assert len(set(losses.values())) == 3
    assert repair(replace(config, teacher="zoo:llava", overwrite=True))["steps"] == 1


def test_a_named_teacher_is_not_passed_over(pruned: Path, tmp_path: Path) -> None:
    config = RepairConfig(model=str(pruned), output=tmp_path / "out", teacher="zoo:llava", **HOW)
    with pytest.raises(RequestError, match=r"--teacher zoo:llava: .* holds its own dense weights, which teach; leave"):
        repair(config)
    assert not list(tmp_path.iterdir())


def test_features_are_refused_before_the_first_step_where_the_output_has_none(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ressa import distill
    from ressa.repairing import RessaTrainer

    config = RepairConfig(model=str(pruned), output=tmp_path / "out", feature_weight=0.5, **HOW | {"max_steps": 1})
    assert repair(config)["steps"] == 1
    monkeypatch.setattr(distill, "FEATURES", "what_no_output_has")
    monkeypatch.setattr(RessaTrainer, "__init__", lambda *a, **k: pytest.fail("has begun"))
    with pytest.raises(RequestError, match="so feature_weight must be 0"):
        repair(replace(config, output=tmp_path / "other"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_data_with_less_than_asked_for_is_said(pruned: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (32, 32)).save(tmp_path / "one.png")
    record = {"image": "one.png", "answers": ["red circle", "blue cross", "green square"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(record))
    data = str(tmp_path / "rows.jsonl")
    config = RepairConfig(model=str(pruned), output=tmp_path / "out", data=data, **HOW | {"max_steps": 1})
    with pytest.warns(UserWarning, match=r"rows.jsonl gives 3 examples, 320 are asked for"):
        assert repair(config)["examples"] == 3


def test_sparsegpt_keeps_its_teacher_apart(command: Callable[..., Any], tmp_path: Path) -> None:
    from ressa.adapters import attach
    from ressa.folders import load_base
    from ressa.teacher import dense

    from model_hooks import load
    from model_hooks.zoo import llava, shapes

    folder = tmp_path / "pruned"
    how = ("--method", "sparsegpt", "--pattern", "2:4", "--samples", 16, "--batch-size", 16, "--dtype", "float32")
    done = command("prune", "zoo:llava", *how, "--keep-dense", "-o", folder)
    assert done.exit_code == 0, done.output
    base, (whole, _) = load_base(folder), load("zoo:llava", dtype="float32", tokenizer=False)
    moved = [p for p, m in base.masks.items()
             if bool((base.model.get_submodule(p).weight[m] != base.held[p][m]).any())]  # fmt: skip
    assert moved
    inputs = llava.encode(shapes.items("heldout", 3))
    inputs.pop("labels")
    student = attach(base.model, base.masks, rank=4, dense=base.held)
    with dense(student), torch.no_grad():
        assert torch.equal(student(**inputs).logits, whole(**inputs).logits)
    assert repair(RepairConfig(model=str(folder), output=tmp_path / "out", **HOW | {"max_steps": 2}))["steps"] == 2


def test_full_finetuning_keeps_zeros(pruned: Path, tmp_path: Path) -> None:
    from ressa.masks import load_masks

    from model_hooks import load

    out = tmp_path / "full"
    result = repair(RepairConfig(model=str(pruned), output=out, method="full", **HOW | {"max_steps": 3}))
    model, _ = load(out, tokenizer=False)
    dense, _ = load(pruned, tokenizer=False)
    found = load_masks(pruned)
    assert result["trainable"] == sum(mask.numel() for mask in found.values())
    moved = 0
    for path, mask in found.items():
        weight = model.get_submodule(path).weight
        assert not bool((weight[~mask] != 0).any())
        moved += int((weight[mask] != dense.get_submodule(path).weight[mask]).sum())
    assert moved > 0.9 * sum(int(mask.sum()) for mask in found.values())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"method": "sparselore"}, "method 'sparselore' is not accepted.*sparselora"),
        ({"backward": "stee"}, "backward 'stee' is not accepted.*ste"),
        ({"teacher_kind": "SS"}, "teacher_kind 'SS' is not accepted"),
        ({"teacher_kind": "DS", "method": "full"}, "needs masked adapters"),
        ({"rank": 0}, "rank is 0; at least 1 is needed"),
        ({"kl_weight": 1.5}, "kl_weight is 1.5; a share of the loss"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"branches": "vision,speech"}, "branches 'vision,speech' is not accepted"),
        ({"learning_rate": 0.0}, "learning_rate is 0"),
        ({"deepspeed": "zero2"}, "deepspeed needs a launcher"),
    ],
)
def test_settings_are_checked_before_anything_is_loaded(settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=says):
        RepairConfig(model="pruned", output=tmp_path / "out", **settings)


@pytest.mark.parametrize("name", ["repair", "paper"])
def test_the_shipped_configurations_are_accepted(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml

    monkeypatch.setenv("RANK", "0")
    file = Path(__file__).parents[1] / "configs" / f"{name}.yaml"
    config = RepairConfig(model="pruned", output=tmp_path / "out", **yaml.safe_load(file.read_text()))
    assert config.samples == 25_000
    if name == "paper":  # 2 GPUs: 390 steps
        assert config.ranks == {"vision": 4, "connector": 2, "language": 8}
        assert config.samples // (2 * config.batch_size * config.accumulation) == 390


def test_whole_weights_are_not_trained_under_zero3(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    (tmp_path / "three.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    config = RepairConfig(model=str(pruned), output=tmp_path / "out", method="full",
                          deepspeed=str(tmp_path / "three.json"))  # fmt: skip
    with pytest.raises(RequestError, match=r"method full keeps zeros in whole weights, which .*three.json splits"):
        repair(config)
    assert [p.name for p in tmp_path.iterdir()] == ["three.json"]


def test_a_folder_that_was_not_pruned_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"zoo:llava has no ressa.json; give a folder that `ressa prune` wrote"):
        repair(RepairConfig(model="zoo:llava", output=tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_examples_that_are_too_long_are_refused_before_training(pruned: Path, tmp_path: Path) -> None:
    config = RepairConfig(
        model=str(pruned), output=tmp_path / "out", max_length=24, **HOW | {"max_steps": 1, "samples": 6}
    )
    with pytest.raises(RequestError, match="row 2: 27 tokens with its image, more than --max-length 24"):
        repair(config)
    assert repair(replace(config, skip_bad_rows=2))["steps"] == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_two_processes_under_deepspeed_agree_with_one(
    stage: str, adapters: tuple[Path, dict[str, Any]], pruned: Path, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed", reason="needs the extra [train]")
    out = tmp_path / "two"
    how = HOW | {"batch_size": 8, "max_steps": 3, "model": pruned, "output": out, "deepspeed": stage}
    ranks("-m", "ressa.train", "--json", *flags(how), log=tmp_path / "log").finish()
    logs = [[json.loads(x) for x in (f / "training_log.jsonl").read_text().splitlines()] for f in (adapters[0], out)]
    one, two = ([entry["loss"] for entry in log if "loss" in entry] for log in logs)
    assert len(two) == 3
    # each process takes the mean over its own tokens, so that batches of unequal answers weigh otherwise
    assert two[0] == pytest.approx(one[0], rel=0.03)
    assert two[2] < two[0]
    assert any(float(w.abs().sum()) > 0 for n, w in load_file(out / "adapter_model.safetensors").items() if "B" in n)
