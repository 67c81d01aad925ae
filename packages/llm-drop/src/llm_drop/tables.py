"""The paper's tables: how a row is measured. The tables themselves are YAML files in the package's folder tables/.

A row names what is dropped (`method` and `n`), how it is chosen and what follows; the scale's `figures` name what is
measured of the result. Every parameter:

    model, revision, dtype             the model; `calibration`, `samples`, `length`: what it is scored on
    step                               a stage of pre-training: fills {step} in `revision`, or, with `pretrain`, takes
                                       the model as it was after so many steps of a short run (llm_drop.stages)
    method                             none, attention, mlp, block or joint
    n | share                          how many sublayers (or blocks), or which share of those that the model has
    selection                          discrete (default), consecutive, iterative, or random (a control)
    objective                          cosine (default) or norm
    repair                             leave the mean changes of what was dropped behind
    bits, group                        then round the weights to so many bits
    heal, steps, heal_batch, heal_data, learning_rates    then train instead: lora or full (llm_drop.train)
    text, documents, characters        held-out text for bits per byte
    tasks, shots, limit                lm-eval tasks
    reference                          the calibration that `choice` compares with
    figures                            language, tasks, kept, cost, speed, choice, similarity
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llm_drop.plan import Plan
from llm_drop.repair import apply
from llm_drop.scoring import Scores, score
from llm_drop.selection import select, select_iteratively
from llm_drop.speculative import sharing_copy
from paper_tables import Context, Paper, tables_folder
from paper_tables.errors import TableError, nearest

Cell = Mapping[str, Any]
KEYWORD = {"attention": "attention", "mlp": "mlp", "block": "blocks", "joint": "joint"}


def run(cell: Cell, context: Context) -> dict[str, Any]:
    """Measure one row for one seed."""
    parent, _ = _parent(cell, context)
    plan = plan_of_cell(cell, context)
    dropped = _dropped(cell, context, parent, plan)
    found: dict[str, Any] = {}
    for name in cell["figures"]:
        if name not in FIGURES:
            raise TableError(f"unknown figure {name!r}{nearest(name, FIGURES)}")
        found |= FIGURES[name](cell, context, dropped, plan)
    return found


def _parent_key(cell: Cell) -> tuple[Any, ...]:
    stage = (cell["seed"], cell["pretrain"]["layers"]) if "pretrain" in cell else ()
    return cell["model"], cell.get("revision"), cell.get("step"), cell.get("dtype", "float32"), *stage


def _parent(cell: Cell, context: Context) -> tuple[Any, Any]:
    """The undropped model of the row and its tokenizer."""
    make = (lambda: _stage(cell, context)) if "pretrain" in cell else (lambda: _load(cell))
    pair: tuple[Any, Any] = context.latest("parent", _parent_key(cell), make)
    return pair


def _stage(cell: Cell, context: Context) -> tuple[Any, Any]:
    from llm_drop.stages import pretrain
    from model_hooks.loading import load_tokenizer

    steps, layers, seed = cell["pretrain"]["steps"], cell["pretrain"]["layers"], cell["seed"]

    def make() -> dict[int, Any]:
        with context.progress("pre-training", steps[-1]) as bar:
            return pretrain(steps, layers=layers, seed=seed, progress=bar.advance)

    models = context.once(("stages", tuple(steps), layers, seed), make)  # a row comes back to each seed
    return models[cell["step"]], load_tokenizer(cell["model"])


def _load(cell: Cell) -> tuple[Any, Any]:
    import torch

    import model_hooks

    options = {"revision": cell["revision"].format(step=cell.get("step"))} if cell.get("revision") else {}
    device_map = "auto" if torch.cuda.is_available() else None
    return model_hooks.load(cell["model"], dtype=cell.get("dtype", "float32"), device_map=device_map, **options)


def _sequences(cell: Cell, context: Context) -> Any:
    from model_hooks.text import load_sequences

    _, tokenizer = _parent(cell, context)
    source, samples, length = cell["calibration"], cell["samples"], cell["length"]
    seed = cell["seed"] or None  # seed 0: the first sequences, as the paper takes them
    key = ("sequences", _parent_key(cell), source, samples, length, seed)
    return context.once(key, lambda: load_sequences(tokenizer, source, samples=samples, length=length, seed=seed))


def scores_of_cell(cell: Cell, context: Context, model: Any = None) -> Scores:
    """Scores of the row's model on the row's calibration data; those of the undropped model are made once."""
    parent, _ = _parent(cell, context)
    sequences = _sequences(cell, context)

    def make() -> Scores:
        with context.progress("calibration") as bar:
            return score(model or parent, sequences, name=cell["model"], data=cell["calibration"], progress=bar)

    if model is not None:
        return make()
    key = ("scores", _parent_key(cell), cell["calibration"], cell["samples"], cell["length"], cell["seed"])
    return context.once(key, make)


def plan_of_cell(cell: Cell, context: Context) -> Plan | None:
    """What the row drops; None for nothing."""
    method = cell["method"]
    if method == "none":
        return None
    if method not in KEYWORD:
        raise TableError(f"unknown method {method!r}{nearest(method, ['none', *KEYWORD])}")
    scores = scores_of_cell(cell, context)
    keyword, n = KEYWORD[method], _count(cell, scores)
    selection, objective = cell.get("selection", "discrete"), cell.get("objective", "cosine")
    if selection == "random":
        return _random_plan(scores, method, n, cell["seed"])
    if selection == "iterative":
        return _iterative_plan(cell, context, {keyword: 1}, n)
    return select(scores, **{keyword: n}, consecutive=selection == "consecutive", objective=objective)


def _count(cell: Cell, scores: Scores) -> int:
    if "n" in cell:
        return int(cell["n"])
    units = {"attention": len(scores.attention), "mlp": len(scores.mlp), "block": len(scores.block)}
    total = units.get(cell["method"], units["attention"] + units["mlp"])
    return round(total * float(cell["share"]))


def _random_plan(scores: Scores, method: str, n: int, seed: int) -> Plan:
    """`n` units of a kind by lot: what the selection is worth shows against it."""
    units = [u for u in scores.importance() if u[0] == method or (method == "joint" and u[0] != "block")]
    lot = random.Random(f"{method}/{n}/{seed}")
    lottery = {unit: place for place, unit in enumerate(lot.sample(units, len(units)))}
    chosen = sorted(units, key=lottery.__getitem__)[:n]
    attention = tuple(i for kind, i in chosen if kind in ("attention", "block"))
    mlp = tuple(i for kind, i in chosen if kind in ("mlp", "block"))
    return Plan(scores.num_layers, attention, mlp, how=f"random {method} {n}", fingerprint=scores.fingerprint)


def _iterative_plan(cell: Cell, context: Context, step: dict[str, int], rounds: int) -> Plan:
    parent, _ = _parent(cell, context)

    def measure(taken: Plan | None) -> Scores:
        if taken is None:
            return scores_of_cell(cell, context)
        return scores_of_cell(cell, context, apply(sharing_copy(parent), taken, check=False))

    return select_iteratively(measure, step, rounds, cell.get("objective", "cosine"))


def _dropped(cell: Cell, context: Context, parent: Any, plan: Plan | None) -> Any:
    """The row's model: dropped, repaired, quantised or healed as the row says; the parent stays as it is."""
    if cell.get("heal", "none") != "none":
        return _healed(cell, plan)
    model = sharing_copy(parent)
    if plan is not None:
        apply(model, plan, repair=scores_of_cell(cell, context) if cell.get("repair") else None, check=False)
    if cell.get("bits", 16) < 16:
        from llm_drop.rtn import quantise

        quantise(model, cell["bits"], cell.get("group", 32))
    return model


def _healed(cell: Cell, plan: Plan | None) -> Any:
    """The model as `llm-drop train` leaves it: through its files, as a user would."""
    from llm_drop.train import TrainConfig, train

    with tempfile.TemporaryDirectory() as room:
        file = plan.save(Path(room) / "plan.json") if plan is not None else None
        train(
            TrainConfig(
                model=cell["model"], plan=file, output=Path(room) / "healed", method=cell["heal"],
                data=cell["heal_data"], length=cell["length"], max_steps=cell["steps"],
                samples=cell["steps"] * cell["heal_batch"] * cell.get("accumulation", 1),
                batch_size=cell["heal_batch"], accumulation=cell.get("accumulation", 1), seed=cell["seed"],
                learning_rate=cell.get("learning_rates", {}).get(cell["heal"], 0.0), heldout=cell["calibration"],
                heldout_samples=4, bf16=cell.get("dtype") == "bfloat16",
            )
        )  # fmt: skip
        model, _ = _load({**cell, "model": str(Path(room) / "healed"), "revision": None})
    return model


def _language(cell: Cell, context: Context, model: Any, plan: Plan | None) -> dict[str, Any]:
    from paper_tables.quality import excerpts, language

    _, tokenizer = _parent(cell, context)
    texts = excerpts(cell["text"], cell.get("documents"), cell.get("characters"))
    found = _once_per_model(
        cell, context, plan, ("language", cell["text"], cell.get("documents"), cell.get("characters")),
        lambda: language(model, tokenizer, texts, batch_size=cell.get("batch_size", 8)),
    )  # fmt: skip
    return {"bits": found["bits_per_byte"]}


def _tasks(cell: Cell, context: Context, model: Any, plan: Plan | None) -> dict[str, Any]:
    from paper_tables.quality import accuracies

    _, tokenizer = _parent(cell, context)
    shots, limit, batch = cell.get("shots") or {}, cell.get("limit"), cell.get("batch_size", 8)

    def measure() -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        for count in dict.fromkeys(shots.get(task) for task in cell["tasks"]):
            same = [task for task in cell["tasks"] if shots.get(task) == count]
            found |= accuracies(model, tokenizer, same, limit=limit, shots=count, batch_size=batch)
        return {task: found[task] for task in cell["tasks"]}

    found = _once_per_model(cell, context, plan, ("tasks", tuple(cell["tasks"]), limit), measure)
    percent = {task: {k: 100 * v for k, v in figure.items()} for task, figure in found.items()}
    mean = sum(f["value"] for f in percent.values()) / len(percent)
    error = sum(f.get("se", 0.0) ** 2 for f in percent.values()) ** 0.5 / len(percent)
    return {**percent, "accuracy": {"value": mean, "se": error}}


def _once_per_model(
    cell: Cell, context: Context, plan: Plan | None, what: tuple[Any, ...], make: Callable[[], Any]
) -> Any:
    """`make()`, once for all tables that measure the same model in the same way."""
    if cell.get("heal", "none") != "none":
        return make()
    units = () if plan is None else plan.units
    repaired_from = (cell["calibration"], cell["samples"], cell["length"], cell["seed"]) if cell.get("repair") else ()
    after = (repaired_from, cell.get("bits", 16), cell.get("group", 32))
    return context.once((*_parent_key(cell), units, after, what), make)


def _cost(cell: Cell, context: Context, model: Any, plan: Plan | None) -> dict[str, Any]:
    from paper_tables.quality import size

    parent, _ = _parent(cell, context)
    whole, left = size(parent), size(model)
    return {
        "kv": left["kv_bytes"] / whole["kv_bytes"],
        "parameters": left["parameters"] / whole["parameters"],
    }


def _speed(cell: Cell, context: Context, model: Any, plan: Plan | None) -> dict[str, Any]:
    from paper_tables.probe import speed

    parent, _ = _parent(cell, context)
    if plan is None:
        return {"prefill": 1.0, "decode": 1.0}
    found = speed(
        parent, {"dropped": model}, context=cell.get("context", 512), new_tokens=cell.get("new_tokens", 16),
        rounds=cell.get("rounds", 7),
    )["dropped"]  # fmt: skip
    return {"prefill": found["prefill"].figure, "decode": found["decode"].figure}


def _kept(cell: Cell, context: Context, model: Any, plan: Plan | None) -> dict[str, Any]:
    """Mean accuracy as a share of the undropped model's, in percent."""
    parent, _ = _parent(cell, context)
    own = _tasks(cell, context, model, plan)["accuracy"]
    whole = _tasks({**cell, "heal": "none", "bits": 16, "repair": False}, context, parent, None)["accuracy"]
    ratio = own["value"] / whole["value"]
    relative = ((own["se"] / own["value"]) ** 2 + (whole["se"] / whole["value"]) ** 2) ** 0.5 if own["value"] else 0.0
    return {"kept": {"value": 100 * ratio, "se": 100 * ratio * relative}}


def _choice(cell: Cell, context: Context, model: Any, plan: Plan | None) -> dict[str, Any]:
    """How much of what the reference calibration chooses this one chooses too."""
    plain = {"selection": "discrete", "objective": "cosine", "seed": 0, **cell["reference"]}
    reference = plan_of_cell({**cell, **plain}, context)
    assert plan is not None
    assert reference is not None
    return {"overlap": 100 * len(set(plan.units) & set(reference.units)) / len(reference.units)}


def _similarity(cell: Cell, context: Context, model: Any, plan: Plan | None) -> dict[str, Any]:
    """Mean similarities of the undropped model's units, and the map of all of them as a picture's data."""
    scores = scores_of_cell(cell, context)
    kinds = {"attention": scores.attention, "mlp": scores.mlp, "block": scores.block}
    context.artefact("similarity", [[values[i] for i in sorted(values)] for values in kinds.values()])
    context.artefact("gaps", [list(row) for row in scores.gaps])
    return {f"{kind}_similarity": sum(values.values()) / len(values) for kind, values in kinds.items()}


FIGURES: dict[str, Callable[[Cell, Context, Any, Plan | None], dict[str, Any]]] = {
    "language": _language, "tasks": _tasks, "kept": _kept, "cost": _cost, "speed": _speed, "choice": _choice,
    "similarity": _similarity,
}  # fmt: skip

PAPER = Paper(
    "llm-drop", tables_folder(__file__), run, title="What Matters in Transformers? Not All Attention is Needed"
)
