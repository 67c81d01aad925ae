"""Datasets of the hub and folders of the `datasets` library. Nothing is downloaded that is not read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model_hooks.errors import RequestError

from .formats import one_line


def load_folder(folder: Path, name: str, split: str | None, subset: str | None) -> Any:
    """A dataset that `save_to_disk` wrote, memory-mapped; any other folder of data files is read as the hub's are."""
    import datasets

    if not any((folder / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
        return _load(str(folder.absolute()), name, split, subset)
    if subset is not None:
        raise RequestError(f"{name} was written by save_to_disk and has no subsets; leave {subset!r} out")
    try:
        found = datasets.load_from_disk(folder)
    except Exception as error:
        raise RequestError(f"{name} is no whole folder of `datasets`: {one_line(error)}") from None
    return _split(found, name, split)


def load_name(name: str, split: str | None, subset: str | None) -> Any:
    """A dataset of the hub, streamed."""
    return _load(name, name, split, subset)


def _load(path: str, name: str, split: str | None, subset: str | None) -> Any:
    import datasets

    try:
        found = datasets.load_dataset(path, subset, streaming=True)
    except Exception as error:
        folder = Path(path).is_dir()
        kind = "a folder that cannot be read" if folder else "no such file or folder, and the hub did not give it"
        raise RequestError(f"{name}: {kind}: {one_line(error)}") from None
    return _split(found, name, split)


def _split(found: Any, name: str, split: str | None) -> Any:
    if not isinstance(found, Mapping):
        if split is not None and str(found.split) != split:
            raise RequestError(f"{name} has no splits; leave {split!r} out")
        return found
    if split is None and len(found) == 1:
        return next(iter(found.values()))
    if split not in found:
        asked = "name one of them" if split is None else f"{split!r} is none of them"
        raise RequestError(f"{name} has the splits {', '.join(found)}; {asked}, as in NAME:{next(iter(found))}")
    return found[split]
