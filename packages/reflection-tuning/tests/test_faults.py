"""Kills in every stage, Ctrl-C, a full disk, a failing server: for real."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import Command
from llm_server import Answer, Call, Server, answer
from processes import run
from reflection_tuning.cli import app
from teachers import lines, on_instruction, reply, some_records

COMMAND = Command(app)
CONCURRENCY = 8
pytestmark = pytest.mark.filterwarnings("ignore:max_length 2048 is lowered")
SECRET = "sk-of-this-test"


# Runs the command in processes forked from this one, which has everything imported, and kills each at its moment: when
# a journal has so many lines, or a file is written anew. Batches of scoring, and the end, are slow, so that kills fall
# among them. Arguments: moments as JSON, [[file or folder, lines or 0], ...], then those of the command.
KILLS = """
import json, os, signal, sys, time
from pathlib import Path
import aiohttp, openai
from instruct_data import Journal
from instruct_data.llm import endpoint
from instruct_data.scoring import losses
from reflection_tuning import near, originals, showing, workflow
from reflection_tuning.cli import main

def slowed(function, seconds):
    def slower(*args, **kwargs):
        time.sleep(seconds)
        return function(*args, **kwargs)
    return slower

def lines_in(folder):
    return sum(len(file.read_bytes().splitlines()) for file in folder.glob("*.jsonl")) if folder.is_dir() else 0

def written(file):
    return file.stat().st_mtime_ns if file.exists() else 0

Journal.append = slowed(Journal.append, 0.02)
losses.Losses.__call__ = slowed(losses.Losses.__call__, 0.02)
showing.select, showing.view = slowed(showing.select, 0.1), slowed(showing.view, 0.1)
for name, lines in json.loads(sys.argv[1]):
    place = Path(name)
    before = lines_in(place) if lines else written(place)
    lines = max(lines, before + 1) if lines else 0
    child = os.fork()
    if child == 0:
        sys.argv[1:] = sys.argv[2:]
        main()
        os._exit(0)
    while not (lines_in(place) >= lines if lines else written(place) != before):
        assert os.waitpid(child, os.WNOHANG) == (0, 0), f"ended before {name} had {lines}"
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
print("all killed")
"""


def slowly(call: Call) -> Answer:
    return answer(reply(call), seconds=0.02)


@pytest.fixture
def slow() -> Iterator[Server]:
    with Server(slowly) as running:
        yield running


@pytest.fixture
def job(room: Path, student: Path, slow: Server) -> Callable[[str | Path], list[str]]:
    data = lines(room / "in.jsonl", some_records(20))
    (room / "open.yaml").write_text("bounds: {}\n")

    def arguments(output: str | Path) -> list[str]:
        return ["run", data, "--base-url", slow.url, "--structured", "schema", "--concurrency", str(CONCURRENCY),
                "--student", str(student), "--policy", str(room / "open.yaml"), "--dtype", "float32",
                "-o", str(output)]  # fmt: skip

    return arguments


@pytest.mark.slow
def test_five_kills_in_every_stage_go_on_to_the_same_files(room: Path, job: Any, slow: Server) -> None:
    out = room / "out"
    replies, losses, scored, selected = (
        out / name for name in ("replies.journal", "losses", "scored.jsonl", "selected.jsonl")
    )
    moments = [
        *((replies, n) for n in (3, 12, 20, 29, 36)),  # of 40 reflections on instructions, and on their answers
        *((replies, n) for n in (42, 46, 50, 54, 58)),  # of 20 on new answers
        *((losses, n) for n in (5, 30, 55, 80, 105)),
        *((scored, 0),) * 2, *((selected, 0),) * 3,
    ]  # fmt: skip
    text = json.dumps([(str(place), lines) for place, lines in moments])
    said = run("-c", KILLS, text, *job(out), log=room / "log", OPENAI_API_KEY=SECRET)
    assert "all killed" in said
    repeated = sum(slow.bodies.values()) - len(slow.bodies)
    assert repeated <= 10 * CONCURRENCY  # what was in flight at the ten kills
    found = COMMAND.said(*job(out))
    assert (found["requests"], found["from_journal"], found["forwarded"]) == (0, 60, 0)
    assert sum(slow.bodies.values()) - len(slow.bodies) == repeated
    keys = [line.partition('"key":"')[2][:64] for line in (losses / "rank-0.jsonl").read_text().splitlines()]
    assert len(keys) - len(set(keys)) <= len(moments)  # how it is done is noted by every life; no text is scored twice
    COMMAND.said(*job(room / "whole"))
    for name in ("reflected.jsonl", "scored.jsonl", "selected.jsonl"):
        assert (out / name).read_bytes() == (room / "whole" / name).read_bytes(), name
    assert all(SECRET.encode() not in file.read_bytes() for file in room.rglob("*") if file.is_file())


def test_ctrl_c_waits_for_what_is_in_flight(room: Path, job: Any, slow: Server) -> None:
    def interrupting(call: Call) -> Answer:
        if call.number == 15:
            os.kill(os.getpid(), signal.SIGINT)
        return slowly(call)

    slow.script = interrupting
    result = COMMAND.call(*job("out"))
    assert result.exit_code == 130
    assert "run the same command again to go on" in result.stderr
    assert not Path("out/reflected.jsonl").exists()
    slow.script = slowly
    done = len(slow.calls)
    found = COMMAND.said(*job("out"))
    assert found["from_journal"] == done  # nothing of the stopped run is sent again
    assert set(slow.bodies.values()) == {1}


@pytest.fixture
def full_disk() -> Iterator[Callable[[int], None]]:
    """Files of this process may not grow beyond so many bytes (EFBIG), as on a disk that is full."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most or before[0], before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize(
    ("most", "there", "missing"),
    [
        (9_000, (), "reflected.jsonl"),  # the journal of replies
        (45_000, (), "reflected.jsonl"),  # what reflect writes
        (58_000, ("reflected.jsonl",), "scored.jsonl"),  # what score writes
    ],
)  # fmt: skip
def test_a_full_disk_in_each_stage_loses_nothing(
    room: Path, job: Any, slow: Server, full_disk: Any, most: int, there: tuple[str, ...], missing: str
) -> None:
    full_disk(most)
    result = COMMAND.call(*job("out"))
    full_disk(0)
    assert result.exit_code == 1, result.output
    assert len(result.stderr.strip().splitlines()) == 1
    assert "out/" in result.stderr
    assert not Path("out", missing).exists()
    assert all(Path("out", name).exists() for name in there)
    sent = len(slow.calls)
    found = COMMAND.said(*job("out"))
    assert found["requests"] == len(slow.calls) - sent
    assert sum(slow.bodies.values()) - len(slow.bodies) <= CONCURRENCY  # those whose reply found no room
    COMMAND.said(*job("whole"))
    for name in ("reflected.jsonl", "scored.jsonl", "selected.jsonl"):
        assert Path("out", name).read_bytes() == Path("whole", name).read_bytes()


def test_a_full_disk_at_selection_loses_nothing(room: Path, job: Any, full_disk: Any) -> None:
    """What `select` writes, alone and at the end of a run: a file before it stays, and scores are not lost."""
    COMMAND.said(*job("out"))
    before = {name: Path("out", name).read_bytes() for name in ("scored.jsonl", "selected.jsonl", "reflections.html")}
    select = ("select", "out/scored.jsonl", "--policy", room / "open.yaml", "--overwrite")
    view = ("view", *select[1:])
    for verb, output in ((select, "out/selected.jsonl"), (select, "out/new.parquet"), (view, "out/reflections.html")):
        full_disk(1_000)
        result = COMMAND.call(*verb, "-o", output)
        full_disk(0)
        assert result.exit_code == 1, result.output
        assert output in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
        assert {name: Path("out", name).read_bytes() for name in before} == before
    assert sorted(file.name for file in Path("out").iterdir() if "new" in file.name or "tmp" in file.name) == []
    COMMAND.said(*select, "-o", "out/selected.jsonl")
    assert Path("out/selected.jsonl").read_bytes() == before["selected.jsonl"]


def test_a_server_that_fails_at_times_fails_no_record(room: Path, job: Any, slow: Server) -> None:
    """429 and 500 and bodies that are no completion are repeated; a 400 fails its version alone."""

    def failing(call: Call) -> Answer:
        if call.times == 1 and call.number % 5 == 0:
            kinds = (Answer(b"{}", 429, {"retry-after": "0"}), Answer(b"{}", 500), Answer(b"<html>", 200))
            return kinds[call.number // 5 % 3]
        if on_instruction(call) and "item 3?" in call.prompt:
            return Answer(b'{"error": {"message": "no"}}', 400)
        return answer(reply(call))

    slow.script = failing
    found = COMMAND.said(*job("out"))
    assert (found["records"], found["reflected"]) == (20, 20)
    text = (room / "out" / "reflected.jsonl").read_text()
    assert text.count('"status": "failed"') == 1


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["local", "server"])
def test_a_model_that_says_nothing_of_use_keeps_every_original(room: Path, backend: str) -> None:
    """A zoo model as it is, in this process and behind `transformers serve`: an honest teacher that cannot do it."""
    from instruct_data import read
    from instruct_data.llm.serve import serving
    from model_hooks.loading import resolve

    data, teacher = lines("in.jsonl", some_records(1)), str(resolve("zoo:gpt2"))
    reflect = ("reflect", data, "--teacher", teacher, "--answer-tokens", "64", "--what", "response", "-o", "out.jsonl")
    if backend == "local":
        result = COMMAND.call(*reflect, "--backend", "local")
    else:
        pytest.importorskip("uvicorn", reason="needs the extra [serve]")
        with serving(teacher) as url:
            result = COMMAND.call(*reflect, "--base-url", url)  # the probe shows that it keeps to no schema
    assert result.exit_code == 3, result.output
    assert "no record was reflected on" in result.stderr
    rows = [record.data for record in read("out.jsonl")]
    assert [{k: v for k, v in row.items() if not k.startswith("reflection")} for row in rows] == some_records(1)
    assert {row["reflection_status"] for row in rows} == {"original"}
    assert {row["reflection"]["A"]["status"] for row in rows} <= {"parse_failed", "truncated"}
