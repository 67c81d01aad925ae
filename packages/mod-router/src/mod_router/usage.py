"""Which layers run on which data, and what follows: layers that never do can leave the model for good."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model_hooks.errors import RequestError
from model_hooks.files import atomic_write, refuse_existing

PLAN_FORMAT = "llm-drop plan 1"


def plan(
    usage: Mapping[int, float], unit: str, below: float, *, num_layers: int, original: tuple[int, ...], name: str,
    fingerprint: str,
) -> dict[str, Any]:  # fmt: skip
    """A plan as `llm-drop drop` reads it: the units of all gated layers that run for less than the share `below`.

    Args:
        usage: layer -> share of the sequences that ran it. original: of each layer, its number before any drop.

    Raises:
        RequestError: no layer is used so little, or no attention would stay.
    """
    if not 0 < below <= 1:
        raise RequestError(f"below={below}: a share in (0, 1] is needed")
    closed = sorted(original[layer] for layer, share in usage.items() if share < below)
    if not closed:
        least = min(usage.values())
        raise RequestError(f"no gated layer runs for less than {below:.3g} of the sequences (the least is {least:.3g})")
    attention = closed if unit in ("attention", "block") else []
    if len(attention) == num_layers:
        raise RequestError(f"all {num_layers} attention layers are used less than {below:.3g}; give a lower --below")
    return {
        "format": PLAN_FORMAT, "num_layers": num_layers, "attention": attention,
        "mlp": closed if unit in ("mlp", "block") else [], "how": f"mod-router: {unit} used below {below:g}",
        "model": name, "fingerprint": fingerprint, "importance": None,
    }  # fmt: skip


def write_plan(record: Mapping[str, Any], output: Path, overwrite: bool = False) -> Path:
    refuse_existing(output, overwrite)
    atomic_write(output, json.dumps(record, indent=2) + "\n")
    return output


def heat_map(usage: Mapping[str, Mapping[int, float]], title: str) -> bytes:
    """A PNG: a row for each data set, a column for each gated layer, shade by the share of sequences that ran it."""
    from paper_tables.plots import draw_matrix, new_figure, png

    figure, axes = new_figure(title)
    layers = sorted(next(iter(usage.values())))
    numbers = [[shares[layer] for layer in layers] for shares in usage.values()]
    draw_matrix(figure, axes, numbers, "gated layer", "data")
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_yticks(range(len(usage)), list(usage))
    return png(figure)
