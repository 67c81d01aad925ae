"""Faults really done: kill -9, a full disk, another request on what is left, two processes; and nothing is lost."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from processes import started
from superfiltering.cli import app
from superfiltering.scores import read_scores, work_folder
from typer.testing import CliRunner, Result

from instruct_data.scoring.forward import Forward

pytestmark = [pytest.mark.usefixtures("room"), pytest.mark.filterwarnings("ignore:max_length 1024 is lowered")]
HANDFUL = "instruct_data.scoring.forward.HANDFUL"
# The command with a pause after each batch, of which none shares its head with others, so that a kill falls among them.
SLOW = """
import time
from instruct_data.scoring import forward
from instruct_data.scoring.losses import Losses
from superfiltering.cli import main
real = Losses.__call__
def slower(*args, **kwargs):
    time.sleep(0.02)
    return real(*args, **kwargs)
Losses.__call__, forward.HANDFUL = slower, 1
main()
"""


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def said(*arguments: Any) -> dict[str, Any]:
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def environment(**changes: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"OMP_NUM_THREADS": "1"} | changes


@pytest.fixture
def job(weak: Path, alpaca: Any, lines: Any) -> list[str]:
    """Scoring of 400 records; the same batches each time, for a resumed run to make."""
    return ["score", lines("data.jsonl", alpaca(400)), "--model", str(weak), "--max-length", "128", "--budget", "256"]


def journalled(output: Path) -> int:
    """Lines of the journal that a killed run has left."""
    return sum(len(file.read_bytes().splitlines()) for file in work_folder(output).glob("*.jsonl"))


class Killed(BaseException):
    """What `kill -9` does, within one process."""


@pytest.fixture
def half(job: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is left of a run that was stopped after some of its batches: `scores.parquet` is to be."""
    real = Forward._together

    def stop(self: Forward, batches: Any) -> Any:
        if self.facts["forwarded"] > 150:
            raise Killed
        return real(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Forward, "_together", stop)
        with pytest.raises(Killed):
            call(*job)
    output = Path("scores.parquet")
    assert not output.exists()
    assert journalled(output) > 150
    return output


@pytest.mark.slow
def test_a_killed_scoring_goes_on_to_the_same_file(job: list[str], room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HANDFUL, 1)
    said(*job, "-o", "whole.parquet")
    output, draw, kept = Path("scores.parquet"), random.Random(0), []
    for _ in range(10):
        before = journalled(output)
        with started("-c", SLOW, *job, log=room / "log") as scoring:
            while journalled(output) <= before:  # past loading, at the first new batch
                assert scoring.poll() is None, scoring.said
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.12))
            scoring.kill()
            assert scoring.poll() == -signal.SIGKILL  # that is what ended it
        assert not output.exists()
        kept.append(journalled(output))
    assert sorted(set(kept)) == kept  # each life adds to what the ones before have done
    found = said(*job)
    assert found["from_journal"] >= kept[-1] - 2  # a line says how it was done, one may be torn
    assert pq.read_table("scores.parquet").equals(pq.read_table("whole.parquet"))
    assert not work_folder(output).exists()


def test_what_was_done_is_not_done_again(half: Path, job: list[str]) -> None:
    done = journalled(half)
    found = said(*job)
    facts = read_scores(half).facts
    assert found["from_journal"] == facts["journalled"] == done - 1  # a line says how it was done
    assert facts["forwarded"] == facts["segments"] - facts["journalled"] > 0
    said(*job, "-o", "whole.parquet")
    assert pq.read_table(half).equals(pq.read_table("whole.parquet"))


def test_another_request_does_not_go_on(half: Path, job: list[str], strong: Path) -> None:
    changes = (("model", strong, "model"), ("template", "alpaca", "template"), ("compat", "aligned", "compat"),
               ("dtype", "bfloat16", "dtype"), ("max-length", "64", "max_length"))  # fmt: skip
    before = sorted(Path.cwd().rglob("*"))
    for option, value, field in changes:
        result = call(*job, f"--{option}", value)
        assert result.exit_code == 2, result.output
        assert field in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    assert sorted(Path.cwd().rglob("*")) == before
    assert call(*job).exit_code == 0


def test_a_torn_line_of_the_journal_is_scored_again(half: Path, job: list[str]) -> None:
    (segment,) = work_folder(half).glob("*.jsonl")
    segment.write_bytes(segment.read_bytes()[:-20])
    said(*job)
    said(*job, "-o", "whole.parquet")
    assert pq.read_table(half).equals(pq.read_table("whole.parquet"))


def test_changed_data_keeps_what_still_holds(half: Path, job: list[str], alpaca: Any, lines: Any) -> None:
    """The journal is by content: of other records in the file, only those are scored anew."""
    lines("data.jsonl", [*alpaca(399), {"instruction": "new", "output": "never seen before"}][::-1])
    found = said(*job)
    assert found["from_journal"] > 100
    said(*job, "-o", "whole.parquet", "--budget", "1")
    np.testing.assert_allclose(read_scores(half).ifd_ppl, read_scores("whole.parquet").ifd_ppl, rtol=1e-4)


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


def test_a_full_disk_loses_nothing(job: list[str], small_disk: Path) -> None:
    output = small_disk / "scores.parquet"
    result = call(*job, "-o", output)
    assert result.exit_code == 1, result.output
    assert "no space left on the disk" in result.stderr
    assert str(small_disk) in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not output.exists()
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    found = said(*job, "-o", output)
    assert found["statuses"] == "400 ok"
    said(*job, "-o", "whole.parquet")
    assert pq.read_table(output).equals(pq.read_table("whole.parquet"))
    assert [path.name for path in small_disk.iterdir()] == ["scores.parquet"]


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
from superfiltering.cli import main
main()
"""


@pytest.mark.slow
def test_a_file_that_may_not_grow_loses_nothing(job: list[str], room: Path) -> None:
    """As a full disk, where nothing can be mounted: files end at 20 kB (EFBIG)."""
    limited = started("-c", LIMITED, *job, log=room / "log")
    assert limited.wait() == 1, limited.said
    assert "scores.parquet" in limited.said
    assert "Traceback" not in limited.said
    assert not Path("scores.parquet").exists()
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    said(*job)
    said(*job, "-o", "whole.parquet")
    assert pq.read_table("scores.parquet").equals(pq.read_table("whole.parquet"))


@pytest.mark.slow
def test_two_processes_share_the_records_and_the_last_one_writes(job: list[str], room: Path) -> None:
    said(*job, "-o", "whole.parquet", "--budget", "1")  # one by one: bit for bit the same in any share
    line = ["-m", "superfiltering.cli", *job, "--budget", "1", "--json", "--original-jsonl", "o.jsonl"]
    told = []
    for rank in ("1", "0"):
        told.append(started(*line, log=room / "log", RANK=rank, WORLD_SIZE="2").result())
        assert Path("scores.parquet").exists() == (rank == "0")
    assert told[0] == {"waiting_for_ranks": [0]}
    assert (told[1]["records"], told[1]["statuses"]) == (400, "400 ok")
    assert len(Path("o.jsonl").read_text().splitlines()) == 400
    assert pq.read_table("scores.parquet").equals(pq.read_table("whole.parquet"))
    assert not work_folder(Path("scores.parquet")).exists()


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                   "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_under_a_launcher(job: list[str], room: Path, launcher: str) -> None:
    job += ["--budget", "1"]  # the last one given counts
    said(*job, "-o", "whole.parquet")
    line = [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "superfiltering.cli", *job]
    result = subprocess.run(line, cwd=room, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("waiting for ranks") == 1
    assert pq.read_table("scores.parquet").equals(pq.read_table("whole.parquet"))
