"""Audit the sparsity of any checkpoint, ours or another's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ressa import masks as mask_files
from ressa.branches import BranchNotFoundError, find_branches
from ressa.merging import SPARSITY, sparsity_of


def inspect(model: Any) -> dict[str, Any]:
    """What zeros a model has.

    Args:
        model: A model, a checkpoint folder, a hub id or zoo:NAME. A folder's `sparsity.json` and `masks.safetensors`
            are compared with its weights.

    Returns:
        sparsity, patterns (pattern -> matrices), branches (matrices, weights, zeros, sparsity), masks (hash of where
        all matrices are not zero), violations (one line for each matrix that is otherwise than the files say).
    """
    folder = model if isinstance(model, (str, Path)) else None
    if folder is not None:
        from model_hooks import load

        model, _ = load(folder, tokenizer=False)
    matrices = _matrices(model)
    rows = sparsity_of(model, matrices)
    patterns: dict[str, int] = {}
    branches: dict[str, dict[str, Any]] = {}
    for path, row in rows.items():
        patterns[row["pattern"] or "dense"] = patterns.get(row["pattern"] or "dense", 0) + 1
        own = branches.setdefault(matrices[path], {"matrices": 0, "weights": 0, "zeros": 0})
        own["matrices"] += 1
        own["weights"] += row["numel"]
        own["zeros"] += row["zeros"]
    for own in branches.values():
        own["sparsity"] = own["zeros"] / max(1, own["weights"])
    found = {path: mask_files.weight_at(model, path).detach() != 0 for path in rows}
    zeros, weights = sum(row["zeros"] for row in rows.values()), sum(row["numel"] for row in rows.values())
    return {
        "sparsity": zeros / max(1, weights), "patterns": patterns, "branches": branches,
        "masks": mask_files.mask_digest(found),
        "violations": [] if folder is None else _violations(Path(folder), model, rows),
    }  # fmt: skip


def _matrices(model: Any) -> dict[str, str]:
    """Path -> branch of the linear layers inside blocks; all linear layers where no branches are found."""
    from torch import nn

    try:
        branches = find_branches(model)
    except BranchNotFoundError:
        return {path: "all" for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {path: name for name in ("vision", "language") for path in branches.linears(name)}


def _violations(folder: Path, model: Any, rows: dict[str, dict[str, Any]]) -> list[str]:
    wrong: list[str] = []
    if (folder / SPARSITY).is_file():
        said = json.loads((folder / SPARSITY).read_text())["modules"]
        for path, row in said.items():
            changed = [key for key in row if path not in rows or rows[path][key] != row[key]]
            if changed:
                now = rows.get(path, {}).get(changed[0])
                wrong.append(f"{path}: {changed[0]} is {now}, {SPARSITY} says {row[changed[0]]}")
    if (folder / mask_files.FILE).is_file() and not _is_dense(folder):
        for path, mask in mask_files.load_masks(folder).items():
            weight = mask_files.weight_at(model, path).detach().cpu()
            if lost := int((weight[~mask] != 0).sum()):
                wrong.append(f"{path}: {lost} weights that its mask prunes are not zero")
    return wrong


def _is_dense(folder: Path) -> bool:
    """A folder that keeps its dense weights beside the masks."""
    record = folder / "ressa.json"
    return record.is_file() and bool(json.loads(record.read_text()).get("dense"))
