"""The paper's tables: how a row is measured. The tables themselves are YAML files in the package's folder tables/.

A row names who decides (`method`) and what it may skip; the scale's `figures` name what is measured. Every parameter:

    model, dtype, data, kind           the base, and what routers are trained on; samples, length, steps, batch
    text, heldout                      held-out data, and how many examples of it
    method                             dense, static (the least similar attention runs), random (by lot), ours, paper,
                                       moved (ours, trained for `trained_at` and moved by its threshold) or full (all
                                       weights are trained along)
    layers, unit, level, pool          as in `RouterConfig`
    capacity                           share of (sequence, layer) pairs that run
    rates                              learning rates by method (ours, paper, full)
    tasks, limit, shots                lm-eval tasks
    figures                            loss, tasks, speed, cost, usage
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from paper_tables import Context, Paper, tables_folder
from paper_tables.errors import TableError, nearest

Cell = Mapping[str, Any]
METHODS = ("dense", "static", "random", "ours", "moved", "paper", "full")


def run(cell: Cell, context: Context) -> dict[str, Any]:
    """Measure one row for one seed."""
    if cell["method"] not in METHODS:
        raise TableError(f"unknown method {cell['method']!r}{nearest(cell['method'], METHODS)}")
    unknown = [name for name in cell["figures"] if name not in FIGURES]
    if unknown:
        raise TableError(f"unknown figure {unknown[0]!r}{nearest(unknown[0], FIGURES)}")
    found: dict[str, Any] = {}
    with _row(cell, context) as row:
        for name in cell["figures"]:
            found |= FIGURES[name](cell, context, row)
    return found


class Row:
    """A row at work: a model with gates on, who decides, and what training took.

    Attributes:
        model, tokenizer, examples: gates on, unless the method is dense.
        forced: decisions that are not the routers', or None.
        trained, seconds: parameters trained, and how long; 0 where nothing was.
    """

    def __init__(self, model: Any, tokenizer: Any, examples: Any) -> None:
        self.model, self.tokenizer, self.examples = model, tokenizer, examples
        self.forced: Any = None
        self.trained, self.seconds = 0, 0.0
        self._measured: Any = None

    def measured(self) -> Any:
        from mod_router.measuring import measure

        if self._measured is None:
            self._measured = measure(self.model, self.examples, forced=self.forced)
        return self._measured


def _base(cell: Cell, context: Context) -> tuple[Any, Any]:
    key = (cell["model"], cell.get("dtype", "float32"))
    pair: tuple[Any, Any] = context.latest("base", key, lambda: _load(cell))
    return pair


def _load(cell: Cell) -> tuple[Any, Any]:
    import torch

    import model_hooks

    device_map = "auto" if torch.cuda.is_available() else None
    return model_hooks.load(cell["model"], dtype=cell.get("dtype", "float32"), device_map=device_map)


def _examples(cell: Cell, context: Context, source: str, count: int, seed: int = 0) -> Any:
    from mod_router.data import read_examples

    _, tokenizer = _base(cell, context)
    how = {"samples": count, "length": cell["length"], "kind": cell.get("kind", "auto"), "seed": seed}
    template = cell.get("template", "none")
    key = ("examples", cell["model"], source, *how.values(), template)
    return context.once(key, lambda: read_examples(source, tokenizer, template=template, **how))


@contextmanager
def _row(cell: Cell, context: Context) -> Any:
    """The row's model; the shared base is as it was afterwards."""
    from mod_router.attaching import attach, detach

    model, tokenizer = _base(cell, context)
    row = Row(model, tokenizer, _examples(cell, context, cell["text"], cell["heldout"]))
    method, gates = cell["method"], {"layers": cell.get("layers", "last"), "unit": cell.get("unit", "attention")}
    if method == "full":
        _full(cell, context, row)
        yield row
        return
    if method == "static":
        row.forced = _static(cell, context)
    if method in ("ours", "paper", "moved"):
        _trained(cell, context, row)
    else:
        attach(model, **gates)
    if method == "random":
        from mod_router.baselines import by_lot
        from mod_router.gate import runtime_of

        row.forced = by_lot(runtime_of(model).layers, cell["capacity"], len(row.examples), cell["seed"])
    try:
        yield row
    finally:
        detach(model)


def _static(cell: Cell, context: Context) -> Any:
    from mod_router.baselines import static
    from mod_router.config import RouterConfig
    from model_hooks.text import load_sequences

    model, tokenizer = _base(cell, context)
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    layers = RouterConfig(layers=cell.get("layers", "last")).resolved(depth)
    ids = load_sequences(
        tokenizer, cell["calibration"], samples=cell.get("calibration_samples", 16), length=cell["length"],
        seed=cell["seed"] or None,
    )  # fmt: skip
    return static(model, ids, layers, cell.get("unit", "attention"), round(cell["capacity"] * len(layers)))


def _trained(cell: Cell, context: Context, row: Row) -> None:
    """Routers as `mod-router tune` leaves them: through its files, as a user would; each training is made once."""
    from mod_router.attaching import set_tau
    from mod_router.checkpoint import set_weights
    from mod_router.measuring import calibrate

    target = cell.get("trained_at", cell["capacity"]) if cell["method"] == "moved" else cell["capacity"]
    recipe = "paper" if cell["method"] == "paper" else "ours"
    kind = cell.get("kind", "auto")  # one for both of the tune's sources, so records are measured on records
    heldout = cell["text"] if kind == "records" else cell["calibration"]
    settings = {
        "model": cell["model"], "recipe": recipe, "layers": cell.get("layers", "last"),
        "unit": cell.get("unit", "attention"), "level": cell.get("level", "sequence"), "pool": cell.get("pool", ""),
        "target_capacity": target, "cheap_train": cell.get("cheap_train", False), "distill": cell.get("distill", -1.0),
        "penalty": cell.get("penalty", 0.0), "calibrate": False, "data": cell["data"], "kind": kind,
        "template": cell.get("template", "none"), "samples": cell["samples"], "length": cell["length"],
        "heldout": heldout, "heldout_samples": 8, "max_steps": cell["steps"], "batch_size": cell["batch"],
        "learning_rate": cell.get("rates", {}).get(recipe, 0.0), "seed": cell["seed"],
        "bf16": cell.get("dtype") == "bfloat16",
    }  # fmt: skip
    if recipe == "paper":
        settings |= {"batch_size": cell.get("paper_batch", 1), "accumulation": cell.get("paper_accumulation", 8),
                     "max_steps": cell.get("paper_steps", cell["steps"]), "target_capacity": 1.0}  # fmt: skip
    record = context.once(("trained", *settings.items()), lambda: _tune(settings))
    from mod_router.attaching import attach

    attach(row.model, record["config"])
    set_weights(row.model, record["weights"])
    row.trained, row.seconds = record["trainable"], record["seconds"]
    if cell["method"] == "paper":
        set_tau(row.model, record["config"].tau)
    else:  # on the prompts alone, so that all rows are compared at one capacity
        calibrate(row.model, row.examples, cell["capacity"])


def _tune(settings: Mapping[str, Any]) -> dict[str, Any]:
    from safetensors.torch import load_file

    from mod_router.checkpoint import WEIGHTS, read_record
    from mod_router.config import RouterConfig
    from mod_router.tune import TuneConfig, tune

    with tempfile.TemporaryDirectory() as room:
        result = tune(TuneConfig(output=Path(room) / "routers", **settings))
        record = read_record(Path(room) / "routers")["config"]
        weights = {int(k.split(".")[1]): v for k, v in load_file(Path(room) / "routers" / WEIGHTS).items()}
    config = RouterConfig(**{**record, "layers": tuple(record["layers"])})
    return {"config": config, "weights": weights, "trainable": result["trainable"], "seconds": result["seconds"]}


def _full(cell: Cell, context: Context, row: Row) -> None:
    """A copy of the base, trained with its routers; `row.model` becomes that copy."""
    import copy

    from mod_router.attaching import attach
    from mod_router.baselines import train_everything
    from mod_router.measuring import calibrate

    model = attach(
        copy.deepcopy(row.model), layers=cell.get("layers", "last"), unit=cell.get("unit", "attention"),
        target_capacity=cell["capacity"],
    )  # fmt: skip
    examples = _examples(cell, context, cell["data"], cell["samples"], cell["seed"])
    begun = time.monotonic()
    rates = cell.get("rates", {})
    row.trained = train_everything(
        model, examples, steps=cell["steps"], batch_size=cell["batch"], learning_rate=rates.get("full", 1e-5),
        router_rate=rates.get("ours", 1e-2), seed=cell["seed"],
    )  # fmt: skip
    row.seconds = time.monotonic() - begun
    calibrate(model, row.examples, cell["capacity"])
    row.model = model


def _dense_loss(cell: Cell, context: Context) -> Any:
    """Loss of the base on each held-out example, [N]: made once."""
    from mod_router.attaching import session
    from mod_router.measuring import measure

    model, _ = _base(cell, context)
    examples = _examples(cell, context, cell["text"], cell["heldout"])

    def make() -> Any:
        if "_mod_router" in vars(model):
            return measure(model, examples).base
        with session(model, layers="last:1"):
            return measure(model, examples).base

    return context.once(("dense", cell["model"], cell["text"], cell["heldout"], cell["length"]), make)


def _loss(cell: Cell, context: Context, row: Row) -> dict[str, Any]:
    """Loss after the prompt, its rise over the base's (paired by example), and the share that ran."""
    found = row.measured()
    rise = found.loss - _dense_loss(cell, context)
    return {"loss": found.figure(found.loss), "rise": found.figure(rise), "capacity": 100 * found.capacity}


def _tasks(cell: Cell, context: Context, row: Row) -> dict[str, Any]:
    """Accuracies in percent, their mean, and the mean as a share of the base's. None with gates by lot, since each
    answer of a question would have its own."""
    if cell["method"] == "random":
        return {}
    whole = context.once(
        ("tasks", cell["model"], tuple(cell["tasks"]), cell.get("limit")), lambda: _accuracies(cell, row, off=True)
    )
    own = whole if cell["method"] == "dense" else _accuracies(cell, row, off=False)
    mean, base = own["accuracy"], whole["accuracy"]
    ratio = mean["value"] / base["value"] if base["value"] else 0.0
    parts = [f["se"] / f["value"] for f in (mean, base) if f["value"]]
    error = 100 * ratio * sum(part**2 for part in parts) ** 0.5
    return {**own, "kept": {"value": 100 * ratio, "se": 0.0 if own is whole else error}}


def _accuracies(cell: Cell, row: Row, off: bool) -> dict[str, Any]:
    from mod_router.context import routing_context
    from mod_router.lm import routed_lm
    from paper_tables.quality import accuracies

    how = {"limit": cell.get("limit"), "batch_size": cell.get("batch_size", 8), "wrapper": routed_lm()}
    shots = cell.get("shots") or {}
    found: dict[str, Any] = {}
    forced = row.forced(0, 1) if row.forced else None
    with routing_context(off=off, forced=forced):
        for count in dict.fromkeys(shots.get(task) for task in cell["tasks"]):
            same = [task for task in cell["tasks"] if shots.get(task) == count]
            found |= accuracies(row.model, row.tokenizer, same, shots=count, **how)
    percent = {task: {k: 100 * v for k, v in found[task].items()} for task in cell["tasks"]}
    mean = sum(f["value"] for f in percent.values()) / len(percent)
    error = sum(f.get("se", 0.0) ** 2 for f in percent.values()) ** 0.5 / len(percent)
    return {**percent, "accuracy": {"value": mean, "se": error}}


def _speed(cell: Cell, context: Context, row: Row) -> dict[str, Any]:
    """Both phases beside the base, batch 1, the share of gates closed that was on the held-out data; cache bytes."""
    import torch

    from mod_router.context import Forced, closed
    from mod_router.gate import runtime_of
    from model_hooks.kv import kv_bytes
    from paper_tables.probe import speed, token_ids

    layers = runtime_of(row.model).layers
    share = row.measured().capacity
    forced = Forced(row.model, closed(layers, share))
    whole = Forced(row.model, closed(layers, 1.0))
    ids = token_ids(row.model, 1, cell.get("context", 256))

    def needed(model: Any) -> int:
        with torch.no_grad():
            return kv_bytes(model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values)

    found = speed(
        _Ungated(row.model), {"routed": forced}, context=cell.get("context", 256),
        new_tokens=cell.get("new_tokens", 16), rounds=cell.get("rounds", 7),
    )["routed"]  # fmt: skip
    kv = needed(forced) / needed(whole)
    return {"prefill": found["prefill"].figure, "decode": found["decode"].figure, "kv": kv}


class _Ungated:
    """A routed model with its routers off, as what times models calls it."""

    def __init__(self, model: Any) -> None:
        self.model, self.device = model, model.device
        self.get_input_embeddings = model.get_input_embeddings

    def __call__(self, **kwargs: Any) -> Any:
        from mod_router.context import routing_context

        with routing_context(off=True):
            return self.model(**kwargs)


def _cost(cell: Cell, context: Context, row: Row) -> dict[str, Any]:
    """What training took."""
    return {"trained": row.trained, "seconds": row.seconds} if row.trained else {}


def _usage(cell: Cell, context: Context, row: Row) -> dict[str, Any]:
    """Which layers ran on which of `usage_data`: a heat map."""
    from mod_router.measuring import measure

    shares = []
    for source in cell["usage_data"]:
        found = measure(row.model, _examples(cell, context, source, cell["heldout"]), compare=False)
        shares.append([float(found.used[layer].mean()) for layer in sorted(found.used)])
    context.artefact("usage", shares)
    spread = [max(column) - min(column) for column in zip(*shares)]
    return {"capacity": 100 * sum(map(sum, shares)) / sum(map(len, shares)), "spread": 100 * sum(spread) / len(spread)}


FIGURES: dict[str, Callable[[Cell, Context, Row], dict[str, Any]]] = {
    "loss": _loss, "tasks": _tasks, "speed": _speed, "cost": _cost, "usage": _usage,
}  # fmt: skip

PAPER = Paper(
    "mod-router", tables_folder(__file__), run,
    title="Router-Tuning: A Simple and Effective Approach for Enabling Dynamic-Depth in Transformers",
)  # fmt: skip
