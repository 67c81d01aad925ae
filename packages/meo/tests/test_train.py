"""Training: every kind runs on local files and learns, a stopped run goes on, the original's flags are taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Command
from meo import convert, gating, load
from meo.cli import app
from meo.converting import banks
from meo.options import Conversion, read_tasks, translate
from meo.train import TrainConfig, main, train
from mergedmodels import BART, GPT2, SMALL, T5, dense, merged, write

from model_hooks import RequestError
from paper_tables.launch import deepspeed_file

pytest.importorskip("accelerate", reason="needs the extra [train]")
from meo import tuning

CONFIGS = Path(__file__).parents[1] / "configs"
QUICK: dict[str, Any] = {
    "experts": 4, "k": 2, "samples": 48, "heldout_samples": 16, "length": 24, "batch_size": 8, "max_steps": 8,
    "learning_rate": 1e-2, "log_every": 1, "target_length": 6, "warmup": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    room = tmp_path_factory.mktemp("models")
    made = {
        "bert": ("BertForMaskedLM", "BertConfig", SMALL), "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
        "t5": ("T5ForConditionalGeneration", "T5Config", T5),
        "bart": ("BartForConditionalGeneration", "BartConfig", {**BART, "decoder_start_token_id": 0}),
    }  # fmt: skip
    return {name: write(room / name, *how) for name, how in made.items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Local files of every kind: an odd word decides the class; the answer is a word of the question."""
    room = tmp_path_factory.mktemp("data")
    words = ["red", "blue", "green", "black"]

    def lines(name: str, records: list[dict[str, Any]]) -> Path:
        (room / name).write_text("".join(json.dumps(r) + "\n" for r in records))
        return room / name

    found = [(words[i % 4], words[i // 4 % 4]) for i in range(80)]
    csv = room / "classes.csv"
    csv.write_text("sentence,label\n" + "".join(f"a {a} thing,{'yes' if a in words[:2] else 'no'}\n" for a, _ in found))
    (room / "text.txt").write_text("".join(f"def f{n % 7}(x):\n    return x + {n % 10}\n\n" for n in range(900)))
    return {
        "classification": csv, "clm": room / "text.txt", "mlm": room / "text.txt",
        "qa": lines("qa.jsonl", [{"question": f"{a} or {b}?", "context": f"{a} is it.",
                                  "answers": {"text": [a], "answer_start": [0]}} for a, b in found]),
        "summarization": lines("sums.jsonl", [{"document": f"{a} {b} {a}", "summary": a} for a, b in found]),
    }  # fmt: skip


def figures(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {row["figure"]: row for row in result["figures"]}


@pytest.mark.parametrize(("kind", "name", "level"), [
    ("classification", "bert", "token"), ("classification", "gpt2", "sequence"), ("clm", "gpt2", "chunk"),
    ("mlm", "bert", "sequence"), ("qa", "t5", "sequence"), ("qa", "gpt2", "prefix"),
    ("summarization", "bart", "sequence"),
])  # fmt: skip
def test_every_kind_of_task_with_the_originals_flags(
    kind: str, name: str, level: str, models: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    before = {file.name: file.read_bytes() for file in models[name].iterdir()}
    length = {"clm": "block_size", "summarization": "max_source_length"}.get(kind, "max_seq_length")
    answers = {"qa": ["--max_answer_length", 6], "summarization": ["--max_target_length", 6]}.get(kind, [])
    result = Command(app).said(
        "train", "--kind", kind, "--model_name_or_path", models[name], "--output_dir", tmp_path / "out",
        "--train_file", data[kind], "--use_moe", "MEO", "--moe_level", level, "--n_experts", 4, "--k", 2,
        "--max_train_samples", 48, "--max_eval_samples", 16, f"--{length}", 24, *answers, "--max_steps", 8,
        "--per_device_train_batch_size", 8, "--learning_rate", "1e-2", "--logging_steps", 1, "--warmup_ratio", "0.0",
        "--do_train", "True", "--do_eval", "--evaluation_strategy", "epoch", "--load_best_model_at_end", "True",
        "--fp16", "--description_size", 128, "--reduce", 16, "--chunk", 8,
    )  # fmt: skip
    log = [json.loads(line) for line in (tmp_path / "out" / "training_log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert result["steps"] == len(losses) == 8
    assert min(losses[1:]) < losses[0]
    reference = log[-1]["reference only"]
    assert reference == result["reference"]
    published = {row["published"]: row["source"] for row in reference}
    assert list(published) == ([82.6, 83.3] if kind == "classification" else [])
    assert all("abstract; for reference only" in source for source in published.values())
    assert all(entry["balance"] > 0 for entry in log if "balance" in entry)
    expected = {"classification": "accuracy", "clm": "perplexity", "mlm": "perplexity", "qa": "exact_match",
                "summarization": "rougeL"}  # fmt: skip
    assert expected[kind] in figures(result)
    if kind in ("clm", "mlm"):
        assert figures(result)["loss"]["after"] < figures(result)["loss"]["before"]
    again, tokenizer = load(tmp_path / "out")
    assert len(banks(again)) >= 4
    assert tokenizer.pad_token_id is not None
    assert {file.name: file.read_bytes() for file in models[name].iterdir()} == before
    assert not (tmp_path / "out.training").exists()


def test_scores_are_learned_as_numbers(models: dict[str, Path], tmp_path: Path) -> None:
    """Labels with a fraction, as STS-B's, are no classes."""
    words = ["red", "blue", "green", "black"]
    rows = [f"a {words[i % 4]} thing,a {words[i // 4 % 4]} one,{0.5 + i % 4}\n" for i in range(64)]
    (tmp_path / "scores.csv").write_text("sentence1,sentence2,label\n" + "".join(rows))
    config = TrainConfig(model=str(models["bert"]), output=tmp_path / "out", data=str(tmp_path / "scores.csv"),
                         **{**QUICK, "max_steps": 24, "level": "sequence"})  # fmt: skip
    found = figures(train(config))
    assert set(found) == {"pearson", "spearman", "loss"}
    assert found["loss"]["after"] < 0.5 * found["loss"]["before"]
    assert load(tmp_path / "out")[0].config.num_labels == 1
    again = Command(app).said("eval", tmp_path / "out", "--data", tmp_path / "scores.csv", "--samples", 8)
    assert {row["figure"] for row in again["figures"]} == set(found)
    (tmp_path / "one.csv").write_text("text,label\n" + "x,0\n" * 40)
    with pytest.raises(RequestError, match="two classes are needed"):
        train(TrainConfig(model=str(models["bert"]), output=tmp_path / "o", data=str(tmp_path / "one.csv"), **QUICK))


def test_a_dense_model_and_a_vanilla_mixture_train_too(
    models: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    sizes = {}
    for method in ("none", "moe"):
        config = TrainConfig(model=str(models["bert"]), output=tmp_path / method, data=str(data["classification"]),
                             **{**QUICK, "method": method, "level": "token"})  # fmt: skip
        sizes[method] = train(config)["parameters"]
    assert sizes["moe"] > 1.25 * sizes["none"]
    assert "meo" not in json.loads((tmp_path / "none" / "config.json").read_text())


def test_several_tasks_are_trained_together(models: dict[str, Path], tmp_path: Path) -> None:
    config = TrainConfig(model=str(models["bert"]), output=tmp_path / "out", data="zoo:glue:order:calibration,"
                         "zoo:glue:returns:calibration", heldout="zoo:glue:order,zoo:glue:returns",
                         **{**QUICK, "level": "task", "tasks": "order,returns", "samples": 16})  # fmt: skip
    assert figures(train(config))["accuracy"]["after"] >= 0
    model, _ = load(tmp_path / "out")
    with gating(task="order"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long))


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(
    models: dict[str, Path], data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {**QUICK, "level": "sequence", "save_every": 2}
    one = TrainConfig(model=str(models["bert"]), output=tmp_path / "one", data=str(data["classification"]), **how)
    whole = train(one)
    two = TrainConfig(model=str(models["bert"]), output=tmp_path / "two", data=str(data["classification"]), **how)
    step = tuning.trainer.Progress.on_step_end

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step(self, args, state, control, **kwargs)
        if state.global_step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(tuning.trainer.Progress, "on_step_end", stop)
    with pytest.raises(KeyboardInterrupt):
        train(two)
    monkeypatch.setattr(tuning.trainer.Progress, "on_step_end", step)
    assert not (tmp_path / "two").exists()
    assert train(two)["figures"] == whole["figures"]


def test_balance_is_added_once_under_accumulation(
    models: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    """Equal batches twice: two of them make the step of one."""
    logs = []
    for size, accumulation in ((8, 1), (8, 2)):
        config = TrainConfig(
            model=str(models["bert"]), output=tmp_path / f"{accumulation}", data=str(data["clm"]), kind="mlm",
            **{**QUICK, "level": "sequence", "batch_size": size, "accumulation": accumulation, "max_steps": 1},
        )  # fmt: skip
        train(config)
        lines = (tmp_path / f"{accumulation}" / "training_log.jsonl").read_text().splitlines()
        logs.append(json.loads(lines[0]))
    assert logs[1]["loss"] == pytest.approx(logs[0]["loss"], rel=0.2)  # not twice as large
    assert logs[1]["balance"] == pytest.approx(logs[0]["balance"], rel=0.8)


@pytest.mark.parametrize(("parts", "trained"), [
    ("experts", {"weight", "bias", "w_gate", "w_noise", "token"}), ("gates", {"w_gate", "w_noise"}),
    ("peft", {"w_gate", "w_noise", "token"}),
])  # fmt: skip
def test_parts_are_what_is_trained(parts: str, trained: set[str]) -> None:
    model = merged("classifier", level="token", gate="noisy-topk", reduce=16)
    tuning.choose(model, parts)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    own = {n.rpartition("dense.")[2].partition(".")[0] for n in names if "encoder.layer" in n}
    assert own == trained
    assert {n for n in names if "encoder.layer" not in n} == {"classifier.weight", "classifier.bias"}


def test_weight_decay_leaves_the_experts_out_when_asked(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    model = merged("classifier", level="token", reduce=16)
    settings = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", weight_decay=0.1)
    decayed = [set(tuning.BalancedTrainer(model=model, args=settings, decay_experts=asked)
                   .get_decay_parameter_names(model)) for asked in (True, False)]  # fmt: skip
    own = {f"{bank}.{name}" for bank, made in banks(model).items() for name, _ in made.named_parameters()}
    assert decayed[0] - decayed[1] == decayed[0] & own
    assert {name for name in own if name.endswith("dense.weight")} <= decayed[0]
    assert "classifier.weight" in decayed[1]


def test_the_originals_flags_mean_ours(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model_name_or_path", "bert", "--use_moe", "MEO", "--moe_level", "task", "--k", "12",
             "--n_experts", "16",
             "--description_size=128", "--do_train", "True", "--do_eval", "--per_device_train_batch_size", "16",
             "--num_train_epochs=10", "--task_name", "sst2", "--learning_rate", "1e-5", "--output_dir", "out",
             "--overwrite_output_dir", "--only_tune_moe", "false"]  # fmt: skip
    assert translate(given) == [
        "--model", "bert", "--method", "meo", "--level", "task", "--k", "12", "--experts", "16", "--batch-size", "16",
        "--epochs=10", "--data", "sst2", "--learning-rate", "1e-5", "--output", "out", "--overwrite",
    ]  # fmt: skip
    assert "description-size is left out" in capsys.readouterr().err
    assert translate(["--use_moe=Conv1D_MoE"]) == ["--method=moe"]
    assert translate(["--use-moe", "none", "-o", "x"]) == ["--method", "none", "-o", "x"]
    with pytest.raises(RequestError, match="unknown use_moe 'meow'"):
        translate(["--use_moe", "meow"])


def test_tasks_are_read_from_files_and_names(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("a: is it right?\nb:\n")
    assert read_tasks(str(tmp_path / "t.yaml")) == {"a": "is it right?", "b": ""}
    assert read_tasks("x, y") == {"x": "", "y": ""}
    (tmp_path / "empty.json").write_text("")
    with pytest.raises(RequestError, match="holds no task"):
        Conversion(tasks=str(tmp_path / "empty.json"), level="task")
    with pytest.raises(RequestError, match="no file"):
        read_tasks("none.json")


@pytest.mark.parametrize(("changes", "message"), [
    ({"kind": "clasification"}, "did you mean 'classification'"), ({"parts": "al"}, "did you mean 'all'"),
    ({"method": "meow"}, "did you mean 'meo'"), ({"experts": 2, "k": 3}, "k is 3"), ({"length": 1}, "length is 1"),
    ({"deepspeed": "zero2"}, "needs a launcher"), ({"level": "task"}, "needs tasks"),
    ({"fsdp": True}, "needs a launcher"), ({"min_target_length": -1}, "min_target_length is -1"),
    ({"bias_rate": -0.1}, "bias_rate is -0.1"),
])  # fmt: skip
def test_wrong_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        TrainConfig(model="zoo:gpt2", output=Path("x"), **changes)


def test_fsdp_needs_gpus_and_excludes_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    if not torch.accelerator.is_available():
        with pytest.raises(RequestError, match="accelerate cuts models over GPUs only"):
            TrainConfig(model="zoo:gpt2", output=Path("x"), fsdp=True)
    with pytest.raises(RequestError, match="give one of them"):
        TrainConfig(model="zoo:gpt2", output=Path("x"), fsdp=True, deepspeed="zero2")


def test_nothing_is_written_for_a_request_that_fails(
    models: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"data": str(tmp_path / "none.csv")}, "no file"), ({"length": 4096}, "more than the model's context of 64"),
        ({"level": "sequence", "kind": "clm", "model": str(models["gpt2"]), "data": str(data["clm"])}, "future tokens"),
        ({"data": str(data["qa"])}, "a class is read from"), ({"kind": "mlm", "model": str(models["gpt2"]),
          "data": str(data["clm"]), "level": "chunk"}, "cannot load|no mask token"),
        ({"samples": 4, "heldout_samples": 90}, "are to be held"),
    ]  # fmt: skip
    for changes, message in cases:
        given = {"model": str(models["bert"]), "data": str(data["classification"]), **QUICK, **changes}
        with pytest.raises(RequestError, match=message):
            train(TrainConfig(output=tmp_path / "out", **given))
        assert list(tmp_path.iterdir()) == []


def test_the_shipped_configurations_are_read() -> None:
    import yaml

    for file in CONFIGS.glob("*.yaml"):
        values = yaml.safe_load(file.read_text())
        config = TrainConfig(model="m", output=Path("o"), **values)
        assert config.meo is not None
    assert deepspeed_file(str(Path(tuning.__file__)), "zero3")


def test_the_module_takes_the_flags_too(models: dict[str, Path], data: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--model_name_or_path", str(models["bert"]), "--output_dir", str(tmp_path / "out"), "--train_file",
              str(data["classification"]), "--use_moe", "MEO", "--n_experts", "4", "--k", "2", "--max_steps", "2",
              "--max_seq_length", "24", "--quiet", "--samples", "40", "--heldout-samples", "10"])  # fmt: skip
    assert not stop.value.code
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_bank_beats_a_dense_linear_on_latent_clusters(seed: int) -> None:
    """Four kinds of sequences, each with a map of its own: equal operations, half of the error at most."""
    from meo.bank import BankSpec, make_bank
    from meo.config import MeoConfig
    from meo.context import Frame, Options, Runtime

    torch.manual_seed(seed)
    width, rows, tokens = 8, 32, 6
    maps, centres = torch.randn(4, width, width), 2 * torch.randn(4, width)
    config = MeoConfig(experts=4, k=2, balance_coef=0.01, init_scale=0.5)
    runtime = Runtime(config, "sequence", False)
    bank = make_bank(BankSpec("x", 0, width, width, False, width, "x"), config, runtime)
    plain = torch.nn.Linear(width, width, bias=False)
    bank.fill(plain.weight.detach(), None, torch.Generator().manual_seed(seed))

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        kind = torch.randint(4, (rows,))
        x = centres[kind][:, None] + torch.randn(rows, tokens, width)
        return x, torch.einsum("btd,bod->bto", x, maps[kind])

    losses = {}
    for name, module in (("bank", bank), ("dense", plain)):
        optimizer = torch.optim.Adam(module.parameters(), lr=2e-2)
        for step in range(301):
            x, y = batch()
            module.train(step < 300)
            frame = Frame(runtime, Options(), rows, tokens, "cpu")
            loss = ((module.mixed(x, frame) if name == "bank" else module(x)) - y).square().mean()
            losses[name] = loss.item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    frame = Frame(runtime, Options(), rows, tokens, "cpu")
    used = bank.decision(batch()[0], frame).idx.unique()
    assert len(used) >= 2
    assert losses["bank"] < 0.5 * losses["dense"]


def test_experts_alike_are_announced() -> None:
    with pytest.warns(UserWarning, match="gates get no gradient"):
        convert(dense("bert"), init="copy")
