"""The paper's tables: how a row is measured. The tables themselves are YAML files in the package's folder tables/.

A row is a chain of what may be done to a model, in this order, each made through the package's files as a user would:

    model, dtype, calibration, samples, length    the base, and the data that all steps look at
    drop: none, expert, layer or block            with n: experts kept in a layer, MoE layers or blocks dropped;
                                                  scope, metric and repair as in `select_experts` and `repair_routers`
    tune                                          `steps` of LoRA of a `rank`, on `train`, with learning `rate`; each
                                                  step sees `accumulation` batches of `batch` sequences
    slim: none, or a method                       with sparsity, pattern, bits, group, policy
    budget                                        share of the bytes that may remain: drops and bits are solved for

`figures` are the columns that are measured, of those in `FIGURES`; `text`, `documents`, `characters`, `tasks`,
`limit` and `shots` say on what.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from paper_tables import Context, Paper, tables_folder
from paper_tables.errors import TableError, nearest

Cell = Mapping[str, Any]
DROPS = ("none", "expert", "layer", "block")
BASE = ("model", "dtype", "calibration", "samples", "length")
TRIM = (*BASE, "drop", "n", "scope", "metric", "reverse", "repair", "seed")
TUNE = (*TRIM, "tune", "steps", "batch", "accumulation", "rank", "rate", "train", "tune_length")
SLIM = (*TUNE, "slim", "sparsity", "pattern", "bits", "group", "policy", "min_tokens", "budget")


def run(cell: Cell, context: Context) -> dict[str, Any]:
    """Measure one row for one seed."""
    if cell.get("drop", "none") not in DROPS:
        raise TableError(f"unknown drop {cell['drop']!r}{nearest(cell['drop'], DROPS)}")
    unknown = [name for name in cell["figures"] if name not in FIGURES]
    if unknown:
        raise TableError(f"unknown figure {unknown[0]!r}{nearest(unknown[0], FIGURES)}")
    found: dict[str, Any] = {}
    for measure in dict.fromkeys(FIGURES[name] for name in cell["figures"]):
        found |= measure(cell, context)
    return {name: found[name] for name in cell["figures"]}


def _key(cell: Cell, names: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple((name, cell.get(name)) for name in names)


def _room(context: Context) -> Path:
    """A folder that lives as long as the process."""
    room: Any = context.once("moe-compress room", tempfile.TemporaryDirectory)
    return Path(room.name)


def _made(context: Context, what: tuple[Any, ...], make: Callable[[Path], Any]) -> str:
    """The folder that `make` fills; each is made once."""

    def fill() -> str:
        folder = _room(context) / f"{len(list(_room(context).iterdir())):03d}"
        make(folder)
        return str(folder)

    return str(context.once(what, fill))


def folder_of(cell: Cell, context: Context) -> str:
    """The row's model: a checkpoint folder, or the base's name where nothing is done to it."""
    if cell.get("budget"):
        return _made(context, ("budget", *_key(cell, SLIM)), lambda folder: _solved(cell, folder))
    source = _trimmed(cell, context)
    if cell.get("tune"):
        base = source
        source = _made(context, ("tuned", *_key(cell, TUNE)), lambda folder: _tuned(cell, base, folder))
    if cell.get("slim", "none") == "none":
        return source
    return _made(context, ("slimmed", *_key(cell, SLIM)), lambda folder: _slimmed(cell, source, folder))


def _trimmed(cell: Cell, context: Context) -> str:
    from moe_compress import workflow

    if cell.get("drop", "none") == "none":
        return str(cell["model"])
    keys = ("model", "calibration", "samples", "length")
    scores = context.once(("scores", *_key(cell, keys), cell.get("metric") == "reconstruction"), lambda: _scores(cell))
    what = {"expert": "experts", "layer": "layers", "block": "blocks"}[cell["drop"]]
    options = {name: cell[name] for name in ("scope", "metric", "reverse") if name in cell}
    plan = workflow.choose(
        scores, {what: cell["n"], **options, "allow_lower_topk": cell.get("allow_lower_topk", False)}
    )

    def make(folder: Path) -> None:
        repair = workflow.sequences_for(cell["model"], cell["calibration"], cell["samples"], cell["length"])
        workflow.trim_to_folder(
            cell["model"], plan, folder, repair=repair if cell.get("repair") else None, measure="",
            dtype=cell.get("dtype", "auto"),  # as the base is stored, so that bytes compare
        )  # fmt: skip

    return _made(context, ("trimmed", *_key(cell, TRIM)), make)


def _scores(cell: Cell) -> Any:
    from moe_compress.workflow import score_source

    return score_source(
        cell["model"], cell["calibration"], samples=cell["samples"], length=cell["length"], batch_size=4,
        reconstruction=cell.get("metric") == "reconstruction", dtype=cell.get("dtype", "float32"),
    )  # fmt: skip


def _tuned(cell: Cell, source: str, folder: Path) -> None:
    from moe_compress.finetune import TuneConfig, finetune

    steps, batch, accumulation = cell["steps"], cell.get("batch", 4), cell.get("accumulation", 1)
    finetune(
        TuneConfig(
            model=source, output=folder, data=cell["train"], samples=steps * batch * accumulation,
            length=cell["tune_length"], heldout=cell["calibration"], heldout_samples=4, max_steps=steps,
            batch_size=batch, accumulation=accumulation, learning_rate=cell.get("rate", 0.0),
            rank=cell.get("rank", 16), alpha=2 * cell.get("rank", 16), seed=cell["seed"],
            bf16=cell.get("dtype") == "bfloat16",
        )
    )  # fmt: skip


def _slimmed(cell: Cell, source: str, folder: Path) -> None:
    from moe_compress.slimming import Slimming
    from moe_compress.workflow import slim_to_folder

    names = ("sparsity", "pattern", "bits", "group", "policy", "min_tokens")
    how = Slimming(cell["slim"], **{name: cell[name] for name in names if name in cell})
    slim_to_folder(
        source, folder, how, cell["calibration"], samples=cell["samples"], length=cell["length"], batch_size=4,
        form="compressed-tensors", workspace=4e9,
    )  # fmt: skip


def _solved(cell: Cell, folder: Path) -> None:
    from moe_compress.recipe import Recipe, run
    from moe_compress.workflow import weight_bytes

    budget = {"bytes": cell["budget"] * weight_bytes(cell["model"]), "group": cell.get("group", 128)}
    calibration = {"data": cell["calibration"], "samples": cell["samples"], "length": cell["length"]}
    run(Recipe(cell["model"], (), calibration, budget), folder, measure="")


def _model(cell: Cell, context: Context, folder: str) -> tuple[Any, Any]:
    from moe_compress.packing import load

    pair: tuple[Any, Any] = context.latest("model", folder, lambda: load(folder, cell.get("dtype", "float32")))
    return pair


def _language(cell: Cell, context: Context) -> dict[str, Any]:
    from paper_tables.quality import excerpts, language

    folder = folder_of(cell, context)
    documents, characters = cell.get("documents"), cell.get("characters")

    def measure() -> Any:
        return language(*_model(cell, context, folder), excerpts(cell["text"], documents, characters))

    found = context.once(("language", folder, cell["text"], documents, characters), measure)
    return {"bits": found["bits_per_byte"]}


def _tasks(cell: Cell, context: Context) -> dict[str, Any]:
    """Accuracies in percent, their mean, and the mean as a share of the base's."""
    own = _accuracies(cell, context, folder_of(cell, context))
    whole = _accuracies(cell, context, str(cell["model"]))
    ratio = own["accuracy"]["value"] / whole["accuracy"]["value"]
    relative = [f["accuracy"]["se"] / f["accuracy"]["value"] for f in (own, whole) if f["accuracy"]["value"]]
    error = 0.0 if own is whole else 100 * ratio * sum(part**2 for part in relative) ** 0.5
    return {**own, "kept": {"value": 100 * ratio, "se": error}}


def _accuracies(cell: Cell, context: Context, folder: str) -> dict[str, Any]:
    from paper_tables.quality import accuracies

    def measure() -> dict[str, Any]:
        model, tokenizer = _model(cell, context, folder)
        found: dict[str, Any] = {}
        shots = cell.get("shots") or {}
        for count in dict.fromkeys(shots.get(task) for task in cell["tasks"]):
            same = [task for task in cell["tasks"] if shots.get(task) == count]
            found |= accuracies(model, tokenizer, same, limit=cell.get("limit"), shots=count)
        percent = {task: {k: 100 * v for k, v in found[task].items()} for task in cell["tasks"]}
        mean = sum(f["value"] for f in percent.values()) / len(percent)
        error = sum(f.get("se", 0.0) ** 2 for f in percent.values()) ** 0.5 / len(percent)
        return {**percent, "accuracy": {"value": mean, "se": error}}

    found: dict[str, Any] = context.once(
        ("tasks", folder, tuple(cell["tasks"]), cell.get("limit"), str(cell.get("shots"))), measure
    )
    return found


def _cost(cell: Cell, context: Context) -> dict[str, Any]:
    """Bytes of the files, parameters and operations a token, as shares of the base's; and bytes in GB."""
    from moe_compress.workflow import weight_bytes

    folder, base = folder_of(cell, context), str(cell["model"])
    own, whole = (_sizes(cell, context, where) for where in (folder, base))
    size = weight_bytes(folder)
    return {
        "bytes": size / weight_bytes(base), "gigabytes": size / 1e9,
        "parameters": own["parameters"] / whole["parameters"], "flops": own["flops"] / whole["flops"],
    }  # fmt: skip


def _sizes(cell: Cell, context: Context, folder: str) -> dict[str, float]:
    from model_hooks import anatomy
    from model_hooks.experts import moe_layers
    from paper_tables.metrics import parameters

    def count() -> dict[str, float]:
        model, _ = _model(cell, context, folder)
        layers = {layer.name: layer for layer in moe_layers(anatomy(model))}
        banks = {id(p) for layer in layers.values() for p in layer.bank.parameters()}
        active = sum(layer.top_k * p[0].numel() for layer in layers.values() for p in layer.bank.parameters())
        rest = sum(p.numel() for p in model.parameters() if p.dim() == 2 and id(p) not in banks)
        return {"parameters": float(parameters(model)), "flops": 2.0 * (active + rest)}

    found: dict[str, float] = context.once(("sizes", folder), count)
    return found


def _speed(cell: Cell, context: Context) -> dict[str, Any]:
    """Both phases beside the base, batch 1, the same kernels on both sides; of what has fewer or smaller layers."""
    from moe_compress.packing import load
    from paper_tables.probe import speed

    folder = folder_of(cell, context)
    if folder == cell["model"]:
        return {"prefill": 1.0, "decode": 1.0}
    dtype = cell.get("dtype", "float32")
    parent, _ = context.latest("parent", cell["model"], lambda: load(cell["model"], dtype))
    model, _ = _model(cell, context, folder)
    options = {"context": cell.get("context", 128), "new_tokens": cell.get("new_tokens", 16)}
    found = speed(parent, {"row": model}, rounds=cell.get("rounds", 7), **options)["row"]
    return {"prefill": found["prefill"].figure, "decode": found["decode"].figure}


FIGURES: dict[str, Callable[[Cell, Context], dict[str, Any]]] = {
    "bits": _language, "accuracy": _tasks, "kept": _tasks, "bytes": _cost, "gigabytes": _cost, "parameters": _cost,
    "flops": _cost, "decode": _speed, "prefill": _speed,
}  # fmt: skip

PAPER = Paper(
    "moe-compress", tables_folder(__file__), run,
    title="Towards Efficient Mixture of Experts: A Holistic Study of Compression Techniques",
)  # fmt: skip
