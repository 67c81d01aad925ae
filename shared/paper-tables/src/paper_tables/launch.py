"""What training entry points share: modules under a launcher, shipped DeepSpeed files, the way on after a kill."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import TableError
from .paper import tables_folder


def run_module(name: str, command: Callable[..., Any], arguments: list[str], help: str = "") -> None:
    """Run `command` as `python -m name`, for launchers. Drops the --local_rank that the deepspeed launcher adds."""
    from .frame import make_app

    given = [a for a in arguments if not a.startswith(("--local_rank=", "--local-rank="))]
    app = make_app(name, help=help)
    app.command("run")(command)
    try:
        app(["run", *given], prog_name=f"python -m {name}")
    except SystemExit as end:
        distributed = sys.modules.get("torch.distributed")
        if not end.code and distributed is not None and distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()  # its threads would abort a process that ends before they do
        raise


def is_main_process() -> bool:
    """Whether this process, of those that a launcher started, is the one that writes."""
    return os.environ.get("RANK", "0") == "0"


def on_cpu() -> bool:
    """Whether torch has nothing to run on but the CPU."""
    import torch

    return not torch.accelerator.is_available()


def deepspeed_file(module_file: str, given: str) -> str | None:
    """The DeepSpeed configuration `given`: one that ships in configs/deepspeed/ beside the package's tables/, by its
    name, or the user's file. None for an empty name. Raises `TableError`."""
    if not given:
        return None
    tables = tables_folder(module_file)
    shipped = tables.with_name(tables.name.replace("tables", "configs")) / "deepspeed"
    names = {file.stem: file for file in shipped.glob("*.json")}
    path = names.get(given, Path(given))
    if not path.is_file():
        raise TableError(f"deepspeed {given!r} is neither a file nor one of {', '.join(sorted(names))}")
    return str(path)


def last_checkpoint(work: Path) -> Path | None:
    """The newest of Trainer's checkpoints in `work` that was written to its end: trainer_state.json comes last."""
    found = [(int(m[1]), p) for p in work.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))]
    for _, path in sorted(found, reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        return path
    return None
