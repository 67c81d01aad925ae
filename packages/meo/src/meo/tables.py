"""The paper's tables: how a row is measured. The tables themselves are YAML files in the package's folder tables/.

A row names what its feed-forwards are; it is trained on each of the data, and `figures` name what is measured:

    model, kind, data, heldout          as of `meo train`; data and heldout are lists, a model is trained on each
    method, experts, k, level, ...      as of `meo train`
    samples, heldout_samples, length, steps, epochs, batch, rate
    score                               the figure by which a kind is judged (accuracy unless given)
    figures                             score, cost, time, leak
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import fields
from math import ceil
from pathlib import Path
from typing import Any

from paper_tables import Context, Paper, tables_folder
from paper_tables.errors import TableError, nearest

Cell = Mapping[str, Any]


def run(cell: Cell, context: Context) -> dict[str, Any]:
    """Measure one row for one seed."""
    unknown = [name for name in cell["figures"] if name not in FIGURES]
    if unknown:
        raise TableError(f"unknown figure {unknown[0]!r}{nearest(unknown[0], FIGURES)}")
    found: dict[str, Any] = {}
    for name in cell["figures"]:
        found |= FIGURES[name](cell, context)
    columns = context.once(("columns", cell["table"]), lambda: set(PAPER.tables()[cell["table"]].columns))
    return {name: figure for name, figure in found.items() if name in columns}


def _conversion(cell: Cell) -> dict[str, Any]:
    """The cell's settings that say how a model is converted: of a dense one none but the seed."""
    from meo.options import Conversion

    said = {f.name: cell[f.name] for f in fields(Conversion) if f.name in cell}
    return {k: said[k] for k in ("method", "seed")} if cell["method"] == "none" else said


def _trained(cell: Cell, context: Context, place: int) -> dict[str, Any]:
    """Figures of the model that was trained on the cell's `place`-th data, and its leak: made once for all tables."""
    settings: dict[str, Any] = {
        "model": cell["model"], "kind": cell["kind"], "data": cell["data"][place], "heldout": cell["heldout"][place],
        "samples": cell["samples"], "heldout_samples": cell["heldout_samples"], "length": cell["length"],
        "max_steps": cell.get("steps", 0), "epochs": float(cell.get("epochs", 1)), "batch_size": cell["batch"],
        "learning_rate": cell["rate"], "target_length": cell.get("target_length", 64), "beams": cell.get("beams", 1),
        "parts": cell.get("parts", "all"), **_conversion(cell),
    }  # fmt: skip
    key = ("trained", *sorted((k, str(v)) for k, v in settings.items()))
    made: dict[str, Any] = context.once(key, lambda: _train(settings))
    return made


def _train(settings: dict[str, Any]) -> dict[str, Any]:
    """Train through files, as a user would."""
    from meo.train import TrainConfig, train
    from meo.workflow import load_for, placed

    with tempfile.TemporaryDirectory() as room:
        output = Path(room) / "trained"
        result = train(TrainConfig(output=output, **settings))
        figures = {row["figure"]: {"value": row["after"], "se": row["se"] or 0.0} for row in result["figures"]}
        leak = leak_of(placed(load_for(str(output), settings["kind"], None)[0])) if settings["kind"] == "clm" else None
    return {"figures": figures, "leak": leak, "parameters": result["parameters"], "seconds": result["seconds"]}


def _score(cell: Cell, context: Context) -> dict[str, Any]:
    """The score on each of the data, by its name, and their mean; all figures where it is one; what training took."""
    score = cell.get("score", "accuracy")
    made = [_trained(cell, context, place) for place in range(len(cell["data"]))]
    names = [data.removeprefix("zoo:glue:").partition(":")[0] for data in cell["data"]]
    each = {name: m["figures"][score] for name, m in zip(names, made)}
    value = sum(f["value"] for f in each.values()) / len(each)
    se = sum(f["se"] ** 2 for f in each.values()) ** 0.5 / len(each)
    more = made[0]["figures"] if len(made) == 1 else {}
    seconds = sum(m["seconds"] for m in made) / len(made)
    average = {"value": value, "se": se}
    return {**each, **more, "average": average, "parameters": made[0]["parameters"] / 1e6, "seconds": seconds}


def _cost(cell: Cell, context: Context) -> dict[str, Any]:
    """GFLOPs of a forward pass over 128 tokens by formula, of this model and of the paper's base size."""
    from meo.flops import SIZES, count, sizes_of
    from meo.options import Conversion

    how: dict[str, Any] = {"tokens": 128}
    meo = Conversion(**_conversion(cell)).meo
    if meo is not None:
        mixed = meo.level == "cumulative"  # each token has experts of its own, so their outputs are mixed
        merges = {"task": 1, "chunk": ceil(128 / meo.chunk)}.get(meo.level)
        how |= {"method": "moe" if mixed else meo.method, "k": meo.k, "groups": merges}
    own = sizes_of(_base(cell, context).config, head=cell["kind"] in ("clm", "mlm"))
    return {"gflops": count(own, **how)["total"] / 1e9, "base": count(SIZES["base"], **how)["total"] / 1e9}


def _base(cell: Cell, context: Context) -> Any:
    from meo.workflow import load_for, placed

    def load() -> Any:
        return placed(load_for(cell["model"], cell["kind"], None, tokenizer="")[0])

    return context.latest("base", (cell["model"], cell["kind"]), load)


def _time(cell: Cell, context: Context) -> dict[str, Any]:
    """Time of a forward pass as a multiple of the dense model's, medians in turn; gates are drawn by lot, for trained
    ones choose what their data says."""
    import copy

    import torch

    from meo.converting import banks, convert
    from meo.options import Conversion
    from paper_tables.probe import token_ids
    from paper_tables.timing import interleaved

    dense = _base(cell, context)
    meo = Conversion(**_conversion(cell)).meo
    ids = token_ids(dense, cell.get("rows", 4), cell.get("tokens", 128))
    if meo is None:
        return {"time": 1.0}
    model = convert(copy.deepcopy(dense), meo)
    with torch.no_grad():
        for bank in banks(model).values():
            if hasattr(bank, "w_gate"):
                bank.w_gate.normal_()

    def forward(m: Any) -> Callable[[], Any]:
        def work() -> Any:
            with torch.no_grad():
                return m(input_ids=ids)

        return work

    found = interleaved({"dense": forward(dense), "own": forward(model)}, rounds=cell.get("rounds", 7))["own"]
    ratio = 1 / found.speedup
    return {"time": {"value": ratio, "se": ratio * ratio * found.se}}


def leak_of(model: Any, tokens: int = 160) -> float:
    """Largest change of an output when a later token changes, relative to that token's own output; 0: no leak."""
    import torch

    from paper_tables.probe import token_ids

    ids = token_ids(model, 1, min(tokens, model.config.max_position_embeddings))
    changed = ids.clone()
    last = ids.shape[1] - 1
    changed[0, last] = (changed[0, last] + 5) % model.config.vocab_size
    with torch.no_grad():
        difference = (model(input_ids=ids).logits - model(input_ids=changed).logits).abs()
    return float(difference[:, :last].max() / difference[:, last:].max().clamp_min(1e-12))


def _leak(cell: Cell, context: Context) -> dict[str, Any]:
    return {"leak": _trained(cell, context, 0)["leak"]}


FIGURES: dict[str, Callable[[Cell, Context], dict[str, Any]]] = {
    "score": _score, "cost": _cost, "time": _time, "leak": _leak,
}  # fmt: skip

PAPER = Paper(
    "meo", tables_folder(__file__), run,
    title="Merging Experts into One: Improving Computational Efficiency of Mixture of Experts",
)  # fmt: skip
