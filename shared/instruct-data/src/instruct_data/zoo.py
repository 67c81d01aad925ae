"""Instruction records that need no download: (docstring, function) pairs of Python's standard library.

`zoo:pairs` are those of the zoo's calibration modules, which ship with model_hooks and are the same everywhere;
`zoo:pairs:heldout` those of its held-out modules, `zoo:pairs:train` those of all other modules of the running Python
that are no copy of a held-out one.
"""

from __future__ import annotations

from typing import Any

from model_hooks.errors import RequestError

PREFIX = "zoo:"
SPLITS = ("calibration", "heldout", "train")


def pairs(name: str) -> list[dict[str, Any]]:
    """Alpaca records `{"id", "instruction", "input", "output"}` of `zoo:pairs` or `zoo:pairs:SPLIT`."""
    from model_hooks import zoo

    kind, _, split = name.removeprefix(PREFIX).partition(":")
    split = split or SPLITS[0]
    if kind != "pairs" or split not in SPLITS:
        raise RequestError(f"no records {name!r}; the zoo has {', '.join(f'zoo:pairs:{s}' for s in SPLITS)}")
    found = zoo.pairs(split)
    if split == "train":  # functions are copied from module to module
        heldout = set(zoo.pairs("heldout"))
        found = [pair for pair in found if pair not in heldout]
    return [
        {"id": f"{split}-{number}", "instruction": instruction, "input": "", "output": output}
        for number, (instruction, output) in enumerate(found)
    ]
