"""How few dimensions do keys have? Ranks, spectra, and whether two texts agree on the directions (section 3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from model_hooks.errors import RequestError

from .basis import Basis

SHARES = (0.8, 0.9, 0.95)


def overlap(a: Basis, b: Basis, d: int) -> Tensor:
    """Agreement of the leading `d` directions of two bases, [L, Hkv] in [0, 1]: mean squared cosine of their angles.

    1 where both span the same space; d / D is what two random spaces have.
    """
    if a.components.shape != b.components.shape or a.layers != b.layers:
        raise RequestError(
            f"bases of shape {tuple(a.components.shape)} and {tuple(b.components.shape)} cannot be compared; "
            "calibrate both on the same model"
        )
    cosines = a.components[..., :d].transpose(-1, -2).double() @ b.components[..., :d].double()
    return cosines.square().sum((-1, -2)) / d


def ranks(basis: Basis) -> list[dict[str, Any]]:
    """A row for each layer: mean rank over heads at 80, 90 and 95 % of the variance, and the heads' range at 90 %."""
    found = {share: basis.rank(share) for share in SHARES}
    rows = []
    for row, layer in enumerate(basis.layers):
        means = {f"rank_{share * 100:.0f}": float(found[share][row].double().mean()) for share in SHARES}
        at_90 = found[0.9][row]
        rows.append({"layer": layer, **means, "least_90": int(at_90.min()), "most_90": int(at_90.max())})
    return rows


def summary(basis: Basis) -> dict[str, Any]:
    """Mean rank over layers and heads at each share, as a number and as a part of the head width (Figure 1)."""
    found: dict[str, Any] = {"head_width": basis.head_dim}
    for share in SHARES:
        rank = float(basis.rank(share).double().mean())
        found[f"rank_{share * 100:.0f}"] = rank
        found[f"of_width_{share * 100:.0f}"] = rank / basis.head_dim
    return found


def draw(basis: Basis, folder: Path, title: str) -> dict[str, Path]:
    """Three pictures in `folder`: ranks by layer and head, explained variance by layer, spectra of a few heads."""
    from model_hooks.files import atomic_write
    from paper_tables.plots import png

    pictures = {"ranks": _ranks, "variance": _variance, "spectra": _spectra}
    paths = {}
    for name, make in pictures.items():
        paths[name] = folder / f"{name}.png"
        atomic_write(paths[name], png(make(basis, title)))
    return paths


def _ranks(basis: Basis, title: str) -> Any:
    from paper_tables.plots import draw_matrix, new_figure

    layers, heads = basis.eigenvalues.shape[:2]
    size = {"width": max(4.5, min(9.0, 2.0 + 0.25 * layers)), "height": max(2.2, min(6.0, 1.2 + 0.3 * heads))}
    figure, axes = new_figure(f"Rank at 90 % of the variance, width {basis.head_dim}\n{title}", **size)
    draw_matrix(figure, axes, basis.rank(0.9).T.double().tolist(), "layer", "KV head")
    return figure


def _variance(basis: Basis, title: str) -> Any:
    from paper_tables.plots import INK, new_figure

    figure, axes = new_figure(f"Variance in the leading dimensions\n{title}")
    explained = basis.explained.mean(1)  # [L, D], mean over heads
    dimensions = range(1, basis.head_dim + 1)
    for row in _few(len(basis.layers)):
        axes.plot(dimensions, explained[row], linewidth=1.4, label=f"layer {basis.layers[row]}")
    axes.axhline(0.9, color="#777777", linestyle=(0, (4, 3)), linewidth=1.2, label="90 %")
    axes.set_xlabel("dimensions", fontsize=9.5, color=INK)
    axes.set_ylabel("share of the variance", fontsize=9.5, color=INK)
    axes.set_ylim(0, 1.02)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    return figure


def _spectra(basis: Basis, title: str) -> Any:
    from paper_tables.plots import INK, new_figure

    figure, axes = new_figure(f"Eigenvalues as shares of the largest\n{title}")
    values = basis.eigenvalues.double()
    values = (values / values[..., :1]).clamp_min(1e-8)
    heads = values.shape[1]
    for row in _few(len(basis.layers)):
        head = row % heads
        axes.semilogy(range(1, basis.head_dim + 1), values[row, head], linewidth=1.4,
                      label=f"layer {basis.layers[row]}, head {head}")  # fmt: skip
    axes.set_xlabel("dimension", fontsize=9.5, color=INK)
    axes.set_ylabel("eigenvalue", fontsize=9.5, color=INK)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    return figure


def _few(layers: int, most: int = 5) -> list[int]:
    """At most `most` rows, evenly spread from the first to the last."""
    count = min(layers, most)
    return sorted({round(i * (layers - 1) / max(1, count - 1)) for i in range(count)})
