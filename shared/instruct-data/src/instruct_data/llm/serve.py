"""`transformers serve` on this machine, for a model folder: a real server with nothing to install but [serve]."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from instruct_data.journal import content_key
from model_hooks.errors import RequestError


def chat_copy(model: str | Path, template: str, folder: Path) -> Path:
    """A copy of a checkpoint in `folder`, with a chat template of one's own."""
    from model_hooks.loading import load_tokenizer, resolve

    shutil.copytree(resolve(model), folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def answering(backend: str, model: str, base_url: str = "") -> Iterator[dict[str, Any]]:
    """Options of a `Service` where `model` answers: endpoint (at `base_url`), server (`transformers serve`, of a
    checkpoint folder), or local (the folder in this process). The folder is asked by labels."""
    if backend == "endpoint":
        yield {"base_url": (base_url,)}
    elif backend == "local":
        yield {"backend": "local", "structured": "labels"}
    elif backend == "server":
        with serving(model) as url:
            yield {"base_url": (url,), "structured": "labels", "concurrency": 4}
    else:
        raise RequestError(f"backend {backend!r}; choose endpoint, server or local")


def journal_of(cell: Mapping[str, Any], room: Path) -> Path:
    """The folder of the replies that a table's row asks its teacher for: in `room`, or, of an endpoint, which is paid,
    in the user's cache, where the same command finds them again after a kill. One for each seed: others are drawn."""
    if cell["backend"] != "endpoint":
        return room / "journal"
    asked = content_key([cell["teacher"], cell.get("base_url"), cell["seed"]])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / f"leanformers/{cell['package']}/{cell['teacher'].replace('/', '-')}-{asked[:12]}"


@contextmanager
def serving(model: str | Path, *, seconds: float = 600.0, device: str = "cpu", dtype: str = "float32") -> Iterator[str]:
    """The base URL of a server of `model`, a checkpoint folder with a chat template; it ends with the block.

    The model's name in requests is `model` itself. Raises `RequestError` where it does not come up in `seconds`, with
    the last line that it said, and where the extra [serve] is missing.
    """
    if missing := [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]:
        raise RequestError(f"serving a model needs {missing[0]}: install instruct-data with its extra [serve]")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model), "--host", "127.0.0.1",
               "--port", str(port), "--device", device, "--dtype", dtype]  # fmt: skip
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=log, stderr=log)
        try:
            _wait(f"http://127.0.0.1:{port}/health", process, seconds, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], seconds: float, log: object) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    log.seek(0)  # type: ignore[attr-defined]
    said = [line.strip() for line in log.read().splitlines() if line.strip()]  # type: ignore[attr-defined]
    raise RequestError(f"transformers serve did not come up: {said[-1] if said else 'it said nothing'}")
