"""Kills in every stage, Ctrl-C, a full disk, a failing server: for real."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import Command
from llm_server import Answer, Call, Server, answer
from processes import started
from reflection_tuning.cli import app
from teachers import lines, on_instruction, reply, some_records

COMMAND = Command(app)
CONCURRENCY = 8
pytestmark = pytest.mark.filterwarnings("ignore:max_length 2048 is lowered")
SECRET = "sk-of-this-test"


# The command, whose batches of scoring, and end, are slow, so that a kill falls among them.
SLOW = """
import time
from instruct_data.scoring.losses import Losses
from reflection_tuning import showing
from reflection_tuning.cli import main
def slowed(function, seconds):
    def slower(*args, **kwargs):
        time.sleep(seconds)
        return function(*args, **kwargs)
    return slower
Losses.__call__ = slowed(Losses.__call__, 0.01)
showing.view = slowed(showing.view, 0.3)
main()
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


def lines_in(folder: Path) -> int:
    return sum(len(file.read_bytes().splitlines()) for file in folder.glob("*.jsonl")) if folder.is_dir() else 0


@pytest.mark.slow
def test_kills_in_every_stage_go_on_to_the_same_files(room: Path, job: Any, slow: Server) -> None:
    out = room / "out"
    moments: list[tuple[str, Callable[[], bool]]] = [
        ("reflections on instructions and answers", lambda: len(slow.calls) >= 8),
        ("reflections on new answers", lambda: len(slow.calls) >= 45),
        ("scoring", lambda: lines_in(out / "losses") >= 10),
        ("scoring, later", lambda: lines_in(out / "losses") >= 100),
        ("selection", (out / "selected.jsonl").exists),
    ]
    kept = 0
    for stage, reached in moments:
        with started("-c", SLOW, *job(out), log=room / "log", OPENAI_API_KEY=SECRET) as running:
            while not reached():
                assert running.poll() is None, f"{stage}\n{running.said}"
                time.sleep(0.002)
            running.kill()
            assert running.poll() == -signal.SIGKILL, stage
        losses = lines_in(out / "losses")
        assert losses >= kept, stage
        kept = losses
    repeated = sum(slow.bodies.values()) - len(slow.bodies)
    assert repeated <= 2 * CONCURRENCY  # what was in flight at the two kills
    found = COMMAND.said(*job(out))
    assert (found["requests"], found["from_journal"], found["forwarded"]) == (0, 60, 0)
    assert sum(slow.bodies.values()) - len(slow.bodies) == repeated
    keys = [line.partition('"key":"')[2][:64] for line in (out / "losses" / "rank-0.jsonl").read_text().splitlines()]
    assert len(set(keys)) >= kept
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
def test_a_model_that_says_nothing_of_use_keeps_every_original(room: Path) -> None:
    """A zoo model as it is, in this process: an honest teacher that cannot do it."""
    from instruct_data import read

    data = lines("in.jsonl", some_records(3))
    result = COMMAND.call("reflect", data, "--backend", "local", "--teacher", "zoo:gpt2", "--answer-tokens", "64",
                          "--what", "response", "-o", "out.jsonl")  # fmt: skip
    assert result.exit_code == 3, result.output
    rows = [record.data for record in read("out.jsonl")]
    assert [{k: v for k, v in row.items() if not k.startswith("reflection")} for row in rows] == some_records(3)
    assert {row["reflection_status"] for row in rows} == {"original"}
    assert {row["reflection"]["A"]["status"] for row in rows} <= {"parse_failed", "truncated"}
