"""The command as its users see it: the whole way on a tiny model, and one clear line for every wrong request."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from commands import Command
from superfiltering.cli import app
from superfiltering.scores import read_scores
from superfiltering.selection import original_selection

pytestmark = [pytest.mark.usefixtures("room"), pytest.mark.filterwarnings("ignore:max_length 1024 is lowered")]
Talks = Callable[..., list[dict[str, Any]]]


COMMAND = Command(app)
call, said, refused = COMMAND.call, COMMAND.said, COMMAND.refused


def loaded(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in Path(path).read_text().splitlines()]


def without_scores(record: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in record.items() if k not in ("ifd_ppl", "ifd_loss", "ppl_A_direct", "ppl_A_condition")}


@pytest.fixture
def data(alpaca: Any, lines: Any) -> str:
    return str(lines("data.jsonl", alpaca(40)))


@pytest.fixture(scope="module")
def scored(weak: Path, alpaca: Any, lines: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores of `data`. Not to be written to."""
    folder = tmp_path_factory.mktemp("scored")
    path = folder / "scores.parquet"
    result = call("score", lines(folder / "data.jsonl", alpaca(40)), "--model", weak, "-o", path)
    assert result.exit_code == 0, result.output
    return path


def test_the_whole_way(data: str, weak: Path, strong: Path, alpaca: Any) -> None:
    first = said("score", data, "--model", weak, "-o", "weak.parquet", "--original-jsonl", "weak.jsonl")
    assert (first["records"], first["statuses"], first["from_journal"]) == (40, "40 ok", 0)
    said("score", data, "--model", strong, "-o", "strong.parquet", "--template", "alpaca", "--compat", "aligned",
         "--max-length", 64, "--budget", 256)  # fmt: skip
    settings = read_scores("strong.parquet").facts["settings"]
    assert [settings[k] for k in ("compat", "template", "max_length")] == ["aligned", "alpaca", 64]

    chosen = said("select", data, "--scores", "weak.parquet", "--max", 0, "--top", "30%", "-o", "best.jsonl")
    scores = read_scores("weak.parquet").ifd_ppl
    wanted = original_selection(scores, 0.3, threshold=float("inf")).tolist()
    best = loaded("best.jsonl")
    assert [without_scores(record) for record in best] == [alpaca(40)[k] for k in wanted]
    assert list(best[0]) == [*alpaca(40)[0], "ifd_ppl", "ifd_loss", "ppl_A_direct", "ppl_A_condition"]
    assert [record["ifd_ppl"] for record in best] == scores[wanted].tolist()
    assert (chosen["chosen"], chosen["asked"], chosen["records"]) == (12, 12, 40)
    assert chosen["dropped"] == [{"reason": "ranked lower", "records": 28}]

    spread = said(
        "diversify", "best.jsonl", "--top-n", 4, "--encoder", weak, "-o", "diverse.jsonl", "--curve", "c.json"
    )
    assert spread["chosen"] == len(loaded("diverse.jsonl")) == 4
    assert all(record in best for record in loaded("diverse.jsonl"))
    gains = json.loads(Path("c.json").read_text())["gains"]
    assert gains == sorted(gains, reverse=True)

    told = said("stats", "weak.parquet", "-o", "stats.json")
    whole = json.loads(Path("stats.json").read_text(), parse_constant=pytest.fail)
    assert told["scored"] == whole["scored"] == 40
    assert whole["run"]["model_name"] == str(weak)
    assert said("view", data, "--scores", "weak.parquet", "--selected", "best.jsonl")["records"] == 40
    assert said("eval", weak, "--data", "best.jsonl", "--max-length", 128, "-o", "eval.json")["loss"]["value"] > 0
    assert json.loads(Path("eval.json").read_text())["records"] == 12


def test_a_filter_agrees_with_itself_and_with_another_by_chance(data: str, scored: Path, strong: Path) -> None:
    found = said("compare", scored, scored, "--resamples", 50)
    assert [found[k] for k in ("spearman", "spearman_low", "spearman_high")] == [1.0, 1.0, 1.0]
    assert {row["overlap"] for row in found["overlaps"] if row["overlap"] is not None} <= {1.0}
    assert (found["only_first"], found["only_second"]) == (0, 0)
    said("score", data, "--model", strong, "-o", "strong.parquet")
    other = said("compare", scored, "strong.parquet", "--by", "ifd_loss", "--resamples", 200)
    assert other["spearman_low"] < other["spearman"] < other["spearman_high"] < 1


def test_compare_has_overlaps_where_scores_are_below_1(lines: Any) -> None:
    shown = [{"ppl": [0, 10.0, 0, 1.0 + k % 9 + k / 100], "loss": [0, 2.0, 0, 1.0]} for k in range(40)]
    found = said("compare", lines("a.jsonl", shown), lines("b.jsonl", shown), "--resamples", 20)
    assert [(row["records"], row["in both"], row["overlap"]) for row in found["overlaps"]] == [
        (2, 2, 1.0), (4, 4, 1.0), (6, 6, 1.0),
    ]  # fmt: skip


@pytest.mark.parametrize("key", ["conversations", "messages"])
def test_conversations_keep_their_shape(key: str, talks: Talks, lines: Any, weak: Path) -> None:
    data = lines("talks.jsonl", talks(12, key))
    said("run", data, "--model", weak, "-o", "out", "--top", "50%", "--diverse", "25%", "--encoder", weak)
    scores = [json.loads(line) for line in Path("out/selected.jsonl").read_text().splitlines()]
    by_id = {row["id"]: row for row in talks(12, key)}
    assert all(record[key] == by_id[record["id"]][key] for record in scores)
    assert all(record["ifd_ppl"] < 1 for record in scores)
    for how in ("min", "token-weighted", "last"):
        said(
            "select",
            data,
            "--scores",
            "out/scores.parquet",
            "--turns",
            how,
            "--top-n",
            2,
            "--max",
            0,
            "-o",
            f"{how}.jsonl",
        )
        values = read_scores("out/scores.parquet", how).ifd_ppl  # type: ignore[arg-type]
        assert [int(r["id"].split("-")[1]) for r in loaded(f"{how}.jsonl")] == original_selection(
            values, 1.0, threshold=float("inf")
        ).tolist()[:2]


@pytest.mark.parametrize("name", ["out.json", "out.jsonl.gz", "out.parquet"])
def test_formats_and_bare_records(name: str, data: str, scored: Path, alpaca: Any) -> None:
    said("select", data, "--scores", scored, "--top-n", 5, "--max", 0, "--bare", "-o", name)
    wanted = original_selection(read_scores(scored).ifd_ppl, 0.125, threshold=float("inf")).tolist()
    path = Path(name)
    if path.suffix == ".parquet":
        written = pq.read_table(path).to_pylist()
    elif path.suffix == ".gz":
        written = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    else:
        written = json.loads(path.read_text())
    assert written == [alpaca(40)[k] for k in wanted]


def test_shares_groups_and_too_few(data: str, scored: Path, lines: Any, alpaca: Any) -> None:
    found = said("select", data, "--scores", scored, "--group-by", "topic", "--top", "20%", "--max", 0, "-o", "g.jsonl")
    assert found["groups"] == [{"group": g, "records": 20, "asked": 4, "survivors": 20, "chosen": 4} for g in "ab"]
    assert sorted(record["topic"] for record in loaded("g.jsonl")) == list("aaaabbbb")
    few = lines("few.jsonl", [{**r, "ifd_ppl": v} for r, v in zip(alpaca(4), (0.5, None, 1.0, 0.9))])
    short = said("select", few, "--top-n", 3, "-o", "few-out.jsonl")
    assert "1 fewer than asked for: only 2" in short["warning"]
    result = call("select", few, "--top-n", 3, "-o", "strict.jsonl", "--strict", "--json")
    assert result.exit_code == 3
    assert "--strict" in result.stderr
    assert json.loads(result.stdout)["chosen"] == len(loaded("strict.jsonl")) == 2
    assert call("select", few, "--top-n", 2, "-o", "enough.jsonl", "--strict").exit_code == 0
    seven = lines("seven.jsonl", [{**r, "ifd_ppl": 0.5} for r in alpaca(7)])
    refused("10% of 7 records, rounded down, is no record at all: at least 10", "select", seven, "--top", "10%")
    refused("has no 'subject' to group by", "select", data, "--scores", scored, "--group-by", "subject")


def test_original_scores_are_read_and_a_failure_is_never_chosen(data: str) -> None:
    good = '{"ppl": [0, 2.0, 0, 1.0], "loss": [0, 0.7, 0, 0.1]}\n'
    failed, none = good.replace("1.0", "0").replace("2.0", "0"), good.replace("1.0", "NaN")
    Path("o.jsonl").write_text(failed + none + good * 38)
    found = said("select", data, "--scores", "o.jsonl", "--top-n", 40, "-o", "out.jsonl")
    assert found["survivors"] == 38
    assert found["dropped"] == [{"reason": "no score", "records": 2}]
    Path("o.jsonl").write_text(good)
    refused("o.jsonl has 1 lines, data.jsonl 40 records", "select", data, "--scores", "o.jsonl", "-o", "new.jsonl")


def test_run_marks_what_it_chose_and_goes_on_from_its_scores(data: str, weak: Path, alpaca: Any) -> None:
    options = ("run", data, "--model", weak, "--top", "20%", "--max-length", 64, "-o", "out")
    said(*options)
    scores, first = read_scores("out/scores.parquet"), Path("out/scores.parquet").stat().st_mtime_ns
    below = int((scores.ifd_ppl < 1).sum())
    best = loaded("out/selected.jsonl")
    assert len(best) == min(8, below) > 0
    said(*options)
    assert Path("out/scores.parquet").stat().st_mtime_ns == first
    for name, value in (("template", "alpaca"), ("compat", "aligned"), ("max-length", "32"), ("dtype", "bfloat16")):
        refused(f"was made with {name.replace('-', '_')} ", *options, f"--{name}", value)
    said(*options, "--template", "alpaca", "--overwrite")
    assert read_scores("out/scores.parquet").facts["settings"]["template"] == "alpaca"
    rows = alpaca(40)
    rows[5]["output"] = "changed"
    Path(data).write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused("the texts of record 5", *options, "--template", "alpaca")


BAD: dict[str, tuple[bytes, str]] = {
    "torn": (b'{"instruction": "a", "output": \n', "bad.jsonl, line 2, column"),
    "bytes": (b'{"instruction": "caf\xe9", "output": "b"}\n', "line 2"),
    "missing key": (b'{"id": "x", "instruction": "a"}\n', 'id "x", key "output": is missing'),
    "no text": (b'{"instruction": "a", "output": 3}\n', 'key "output": is a number, must be a string'),
    "no object": (b'["a"]\n', "must be an object"),
    "same id": (b'{"id": "0", "instruction": "a", "output": "b"}\n', "ids that more than one record bears"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_record_stops_before_the_model_or_is_set_aside(case: str, weak: Path) -> None:
    good = b'{"id": "%d", "instruction": "the value", "output": "is returned as a list"}\n'
    text, message = BAD[case]
    Path("bad.jsonl").write_bytes(good % 0 + text + good % 2 + good % 3)
    refused(message, "score", "bad.jsonl", "--model", "./nowhere")
    found = said("score", "bad.jsonl", "--model", weak, "--on-bad-record", "skip", "--rejects", "r.jsonl")
    assert (found["records"], found["bad_records"]) == (3, 1)
    assert [reject["line"] for reject in loaded("r.jsonl")] == [2]
    skip = ("--on-bad-record", "skip", "--rejects", "again.jsonl")
    chosen = said("select", "bad.jsonl", "--scores", "scores.parquet", "--top-n", 3, "--max", 0, *skip)
    assert [r["id"] for r in sorted(loaded("selected.jsonl"), key=lambda r: r["id"])] == ["0", "2", "3"]
    assert chosen["bad_records"] == 1


def test_wrong_requests(data: str, scored: Path, weak: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("empty.jsonl").write_text("")
    Path("array.json").write_text('[{"instruction": "a", "output": "b"}, {"instruction": "c"')
    Path("strange.csv").write_text("a,b")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    score = ("score", data, "--model", weak)
    refused("empty.jsonl is empty", "score", "empty.jsonl", "--model", weak)
    refused("array.json", "score", "array.json", "--model", weak)
    refused("known by its name", "score", "strange.csv", "--model", weak)
    refused("missing.jsonl does not exist", "score", "missing.jsonl", "--model", weak)
    refused("no folder ./nowhere", "score", data, "--model", "./nowhere")
    refused("the hub cannot be reached", "score", data, "--model", "owner/no-such-model")
    refused("no template 'alpac'", "score", data, "--model", "./nowhere", "--template", "alpac")
    refused("no compat 'orginal'", "score", data, "--model", "./nowhere", "--compat", "orginal")
    shutil.copytree(weak, "plain", ignore=shutil.ignore_patterns("chat_template*"))
    config = json.loads(Path("plain/tokenizer_config.json").read_text())
    Path("plain/tokenizer_config.json").write_text(json.dumps({**config, "chat_template": None}))
    refused("needs a tokenizer with a chat template", "score", data, "--model", "plain", "--template", "chat")
    refused("budget 'many'", *score, "--budget", "many")
    refused("schema 'alpacca' is none of", *score, "--schema", "alpacca")
    refused("dtype 'int3' is not accepted", *score, "--dtype", "int3")
    select = ("select", data, "--scores", scored, "-o", "new.jsonl")
    refused("no score 'ifd'; choose one of ifd_ppl, ifd_loss", *select, "--by", "ifd")
    refused("unknown aggregation of turns 'first'", *select, "--turns", "first")
    refused("give one of the two", *select, "--top", "10%", "--top-n", 3)
    refused("'ten' is no number", *select, "--top", "ten")
    refused("a share of 'some'", *select, "--of", "some")
    refused("has 'ifd_ppl'; score them first", "select", data, "-o", "new.jsonl")
    refused("gone.parquet does not exist", "stats", "gone.parquet")
    refused("one of them", "diversify", data, "--encoder", weak)
    refused("less than one", "diversify", data, "--encoder", weak, "--top", "1%")
    refused("cannot choose 41 of 40", "diversify", data, "--encoder", weak, "--top-n", 41)
    refused("unknown text 'answers'", "diversify", data, "--encoder", weak, "--top-n", 3, "--text", "answers")
    refused("0.5% of 40 records is less than one", "run", data, "--model", "./nowhere", "--top", "0.5%")
    refused("no record of data.jsonl has an answer within 2 tokens", "eval", weak, "--data", data, "--max-length", 2)
    refused("No such option: --modle", "score", data, "--modle", weak)


def test_what_exists_is_kept(data: str, scored: Path, weak: Path) -> None:
    mine = ("scores.parquet", "selected.jsonl", "diverse.jsonl", "scores.html", "o.jsonl", "report.json", "curve.json")
    for name in mine:
        Path(name).write_text("mine")
    kept = "exists already"
    refused(kept, "score", data, "--model", weak)
    refused(kept, "score", data, "--model", weak, "-o", "new.parquet", "--original-jsonl", "o.jsonl")
    refused(kept, "select", data, "--scores", scored)
    refused(kept, "diversify", data, "--encoder", weak, "--top-n", 2)
    refused(kept, "diversify", data, "--encoder", weak, "--top-n", 2, "-o", "new.jsonl", "--curve", "curve.json")
    refused(kept, "view", data, "--scores", scored)
    refused(kept, "stats", scored, "-o", "report.json")
    refused(kept, "eval", weak, "--data", data, "-o", "report.json")
    refused(kept, "bench", "-o", "report.json")
    assert {Path(name).read_text() for name in mine} == {"mine"}
    said("select", data, "--scores", scored, "--overwrite")
    assert len(loaded("selected.jsonl")) == min(4, int((read_scores(scored).ifd_ppl < 1).sum()))


@pytest.mark.parametrize("output", ["file/scores.parquet", "/proc/scores.parquet"])
def test_an_output_that_cannot_be_is_told_before_the_model(output: str, data: str) -> None:
    if output.startswith("/proc") and not Path("/proc").is_dir():
        pytest.skip("needs /proc, a folder in which nothing can be made")
    Path("file").write_text("")
    refused("cannot write to", "score", data, "--model", "./nowhere", "-o", output)
    refused("cannot write to", "score", data, "--model", "./nowhere", "--original-jsonl", output)


def test_only_the_first_records(data: str, weak: Path) -> None:
    assert said("score", data, "--model", weak, "--limit", 5)["records"] == 5
    refused("record 5 has id 5, its score id none", "select", data, "--scores", "scores.parquet")


def test_a_warm_start_is_not_chosen_again(data: str, weak: Path, alpaca: Any, lines: Any) -> None:
    given = lines("given.jsonl", alpaca(40)[7:9])
    said("diversify", data, "--encoder", weak, "--top-n", 6, "--given", given)
    chosen = loaded("diverse.jsonl")
    assert len(chosen) == 6
    assert not [record for record in chosen if record in alpaca(40)[7:9]]
    refused("record 0 of other.jsonl is not in data.jsonl", "diversify", data, "--encoder", weak, "--top-n", 6,
            "--given", lines("other.jsonl", [{"instruction": "a", "output": "b"}]), "-o", "new.jsonl")  # fmt: skip


def test_options_come_from_a_file_and_the_line_wins(data: str, scored: Path) -> None:
    Path("select.yaml").write_text("top-n: 3\nmax: 0\n")
    options = ("select", data, "--scores", scored, "--config", "select.yaml")
    assert said(*options)["chosen"] == 3
    assert said(*options, "--top-n", 2, "-o", "other.jsonl")["chosen"] == 2
    Path("wrong.yaml").write_text("topp: 10%\n")
    refused("unknown key 'topp'", "select", data, "--config", "wrong.yaml")


def test_a_broken_checkpoint_is_one_line(data: str, weak: Path) -> None:
    shutil.copytree(weak, "cut")
    with open("cut/model.safetensors", "r+b") as file:
        file.truncate(Path("cut/model.safetensors").stat().st_size - 100)
    refused("is truncated", "score", data, "--model", "cut")
