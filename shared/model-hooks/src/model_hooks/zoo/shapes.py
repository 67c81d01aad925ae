"""Drawn images with questions about them: what a tiny vision-language model can really learn in minutes.

    items = shapes.items("calibration", 128)                # [Item(image, kind, question, answer)]
    items[0].image                                          # uint8 array [32, 32, 3]

An image is a grid of two by two cells. Each cell holds a circle, square, triangle or cross in one of six colours, a
little off its centre, on a grey background with Gaussian noise. NumPy alone draws them, so that the same split, count
and seed are the same images on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIZE, CELL = 32, 16  # pixels
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 230),
    "yellow": (230, 210, 40),
    "purple": (160, 50, 200),
    "orange": (245, 140, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
CELLS = ("topleft", "topright", "bottomleft", "bottomright")
KINDS = ("color", "shape", "describe")
SPLITS = ("train", "calibration", "heldout")
WORDS = ("what", "color", "shape", "describe", "?", *CELLS, *COLORS, *SHAPES)

RADIUS = (6.2, 7.0)
SHIFT = 1.0  # of a shape's centre from its cell's, at most
GREY = (60, 200)
NOISE = 4.0  # standard deviation


@dataclass(frozen=True, eq=False)
class Item:
    """``image`` is uint8 [32, 32, 3]; ``kind`` is one of ``KINDS``."""

    image: NDArray[np.uint8]
    kind: str
    question: str
    answer: str


def draw(rng: np.random.Generator, count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
    """``count`` images, uint8 [count, 32, 32, 3], and the index of each cell's colour and shape, [count, 4]."""
    colors, shapes = rng.integers(len(COLORS), size=(count, 4)), rng.integers(len(SHAPES), size=(count, 4))
    center = CELL / 2 - 0.5 + rng.uniform(-SHIFT, SHIFT, (2, count, 4, 1, 1))
    radius = rng.uniform(*RADIUS, (count, 4, 1, 1))
    axis = np.arange(CELL)
    y, x = axis[:, None] - center[0], axis[None, :] - center[1]
    wide, high = np.abs(x), np.abs(y)
    inside = np.stack(
        [
            x**2 + y**2 <= radius**2,
            np.maximum(wide, high) <= 0.85 * radius,
            (high <= 0.9 * radius) & (wide <= 0.5 * (y + 0.9 * radius)),
            (np.maximum(wide, high) <= radius) & (np.minimum(wide, high) <= radius / 3),
        ]
    )
    chosen = np.take_along_axis(inside, shapes[None, :, :, None, None], 0)[0]  # [count, 4, 16, 16]
    grey = rng.uniform(*GREY, (count, 1, 1, 1, 1)) * np.ones(3)
    palette = np.array(list(COLORS.values()), float)
    cells = np.where(chosen[..., None], palette[colors][:, :, None, None], grey)
    grid = cells.reshape(count, 2, 2, CELL, CELL, 3).swapaxes(2, 3).reshape(count, SIZE, SIZE, 3)
    noisy = grid + rng.normal(0.0, NOISE, grid.shape)
    return noisy.round().clip(0, 255).astype(np.uint8), colors, shapes


def stream(rng: np.random.Generator, count: int, kinds: tuple[str, ...] = KINDS) -> list[Item]:
    """``count`` items, one question each, as many of each kind and in turn."""
    images, colors, shapes = draw(rng, count)
    cells, names = rng.integers(len(CELLS), size=count), tuple(COLORS)
    items = []
    for i in range(count):
        kind, cell = kinds[i % len(kinds)], cells[i]
        said = {"color": names[colors[i, cell]], "shape": SHAPES[shapes[i, cell]]}
        if kind == "describe":
            whole = " ".join(f"{names[c]} {SHAPES[s]}" for c, s in zip(colors[i], shapes[i], strict=True))
            items.append(Item(images[i], kind, "describe", whole))
        else:
            items.append(Item(images[i], kind, f"what {kind} {CELLS[cell]} ?", said[kind]))
    return items


def items(split: str, count: int, seed: int = 0, kinds: tuple[str, ...] = KINDS) -> list[Item]:
    """The first ``count`` items of a split; splits and seeds are drawn from different generators.

    ``ValueError`` for another split or another kind of question.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; the shapes have {', '.join(SPLITS)}")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"unknown kind of question {unknown or kinds}; the shapes have {', '.join(KINDS)}")
    return stream(np.random.default_rng([SPLITS.index(split), seed]), count, kinds)
