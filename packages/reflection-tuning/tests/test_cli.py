"""The command as its users see it, against a server that can be made to fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from commands import Command
from llm_server import Server, answer, refusal
from reflection_tuning.cli import app
from teachers import lines, on_instruction, part, reply, some_records, teaching

from instruct_data import read

COMMAND = Command(app)
call, said, refused = COMMAND.call, COMMAND.said, COMMAND.refused
pytestmark = pytest.mark.filterwarnings("ignore:max_length 2048 is lowered")
SCHEMA = ("--structured", "schema")


def rows_of(path: str | Path) -> list[dict[str, Any]]:
    return [record.data for record in read(str(path))]


def reflect(data: str, server: Server, *options: Any, output: str = "reflected.jsonl") -> dict[str, Any]:
    return said("reflect", data, "--base-url", server.url, "-o", output, *options)


def test_every_record_has_its_versions_in_one_row(data: str, server: Server) -> None:
    found = reflect(data, server)
    assert (found["records"], found["reflected"], found["requests"]) == (12, 12, 37)  # three each, and the probe
    for before, after in zip(rows_of(data), rows_of("reflected.jsonl")):
        assert {k: after[k] for k in before} == before
        made = after["reflection"]
        question = before["instruction"] + (f"\n{before['input']}" if before["input"] else "")
        assert made["ori"]["instruction"] == question
        assert made["Q"]["instruction"] == f"Explain in detail: {before['instruction']}"
        assert made["Q"]["answer"] == f"In detail, {before['output']} That is why."
        assert (made["A"]["instruction"], made["QA"]["instruction"]) == (None, made["Q"]["instruction"])
        assert made["A"]["answer"] == f"Well then: {before['output']} And there is more to it."
        assert made["QA"]["answer"] == f"Well then: {made['Q']['answer']} And there is more to it."
        assert len({made[name]["request_key"] for name in ("Q", "A", "QA")}) == 3
        assert "accuracy: could be better" in made["A"]["criticism"]
    schema = server.calls[-1].json["response_format"]["json_schema"]["schema"]
    assert schema["required"] == ["criticism", "better_answer"]
    sent = len(server.calls)
    assert reflect(data, server, "--overwrite")["requests"] == 0
    assert len(server.calls) == sent


def test_the_teacher_sees_instruction_input_and_answer(data: str, server: Server) -> None:
    reflect(data, server, *SCHEMA, "--what", "response", "--concurrency", 1)
    assert [part(c, "input") for c in server.calls[:4]] == ["item 7", "", "", "item 10"]
    assert "helpfulness, relevance, accuracy, level of detail" in server.calls[0].json["messages"][0]["content"]
    talk = [("user", "Hi"), ("assistant", "Hello"), ("user", "What is 1?"), ("assistant", "One.")]
    file = lines("talk.jsonl", [{"messages": [{"role": who, "content": text} for who, text in talk]}])
    reflect(file, server, *SCHEMA, "--what", "instruction", output="talked.jsonl")
    assert part(server.calls[-1], "conversation so far") == "User: Hi\nAssistant: Hello"
    assert part(server.calls[-1], "instruction") == "What is 1?"


def test_a_whole_run_and_what_it_kept(data: str, server: Server, student: Path) -> None:
    options = ("--student", student, "--policy", "v2-keep-all")
    found = said("run", data, "--base-url", server.url, "-o", "out", *options)
    assert found["records"] == 12
    rows = rows_of("out/selected.jsonl")
    assert found["selected"] == len(rows) == sum(found.get(name, 0) for name in ("ori", "Q", "A", "QA")) > 0
    scored = {row["id"]: row["reflection"] for row in rows_of("out/scored.jsonl")}
    assert len(scored) == 12
    for row in rows:
        won = scored[row["id"]][row["reflection_version"]]
        assert row["output"] == won["answer"]
        assert row["reflection_rifd"] == won["rifd"] < 1
        assert row["reflection_ifd"] == won["ifd"] < 1
        assert "reflection" not in row
    sent = len(server.calls)
    again = said("run", data, "--base-url", server.url, "-o", "out", *options)
    assert (again["requests"], again["forwarded"], len(server.calls)) == (0, 0, sent)
    assert rows_of("out/selected.jsonl") == rows
    assert "<html" in Path("out/reflections.html").read_text()


def test_version_1_byte_by_byte(data: str, server: Server) -> None:
    """Reflection on the instruction, then on its answer, and always the new pair: nothing beside."""
    lines("in.jsonl", some_records(20))
    assert reflect(data, server, *SCHEMA, "--what", "v1", "--checks", "none")["requests"] == 40
    said("select", "reflected.jsonl", "--policy", "v1", "--bare", "-o", "v1.json")
    expected = [
        row | {"instruction": f"Explain in detail: {row['instruction']}", "input": "",
               "output": f"Well then: In detail, {row['output']} That is why. And there is more to it."}
        for row in some_records(20)
    ]  # fmt: skip
    text = "[\n" + ",\n".join(json.dumps(row) for row in expected) + "\n]\n"
    assert Path("v1.json").read_text() == text
    lines("part.jsonl", some_records(20)[5:11])
    options = (*SCHEMA, "--what", "v1", "--checks", "none", "--journal", "reflected.jsonl.journal")
    found = reflect("part.jsonl", server, *options, output="part.out.jsonl")
    assert found["requests"] == 0
    assert rows_of("part.out.jsonl") == rows_of("reflected.jsonl")[5:11]
    refused("which the policy v2-paper needs", "select", "reflected.jsonl")


def test_a_reflection_on_answers_writes_as_many_records(data: str, server: Server) -> None:
    """The published script for answers writes an empty list."""
    assert reflect(data, server, *SCHEMA, "--what", "response")["records"] == 12
    found = said("select", "reflected.jsonl", "--policy", "v1", "-o", "new.jsonl")
    assert (found["selected"], found["A"]) == (12, 12)
    assert all(row["output"].startswith("Well then: ") for row in rows_of("new.jsonl"))


@pytest.mark.parametrize(
    ("text", "finish", "status", "reason"),
    [
        ("Sorry, what?", "stop", "parse_failed", None),
        ('{"better_answer": "cut"}', "length", "truncated", None),
        ('{"better_answer": "As the original answer says, 12."}', "stop", "rejected", "reference"),
        ('{"better_answer": "Да, это одиннадцать или двенадцать, и больше ничего."}', "stop", "rejected", "language"),
        ('{"better_answer": "Go on. [New Answer] It is what it is and was."}', "stop", "rejected", "tags"),
        ('{"better_answer": "IT is 12, and we  are sure that it is."}', "stop", "rejected", "unchanged"),
        ('{"better_answer": "12"}', "stop", "rejected", "length"),
        ('{"better_answer": "I am sorry, I cannot help with numbers of that kind."}', "stop", "rejected", "refusal"),
        (json.dumps({"better_answer": "so it goes on and on " * 9}), "stop", "rejected", "repetition"),
    ],
)  # fmt: skip
def test_the_original_stays_with_its_reason(
    room: Path, server: Server, text: str, finish: str, status: str, reason: str | None
) -> None:
    server.script = lambda found: answer(text, finish=finish)
    row = {"id": 1, "instruction": "What is 3 * 4?", "output": "It is 12, and we are sure that it is."}
    lines("in.jsonl", [row])
    result = call("reflect", "in.jsonl", "--base-url", server.url, "--structured", "labels", "--what", "response",
                  "-o", "out.jsonl", "--json")  # fmt: skip
    assert result.exit_code == 3
    assert "no record was reflected on" in result.stderr
    assert json.loads(result.stdout)["reflected"] == 0
    (made,) = rows_of("out.jsonl")
    assert {k: made[k] for k in row} == row
    version = made["reflection"]["A"]
    assert version["status"] == status
    assert (version["reject_reason"] or "").partition(":")[0] == (reason or "")
    assert (made["reflection_status"], made["reflection_reason"] is None) == ("original", False)
    assert len(server.calls) == (2 if status == "parse_failed" else 1)
    if status == "parse_failed":  # asked once more, with other words and warmer
        first, second = (c.json for c in server.calls)
        assert len(second["messages"]) == len(first["messages"]) + 2
        assert "cannot be used" in second["messages"][-1]["content"]
        assert (first["temperature"], second["temperature"]) == (0, 0.3)


def test_an_instruction_is_never_paired_with_another_answer(data: str, server: Server) -> None:
    """Half a reply is none: the published scripts put the other half in from the old pair."""
    server.script = lambda c: answer('{"new_instruction": "Say X."}') if on_instruction(c) else teaching(c)
    found = reflect(data, server, *SCHEMA)
    assert {(o["version"], o["outcome"]): o["records"] for o in found["outcomes"]} == {
        ("A", "ok"): 12, ("Q", "parse_failed"): 12,
    }  # fmt: skip
    for row in rows_of("reflected.jsonl"):
        assert row["reflection"]["Q"]["answer"] is None
        assert row["reflection"]["QA"] is None  # nothing was asked for it


def test_a_prompt_that_leaves_no_room_is_not_sent(data: str, server: Server) -> None:
    lines("in.jsonl", [*some_records(2), {"id": "long", "instruction": "x " * 4000, "output": "y"}])
    reflect(data, server, *SCHEMA, "--context", 2048)
    statuses = [{name: made["status"] for name, made in row["reflection"].items() if made} for row in
                rows_of("reflected.jsonl")]  # fmt: skip
    assert statuses[0] == dict.fromkeys(("ori", "Q", "A", "QA"), "ok")
    assert statuses[2] == {"ori": "ok", "Q": "too_long", "A": "too_long"}
    assert all(64 <= c.json["max_tokens"] <= 2048 for c in server.calls)
    assert any(c.json["max_tokens"] < 2048 for c in server.calls)


def test_empty_texts_are_not_sent(room: Path, server: Server) -> None:
    rows = [{"instruction": "q", "output": " \n"}, {"instruction": " ", "output": "a"}, *some_records(1)]
    found = reflect(lines("in.jsonl", rows), server, *SCHEMA)
    assert (found["records"], found["reflected"], found["requests"]) == (3, 1, 3)
    assert rows_of("reflected.jsonl")[0]["reflection_reason"].startswith("empty")


def test_policies_are_replayed_without_a_model(data: str, server: Server, student: Path, monkeypatch: Any) -> None:
    reflect(data, server, *SCHEMA, output="reflected.parquet")
    found = said("score", "reflected.parquet", "--student", student, "-o", "scored.parquet")
    assert found["statuses"] == [{"status": "ok", "versions": 48}]
    monkeypatch.setattr("model_hooks.loading.load_placed", lambda *a: pytest.fail("a model was loaded"))
    every = said("select", "scored.parquet", "--policy", "v2-keep-all", "-o", "all.jsonl")
    top = said("select", "scored.parquet", "--policy", "v2-keep-all", "--top", 0.5, "-o", "half.jsonl")
    assert top["selected"] == round(every["selected"] / 2)
    values = [row["reflection_ifd"] for row in rows_of("all.jsonl")]
    kept = [row["reflection_ifd"] for row in rows_of("half.jsonl")]
    assert sorted(kept) == sorted(values)[-len(kept) :]
    said("select", "scored.parquet", "--policy", "v2-keep-all", "--top-n", 1, "--rank-by", "rifd", "-o", "one.parquet")
    (one,) = rows_of("one.parquet")
    assert one["reflection_rifd"] == min(row["reflection_rifd"] for row in rows_of("all.jsonl"))
    funnel = said("stats", "scored.parquet", "--policy", "v2-keep-all", "-o", "stats.json")
    assert (funnel["records"], funnel["emitted"]) == (12, every["selected"])
    assert {(r["version"], r["outcome"], r["records"]) for r in funnel["replies"]} == {
        (name, "ok", 12) for name in ("Q", "A", "QA")
    }  # fmt: skip
    assert sum(w["records"] for w in funnel["winners"]) == 12
    assert funnel["completion_tokens"] == 36 * 5
    page = said("view", "scored.parquet", "--policy", "v2-keep-all", "-o", "page.html")
    assert (page["records"], page["emitted"]) == (12, every["selected"])
    assert (
        said("export", "scored.parquet", "--policy", "v2-keep-all", "-o", "sft.jsonl")["records"] == every["selected"]
    )
    sft = [json.loads(line)["messages"] for line in Path("sft.jsonl").read_text().splitlines()]
    assert [m[-1]["content"] for m in sft] == [row["output"] for row in rows_of("all.jsonl")]
    refused("emits none", "select", "scored.parquet", "--config", policy_file("emit: []"))
    refused("rank-by 'ppl'", "select", "scored.parquet", "--rank-by", "ppl", "--top", 0.1)
    refused("not both", "select", "scored.parquet", "--top-n", 3, "--top", 0.1)


def policy_file(text: str) -> str:
    Path("mine.yaml").write_text(text + "\nbounds: {}\n")
    Path("config.yaml").write_text("policy: mine.yaml\n")
    return "config.yaml"


def test_preferences_are_of_one_instruction(data: str, server: Server) -> None:
    """The rejected answer is the one that was there before, under the instruction that is kept."""
    reflect(data, server, *SCHEMA)
    text = Path("reflected.jsonl").read_text()
    lines("bad.jsonl", [json.loads(line.replace('"score_status": null', '"score_status": "x"'))
                        for line in text.splitlines()])  # fmt: skip
    Path("answers.yaml").write_text("response: {direction: always}\n")  # without scores no new instruction is kept
    for file, policy, begin in (("reflected.jsonl", "v1", "In detail, "), ("bad.jsonl", "answers.yaml", "")):
        said("export", file, "--form", "preference", "--policy", policy, "-o", "pairs.jsonl", "--overwrite")
        pairs = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
        assert len(pairs) == 12
        for pair, row in zip(pairs, some_records(12)):
            old, new = pair["rejected"][0]["content"], pair["chosen"][0]["content"]
            assert old.startswith(begin or row["output"])
            assert new == f"Well then: {old} And there is more to it."
            assert pair["prompt"][-1]["content"].startswith("Explain in detail:" if begin else row["instruction"])
    refused("form 'ppo'", "export", "reflected.jsonl", "--form", "ppo")


def test_of_a_conversation_the_last_pair_is_changed(room: Path, server: Server, student: Path) -> None:
    talk = [("user", "Hi"), ("assistant", "Hello"), ("user", "What is 1?"), ("assistant", "One, as it is.")]
    row = {"id": 5, "messages": [{"role": who, "content": text} for who, text in talk], "x": [1]}
    lines("in.jsonl", [row])
    reflect("in.jsonl", server, *SCHEMA)
    said("score", "reflected.jsonl", "--student", student, "-o", "scored.jsonl")
    (made,) = rows_of("scored.jsonl")
    assert {made["reflection"][name]["score_status"] for name in ("ori", "Q", "A", "QA")} == {"ok"}
    said("select", "scored.jsonl", "--policy", "v1", "--bare", "-o", "new.jsonl")
    (new,) = rows_of("new.jsonl")
    assert new["messages"][:2] == row["messages"][:2]
    assert [turn["content"] for turn in new["messages"][2:]] == [
        "Explain in detail: What is 1?",
        "Well then: In detail, One, as it is. That is why. And there is more to it.",
    ]
    assert {k: new[k] for k in ("id", "x")} == {"id": 5, "x": [1]}
    said("export", "scored.jsonl", "--policy", "v1", "-o", "sft.jsonl")
    assert json.loads(Path("sft.jsonl").read_text())["messages"] == new["messages"]


def test_the_page_can_be_filtered(data: str, server: Server, monkeypatch: Any) -> None:
    from reflection_tuning import showing

    pages: list[Any] = []
    real = showing.write_page
    monkeypatch.setattr(showing, "write_page", lambda rows, *args, **more: real(
        pages.append(list(rows)) or pages[-1], *args, **more
    ))  # fmt: skip
    server.script = lambda c: answer('{"better_answer": "no"}') if "item 4?" in c.prompt else teaching(c)
    reflect(data, server, *SCHEMA, "--what", "response")
    assert said("view", "reflected.jsonl", "--policy", "v1", "-o", "page.html")["emitted"] == 12
    (rows,) = pages
    assert [row["task"] for row in rows] == [row["category"] for row in some_records(12)]
    assert {row["reject reason"] for row in rows} == {None, "length"}
    assert {(row["version"], row["status"]) for row in rows} == {("A", "emitted"), ("ori", "emitted")}
    for row in rows:
        assert (row["answer_before"] == row["answer_after"]) == (row["version"] == "ori") == (row["id"] == "r4")


def test_parts_and_their_merge_are_the_run_in_one_piece(data: str, server: Server) -> None:
    reflect(data, server, output="whole.jsonl")
    for number in (1, 2):
        reflect(data, server, "--shard", f"{number}/2", "--journal", f"j{number}", output=f"part{number}.jsonl")
    assert said("merge", data, "part2.jsonl", "part1.jsonl", "-o", "merged.jsonl")["records"] == 12
    assert Path("merged.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    refused("parts are missing: 2/2", "merge", data, "part1.jsonl", "-o", "no.jsonl")
    reflect(data, server, output="out.parquet")
    assert rows_of("out.parquet") == rows_of("whole.jsonl")
    assert str(pq.read_schema("out.parquet").field("reflection").type).startswith("struct<ori: struct<status: string")


def test_bad_input_is_named_before_anything_is_sent(room: Path, server: Server, data: str) -> None:
    good = json.dumps(some_records(1)[0])
    run = ("reflect", "in.jsonl", "--base-url", server.url)
    for text, message in [
        (good + '\n{"instruction": \n', "in.jsonl, line 2, column"), ("", "is empty"),
        (good + '\n{"id": 3, "output": "x"}\n', 'key "instruction": is missing'),
        (good + "\n" + good + "\n", "ids that more than one record bears"),
    ]:  # fmt: skip
        Path("in.jsonl").write_text(text)
        refused(message, *run)
    Path("in.jsonl").write_bytes(good.encode() + b'\n{"instruction": "\xff", "output": "a"}\n')
    refused("byte", *run)
    lines("in.jsonl", some_records(3))
    for message, *options in [
        ("what 'all'", "--what", "all"), ("unknown check 'lenght'", "--checks", "lenght"),
        ("PART/OF", "--shard", "3/2"),
        ("backend 'none'", "--backend", "none"), ("a reply needs 64 tokens", "--answer-tokens", 3),
        ("cannot read", "--prices", "no.yaml"),
    ]:  # fmt: skip
        refused(message, *run, *options)
    refused("no template 'llama'", "score", "in.jsonl", "--template", "llama")
    refused("no compat 'x'", "run", "in.jsonl", "--compat", "x")
    refused("neither a file nor one of", "run", "in.jsonl", "--policy", "v3")
    refused("has no reflection", "stats", "in.jsonl")
    assert not server.calls
    reflect(data, server, *SCHEMA)
    text = Path("reflected.jsonl").read_text()
    Path("reflected.jsonl").write_text(text.replace('"output": "the', '"output": "a'))
    refused("is another than the one that was reflected on", "stats", "reflected.jsonl", "--policy", "v1")
    lines("odd.jsonl", [some_records(1)[0] | {"reflection": 5}])
    refused("is not what `reflect` writes", "stats", "odd.jsonl")


def test_a_refused_key_ends_the_run_and_is_shown_nowhere(data: str, server: Server, monkeypatch: Any) -> None:
    secret = "sk-secret-0123"
    monkeypatch.setenv("MY_KEY", secret)
    server.script = lambda found: refusal(401, f"bad key {secret}")
    result = call("reflect", data, "--base-url", server.url, "--api-key-env", "MY_KEY", "--json")
    assert result.exit_code == 5
    assert len(server.calls) == 1  # the probe alone
    server.script = teaching
    said("reflect", data, "--base-url", server.url, "--api-key-env", "MY_KEY")
    assert server.calls[-1].headers["authorization"] == f"Bearer {secret}"
    assert secret not in result.output + result.stderr
    for file in Path().rglob("*"):
        assert not file.is_file() or secret.encode() not in file.read_bytes()


def test_a_budget_ends_the_run_and_a_higher_one_goes_on(data: str, server: Server) -> None:
    Path("prices.yaml").write_text("fake: {prompt: 100000, completion: 200000}\n")  # 2 for each reply
    run = (
        "reflect",
        data,
        "--base-url",
        server.url,
        "--teacher",
        "fake",
        "--prices",
        "prices.yaml",
        "--concurrency",
        2,
    )
    result = call(*run, *SCHEMA, "--max-cost", 20)
    assert result.exit_code == 4
    assert "the limit of 20 cost is reached" in result.stderr
    assert 10 <= len(server.calls) <= 12
    assert not Path("reflected.jsonl").exists()
    done = said(*run, *SCHEMA)
    assert len(server.calls) == 36
    assert done["from_journal"] + done["requests"] == 36
    dry = said("reflect", data, "--dry-run", "--teacher", "fake", "--prices", "prices.yaml", "-o", "dry.jsonl")
    assert dry["requests"] == 36
    assert dry["cost_about"] > 0
    assert len(server.calls) == 36


def test_a_teacher_without_schemas_is_asked_by_tags(data: str, server: Server) -> None:
    def script(found: Any) -> Any:
        if "response_format" in found.json:
            return answer("Of course!")
        made = json.loads(reply(found))
        if on_instruction(found):
            return answer(
                f"Hm.\n[New Instruction]\n{made['new_instruction']}\n[End]\n[New Answer]\n{made['new_answer']}\n[End]"
            )
        return answer(f"Hm.\n[Better Answer]\n{made['better_answer']}\n[End]")

    server.script = script
    assert reflect(data, server)["reflected"] == 12
    assert rows_of("reflected.jsonl")[2]["reflection"]["QA"]["criticism"] == "Hm."
