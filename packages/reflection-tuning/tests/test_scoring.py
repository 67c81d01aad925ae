"""IFD and r-IFD of all versions against one plain forward at a time, in any batching and any number of processes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Command
from llm_server import Server
from reflection_tuning.cli import app
from reflection_tuning.originals import ratio
from reflection_tuning.reverse import REVERSE
from reflection_tuning.versions import versions_of
from reflection_tuning.workflow import Incomplete, score_records
from teachers import lines, some_records

from instruct_data import Example, read
from instruct_data.scoring.losses import Losses
from instruct_data.templates import template
from model_hooks import load

COMMAND = Command(app)
said, refused = COMMAND.said, COMMAND.refused
pytestmark = [pytest.mark.filterwarnings("ignore:max_length .* is lowered"), pytest.mark.usefixtures("room")]
LOSSES = ("loss_y_x", "loss_y", "loss_x_y", "loss_x")


@pytest.fixture(scope="module")
def loaded(student: Path) -> tuple[Any, Any]:
    return load(student, dtype="float32")


def plain_loss(model: Any, ids: list[int], start: int) -> float:
    """Summed loss of ids[start:], by one forward and in float64."""
    logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    logp = logits.log_softmax(-1)
    return -sum(float(logp[at - 1, ids[at]]) for at in range(start, len(ids)))


@torch.inference_mode()
def expected(model: Any, tokenizer: Any, example: Example, name: str, limit: int) -> dict[str, Any]:
    """The published scorer: one record, four forwards."""
    prompt = template(name)
    asked = Example(REVERSE.format(answer=example.response), "", "", example.history, example.system)
    found: dict[str, Any] = {}
    sides = (("y", prompt(example), example.response), ("x", prompt(asked), example.instruction + example.input))
    for side, before, target in sides:
        start = len(tokenizer(before)["input_ids"])
        if start >= limit:
            continue
        whole = tokenizer(before + target)["input_ids"][:limit]
        alone = tokenizer(target)["input_ids"][: limit - start + 1]
        other = "x" if side == "y" else "y"
        found[f"loss_{side}_{other}"] = plain_loss(model, whole, start), len(whole) - start
        found[f"loss_{side}"] = plain_loss(model, alone, 1), len(alone) - 1
    return found


def reflected(count: int) -> list[dict[str, Any]]:
    """Records with all four versions, made without a teacher."""
    from reflection_tuning.versions import Version, columns, original

    rows = []
    for record in read(some_records(count), name="records"):
        question, answer = f"Explain why {record.examples[-1].instruction}", record.examples[-1].response
        versions = {
            "ori": original(record), "Q": Version(instruction=question, answer=f"In short {answer}"),
            "A": Version(answer=f"{answer} And so it is for every item."),
            "QA": Version(instruction=question, answer=f"In short {answer} And so it is for every list."),
        }  # fmt: skip
        rows.append({**record.data, **columns(versions)})
    return rows


def scored(loaded: tuple[Any, Any], rows: list[dict[str, Any]], output: str, **options: Any) -> list[Any]:
    records = read(rows, "alpaca", name="records")
    score_records(*loaded, records, Path(output), **options)
    return [versions_of(record) for record in read(output, "alpaca")]


@pytest.mark.parametrize("name", ["vicuna", "alpaca", "wiz"])
@pytest.mark.parametrize("limit", [512, 64])
def test_all_four_losses_are_those_of_the_published_scorer(loaded: tuple[Any, Any], name: str, limit: int) -> None:
    rows = reflected(4)
    cut = 0
    for record, versions in zip(
        read(rows, name="r"), scored(loaded, rows, "out.jsonl", template=name, max_length=limit)
    ):
        for version in versions.values():
            wanted = expected(*loaded, version.example(record.examples[-1]), name, limit)
            cut += 4 - len(wanted)
            for loss, count in wanted.items():
                total, tokens = getattr(version, loss), getattr(version, loss.replace("loss", "tokens"))
                assert tokens == count[1]
                assert total / tokens == pytest.approx(count[0] / count[1], abs=1e-5)
            assert version.ifd is not None or "loss_y_x" not in wanted
            assert (version.rifd is not None) == ("loss_x_y" in wanted)
            if version.ifd is not None:
                (a, n), (b, m) = wanted["loss_y_x"], wanted["loss_y"]
                assert version.ifd == pytest.approx(math.exp(a / n - b / m), rel=1e-4)
            if version.rifd is not None:
                (a, n), (b, m) = wanted["loss_x_y"], wanted["loss_x"]
                assert version.rifd == pytest.approx(math.exp(a / n - b / m), rel=1e-4)
            if limit == 512:
                assert version.score_status == "ok"
                assert not version.truncated
    assert (cut > 0) == (limit == 64)  # the reverse prompt alone is longer


def test_an_instruction_that_the_input_repeats_is_scored_whole(loaded: tuple[Any, Any]) -> None:
    """The published scorer looks for the last place of the instruction and misses what is before it: a difference."""
    row = {"instruction": "the value", "input": " of the value", "output": "a list"}
    ((versions),) = scored(loaded, [row], "out.jsonl")
    ori, tokenizer = versions["ori"], loaded[1]
    assert ori.tokens_x_y == len(tokenizer("the value of the value", add_special_tokens=False)["input_ids"])
    text = row["instruction"] + row["input"]
    published = len(tokenizer(text[text.rfind(row["instruction"]) :], add_special_tokens=False)["input_ids"])
    assert published < ori.tokens_x_y


def test_batches_and_processes_give_the_same_scores_and_selection(loaded: tuple[Any, Any]) -> None:
    rows = reflected(10)
    Path(policy := "open.yaml").write_text("bounds: {}\n")  # a random student finds little below 1
    ways: dict[str, dict[str, Any]] = {"alone": {"budget": 1}, "batched": {}, "large": {"budget": 4096}}
    found = {name: scored(loaded, rows, f"{name}.jsonl", **options) for name, options in ways.items()}
    for rank in (1, 0):
        told = score_records(*loaded, read(rows, "alpaca", name="r"), Path("shared.jsonl"), rank=rank, world=2)
        assert ("waiting_for_ranks" in told) == (rank == 1)
    found["shared"] = [versions_of(record) for record in read("shared.jsonl", "alpaca")]
    for name, versions in found.items():
        for one, other in zip(found["alone"], versions):
            for key in one:
                for loss in LOSSES:
                    a, b = getattr(one[key], loss), getattr(other[key], loss)
                    assert a == pytest.approx(b, abs=1e-5 * getattr(one[key], loss.replace("loss", "tokens"))), name
        said("select", f"{name}.jsonl", "--policy", policy, "-o", f"{name}.out.jsonl")
    texts = {name: [(r.id, r.data["output"]) for r in read(f"{name}.out.jsonl")] for name in found}
    assert len({str(text) for text in texts.values()}) == 1
    assert {record.data["reflection_version"] for record in read("alone.out.jsonl")} > {"ori"}


class Count:
    """Tokens that a model forwards."""

    def __init__(self, model: Any) -> None:
        self.tokens = 0
        self.handle = model.base_model.register_forward_pre_hook(self.add, with_kwargs=True)

    def add(self, module: Any, args: Any, kwargs: Any) -> None:
        self.tokens += kwargs["input_ids"].numel()


def test_what_versions_share_is_forwarded_once(loaded: tuple[Any, Any]) -> None:
    """Sixteen passes a record one by one, beside every distinct text once and what all prompts begin with once: a fifth
    less at least, counted at the model, on texts about as long as Alpaca's."""
    rows = reflected(8)
    for row in rows:
        for text in (row, *(row["reflection"][name] for name in ("Q", "A", "QA"))):
            key = "output" if "output" in text else "answer"
            text[key] = " ".join([text[key]] * 4)  # about 45 words
        row["reflection"]["ori"]["answer"] = row["output"]
    model, tokenizer = loaded
    counted = Count(model)
    with torch.inference_mode():
        for record in read(rows, name="r"):
            for version in versions_of(record).values():
                expected(model, tokenizer, version.example(record.examples[-1]), "vicuna", 512)
    alone, counted.tokens = counted.tokens, 0
    told = score_records(model, tokenizer, read(rows, "alpaca", name="r"), Path("out.jsonl"), budget=1)
    counted.handle.remove()
    about = json.loads(Path("out.jsonl.manifest.json").read_text())
    assert told["forwarded"] == about["segments"] <= 14 * 8
    checked = counted.tokens - about["forwarded_tokens"]  # the way of forwarding is tried on a few cut texts first
    assert 0 <= checked < 3000
    assert about["forwarded_tokens"] < 0.8 * alone


def out_of_memory(limit: int, poison: int) -> Callable[..., Any]:
    real = Losses.__call__

    def call(self: Losses, segments: Any, *parts: Any) -> Any:
        if len(segments) > limit or any(poison in list(s.ids) for s in segments):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, segments, *parts)

    return call


def test_memory_that_runs_out_costs_the_record_and_never_looks_like_a_score(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, student: Path
) -> None:
    rows = reflected(6)
    rows[2]["reflection"]["A"]["answer"] = "zebra zebra zebra"
    poison = loaded[1](" zebra", add_special_tokens=False)["input_ids"][-1]
    whole = scored(loaded, rows, "whole.jsonl")
    monkeypatch.setattr(Losses, "check", lambda self, segments: None)
    monkeypatch.setattr(Losses, "__call__", out_of_memory(3, poison))
    with pytest.raises(Incomplete, match=r"3 losses could not be computed|losses could not be computed") as failure:
        score_records(*loaded, read(rows, "alpaca", name="r"), Path("out.jsonl"))
    assert failure.value.exit_code == 3
    versions = [versions_of(record) for record in read("out.jsonl", "alpaca")]
    bad = versions[2]["A"]
    assert (bad.ifd, bad.rifd) == (None, None)
    assert "failed" in str(bad.score_status)
    others = [v for at, one in enumerate(versions) for name, v in one.items() if (at, name) != (2, "A")]
    assert all(v.score_status == "ok" for v in others)
    assert versions[0]["QA"].rifd == pytest.approx(whole[0]["QA"].rifd, rel=1e-4)
    lines("rows.jsonl", rows)
    result = COMMAND.call("score", "rows.jsonl", "--student", student, "-o", "said.jsonl")
    assert result.exit_code == 3
    assert "could not be computed" in result.stderr
    Path("answers.yaml").write_text("instruction: {metric: ifd, margin: 1000}\nbounds: {rifd: [0, 1000]}\n")
    kept = said("select", "said.jsonl", "--policy", "answers.yaml", "-o", "kept.jsonl")
    assert kept["selected"] == 6
    assert kept["A"] < 6
    assert all("zebra" not in record.data["output"] for record in read("kept.jsonl"))


@pytest.mark.parametrize(
    ("instruction", "answer", "status"),
    [
        ("x", "", "empty_answer"), ("x", " \n\t", "empty_answer"), ("", "x", "empty_instruction"),
        (" ", "x", "empty_instruction"), ("the value", "the value", "ok"), ("the value", "a", "ok"),
        ("\ud800", "a", "failed"), ("the value", "of the list " * 30_000, "x: prompt_too_long"),
        ("is not in a list " * 3000, "a", "y: prompt_too_long"),
    ],
)  # fmt: skip
def test_any_text_has_a_status(loaded: tuple[Any, Any], instruction: str, answer: str, status: str) -> None:
    row = {"instruction": instruction, "output": answer}
    records = read([row], "alpaca", name="r")
    try:
        score_records(*loaded, records, Path("out.jsonl"))
    except Incomplete:
        assert status == "failed"
    ((versions),) = [versions_of(record) for record in read("out.jsonl", "alpaca")]
    assert status in str(versions["ori"].score_status)
    ratios = versions["ori"].ratios
    assert ratios is not None
    assert (ratios.known("ifd") is not None and ratios.known("rifd") is not None) == (status == "ok")


def test_published_files_are_read_and_written(server: Server, student: Path, loaded: tuple[Any, Any]) -> None:
    """Scores of files that hold one version each: the ratios are the quotients of what the files hold, exactly."""
    rows = reflected(5)
    lines("reflected.jsonl", rows)
    said("score", "reflected.jsonl", "--student", student, "-o", "scored.jsonl", "--original-jsonl", "published")
    plain = [{k: v for k, v in row.items() if not k.startswith("reflection")} for row in rows]
    lines("ori.jsonl", plain)
    for name in ("Q", "A", "QA"):
        made = [row["reflection"][name] for row in rows]
        lines(f"{name}.jsonl", [
            {"instruction": m["instruction"] or row["instruction"], "input": "" if m["instruction"] else row["input"],
             "output": m["answer"]} for m, row in zip(made, plain)
        ])  # fmt: skip
    text = Path("published/A.jsonl").read_text().splitlines()
    text[0] = '{"ppl": [NaN, 0, 0, 0], "loss": [0, 0, 0, 0]}'  # as a record that raised
    text[1] = "{}"
    Path("published/A.jsonl").write_text("\n".join(text) + "\n")
    given = [f"{name}={name}.jsonl" for name in ("Q", "A", "QA")]
    scores = [f"{name}=published/{name}.jsonl" for name in ("ori", "Q", "A", "QA")]
    options = [*(x for g in given for x in ("--version", g)), *(x for s in scores for x in ("--scores", s))]
    found = said("gather", "ori.jsonl", *options, "-o", "gathered.jsonl")
    assert (found["records"], found["versions"]) == (5, ["ori", "Q", "A", "QA"])
    own = [versions_of(record) for record in read("scored.jsonl", "alpaca")]
    for at, (record, versions) in enumerate(zip(read("gathered.jsonl", "alpaca"), own)):
        for name, version in versions_of(record).items():
            if name == "A" and at < 2:
                assert (version.ifd, version.rifd) == (None, None)
                assert version.score_status == ("failed", "empty_answer")[at]
                continue
            line = json.loads(Path(f"published/{name}.jsonl").read_text().splitlines()[at])
            (_, py, _, pyx), (px, _, pxy, _) = line["ppl"], line["ppl"]
            assert (version.ifd, version.rifd) == (pyx / py, pxy / px)
            assert version.ifd == pytest.approx(versions[name].ifd, rel=1e-12)
    assert "NaN" not in Path("gathered.jsonl").read_text()
    refused("give NAME=FILE", "gather", "ori.jsonl", "-o", "no.jsonl", "--version", "B=x")
    refused("does not exist", "gather", "ori.jsonl", "-o", "no.jsonl", "--scores", "ori=no.jsonl")
    Path("short.jsonl").write_text("\n".join(text[:3]) + "\n")
    refused("fewer lines", "gather", "ori.jsonl", "-o", "no.jsonl", "--scores", "ori=short.jsonl")
    Path("short.jsonl").write_text('{"ppl": [1, 2]}\n' * 5)
    refused(
        "is no line of the published scores", "gather", "ori.jsonl", "-o", "no.jsonl", "--scores", "ori=short.jsonl"
    )
    refused("has another instruction", "gather", "ori.jsonl", "-o", "no.jsonl", "--version", "A=Q.jsonl")
    assert ratio(math.nan, 1) is ratio(0, 1) is ratio(1, math.inf) is None


def test_the_loss_of_held_out_answers(student: Path, loaded: tuple[Any, Any]) -> None:
    """`eval`: the mean over tokens of what one plain forward at a time gives."""
    data = lines("heldout.jsonl", some_records(6))
    found = said("eval", student, "--data", data, "--template", "alpaca", "--dtype", "float32")
    sums = []
    with torch.inference_mode():
        for record in read(data):
            example = record.examples[-1]
            before = template("alpaca")(example)
            ids, start = loaded[1](before + example.response)["input_ids"], len(loaded[1](before)["input_ids"])
            sums.append((plain_loss(loaded[0], ids, start), len(ids) - start))
    total, count = (sum(part) for part in zip(*sums))
    assert (found["records"], found["tokens"]) == (6, count)
    assert found["loss"]["value"] == pytest.approx(total / count, rel=1e-5)
    assert found["loss"]["se"] > 0
    refused("no record of", "eval", student, "--data", data, "--max-length", 8)
