"""The command as its users see it, against a server that can be made to fail."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from commands import Command
from llm_server import Server, answer, refusal
from realign.cli import app
from realign.taxonomy import load_taxonomy
from rewriters import response_of, revised, rewriting

from instruct_data import read

COMMAND = Command(app)
call, said, refused = COMMAND.call, COMMAND.said, COMMAND.refused


def rows_of(path: str | Path) -> list[dict[str, Any]]:
    return [record.data for record in read(str(path))]


def lines(path: str, rows: list[dict[str, Any]]) -> str:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def simple(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"id": n, "instruction": f"What is {n}?", "output": f"It is {n}.", "category": "closed_qa", **more}
            for n in range(count)]  # fmt: skip


def test_all_46_tasks_end_to_end(mixed: Path, server: Server) -> None:
    found = said("run", mixed, "--base-url", server.url, "--model", "fake", "-o", "out.json", "--filters", "alpaca")
    before, after = rows_of(mixed), rows_of("out.json")
    tasks = load_taxonomy().tasks
    assert [row["id"] for row in after] == [row["id"] for row in before]
    for old, new in zip(before, after):
        rewritten = tasks[old["category"]].rewrite
        assert new["realign_category"] == old["category"]
        assert new["realign_status"] == ("rewrite" if rewritten else "original")
        if rewritten:
            assert new["output"] == f"In short:\n- {old['output']}\nThat is all."
            assert new["realign_original"] == old["output"]
            assert len(new["realign_request_key"]) == 64
        else:
            assert {k: new[k] for k in old} == old
            assert new["realign_reason"] == "not_rewritten"
    assert (found["records"], found["rewritten"], found["requests"]) == (46, 35, 71)  # two replies each, and the probe
    manifest = json.loads(Path("out.json.manifest.json").read_text())
    assert manifest["outcomes"] == {"rewrite": 35, "not_rewritten": 11}
    assert server.calls[1].json["response_format"]["type"] == "json_schema"
    sent = len(server.calls)
    again = said("run", mixed, "--base-url", server.url, "--model", "fake", "-o", "out.json", "--filters", "alpaca",
                 "--overwrite")  # fmt: skip
    assert (again["requests"], len(server.calls)) == (0, sent)
    assert rows_of("out.json") == after


def test_prompts_hold_question_answer_format_and_evidence(server: Server) -> None:
    corpus = [{"text": "Canberra is the capital of Australia.", "url": "http://a"}, {"text": "Sheep eat grass."}]
    lines("corpus.jsonl", corpus)
    rows = [{"instruction": "What is the capital of Australia?", "output": "Sydney", "category": "open_qa"}]
    out = said("run", lines("one.jsonl", rows), "--base-url", server.url, "--retriever", "corpus.jsonl", "-n", 1,
               "--filters", "none", "--structured", "labels", "--no-adaptive", "-o", "out.jsonl")  # fmt: skip
    assert out["rewritten"] == 1
    system, user = (m["content"] for m in server.calls[0].json["messages"])
    assert "[question starts]\nWhat is the capital of Australia?\n[question ends]" in user
    assert "[evidence starts]\n1. Canberra is the capital of Australia.\n[evidence ends]" in user
    assert load_taxonomy()["open_qa"].format in user
    assert "Revised response:" in system
    assert "judge whether the format suits" not in system
    assert "response_format" not in server.calls[0].json
    assert rows_of("out.jsonl")[0]["realign_evidence"] == ["Canberra is the capital of Australia."]


def test_an_endpoint_without_schemas_is_asked_by_labels(server: Server) -> None:
    def script(found: Any) -> Any:
        if "response_format" in found.json:
            return answer("Of course! Here it is.")
        return answer(f"Reasoning: it fits\nRevised response: Well: {response_of(found)}")

    server.script = script
    lines("in.jsonl", simple(3))
    assert said("run", "in.jsonl", "--base-url", server.url, "-o", "out.jsonl")["rewritten"] == 3
    assert rows_of("out.jsonl")[2]["output"] == "Well: It is 2."


@pytest.mark.parametrize(
    ("text", "finish", "reason"),
    [
        ("no labels at all", "stop", "parse_failed"), (revised("cut"), "length", "truncated"),
        (revised("It is 0."), "stop", "unchanged"), (revised("Something else.", suitable=False), "stop", "unsuitable"),
        (revised("x"), "stop", "rejected"),
    ],
)  # fmt: skip
def test_the_original_stays_with_its_reason(server: Server, text: str, finish: str, reason: str) -> None:
    server.script = lambda found: answer(text, finish=finish)
    lines("in.jsonl", simple(1))
    found = said("run", "in.jsonl", "--base-url", server.url, "--structured", "labels", "-o", "out.jsonl", "-n", 1)
    (row,) = rows_of("out.jsonl")
    assert (row["output"], row["realign_status"], row["realign_reason"]) == ("It is 0.", "original", reason)
    assert found["why_original"] == [{"reason": reason, "records": 1}]
    assert len(server.calls) == (2 if reason == "parse_failed" else 1)  # asked once more
    assert (row["realign_reject_reason"] or "").startswith("length" if reason == "rejected" else "")


def test_the_longest_survivor_is_taken(server: Server) -> None:
    texts = {"a": ["It is 0, briefly.", "It is 0, and it says so at some length.", "It is 0 ```code``` " * 9]}
    server.script = lambda found: answer(revised(texts["a"][found.times - 1]))
    lines("in.jsonl", simple(1))
    arguments = ("run", "in.jsonl", "--base-url", server.url, "--structured", "labels", "-n", 3, "--concurrency", 1)
    for select, journal in (("filter-then-longest", "j1"), ("longest", "j2"), ("first", "j3")):
        server.bodies.clear()
        said(*arguments, "--filters", "alpaca", "--select", select, "-o", f"{select}.jsonl", "--journal", journal)
    assert rows_of("filter-then-longest.jsonl")[0]["output"] == texts["a"][1]
    assert rows_of("longest.jsonl")[0]["realign_reject_reason"] == "code: added"
    assert rows_of("first.jsonl")[0]["output"] == texts["a"][0]


def test_every_form_goes_in_and_out_and_nothing_is_lost(server: Server) -> None:
    talk = [("human", "Hi"), ("gpt", "Hello"), ("human", "What is 1?"), ("gpt", "One.")]
    forms: dict[str, dict[str, Any]] = {
        "alpaca": {"x": [1, {"y": None}], "instruction": "1?", "input": "", "output": "One.", "category": "open_qa"},
        "items": {"id": 7, "items": [{"from": w, "value": t, "category": "open_qa"} for w, t in talk]},
        "sharegpt": {"conversations": [{"from": w, "value": t} for w, t in talk], "category": "open_qa"},
        "messages": {"messages": [{"role": "user" if w == "human" else "assistant", "content": t} for w, t in talk],
                     "category": "open_qa"},
        "instances": {"instruction": "1?", "instances": [{"input": "", "output": "One."}], "category": "open_qa"},
    }  # fmt: skip
    for name, row in forms.items():
        lines(f"{name}.jsonl", [row])
        options = ("--base-url", server.url, "--filters", "none", "--bare", "--journal", "journal")
        said("run", f"{name}.jsonl", "-o", f"{name}.new.jsonl", *options)
        (record,) = read(f"{name}.new.jsonl", name)
        assert record.examples[-1].response.startswith("In short:")
        kept = said("run", f"{name}.jsonl", "-o", f"{name}.kept.jsonl", *options, "--turns", "none")
        if name not in ("alpaca", "instances"):
            assert kept["rewritten"] == 0
            assert Path(f"{name}.kept.jsonl").read_bytes() == Path(f"{name}.jsonl").read_bytes()
    assert "User: Hi\nAssistant: Hello" in server.calls[-1].json["messages"][1]["content"]


def test_parquet_and_lines_hold_the_same_rows(mixed: Path, server: Server) -> None:
    for suffix in ("jsonl", "parquet", "jsonl.gz"):
        said("run", mixed, "--base-url", server.url, "-o", f"out.{suffix}", "--journal", "journal")
    assert rows_of("out.parquet") == rows_of("out.jsonl") == rows_of("out.jsonl.gz")
    assert gzip.decompress(Path("out.jsonl.gz").read_bytes()) == Path("out.jsonl").read_bytes()


def test_bad_input_is_named_before_anything_is_sent(server: Server) -> None:
    run = ("run", "in.jsonl", "--base-url", server.url)
    good = json.dumps(simple(1)[0])
    for text, message in [
        (good + '\n{"instruction": \n', "in.jsonl, line 2, column"), ("", "is empty"), ("\n\n", "holds no record"),
        (good + '\n{"id": 3, "output": "x"}\n', 'key "instruction": is missing'),
        (good + '\n{"id": 3, "instruction": "x", "output": 5}\n', 'key "output": is a number'),
        (good + "\n" + good + "\n", "ids that more than one record bears"),
    ]:  # fmt: skip
        Path("in.jsonl").write_text(text)
        refused(message, *run)
    Path("in.jsonl").write_bytes(good.encode() + b'\n{"instruction": "\xff", "output": "a"}\n')
    refused("byte", *run)
    Path("in.json").write_text(
        json.dumps([{"items": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]}])
    )
    refused("out of turn", "run", "in.json", "--base-url", server.url)
    assert not server.calls
    Path("in.jsonl").write_text(good + '\n{"instruction": \n')
    found = said(*run, "--on-bad-record", "skip", "--rejects", "bad.jsonl", "-o", "ok.jsonl")
    assert found["records"] == 1
    assert json.loads(Path("bad.jsonl").read_text())["line"] == 2
    Path("in.jsonl").write_bytes(b"\xef\xbb\xbf" + (good + "\n" + good + "\n").encode())
    assert said(*run, "--reid", "-o", "ids.jsonl")["records"] == 2
    assert [row["id"] for row in rows_of("ids.jsonl")] == [0, 1]
    empty = lines("empty.jsonl", [{"instruction": "q", "output": " ", "category": "open_qa"}])
    assert said("run", empty, "--base-url", server.url, "-o", "e.jsonl")["why_original"][0]["reason"] == "empty"


def test_a_wrong_request_is_one_line(mixed: Path, server: Server) -> None:
    for message, *options in [
        ("unknown filter 'lenght'", "--filters", "lenght"), ("select 'best'", "--select", "best"),
        ("PART/OF", "--shard", "3/2"), ("backend 'none'", "--backend", "none"), ("turns 'some'", "--turns", "some"),
        ("structured 'xml'", "--structured", "xml"), ("fsync 'never'", "--fsync", "never"),
        ("cannot read", "--prices", "no.yaml"), ("no task classifier", "--classifier", "no.npz"),
        ("does not exist", "--retriever", "no.jsonl"),
    ]:  # fmt: skip
        refused(message, "run", mixed, "--base-url", server.url, *options)
    assert not server.calls
    Path("there.jsonl").write_text("mine")
    refused("exists already", "run", mixed, "-o", "there.jsonl")


def test_a_refused_key_ends_the_run_and_is_shown_nowhere(mixed: Path, server: Server, monkeypatch: Any) -> None:
    secret = "sk-secret-0123"
    monkeypatch.setenv("MY_KEY", secret)
    server.script = lambda found: refusal(401, f"bad key {secret}")
    result = call("run", mixed, "--base-url", server.url, "--api-key-env", "MY_KEY", "--json")
    assert result.exit_code == 5
    assert "refuses to serve" in result.stderr
    assert server.calls[0].headers["authorization"] == f"Bearer {secret}"
    assert len(server.calls) == 1  # the probe alone
    server.script = rewriting
    said("run", mixed, "--base-url", server.url, "--api-key-env", "MY_KEY")
    assert secret not in result.output + result.stderr
    for file in Path().rglob("*"):
        assert not file.is_file() or secret.encode() not in file.read_bytes()


def test_a_budget_ends_the_run_and_a_higher_one_goes_on(mixed: Path, server: Server) -> None:
    Path("prices.yaml").write_text("fake: {prompt: 100000, completion: 200000}\n")  # 2 for each reply
    run = ("run", mixed, "--base-url", server.url, "--model", "fake", "--prices", "prices.yaml", "--concurrency", 4)
    result = call(*run, "--max-cost", 20)
    assert result.exit_code == 4
    assert "the limit of 20 cost is reached" in result.stderr
    assert 10 <= len(server.calls) <= 14
    assert not Path("realigned.jsonl").exists()
    done = said(*run)
    assert done["requests"] == len(server.calls) - done["from_journal"] or len(server.calls) == 71
    account = {row["stage"]: row for row in done["account"]}
    assert account["rewrite"]["cost"] == pytest.approx(2 * account["rewrite"]["replies"])
    dry = said("run", mixed, "--dry-run", "--model", "fake", "--prices", "prices.yaml", "-o", "dry.jsonl")
    assert dry["requests"] == 70
    assert dry["cost_about"] > 0
    assert len(server.calls) == 71


def test_parts_and_their_merge_are_the_run_in_one_piece(mixed: Path, server: Server) -> None:
    run = ("run", mixed, "--base-url", server.url, "--model", "fake")
    said(*run, "-o", "whole.jsonl", "--journal", "j0")
    for part in (1, 2):
        said(*run, "--shard", f"{part}/2", "-o", f"part{part}.jsonl", "--journal", f"j{part}")
    assert said("merge", mixed, "part2.jsonl", "part1.jsonl", "-o", "merged.jsonl")["records"] == 46
    assert Path("merged.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    refused("parts are missing: 2/2", "merge", mixed, "part1.jsonl", "-o", "no.jsonl")
    said(*run, "--shard", "2/2", "-o", "foreign.jsonl", "--journal", "j2", "--temperature", "0.9")
    refused("recipe", "merge", mixed, "part1.jsonl", "foreign.jsonl", "-o", "no.jsonl")
    refused("does not exist", "merge", mixed, "part1.jsonl", "absent.jsonl", "-o", "no.jsonl")


def test_the_steps_one_by_one(server: Server) -> None:
    lines("corpus.jsonl", [{"text": "Bees dance."}, {"text": "Cows eat grass."}])
    lines("in.jsonl", [{"instruction": "Verify whether the claim is true: bees dance", "output": "Yes, bees dance."},
                       {"instruction": "Write a poem about bees", "output": "Bees, bees."}])  # fmt: skip
    base = ("--base-url", server.url)
    tasks = said("classify", "in.jsonl", "-o", "1.jsonl")["tasks"]
    assert {row["task"] for row in tasks} == {"fact_verification", "poem_generation"}
    assert rows_of("1.jsonl")[0]["realign_category_score"] > 0.1
    assert said("retrieve", "1.jsonl", "--retriever", "corpus.jsonl", "-o", "2.jsonl")["supported"] == 1
    assert [row["realign_evidence"] for row in rows_of("2.jsonl")] == [["Bees dance."], None]
    assert said("rewrite", "2.jsonl", *base, "-o", "3.jsonl")["rewritten"] == 1
    assert said("filter", "3.jsonl", "--filters", "alpaca", "-o", "4.jsonl")["rewritten"] == 1
    assert rows_of("4.jsonl") == rows_of("3.jsonl")
    row = rows_of("3.jsonl")[0]
    lines("long.jsonl", [{**row, "realign_original": "word " * 99}])
    assert said("filter", "long.jsonl", "--filters", "alpaca", "-o", "5.jsonl")["rewritten"] == 0
    (back,) = rows_of("5.jsonl")
    assert (back["output"], back["realign_status"], back["realign_original"]) == ("word " * 99, "original", None)
    found = said("stats", "3.jsonl")
    assert found["outcomes"] == [{"outcome": "rewrite", "answers": 1}, {"outcome": "not_rewritten", "answers": 1}]
    assert said("view", "3.jsonl", "-o", "page.html")["rewritten"] == 1
    assert said("export", "3.jsonl", "-o", "sft.jsonl")["records"] == 2
    assert said("export", "3.jsonl", "--form", "preference", "-o", "dpo.jsonl")["records"] == 1
    pair = json.loads(Path("dpo.jsonl").read_text())
    assert pair["chosen"][0]["content"].startswith("In short")
    assert pair["rejected"] == [{"role": "assistant", "content": "Yes, bees dance."}]
    refused("has no realign_status", "stats", "in.jsonl")
    refused("form 'ppo'", "export", "3.jsonl", "--form", "ppo", "-o", "x.jsonl")
    refused("retrieve needs --retriever", "retrieve", "1.jsonl", "-o", "x.jsonl")


def test_classification_by_a_model_admits_no_other_name(server: Server) -> None:
    names = iter(['{"task": "open_qa"}', "Open QA", "something else", '{"task": "nonsense"}'])
    server.script = lambda found: answer(next(names))
    lines("in.jsonl", [{"instruction": f"question {n}", "output": "a"} for n in range(4)])
    options = ("--classifier", "model", "--model", "fake", "--structured", "schema", "--concurrency", 1)
    found = said("classify", "in.jsonl", "-o", "1.jsonl", "--base-url", server.url, *options)
    assert [row["realign_category"] for row in rows_of("1.jsonl")] == ["open_qa", "open_qa", "default", "default"]
    assert found["fallbacks"] == 2
    schema = server.calls[0].json["response_format"]["json_schema"]["schema"]
    assert len(schema["properties"]["task"]["enum"]) == 46
    assert server.calls[0].json["temperature"] == 0
    assert server.calls[0].json["max_tokens"] == 50
