"""What the verbs leave for each other: the folder of a pruned model, that of adapters, and how they are loaded.

A pruned folder is an ordinary checkpoint with `masks.safetensors` and `ressa.json` beside it; its weights have their
zeros, or with --keep-dense are dense. An adapter folder is PEFT's, with its masks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model_hooks.errors import RequestError

RECORD = "ressa.json"
MASKS = "masks.safetensors"
DENSE = "dense.safetensors"  # the dense weights by path, where a method has moved those that stayed
ADAPTER = "adapter_config.json"
NO_TEACHER = (
    "dense weights are not available: pass --teacher DIR, --teacher-cache DIR or --teacher none, or prune with "
    "--keep-dense"
)


@dataclass(frozen=True)
class Base:
    """A pruned model to repair.

    Attributes:
        model: With its zeros, or dense.
        masks: Module path -> bool [out, in], True = kept.
        dense: Whether there is a teacher: dense weights are wanted and at hand, the model's own or `held`.
        held: Dense weights by path, where a method has moved those that stayed.
    """

    model: Any
    processor: Any
    masks: dict[str, Any]
    dense: bool
    held: dict[str, Any] = field(default_factory=dict)


def pruned_folder(folder: str | Path) -> dict[str, Any]:
    """The record of a folder that `ressa prune` wrote. Raises `RequestError` for any other."""
    path = Path(folder)
    for name in (RECORD, MASKS):
        if not (path / name).is_file():
            raise RequestError(f"{folder} has no {name}; give a folder that `ressa prune` wrote")
    try:
        record: dict[str, Any] = json.loads((path / RECORD).read_text())
    except ValueError:
        raise RequestError(f"{path / RECORD} is not JSON; prune again") from None
    return record


def is_adapter(folder: str | Path) -> bool:
    return (Path(folder) / ADAPTER).is_file()


def load_base(folder: str | Path, teacher: str = "", dtype: Any = "float32") -> Base:
    """The model of a pruned folder, ready for adapters.

    teacher: The dense model where the folder holds zeros: it is loaded instead, and its masked weights must be the
        folder's, so that one set of weights serves as both. Empty: the folder's own dense weights; none: no teacher.

    Raises `RequestError` where a teacher is wanted and there are no dense weights, or the teacher is another model.
    """
    from model_hooks import load
    from model_hooks.processors import load_processor
    from ressa.masks import load_masks

    dense = has_dense(folder, teacher)
    masks = load_masks(Path(folder) / MASKS)
    source = str(folder) if dense or teacher == "none" else teacher
    model, _ = load(source, dtype=dtype, tokenizer=False)
    if source != str(folder):
        _check_same(model, folder, masks, dtype, teacher)
    held = {}
    if (Path(folder) / DENSE).is_file() and teacher != "none":
        from safetensors.torch import load_file

        held = {path: weight.to(model.dtype) for path, weight in load_file(Path(folder) / DENSE).items()}
    return Base(model, load_processor(folder), masks, teacher != "none" and (dense or source != str(folder)), held)


def has_dense(folder: str | Path, teacher: str) -> bool:
    """Whether a pruned folder holds its dense weights. Raises `RequestError` where they are wanted and not there, or
    are there and another teacher is named."""
    record = pruned_folder(folder)
    if record["dense"] or (Path(folder) / DENSE).is_file():
        if teacher not in ("", "none"):
            raise RequestError(f"--teacher {teacher}: {folder} holds its own dense weights, which teach; leave it out")
        return True
    if teacher == "":
        raise RequestError(f"{folder}: {NO_TEACHER}")
    if teacher != "none" and record["method"] == "sparsegpt":
        raise RequestError(
            f"{folder}: SparseGPT moved the weights that stayed; prune with --keep-dense to learn from them"
        )
    return False


def _check_same(dense: Any, folder: str | Path, masks: dict[str, Any], dtype: Any, teacher: str) -> None:
    """Raise `RequestError` unless the dense model, masked, is what the folder holds."""
    import torch

    from model_hooks import load

    sparse, _ = load(folder, dtype=dtype, tokenizer=False)
    words = [m.config.get_text_config(decoder=True).vocab_size for m in (dense, sparse)]
    if words[0] != words[1]:
        raise RequestError(f"--teacher {teacher} has {words[0]} words in its vocabulary, {folder} has {words[1]}")
    own = dict(sparse.named_parameters())
    for name, weight in dense.named_parameters():
        mask = masks.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        expected = weight if mask is None else weight.masked_fill(~mask.to(weight.device), 0)
        if name not in own or not torch.equal(own[name], expected):
            raise RequestError(f"--teacher {teacher} is not what {folder} was pruned from: {name} differs")


def load_any(name: str | Path, dtype: str = "auto", device_map: str = "") -> tuple[Any, Any]:
    """A model to measure, with its processor: a checkpoint, or adapters on the base that they name."""
    from model_hooks.loading import load_placed
    from model_hooks.processors import load_processor

    if not is_adapter(name):
        return load_placed(name, dtype, device_map)[0], load_processor(name)
    from ressa.adapters import load_adapters

    base = json.loads((Path(name) / ADAPTER).read_text())["base_model_name_or_path"]
    model, _ = load_placed(base, dtype, device_map)
    return load_adapters(model, name), load_processor(base)
