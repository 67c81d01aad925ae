"""What a result depends on, as short hashes: the code that measured it, the inputs it read, and the cell itself."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .paper import Paper
    from .table import Table

OWN = ("memory.py", "metrics.py", "probe.py", "quality.py", "timing.py")  # of paper_tables itself, only these measure
TRAINING = ("sft.py", "trainer.py", "training.py")  # these measure where a row trains
NOT_CODE = (".pyc", ".pyi", ".md", ".safetensors")
NO_CODE_IN = frozenset({"__pycache__", "_tables", "checkpoints"})
ABOUT_A_MODEL = frozenset({"measurements.json", "training_log.jsonl"})  # beside a zoo model, as its card is
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


@cache
def _resolved(file: str) -> Path:
    return Path(file).resolve()  # some thousands of modules, asked for after every unit


def _tree(folder: Path, skip: tuple[str, ...], without: frozenset[str] = frozenset()) -> list[bytes]:
    """Names and contents of the files below `folder`, but for suffixes in `skip` and files and folders in `without`."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix not in skip)
    kept = [p for p in files if not without & set(p.relative_to(folder).parts)]
    return [part for p in kept for part in (p.relative_to(folder).as_posix().encode(), _content(p))]


class Code:
    """The code that measures a paper's rows, as hashes by name: `used` is what a result is kept with.

    Always: ours that measure. Ours that train where this process has imported them. Of the paper's own package and
    those in `paper.code` the modules that this process has imported, but for a command line (`cli.py`), and everything
    there that is no module: so a new module or verb makes no result doubtful. README, tests and tables lie outside of
    these folders; weights and compiled files do not count.
    """

    def __init__(self, paper: Paper) -> None:
        here = Path(__file__).parent
        own = (getattr(paper.run, "__module__", "") or type(paper.run).__module__).partition(".")[0]
        measuring = [part for n in OWN if (here / n).is_file() for part in (n.encode(), _content(here / n))]
        self.always = {"paper_tables": _hash(measuring)}
        self.modules: dict[str, tuple[Path, str]] = {}  # name -> its file and hash
        for name in TRAINING:
            self._add(f"{here.name}/{name}", here / name)
        for name in dict.fromkeys((own, *paper.code)):
            spec = importlib.util.find_spec(name) if name and name != "__main__" else None
            if spec is None or spec.origin is None:
                continue
            origin = Path(spec.origin)
            if not spec.submodule_search_locations:
                self._add(origin.name, origin)
                continue
            self.always[f"{name} (data)"] = _hash(_tree(origin.parent, (*NOT_CODE, ".py"), NO_CODE_IN))
            for file in sorted(origin.parent.rglob("*.py")):
                if file.name != "cli.py":
                    self._add(f"{name}/{file.relative_to(origin.parent).as_posix()}", file)

    def _add(self, name: str, file: Path) -> None:
        self.modules[name] = (file.resolve(), _hash([_content(file)]))

    def used(self) -> dict[str, str]:
        """What counts for a result that this process has just measured; files as they were when this was made."""
        files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
        imported = {_resolved(file) for file in files if file}
        return {**self.always, **{name: text for name, (file, text) in self.modules.items() if file in imported}}

    def holds(self, recorded: Any) -> bool:
        """Would what was `recorded` by `used` be measured by the same code now?"""
        now = {**self.always, **{name: text for name, (_, text) in self.modules.items()}}
        return (
            isinstance(recorded, Mapping) and self.always.keys() <= recorded.keys() and recorded.items() <= now.items()
        )


def digest(used: Mapping[str, str]) -> str:
    """A short name of what `Code.used` gave, under which a results file keeps it once for all of its units."""
    return _hash([json.dumps(dict(used), sort_keys=True).encode()])


def _fingerprint(source: str) -> str:
    """Content of what a setting names: a zoo item, a folder, a file, or a hub id's revision in the local cache.

    Where nothing of that name is here, the name and an `@` with nothing behind it.
    """
    if source.startswith("zoo:"):
        try:
            from model_hooks.loading import resolve

            source = resolve(source)
        except (ImportError, ValueError):  # not a model: a part of the zoo's text, whose files are in the code version
            return source
    path = Path(source).expanduser()
    if path.is_dir():
        return _hash(_tree(path, (".md",), ABOUT_A_MODEL))
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


def unit_key(table: Table, cell: Mapping[str, Any]) -> dict[str, Any]:
    """What a unit's result depends on beside code: hashes of its cell (in any order of keys) and of each input."""
    inputs = {
        name: [_fingerprint(str(item)) for item in (value if isinstance(value, list) else [value])]
        for name, value in cell.items()
        if name in table.inputs or (isinstance(value, str) and value.startswith("zoo:"))
    }
    text = json.dumps(dict(cell), sort_keys=True, default=str)
    return {"cell": _hash([text.encode()]), "inputs": inputs}


def same(recorded: Any, key: Mapping[str, Any]) -> bool:
    """Is what was measured under the key `recorded` still valid under `key`, as far as can be told here?

    An input that is not on this machine (a hub model that was not downloaded) is no ground to doubt a result.
    """
    if not isinstance(recorded, Mapping) or recorded.get("cell") != key["cell"]:
        return False
    before, now = recorded.get("inputs"), key["inputs"]
    if not isinstance(before, Mapping) or before.keys() != now.keys():
        return False
    return all(
        len(before[name]) == len(now[name])
        and all(a == b or (b.endswith("@") and a.startswith(b)) for a, b in zip(before[name], now[name], strict=True))
        for name in now
    )


def settle(key: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """`key` as it was before the work, with the revisions of those inputs that came onto the machine during it."""
    inputs = {
        name: [b if a.endswith("@") else a for a, b in zip(before, later["inputs"][name], strict=True)]
        for name, before in key["inputs"].items()
    }
    return {**key, "inputs": inputs}
