"""Programs in processes of their own, forked from one that has imported torch and what trains with it.

A process that starts from nothing spends ten seconds on imports, more than most tests take; a forked one starts at
once. The server (Python's forkserver, one for each process of pytest) imports other people's packages only and computes
nothing: ours are imported by each process anew, and its random states, threads and process groups are its own.

    run("-m", "llm_drop.cli", "score", ..., log=path)            what it printed, after success
    with started("-c", code, *arguments, log=path) as process:   a process to watch, or to kill
    ranks("-m", "llm_drop.train", ..., log=path)                 two processes, as torchrun would start them
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

FORKED = multiprocessing.get_context("forkserver")
# Heavy modules of other people, none of ours; one that is not installed is passed over, and its tests skip.
FORKED.set_forkserver_preload([
    "torch.distributed.fsdp", "torch._dynamo", "transformers.trainer", "transformers.models.llama.modeling_llama",
    "transformers.models.gpt2.modeling_gpt2", "accelerate", "datasets", "peft", "deepspeed", "trl.trainer.sft_trainer",
    "trl.trainer.dpo_trainer",
])  # fmt: skip


class Running:
    """One or several processes that run the same program."""

    def __init__(self, program: Sequence[Any], log: Path, environments: Sequence[Mapping[str, str]], cwd: Path) -> None:
        self.log = log
        log.write_bytes(b"")
        words = [str(word) for word in program]
        kept = {k: v for k, v in os.environ.items() if k not in LAUNCHERS}
        self.processes = [
            FORKED.Process(target=_run, args=(words, str(log), {**kept, **more}, str(cwd)), daemon=True)
            for more in environments
        ]
        for process in self.processes:
            process.start()

    @property
    def said(self) -> str:
        """What was printed so far, to both streams."""
        return self.log.read_text(errors="replace")

    @property
    def pid(self) -> int:
        """The number of the (first) process."""
        assert self.processes[0].pid is not None
        return self.processes[0].pid

    def poll(self) -> int | None:
        """None while all run, else an exit code, the first that is not 0 where there is one; -9 of a killed one."""
        codes = [process.exitcode for process in self.processes]
        return next((c for c in codes if c), None if None in codes else 0)

    def wait(self, seconds: float = 600) -> int:
        """The exit code; as under torchrun, where one process fails the others are ended."""
        end = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < end:
            self.processes[0].join(0.02)
        code = self.poll()
        self.kill()
        assert code is not None, f"not done after {seconds} s\n{self.said[-4000:]}"
        return code

    def wait_for(self, file: Path) -> None:
        """Until `file` is there; an error if the program ends before."""
        while not file.is_file():
            assert self.poll() is None, f"the program ended before {file.name} was there\n{self.said[-4000:]}"
            time.sleep(0.005)

    def finish(self) -> str:
        """What it printed, after success."""
        code = self.wait()
        assert code == 0, f"exited {code}\n{self.said[-4000:]}"
        return self.said

    def result(self) -> dict[str, Any]:
        """What one of our commands prints with `--json`, after success; one process tells it."""
        said = self.finish()
        assert said.count('{\n "') == 1, said[-4000:]
        found: dict[str, Any] = json.JSONDecoder().raw_decode(said[said.index('{\n "') :])[0]
        return found

    def kill(self) -> None:
        """kill -9, all at one blow, as when a machine loses power."""
        for process in self.processes:
            if process.exitcode is None:
                with suppress(ProcessLookupError):
                    os.kill(process.pid or 0, signal.SIGKILL)
        for process in self.processes:
            process.join()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def flags(options: Mapping[str, Any]) -> list[str]:
    """Options as a command line has them; True is a switch."""
    words: list[str] = []
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return words


def calling(file: str, call: str) -> str:
    """Code for `-c` that calls a function of the test file `file`; `rank` is the number of the process."""
    path = Path(file)
    start = f"import os, sys; sys.path.insert(0, {str(path.parent)!r}); rank = int(os.environ.get('RANK', 0))"
    return f"{start}; import {path.stem} as tests; tests.{call}"


def started(*program: Any, log: Path, cwd: Path | None = None, **environment: str) -> Running:
    """Start `-m MODULE ARGUMENTS...` or `-c CODE ARGUMENTS...`; what it prints goes to `log`."""
    return Running(program, log, [environment], cwd or Path.cwd())


def run(*program: Any, log: Path, cwd: Path | None = None, **environment: str) -> str:
    """Run a program to its end; what it printed. AssertionError where it fails."""
    return started(*program, log=log, cwd=cwd, **environment).finish()


def ranks(*program: Any, log: Path, count: int = 2, cwd: Path | None = None) -> Running:
    """Start `count` processes with what torchrun tells its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    each = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return Running(program, log, each, cwd or Path.cwd())


def _run(words: list[str], log: str, environment: dict[str, str], cwd: str) -> None:
    """In the forked process: become the program."""
    said = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    how, what, *arguments = words
    if how == "-m":
        sys.argv = [what, *arguments]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.argv = ["-c", *arguments]
        exec(compile(what, "<program>", "exec"), {"__name__": "__main__"})
