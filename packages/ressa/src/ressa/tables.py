"""The paper's tables: how a row is measured. The tables themselves are YAML files in the package's folder tables/.

model, dtype, calibration, calibration_samples    the base, and what statistics are taken on
prune                                             N-M (keeps N of M) or a percentage; or share and total: of a sum
                                                  of sparsities, in percent, what goes to the vision tower
metric, pruned_branches                           wanda, magnitude, sparsegpt or random; vision, language or both
arm                                               see `ressa.arms`
data, samples, steps, batch, rate, rank, alpha    the repair's; full_rate is that of the arm `full`
adapted, kl_weight, temperature, positions        as in `RepairConfig`
heldout, measured                                 what figures are taken on, and how many examples
tasks                                             of the figure `average`: data, samples and metric of each
figures                                           exact, perplexity, average, kept (exact answers, of the dense
                                                  model's), gained (points above no repair), zeros (share of the
                                                  pruned positions that are zero)
"""

from __future__ import annotations

from functools import partial
from typing import Any

from paper_tables import Context, Paper, tables_folder
from paper_tables.errors import TableError, nearest
from ressa.arms import ARMS, PRUNED, TRAINED, Cell, Result, base_of, keyed, result_of

FIGURES = ("exact", "perplexity", "average", "kept", "gained", "zeros")
WITHOUT = {"dense": ("gained", "zeros"), "none": ("gained",)}  # figures that mean nothing for an arm


def run(cell: Cell, context: Context) -> dict[str, Any]:
    """Measure one row for one seed."""
    if cell["arm"] not in ARMS:
        raise TableError(f"unknown arm {cell['arm']!r}{nearest(cell['arm'], ARMS)}")
    unknown = [name for name in cell["figures"] if name not in FIGURES]
    if unknown:
        raise TableError(f"unknown figure {unknown[0]!r}{nearest(unknown[0], FIGURES)}")
    wanted = [name for name in cell["figures"] if name not in WITHOUT.get(cell["arm"], ())]
    if "average" in wanted:
        _tasks(cell, context)  # before anything is trained: a column that is not there is known at once
    found = dict(_measured(cell, context))
    if "kept" in wanted:
        dense = _measured({**cell, "arm": "dense"}, context)["exact"]["value"]
        found["kept"] = {k: 100 * v / dense for k, v in found["exact"].items()}
    if "gained" in wanted:
        found["gained"] = found["exact"]["value"] - _measured({**cell, "arm": "none"}, context)["exact"]["value"]
    return {name: found[name] for name in wanted}


def _measured(cell: Cell, context: Context) -> dict[str, Any]:
    """Figures of the row's own model; those of the dense and of the unrepaired one are shared by all rows and seeds."""
    arm = cell["arm"]
    names = {"dense": ("model", "dtype"), "none": PRUNED}.get(arm, (*TRAINED, "full_rate"))
    average = ("tasks",) if "average" in cell["figures"] else ()  # the figure that is not always taken
    key = ("figures", arm, *keyed(cell, (*names, "heldout", "measured", *average)))
    found: dict[str, Any] = context.once(key, lambda: _figures(cell, context, result_of(cell, context)))
    return found


def _figures(cell: Cell, context: Context, result: Result) -> dict[str, Any]:
    from ressa.evaluating import evaluate

    base = base_of(cell, context)
    examples, rows = base.encoded(cell["heldout"], cell["measured"])
    found = evaluate(result.model, base.encoder, examples, rows=rows, batch_size=cell.get("measured_batch", 64))
    figures = {
        "exact": {k: 100 * found["exact"][k] for k in ("value", "se")},
        "perplexity": {k: found["perplexity"][k] for k in ("value", "se")},
    }
    if "average" in cell["figures"]:
        figures["average"] = _average(cell, context, base, result.model)
    if not result.masks:
        return figures
    pruned = sum(int((~mask).sum()) for mask in result.masks.values())
    zeros = sum(int((result.model.get_submodule(p).weight[~m] == 0).sum()) for p, m in result.masks.items())
    return {**figures, "zeros": 100 * zeros / max(1, pruned)}


def _tasks(cell: Cell, context: Context) -> list[tuple[list[Any], str]]:
    """Examples and metric of each task; the examples are read once."""
    from ressa.data import read

    found = []
    for task in cell["tasks"]:
        how = {"skip_bad_rows": task.get("skip_bad_rows", 0), "whole": True}
        key = ("task", task["data"], task["samples"], *how.items())
        found.append((context.once(key, partial(read, task["data"], task["samples"], **how)), task["metric"]))
    return found


def _average(cell: Cell, context: Context, base: Any, model: Any) -> dict[str, float]:
    """The mean of the tasks' figures, in percent."""
    from ressa.evaluating import evaluate

    found = [evaluate(model, base.encoder, e, [metric])[metric] for e, metric in _tasks(cell, context)]
    error = sum(one["se"] ** 2 for one in found) ** 0.5 / len(found)
    return {"value": 100 * sum(one["value"] for one in found) / len(found), "se": 100 * error}


PAPER = Paper(
    "ressa", tables_folder(__file__), run,
    title="Rethinking Pruning for Vision-Language Models: Strategies for Effective Sparsity and Performance "
    "Restoration",
)  # fmt: skip
