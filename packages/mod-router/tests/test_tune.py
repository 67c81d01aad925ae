"""Tuning: only routers change, targets are met on held-out data, a stopped run goes on, faults change nothing."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mod_router import attach
from mod_router import load as load_routers
from mod_router.attaching import routers
from mod_router.data import collate, from_tensors, read_examples, to_tensors
from mod_router.measuring import calibrate, capacity, measure
from mod_router.tune import TuneConfig, main, tune
from routermodels import write_tiny
from safetensors.torch import load_file

from model_hooks import RequestError, load
from model_hooks.zoo import tokenizer as zoo_tokenizer
from paper_tables.launch import deepspeed_file

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="needs the extra [train]")
from mod_router import tuning  # noqa: E402

CONFIGS = Path(__file__).parents[1] / "configs"
QUICK: dict[str, Any] = {
    "samples": 48, "length": 32, "heldout_samples": 24, "batch_size": 8, "layers": "1-4", "log_every": 1, "epochs": 2.0,
}  # fmt: skip


def config(tiny: Path, text: Path, output: Path, **changes: Any) -> TuneConfig:
    return TuneConfig(**{"model": str(tiny), "output": output, "data": str(text), **QUICK, **changes})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "router.safetensors")


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def test_only_routers_are_trained_and_the_target_is_met(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[int] = []
    fit = tuning.RouterTrainer.train

    def watched(self: Any, **kwargs: Any) -> Any:
        result = fit(self, **kwargs)
        held = [t for values in self.optimizer.state.values() for t in values.values() if t.dim()]
        states.append(sum(t.numel() * t.element_size() for t in held))
        return result

    monkeypatch.setattr(tuning.RouterTrainer, "train", watched)
    before = {file.name: file.read_bytes() for file in tiny.iterdir()}
    enough = {"samples": 320, "heldout_samples": 320, "max_steps": 12}
    result = tune(config(tiny, text, tmp_path / "routers", target_capacity=0.5, **enough))
    assert states == [2 * 4 * 32 * 4]  # two moments of 4 routers, float32
    assert result["trainable"] == 4 * 32
    assert result["steps"] == 12
    assert result["capacity"] == pytest.approx(0.5, abs=0.03)
    assert result["cost"] == pytest.approx(result["loss"] - result["base_loss"], abs=1e-6)
    assert {file.name: file.read_bytes() for file in tiny.iterdir()} == before
    model = load_routers(load(tiny, tokenizer=False)[0], tmp_path / "routers")
    assert all(float(r.weight.detach().abs().sum()) > 0 for r in routers(model).values())
    held = read_examples(str(text), load(tiny)[1], samples=640, length=32)[320:]  # the last ones are held out
    again = measure(model, held)
    assert again.capacity == pytest.approx(result["capacity"])
    assert float(again.loss.mean()) == pytest.approx(result["loss"], rel=1e-5)
    assert not (tmp_path / "routers.training").exists()
    record = json.loads((tmp_path / "routers" / "router_config.json").read_text())
    assert record["config"]["tau"] == result["tau"]
    assert record["measured"]["capacity"] == result["capacity"]
    assert log_of(tmp_path / "routers")[0]["step"] == 1


@pytest.mark.parametrize("target", [0.25, 0.75])
def test_other_targets_are_met_by_the_same_routers(target: float, tiny: Path, text: Path, tmp_path: Path) -> None:
    tune(config(tiny, text, tmp_path / "routers", target_capacity=0.5, calibrate=False))
    model, tokenizer = load(tiny)
    load_routers(model, tmp_path / "routers")
    found = read_examples(str(text), tokenizer, samples=640, length=32, seed=5)
    calibrate(model, found[:320], target)
    assert capacity(model, found[320:]) == pytest.approx(target, abs=0.03)


def test_a_threshold_curve_falls(tiny: Path, text: Path, tmp_path: Path) -> None:
    from mod_router.attaching import set_tau

    tune(config(tiny, text, tmp_path / "routers", target_capacity=0.5))
    model, tokenizer = load(tiny)
    load_routers(model, tmp_path / "routers")
    examples = read_examples(str(text), tokenizer, samples=40, length=32)
    shares = []
    for tau in (0.01, 0.3, 0.45, 0.5, 0.55, 0.7, 0.99):
        set_tau(model, tau)
        shares.append(capacity(model, examples))
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 1.0
    assert shares[-1] == 0.0


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_a_useless_layer_is_closed_and_an_essential_one_stays(level: str, text: Path, tmp_path: Path) -> None:
    """Attention 2 adds nothing (its output matrix is zero), attention 3 adds much; half of them may run."""
    folder = write_tiny(tmp_path / "planted")
    model, _ = load(folder)
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[3].self_attn.o_proj.weight.mul_(4)
    model.save_pretrained(folder)
    changes = {"layers": "2,3", "target_capacity": 0.5, "epochs": 6.0, "learning_rate": 3e-2, "level": level}
    result = tune(config(folder, text, tmp_path / "routers", **changes))
    assert result["usage"][2] < 0.1
    assert result["usage"][3] > 0.9


def test_the_papers_recipe_steps_as_published(tiny: Path, text: Path, tmp_path: Path) -> None:
    changes = {"recipe": "paper", "layers": "last:3", "batch_size": 1, "accumulation": 8, "epochs": 1.0}
    result = tune(config(tiny, text, tmp_path / "routers", **changes))
    assert result["tau"] == 0.5  # no calibration
    assert result["steps"] == 6
    rates = [entry["learning_rate"] for entry in log_of(tmp_path / "routers") if "learning_rate" in entry]
    assert max(rates) <= 1e-5
    assert rates[-1] < rates[1]  # the cosine falls after one step of warm-up (0.03 of 6, rounded up)
    moved = max(float(w.abs().max()) for w in weights(tmp_path / "routers").values())
    assert 0 < moved <= 6 * 1.1e-5  # Adam moves a coordinate by about the learning rate a step
    assert set(weights(tmp_path / "routers")) == {f"layers.{i}.weight" for i in (2, 3, 4)}


def test_a_stopped_run_goes_on_to_the_same_weights(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"save_every": 2, "noise": 0.1}
    straight = tune(config(tiny, text, tmp_path / "straight", **settings))
    step, calls = tuning.RouterTrainer.training_step, iter(range(100))

    def stop(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(calls) == 7:  # in the eighth step, after checkpoint-6
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(tuning.RouterTrainer, "training_step", stop)
    stopped = config(tiny, text, tmp_path / "stopped", **settings)
    with pytest.raises(KeyboardInterrupt):
        tune(stopped)
    assert not stopped.output.exists()
    assert (stopped.work / "checkpoint-6" / "routers.safetensors").stat().st_size < 4096  # no copy of the base
    monkeypatch.setattr(tuning.RouterTrainer, "training_step", step)
    with pytest.raises(RequestError, match=r"unfinished run with target_capacity 0.6, now 0.3"):
        tune(config(tiny, text, tmp_path / "stopped", **settings, target_capacity=0.3))
    result = tune(stopped)
    a, b = weights(tmp_path / "straight"), weights(tmp_path / "stopped")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert (result["loss"], result["capacity"]) == (straight["loss"], straight["capacity"])
    assert [e["step"] for e in log_of(stopped.output) if "loss" in e] == list(range(1, 13))


def test_a_base_that_changed_is_noticed(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = tuning.RouterTrainer.training_step

    def meddle(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        model.model.norm.weight.data[0] += 1
        return step(self, model, *args, **kwargs)

    monkeypatch.setattr(tuning.RouterTrainer, "training_step", meddle)
    with pytest.raises(RuntimeError, match="weights of the base changed"):
        tune(config(tiny, text, tmp_path / "routers", max_steps=1))
    assert not (tmp_path / "routers").exists()


def test_records_of_every_kind_are_read(tmp_path: Path) -> None:
    tokenizer = zoo_tokenizer.load()
    rows = {
        "alpaca": [{"instruction": "add", "output": "def add(a, b): return a + b"}],
        "messages": [{"messages": [{"role": "user", "content": "add"}, {"role": "assistant", "content": "a + b"}]}],
        "completion": [{"prompt": "add", "completion": "a + b"}],
    }
    for name, records in rows.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        (example,) = read_examples(str(file), tokenizer, samples=5, length=64)
        assert tokenizer.decode(example.ids[: example.prompt]).strip() == "add"
        assert tokenizer.decode(example.ids[example.prompt :]).startswith(("def add", "a + b"))
        assert example.ids[-1] == tokenizer.eos_token_id
    batch = collate([example, *read_examples("zoo:pairs", tokenizer, samples=3, length=24)], pad=1)
    assert ((batch["labels"] != -100) == (batch["attention_mask"].bool() & ~batch["pool_mask"])).all()
    assert (batch["input_ids"][~batch["attention_mask"].bool()] == 1).all()
    again = from_tensors(to_tensors([example, example]))
    assert [(e.ids.tolist(), e.prompt) for e in again] == [(example.ids.tolist(), example.prompt)] * 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', r"line 2.*needs text in 'prompt' and 'completion'"),
        ('{"text": "a"}\n', "fits no schema"),
        ('{"instruction": "a", "output": ""}\n', "none of 1 records has an answer"),
        ('{"instruction": "a", "output": "b"}\n{"instruction": "a"}\n', r"line 2.*output"),
    ],
)
def test_faulty_data_is_named_by_its_row(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(content)
    with pytest.raises(RequestError, match=message):
        read_examples(str(file), zoo_tokenizer.load(), samples=5, length=32)


WRONG: dict[str, tuple[list[str], str]] = {
    "recipe": (["--recipe", "papre"], "did you mean 'paper'?"),
    "unit": (["--unit", "attn_sequence"], "it is one of attention, mlp, block"),
    "layers": (["--layers", "last:6"], "takes last:1 to last:5"),
    "capacity": (["--target-capacity", "0"], "lies in (0, 1]"),
    "penalty": (["--penalty", "-1"], "numbers from 0 on"),
    "learning rate": (["--learning-rate", "nan"], "learning_rate is nan"),
    "too long": (["--length", "65"], "context of 64 tokens"),
    "too little": (["--heldout-samples", "9000"], "are to be held out"),
    "no model": (["--model", "./nowhere"], "no folder ./nowhere"),
    "no launcher": (["--deepspeed", "zero2"], "needs a launcher"),
    "existing output": (["--output", "taken"], "--overwrite"),
    "output in the input": (["--output", "model/routers"], "overlaps the input"),
    "existing work": (["--output", "busy"], "is in the way"),
    "unknown key": (["--config", "typo.yaml"], "did you mean 'learning_rate'?"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_is_one_line_and_writes_nothing(
    case: str, tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(tiny)
    for folder in ("taken", "busy.training"):
        Path(folder).mkdir()
    Path("busy.training/notes.txt").write_text("mine")
    Path("typo.yaml").write_text("learning_rat: 1\n")
    before = sorted(tmp_path.rglob("*"))
    arguments, message = WRONG[case]
    with pytest.raises(SystemExit) as stopped:
        main(["--model", "model", "--output", "routers", "--data", str(text), "--length", "32", *arguments])
    said = capsys.readouterr()
    assert stopped.value.code == 2, said
    assert message in said.err
    assert "Traceback" not in said.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["tune", "paper"])
def test_shipped_configurations_run(name: str, tiny: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert set(values) <= {f.name for f in fields(TuneConfig)} - {"model", "output"}
    with pytest.raises(SystemExit) as stopped:
        main(["--local_rank=0", "--config", str(CONFIGS / f"{name}.yaml"), "--model", str(tiny), "-o",
              str(tmp_path / "routers"), "--data", str(text), "--heldout", str(text), "--length", "32",
              "--samples", "8", "--heldout-samples", "4", "--max-steps", "1", "--layers", "last:3", "--kind", "auto",
              "--template", "none", "--json"])  # fmt: skip
    said = capsys.readouterr()
    assert stopped.value.code == 0, said.err
    assert json.loads(said.out)["steps"] == 1


def test_shipped_deepspeed_files_are_found() -> None:
    for stage, name in ((2, "zero2"), (3, "zero3")):
        file = deepspeed_file(tuning.__file__, name)
        assert file is not None
        assert json.loads(Path(file).read_text())["zero_optimization"]["stage"] == stage


def test_a_model_that_shares_a_routers_weight_is_refused() -> None:
    from routermodels import build

    model = attach(build(), layers=(1,))
    model.model.layers[0].tied = next(iter(routers(model).values())).weight
    with pytest.raises(RuntimeError, match="would be trained too"):
        tuning.only_routers(model)
