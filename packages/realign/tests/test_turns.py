"""All answers of a conversation, and candidates by one request: each written, counted, filtered and shown by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import Command
from llm_server import Answer, Call, Server, answer
from realign.cli import app
from rewriters import response_of, revised

from instruct_data import read

COMMAND = Command(app)
said, refused = COMMAND.said, COMMAND.refused
QUESTIONS = (
    "Write a poem about bees",
    "Verify whether the claim is true: bees can dance",
    "Verify whether it is true: no",
)
ANSWERS = ("Bees, bees.", "Yes, bees dance.", "No, it is not.")
WORDS = {"sharegpt": ("conversations", "from", "value", "human", "gpt"),
         "messages": ("messages", "role", "content", "user", "assistant")}  # fmt: skip


def talk(form: str = "messages", count: int = 3, **more: Any) -> dict[str, Any]:
    key, who, text, user, assistant = WORDS[form]
    turns = [
        turn for q, a in zip(QUESTIONS[:count], ANSWERS) for turn in ({who: user, text: q}, {who: assistant, text: a})
    ]
    return {"id": 5, key: turns, **more}


def lines(path: str, rows: list[dict[str, Any]]) -> str:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path: str) -> list[dict[str, Any]]:
    return [record.data for record in read(path)]


def answers(row: dict[str, Any], form: str = "messages") -> list[str]:
    key, who, text, _, assistant = WORDS[form]
    return [turn[text] for turn in row[key] if turn[who] == assistant]


OPTIONS = ("--filters", "none", "-n", 1, "--structured", "schema", "--turns", "all")


@pytest.mark.parametrize("form", WORDS)
def test_every_turn_is_rewritten_by_its_own_task(server: Server, form: str) -> None:
    lines("in.jsonl", [talk(form), talk(form, 1, id=6)])
    found = said("run", "in.jsonl", "--base-url", server.url, *OPTIONS, "-o", "out.jsonl")
    assert (found["records"], found["rewritten"], found["requests"]) == (2, 1, 2)  # poems are never rewritten
    row, single = rows_of("out.jsonl")
    new = [ANSWERS[0], *(f"In short:\n- {text}\nThat is all." for text in ANSWERS[1:])]
    assert answers(row, form) == new
    turns = row["realign_turns"]
    assert [turn["status"] for turn in turns] == ["original", "rewrite", "rewrite"]
    assert [turn["category"] for turn in turns] == ["poem_generation", "fact_verification", "fact_verification"]
    assert [turn["original"] for turn in turns] == [None, *ANSWERS[1:]]
    assert (row["realign_status"], row["realign_original"], row["realign_tokens_out"]) == ("rewrite", ANSWERS[2], 10)
    assert (single["realign_turns"], single["realign_reason"]) == (None, "not_rewritten")
    for call in server.calls:  # earlier turns are shown as they were
        question = call.prompt.partition("[question starts]\n")[2].partition("\n[question ends]")[0]
        at = QUESTIONS.index(question)
        assert all(f"User: {q}\nAssistant: {a}" in call.prompt for q, a in zip(QUESTIONS[:at], ANSWERS))


def test_the_last_turn_alone_is_the_default_and_adds_no_column(server: Server) -> None:
    lines("in.jsonl", [talk()])
    said("run", "in.jsonl", "--base-url", server.url, *OPTIONS[:-2], "-o", "out.jsonl")
    (row,) = rows_of("out.jsonl")
    assert answers(row)[:2] == list(ANSWERS[:2])
    assert answers(row)[2].startswith("In short")
    assert "realign_turns" not in row


def test_a_given_task_counts_for_the_last_answer(server: Server) -> None:
    lines("in.jsonl", [talk(count=2, category="poem_generation")])
    assert said("run", "in.jsonl", "--base-url", server.url, *OPTIONS, "-o", "out.jsonl")["rewritten"] == 0
    assert server.calls == []


def test_filters_stats_page_and_exports_know_every_turn(server: Server) -> None:
    server.script = lambda call: answer(revised("x" if "can dance" in call.prompt.split("[question starts]")[1] else
                                                f"Well, {response_of(call)}"))  # fmt: skip
    lines("in.jsonl", [talk()])
    said("run", "in.jsonl", "--base-url", server.url, *OPTIONS, "-o", "1.jsonl")
    found = said("filter", "1.jsonl", "--filters", "alpaca", "-o", "2.jsonl")
    assert found["rewritten"] == 1
    assert {row["outcome"]: row["answers"] for row in found["filters"]} == {
        "original before": 1,
        "length": 1,
        "rewrite": 1,
    }
    (row,) = rows_of("2.jsonl")
    assert answers(row) == [ANSWERS[0], ANSWERS[1], f"Well, {ANSWERS[2]}"]
    assert row["realign_turns"][1]["reject_reason"].startswith("length")
    assert (row["realign_status"], row["realign_original"]) == ("rewrite", ANSWERS[2])
    told = said("stats", "2.jsonl")
    assert (told["records"], told["answers"], told["rewritten"]) == (1, 3, 1)
    assert {task["task"]: task["answers"] for task in told["tasks"]} == {"fact_verification": 2, "poem_generation": 1}
    assert said("view", "2.jsonl", "-o", "page.html")["answers"] == 3
    assert said("export", "1.jsonl", "--form", "preference", "-o", "dpo.jsonl")["records"] == 2
    first, second = map(json.loads, Path("dpo.jsonl").read_text().splitlines())
    assert [m["content"] for m in first["prompt"]] == [QUESTIONS[0], ANSWERS[0], QUESTIONS[1]]
    assert (second["chosen"][0]["content"], second["rejected"][0]["content"]) == (f"Well, {ANSWERS[2]}", ANSWERS[2])
    assert said("export", "2.jsonl", "-o", "sft.jsonl")["records"] == 1


def test_a_conversation_of_which_all_is_refused_is_an_original(server: Server) -> None:
    lines("in.jsonl", [talk()])
    said("run", "in.jsonl", "--base-url", server.url, *OPTIONS, "-o", "1.jsonl")
    (row,) = rows_of("1.jsonl")
    row["realign_turns"] = [
        {**turn, "original": turn["original"] and 99 * turn["original"]} for turn in row["realign_turns"]
    ]
    lines("2.jsonl", [row])
    assert said("filter", "2.jsonl", "--filters", "alpaca", "-o", "3.jsonl")["rewritten"] == 0
    (back,) = rows_of("3.jsonl")
    assert answers(back) == [ANSWERS[0], 99 * ANSWERS[1], 99 * ANSWERS[2]]
    assert (back["realign_status"], back["realign_reason"], back["realign_original"]) == ("original", "rejected", None)


def test_what_another_run_said_of_turns_is_not_believed(server: Server) -> None:
    lines("in.jsonl", [talk()])
    said("run", "in.jsonl", "--base-url", server.url, *OPTIONS, "-o", "1.jsonl")
    said("run", "1.jsonl", "--base-url", server.url, *OPTIONS[:-2], "-o", "2.jsonl")
    assert rows_of("2.jsonl")[0]["realign_turns"] is None
    (row,) = rows_of("1.jsonl")
    lines("3.jsonl", [row | {"realign_turns": row["realign_turns"][:2]}])
    refused("record 5 has 3 answers, its realign_turns speaks of 2", "stats", "3.jsonl")


def test_parts_and_parquet_hold_the_same(server: Server) -> None:
    lines("in.jsonl", [talk(id=n) for n in range(4)])
    run = ("run", "in.jsonl", "--base-url", server.url, *OPTIONS)
    said(*run, "-o", "whole.parquet", "--journal", "j")
    for part in (1, 2):
        said(*run, "--shard", f"{part}/2", "-o", f"part{part}", "--journal", f"j{part}")
    said("merge", "in.jsonl", "part1", "part2", "-o", "merged.parquet")
    assert rows_of("merged.parquet") == rows_of("whole.parquet")
    assert rows_of("whole.parquet")[3]["realign_turns"][2]["original"] == ANSWERS[2]
    dry = said("run", "in.jsonl", "--dry-run", "--turns", "all", "-n", 2, "-o", "dry.jsonl")
    assert dry["requests"] == 4 * 2 * 2
    assert said("run", "in.jsonl", "--dry-run", "--turns", "none", "-o", "dry.jsonl")["requests"] == 0


def several(call: Call) -> Answer:
    """As many choices as are asked for; the longest in the middle."""
    texts = [revised(f"Well{'!' * (n == 1)}, {response_of(call)}") for n in range(call.json.get("n", 1))]
    made = [{"index": n, "message": {"content": text}, "finish_reason": "stop"} for n, text in enumerate(texts)]
    usage = {"prompt_tokens": 10, "completion_tokens": 5 * len(made)}
    return Answer(json.dumps({"choices": made, "usage": usage}).encode())


def test_candidates_by_one_request(server: Server) -> None:
    server.script = several
    lines("in.jsonl", [{"id": n, "instruction": f"What is {n}?", "output": f"It is {n}.", "category": "closed_qa"}
                       for n in range(5)])  # fmt: skip
    run = ("run", "in.jsonl", "--base-url", server.url, "-n", 3, "--structured", "schema", "--filters", "none")
    found = said(*run, "--n-mode", "server", "-o", "out.jsonl", "--journal", "j")
    assert found["requests"] == len(server.calls) == 5
    assert [call.json["n"] for call in server.calls] == [3] * 5
    rows = rows_of("out.jsonl")
    assert [row["output"] for row in rows] == [f"Well!, It is {n}." for n in range(5)]
    assert {(row["realign_tokens_in"], row["realign_tokens_out"]) for row in rows} == {(10, 15)}
    (account,) = found["account"]
    assert (account["prompt tokens"], account["completion tokens"], account["replies"]) == (50, 75, 15)
    again = said(*run, "-o", "again.jsonl", "--journal", "j")  # the other way goes on from the same journal
    assert (again["requests"], rows_of("again.jsonl")) == (0, rows)
    refused("n-mode 'both'", *run, "--n-mode", "both", "-o", "no.jsonl")
    refused("needs the backend server", *run, "--n-mode", "server", "--backend", "batch", "-o", "no.jsonl")
