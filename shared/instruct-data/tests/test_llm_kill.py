"""Ends of every kind: kill -9, Ctrl-C. Nothing that was paid for is paid for again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from llm_server import Server, answer

SCRIPT = Path(__file__).parent / "llm_kill.py"
CONCURRENCY = 16


def start(url, folder, *more):
    return subprocess.Popen(
        [sys.executable, SCRIPT, url, folder, *more], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def reply(call):
    return answer(f"{call.prompt}!", seconds=0.02 + 0.02 * (call.number % 5))


def gone(child):
    """Whether a grandchild, which its own parent does not wait for, has ended."""
    try:
        return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.slow
def test_ten_kills_and_the_run_is_the_same_at_no_more_than_what_was_in_flight(tmp_path):
    rng = random.Random(0)
    with Server(reply) as server:
        parent = start(server.url, tmp_path, "pause")
        assert parent.stdout.readline() == "ready\n"
        kills = 0
        while kills < 10:
            answered = len(server.calls)
            parent.stdin.write("go\n")
            parent.stdin.flush()
            child = int(parent.stdout.readline())
            more = rng.randrange(5, 55)
            while len(server.calls) < answered + more and not gone(child):
                time.sleep(0.002)
            assert not gone(child), f"ended after {kills} kills and {len(server.calls)} calls"
            os.kill(child, signal.SIGKILL)
            kills += 1
            assert parent.stdout.readline() == "ended\n"
            if kills == 5:  # and a torn line
                with (tmp_path / "journal" / "0.jsonl").open("ab") as file:
                    file.write(b'{"crc":"0123')
        parent.stdin.close()
        assert parent.wait(10) == 0
        time.sleep(0.2)
        last = start(server.url, tmp_path)
        assert last.wait(60) == 0
        rows = json.loads((tmp_path / "rows.json").read_text())
        assert rows == [[f"record {n}!"] * 2 for n in range(300)]
        asked = Counter(call.prompt for call in server.calls)
        repeated = sum(asked.values()) - 600
        assert set(asked) == {f"record {n}" for n in range(300)}
        assert 0 < repeated <= 10 * CONCURRENCY
        again = start(server.url, tmp_path)
        assert again.wait(60) == 0
        assert (tmp_path / "sent").read_text() == "0"


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_in_flight(tmp_path):
    with Server(lambda call: answer(call.prompt, seconds=0.3)) as server:
        run = start(server.url, tmp_path)
        while len(server.calls) < 40:
            time.sleep(0.01)
        run.send_signal(signal.SIGINT)
        run.wait(10)
        assert run.returncode not in (0, -signal.SIGKILL)
        assert "KeyboardInterrupt" in run.stderr.read()
        sent = len(server.calls)
        kept = (tmp_path / "journal" / "0.jsonl").read_text().count("\n")
        assert kept == sent <= 40 + CONCURRENCY
