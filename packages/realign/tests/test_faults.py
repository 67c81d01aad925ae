"""Kills, Ctrl-C, a full disk, a process list: for real."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import Command
from llm_server import Server, answer
from realign.cli import app
from rewriters import response_of, revised

COMMAND = Command(app)
CONCURRENCY = 8


@pytest.fixture
def data(room: Path) -> Path:
    rows = [
        {"id": n, "instruction": f"What is {n}?", "output": f"It is {n}.", "category": "closed_qa"} for n in range(80)
    ]
    file = room / "in.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def slow() -> Iterator[Server]:
    with Server(lambda call: answer(revised(f"Well, {response_of(call)}"), seconds=0.03)) as running:
        yield running


def job(data: Path, server: Server, output: str | Path) -> list[str]:
    return ["run", str(data), "--base-url", server.url, "--structured", "schema", "--concurrency", str(CONCURRENCY),
            "-n", "1", "--filters", "none", "-o", str(output)]  # fmt: skip


def start(arguments: list[str], **environment: str) -> Any:
    return subprocess.Popen(
        [sys.executable, "-m", "realign.cli", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip


def wait_for(server: Server, calls: int) -> None:
    end = time.monotonic() + 60
    while len(server.calls) < calls:
        assert time.monotonic() < end, "the run does not send"
        time.sleep(0.005)


@pytest.mark.slow
def test_a_killed_run_and_one_stopped_by_ctrl_c_go_on_to_the_same_file(data: Path, slow: Server) -> None:
    secret = "sk-of-this-test"
    killed = start(job(data, slow, "out.jsonl"), OPENAI_API_KEY=secret)
    wait_for(slow, 15)
    command = Path(f"/proc/{killed.pid}/cmdline").read_bytes()
    assert b"realign" in command
    assert secret.encode() not in command
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = len(slow.calls)
    stopped = start(job(data, slow, "out.jsonl"))
    wait_for(slow, before + 15)
    stopped.send_signal(signal.SIGINT)
    _, said = stopped.communicate(timeout=30)
    assert stopped.returncode == 130
    assert "run the same command again to go on" in said
    assert not Path("out.jsonl").exists()
    repeated = sum(slow.bodies.values()) - len(slow.bodies)
    assert repeated <= CONCURRENCY
    found = COMMAND.said(*job(data, slow, "out.jsonl"))
    assert found["requests"] + found["from_journal"] == 80
    assert sum(slow.bodies.values()) - len(slow.bodies) == repeated  # nothing of the stopped run is sent again
    with Server(slow.script) as other:
        COMMAND.said(*job(data, other, "whole.jsonl"))
    assert Path("whole.jsonl").read_bytes() == Path("out.jsonl").read_bytes()
    assert all(secret.encode() not in file.read_bytes() for file in Path().rglob("*") if file.is_file())


@pytest.fixture
def small_disk(room: Path) -> Iterator[Path]:
    """A file system of 24 KiB."""
    path = room / "disk"
    path.mkdir()
    made = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", str(path)], capture_output=True
    )
    if not made or made.returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_loses_nothing(data: Path, slow: Server, small_disk: Path) -> None:
    output = small_disk / "out.jsonl"
    result = COMMAND.call(*job(data, slow, output))
    assert result.exit_code == 1, result.output
    assert "no space left on the disk" in result.stderr
    assert str(small_disk) in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not output.exists()
    assert Counter(slow.bodies.values()).keys() == {1}
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    COMMAND.said(*job(data, slow, output))
    assert sum(slow.bodies.values()) - len(slow.bodies) <= CONCURRENCY  # those whose reply found no room
    COMMAND.said(*job(data, slow, "whole.jsonl"))
    assert output.read_bytes() == Path("whole.jsonl").read_bytes()
