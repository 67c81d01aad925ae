"""Fine-tuning: what is learned from, that it helps, that a stopped run goes on, that a wrong request writes nothing."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from processes import flags, started
from superfiltering import cli
from superfiltering.cli import app
from superfiltering.train import TrainConfig, main, train
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from instruct_data.completions import completions
from instruct_data.records import read
from instruct_data.templates import template
from model_hooks import RequestError, load
from paper_tables.errors import TableError
from paper_tables.launch import deepspeed_file

pytest.importorskip("trl", reason="needs the extra [train]")
from paper_tables import sft

CONFIGS = Path(__file__).parents[1] / "configs"
QUICK: dict[str, Any] = {
    "template": "none", "max_length": 64, "batch_size": 4, "accumulation": 2, "epochs": 2.0, "learning_rate": 1e-2,
    "log_every": 1,
}  # fmt: skip


@pytest.fixture
def data(tmp_path: Path, alpaca: Any, lines: Any) -> str:
    return str(lines(tmp_path / "data.jsonl", alpaca(24)))


def config(weak: Path, data: str, output: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(**{"model": str(weak), "data": data, "output": output, **QUICK, **changes})


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(load(folder, tokenizer=False)[0].state_dict())


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def trainer_of(weak: Path, data: str, output: Path, **changes: Any) -> Any:
    wanted = config(weak, data, output, **changes)
    model, tokenizer = load(weak, dtype="float32")
    rows = completions(data, wanted.schema, wanted.template, tokenizer)
    return sft.trainer_of(wanted, sft.arguments(wanted, None, "superfiltering"), model, tokenizer, rows)


def test_a_student_learns_and_is_an_ordinary_checkpoint(weak: Path, data: str, tmp_path: Path, capfd: Any) -> None:
    output = tmp_path / "student"
    result = train(config(weak, data, output))
    said = capfd.readouterr()
    assert said.out + said.err == ""  # no bars of datasets or transformers
    losses = [entry["loss"] for entry in log_of(output) if "loss" in entry]
    assert (result["records"], result["steps"], len(losses)) == (24, 6, 6)
    assert losses[-1] == result["loss"] < losses[0] - 0.5
    model = AutoModelForCausalLM.from_pretrained(output)
    assert largest_difference(dict(model.state_dict()), weights(weak)) > 1e-3
    card = (output / "README.md").read_text()
    assert f"fine-tuned on {data}" in card
    assert "2402.00530" in card
    assert not (tmp_path / "student.training").exists()
    options = ["--data", data, "--template", "none", "--max-length", "128", "--json"]
    after, before = (CliRunner().invoke(app, ["eval", str(folder), *options]) for folder in (output, weak))
    assert json.loads(after.stdout)["loss"]["value"] < json.loads(before.stdout)["loss"]["value"] - 0.5


def test_the_loss_is_on_answers_and_their_end_alone(weak: Path, talks: Any, lines: Any, tmp_path: Path) -> None:
    """Every turn is a row; what has a label is the answer's tokens and the end of text."""
    data = lines(tmp_path / "talks.jsonl", talks(6))
    trainer = trainer_of(weak, data, tmp_path / "student", max_length=128)
    tokenizer = trainer.processing_class
    examples = [e for record in read(data) for e in record.examples]
    batch = trainer.data_collator([trainer.train_dataset[k] for k in range(len(examples))])
    prompt = template("none")
    for example, ids, labels in zip(examples, batch["input_ids"], batch["labels"]):
        learned = [int(label) for label in labels if label != -100]
        whole = [*tokenizer.encode(prompt(example) + example.response), tokenizer.eos_token_id]
        assert [int(i) for i in ids[: len(whole)]] == whole
        start = len(tokenizer.encode(prompt(example)))
        assert learned == whole[start:]
        assert all(labels[:start] == -100)
    model = trainer.model.eval()
    with torch.no_grad():
        loss = float(trainer.compute_loss(model, dict(batch)))
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double()
    wanted = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100
    )
    assert loss == pytest.approx(float(wanted), rel=1e-5)


def test_records_without_an_answer_left_are_dropped(weak: Path, alpaca: Any, lines: Any, tmp_path: Path) -> None:
    rows = [*alpaca(4), {"instruction": "word " * 80, "output": "cut away"}, {"instruction": "a", "output": ""}]
    data = lines(tmp_path / "mixed.jsonl", rows)
    assert len(trainer_of(weak, data, tmp_path / "student").train_dataset) == 4
    only = lines(tmp_path / "cut.jsonl", rows[4:])
    with pytest.raises(RequestError, match="none of 1 answers has a token within --max-length 64"):
        train(config(weak, only, tmp_path / "student"))
    empty = lines(tmp_path / "empty.jsonl", rows[5:])
    with pytest.raises(RequestError, match=r"no record of .*empty\.jsonl has an answer"):
        train(config(weak, empty, tmp_path / "student"))
    assert not (tmp_path / "student").exists()


def test_a_stopped_run_goes_on_to_the_same_weights(
    weak: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = train(config(weak, data, tmp_path / "straight"))
    step, calls = sft.SFTTrainer.training_step, iter(range(100))

    def stop(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(calls) == 10:  # in the sixth step, after checkpoint-4
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(sft.SFTTrainer, "training_step", stop)
    stopped = config(weak, data, tmp_path / "stopped", save_every=2)
    with pytest.raises(KeyboardInterrupt):
        train(stopped)
    assert not stopped.output.exists()
    monkeypatch.setattr(sft.SFTTrainer, "training_step", step)
    for name, value in (("learning_rate", 0.1), ("max_length", 32), ("template", "alpaca"), ("seed", 3)):
        with pytest.raises(RequestError, match=f"holds an unfinished run with {name} .*, now {value!r}"):
            train(config(weak, data, tmp_path / "stopped", **{name: value}))
    text = Path(data).read_text()
    Path(data).write_text(text.replace("topic", "kind").replace("value", "price"))
    with pytest.raises(RequestError, match=r"holds a run on other records than .*data\.jsonl has now"):
        train(stopped)
    Path(data).write_text(text.replace("topic", "kind"))  # nothing that is learned from
    result = train(stopped)
    assert largest_difference(weights(tmp_path / "straight"), weights(stopped.output)) == 0
    assert (result["loss"], result["steps"]) == (straight["loss"], straight["steps"])
    assert [entry["step"] for entry in log_of(stopped.output) if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert not stopped.work.exists()


@pytest.mark.parametrize("torn", ["trainer_state.json", "optimizer.pt", "model.safetensors"])
def test_a_checkpoint_torn_by_a_kill_is_not_gone_on_from(
    torn: str, weak: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill while checkpoint-4 is written leaves a part of it; the run goes on from checkpoint-2."""
    straight = train(config(weak, data, tmp_path / "straight"))
    save, written = sft.SFTTrainer._save_checkpoint, []

    def killed(self: Any, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        written.append(self.state.global_step)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(sft.SFTTrainer, "_save_checkpoint", killed)
    stopped = config(weak, data, tmp_path / "stopped", save_every=2)
    with pytest.raises(KeyboardInterrupt):
        train(stopped)
    assert written == [2, 4]
    monkeypatch.setattr(sft.SFTTrainer, "_save_checkpoint", save)
    file = stopped.work / "checkpoint-4" / torn
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    if torn != "trainer_state.json":  # which comes last
        (stopped.work / "checkpoint-4" / "trainer_state.json").unlink()
    result = train(stopped)
    assert result["loss"] == straight["loss"]
    assert largest_difference(weights(tmp_path / "straight"), weights(stopped.output)) == 0


def test_a_run_begins_anew_if_asked(weak: Path, data: str, tmp_path: Path) -> None:
    other = config(weak, data, tmp_path / "student", learning_rate=0.1)
    other.work.mkdir()
    (other.work / "prepared.json").write_text(json.dumps({"settings": other.settings()}))
    result = train(config(weak, data, tmp_path / "student", resume=False, max_steps=1))
    assert result["steps"] == 1


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_weights(weak: Path, data: str, tmp_path: Path) -> None:
    options = {"epochs": 8.0, "save_every": 3}
    train(config(weak, data, tmp_path / "straight", **options))
    stopped = config(weak, data, tmp_path / "killed", **options)
    asked = flags({name: getattr(stopped, name) for name in ("model", "data", "output", *QUICK, *options)})
    with started("-m", "superfiltering.train", *asked, "--quiet", log=tmp_path / "log") as running:
        running.wait_for(stopped.work / "checkpoint-3" / "trainer_state.json")
    assert not stopped.output.exists()
    train(stopped)
    assert largest_difference(weights(tmp_path / "straight"), weights(stopped.output)) == 0


WRONG: dict[str, tuple[list[str], str]] = {
    "template": (["--template", "alpacca"], "no template 'alpacca'"),
    "no launcher": (["--deepspeed", "zero2"], "needs a launcher"),
    "batch": (["--batch-size", "0"], "batch_size is 0; at least 1"),
    "learning rate": (["--learning-rate", "nan"], "learning_rate is nan"),
    "epochs": (["--epochs", "inf"], "epochs is inf"),
    "warm-up": (["--warmup", "1"], "warmup is 1.0"),
    "no data": (["--data", "missing.jsonl"], "missing.jsonl does not exist"),
    "schema": (["--schema", "sharegpt"], "is not of schema sharegpt"),
    "bad record": (["--data", "bad.jsonl"], 'key "output": is missing'),
    "no model": (["--model", "./nowhere"], "no folder ./nowhere"),
    "existing output": (["--output", "taken"], "exists"),
    "output in the input": (["--output", "model/student"], "overlaps the input"),
    "existing work": (["--output", "busy"], "is in the way"),
    "unknown key": (["--config", "typo.yaml"], "did you mean 'learning_rate'?"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_is_one_line_and_writes_nothing(
    case: str, weak: Path, data: str, room: Path, capsys: Any, lines: Any
) -> None:
    Path("model").symlink_to(weak)
    for folder in ("taken", "busy.training"):
        Path(folder).mkdir()
        Path(folder, "precious").write_text("x")
    Path("typo.yaml").write_text("learning_rat: 1\n")
    lines("bad.jsonl", [{"instruction": "a", "output": "b"}, {"instruction": "c"}])
    before = sorted(room.rglob("*"))
    arguments, message = WRONG[case]
    with pytest.raises(SystemExit) as stopped:
        main(["--model", "model", "--output", "student", "--data", data, *arguments])
    said = capsys.readouterr()
    assert stopped.value.code == 2, said
    assert message in said.err
    assert len(said.err.strip().splitlines()) == 1
    assert sorted(room.rglob("*")) == before


def test_a_loss_that_is_no_number_fails_and_writes_nothing(weak: Path, data: str, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--model", str(weak), "--output", str(tmp_path / "student"), "--data", data, "--accumulation", "1",
              "--learning-rate", "1e30", "--max-steps", "5", "--log-every", "1"])  # fmt: skip
    assert stopped.value.code == 1
    assert "lower --learning-rate" in capsys.readouterr().err
    assert not (tmp_path / "student").exists()


def test_the_shipped_configuration_runs(weak: Path, data: str, tmp_path: Path, capsys: Any) -> None:
    values = yaml.safe_load((CONFIGS / "sft.yaml").read_text())
    assert set(values) <= {f.name for f in fields(TrainConfig)} - {"model", "data", "output"}
    with pytest.raises(SystemExit) as stopped:
        main(["--local_rank=0", "--config", str(CONFIGS / "sft.yaml"), "--model", str(weak), "-o",
              str(tmp_path / "student"), "--data", data, "--max-length", "128", "--max-steps", "1", "--deepspeed", "",
              "--json"])  # fmt: skip
    said = capsys.readouterr()
    assert stopped.value.code == 0, said.err
    assert json.loads(said.out)["steps"] == 1
    assert load(tmp_path / "student")[0].dtype == torch.bfloat16


def test_shipped_deepspeed_files_are_found() -> None:
    for stage, name in ((2, "zero2"), (3, "zero3"), (3, "zero3-offload")):
        file = deepspeed_file(cli.__file__, name)
        assert file is not None
        assert json.loads(Path(file).read_text())["zero_optimization"]["stage"] == stage
    with pytest.raises(TableError, match="zero2, zero3, zero3-offload"):
        deepspeed_file(cli.__file__, "zero4")
