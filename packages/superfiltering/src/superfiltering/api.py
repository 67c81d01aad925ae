"""Superfiltering inside a training script: a dataset and a small model in, positions of the chosen records out."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from .scores import read_scores, score_records
from .selection import Selection, Share, Turns, select


def superfilter(
    dataset: Any,
    model: Any,
    tokenizer: Any,
    *,
    top: Share = 0.1,
    maximum: float = 1.0,
    template: str = "none",
    compat: str = "original",
    max_length: int = 1024,
    turns: Turns = "mean",
) -> Selection:
    """Choose the share `top` of `dataset` with the highest IFD below `maximum` under `model` (section 2 of the paper).

    `dataset`: anything `instruct_data.read` takes, a `datasets.Dataset` or a list of dicts among it. `chosen` of the
    result holds the positions, best first: `dataset.select(found.chosen)`. Raises `RequestError` for bad records.
    """
    from instruct_data import read

    records = read(dataset)
    with tempfile.TemporaryDirectory() as room:
        file = Path(room) / "scores.parquet"
        score_records(model, tokenizer, records, file, template=template, compat=compat, max_length=max_length)
        scores = read_scores(file, turns)
    return select(scores.ifd_ppl, top=top, maximum=maximum)
