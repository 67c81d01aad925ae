"""Files that are either whole or absent: everything is written beside its place and renamed into it."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from .errors import RequestError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota, the size that a file may have


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _os_error(error: BaseException, path: str | Path) -> OSError | None:
    """A full disk that safetensors tells in an error of its own, as an OSError of `path`."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    if isinstance(error, OSError) or not found or int(found[1]) not in FULL:
        return None
    return OSError(int(found[1]), os.strerror(int(found[1])), str(path))


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """The path of an empty file beside `path` that takes its place when the block ends well, and vanishes when not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        _sync(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if (other := _os_error(error, path)) is not None:
            raise other from error
        raise


def atomic_write(path: str | Path, content: str | bytes) -> None:
    """Write `content` to `path` so that a crash or a full disk leaves the old file, or the new one, never a part."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def refuse_existing(path: str | Path, overwrite: bool) -> None:
    """Raise `RequestError` where `path` exists and may not be replaced: call it before the work, not after."""
    if Path(path).exists() and not overwrite:
        raise RequestError(f"{path} exists already and was left as it is; give another name or --overwrite")


def refuse_overlap(folder: str | Path, source: str | Path) -> None:
    """Raise `RequestError` where `folder` is, holds or lies in `source`, if that is a path."""
    if not Path(source).exists():
        return
    here, there = Path(folder).resolve(), Path(source).resolve()
    if here == there or here in there.parents or there in here.parents:
        raise RequestError(f"output {folder} overlaps the input {source}; write somewhere else")


@contextmanager
def atomic_folder(folder: str | Path, overwrite: bool = False, source: str | Path | None = None) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends well, and vanishes when not.

    Raises `RequestError` if `folder` exists (unless `overwrite`) or is, holds or lies in `source`.
    """
    target = Path(folder).absolute()
    old = target.with_name(f".{target.name}.old")
    if old.is_dir() and not target.exists():  # a run was killed between the two renames of an overwrite
        os.replace(old, target)
    refuse_existing(folder, overwrite)
    if source is not None:
        refuse_overlap(folder, source)
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in target.parent.glob(f".{escape(target.name)}.part-*"):  # left by a killed run
        shutil.rmtree(stale, ignore_errors=True)
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}.part-", dir=target.parent))
    try:
        yield part
        for file in (*part.rglob("*"), part):
            os.chmod(file, 0o755 if file.is_dir() else 0o644)  # safetensors writes for its user alone
            _sync(file)
        _swap(part, target)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if (other := _os_error(error, folder)) is not None:
            raise other from error
        raise


def _swap(part: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
    os.replace(part, target)
    _sync(target.parent)
    if old.is_dir():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        old.unlink()
