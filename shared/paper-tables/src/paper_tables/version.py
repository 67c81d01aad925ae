"""What a result depends on, as short hashes: the code that measured it, the inputs it read, and the cell itself."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .paper import Paper
    from .table import Table

OWN = ("metrics.py", "timing.py")  # of paper_tables itself, only these measure
NOT_CODE = (".pyc", ".pyi", ".md", ".safetensors")
WHOLE = 64 << 20  # files up to this size are hashed whole, larger ones by samples


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


@cache
def _file(path: str, size: int, changed: int) -> bytes:
    """Hash of a file's content; of a large one, of its size and 64 pieces of 1 MiB, its two ends among them."""
    digest = hashlib.blake2b(str(size).encode() if size > WHOLE else b"", digest_size=16)
    with open(path, "rb") as file:
        if size <= WHOLE:
            digest.update(file.read())
        else:
            for piece in range(64):
                file.seek(piece * (size - (1 << 20)) // 63)
                digest.update(file.read(1 << 20))
    return digest.digest()


def _content(path: Path) -> bytes:
    stat = path.stat()
    return _file(str(path), stat.st_size, stat.st_mtime_ns)


def _tree(folder: Path, skip: tuple[str, ...] = ()) -> list[bytes]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix not in skip)
    kept = [p for p in files if not {"__pycache__", "_tables", "checkpoints"} & set(p.relative_to(folder).parts)]
    return [part for p in kept for part in (p.relative_to(folder).as_posix().encode(), _content(p))]


def code_version(paper: Paper) -> str:
    """Hash of the files that measure: the package's import folder, those of `paper.code`, our metrics and timing.

    README, tests and tables lie outside of these folders; weights and compiled files in them do not count.
    """
    module = getattr(paper.run, "__module__", "") or type(paper.run).__module__
    here = Path(__file__).parent
    parts = [part for name in OWN if (here / name).is_file() for part in (name.encode(), _content(here / name))]
    for name in dict.fromkeys((module.partition(".")[0], *paper.code)):
        spec = importlib.util.find_spec(name) if name and name != "__main__" else None
        if spec is None or spec.origin is None:
            continue
        origin = Path(spec.origin)
        parts.append(name.encode())
        parts.extend(_tree(origin.parent, NOT_CODE) if spec.submodule_search_locations else [_content(origin)])
    return _hash(parts)


def _fingerprint(source: str) -> str:
    """Content of what a setting names: a zoo item, a folder, a file, or a hub id's revision in the local cache."""
    if source.startswith("zoo:"):
        try:
            from model_hooks.loading import resolve

            source = resolve(source)
        except Exception:  # not a model: a part of the zoo's text, whose files are in the code version
            return source
    path = Path(source).expanduser()
    if path.is_dir():
        return _hash(_tree(path, (".md",)))
    if path.is_file():
        return _hash([_content(path)])
    return f"{source}@{_revision(source)}"


def _revision(repo: str) -> str:
    """Commit of the hub repository `repo` in the local cache, or nothing."""
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return ""
    for kind in ("models", "datasets"):
        reference = Path(HF_HUB_CACHE) / f"{kind}--{repo.replace('/', '--')}" / "refs" / "main"
        if reference.is_file():
            return reference.read_text().strip()
    return ""


def unit_key(table: Table, cell: Mapping[str, Any], code: str) -> str:
    """Hash of a unit: its cell, the content of its inputs, the code. Independent of the order of the cell's keys."""
    inputs = {
        name: [_fingerprint(str(item)) for item in (value if isinstance(value, list) else [value])]
        for name, value in cell.items()
        if name in table.inputs or (isinstance(value, str) and value.startswith("zoo:"))
    }
    text = json.dumps([dict(cell), inputs, code], sort_keys=True, default=str)
    return _hash([text.encode()])
