"""The paper's tables: how a row is measured. The tables themselves are YAML files in the package's folder tables/.

Every parameter:

    data, records                      the source of alpaca records, and how many of them (drawn by the seed; 0: all)
    noise                              share of them that is spoilt (superfiltering.noise); 0 for none
    weak, strong, dtype                the filter models
    template, compat, max_length       as of `superfiltering score`
    kind                               which records a row of the noise table is about
    choose, share                      what a row of the students' or the diversity table takes: all, top, random,
                                       worst, or facility (of the best `pool` by score)
    encoder, pool                      for the diversity table
    student, epochs, learning_rate, batch, accumulation, gradient_checkpointing, student_length, heldout
                                       the student: what is fine-tuned, how, and what its loss is on
    figures                            agreement, noise, student, cost, diversity
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from paper_tables import Context, Paper, tables_folder
from paper_tables.errors import TableError, nearest

from .noise import spoil

if TYPE_CHECKING:
    from .scores import RecordScores

Cell = Mapping[str, Any]


def run(cell: Cell, context: Context) -> dict[str, Any]:
    """Measure one row for one seed."""
    found: dict[str, Any] = {}
    for name in cell["figures"]:
        if name not in FIGURES:
            raise TableError(f"unknown figure {name!r}{nearest(name, FIGURES)}")
        found |= FIGURES[name](cell, context)
    return found


def data_of(cell: Cell, context: Context) -> tuple[list[dict[str, Any]], list[str]]:
    """The row's records, some of them spoilt, and what each is."""
    from instruct_data.records import read

    def make() -> tuple[list[dict[str, Any]], list[str]]:
        every = context.once(("records", cell["data"]), lambda: [r.data for r in read(cell["data"], "alpaca")])
        wanted = cell.get("records") or len(every)
        drawn = random.Random(f"records/{cell['seed']}").sample(range(len(every)), min(wanted, len(every)))
        chosen = [every[i] for i in sorted(drawn)]
        noise = cell.get("noise", 0.0)
        return spoil(chosen, noise, cell["seed"]) if noise else (chosen, ["clean"] * len(chosen))

    return context.once(_data_key(cell), make)


def _data_key(cell: Cell) -> tuple[Any, ...]:
    return "data", cell["data"], cell.get("records", 0), cell.get("noise", 0.0), cell["seed"]


def scores_of(cell: Cell, context: Context, which: str) -> RecordScores:
    """Scores of the row's records by its weak or its strong model."""
    from instruct_data.records import read

    from .scores import read_scores, score_records

    options = {"compat": cell.get("compat", "original"), "max_length": cell.get("max_length", 1024)}

    def make() -> RecordScores:
        rows, _ = data_of(cell, context)
        model, tokenizer = _load(cell, context, cell[which])
        records = read(rows, "alpaca", name=cell["data"])
        with tempfile.TemporaryDirectory() as room, context.progress("tokens scored") as bar:
            file = Path(room) / "scores.parquet"
            template = cell.get("template", "none")
            score_records(model, tokenizer, records, file, template=template, name=cell[which], progress=bar, **options)
            return read_scores(file)

    made_with = (cell.get("template", "none"), cell.get("dtype", "float32"), *options.values())
    return context.once(("scores", _data_key(cell), cell[which], *made_with), make)


def _load(cell: Cell, context: Context, name: str) -> tuple[Any, Any]:
    from model_hooks.loading import load_placed

    dtype = cell.get("dtype", "float32")
    return context.latest("model", (name, dtype), lambda: load_placed(name, dtype))


def _agreement(cell: Cell, context: Context) -> dict[str, Any]:
    """Rank correlation and overlap of the tops, of the scores and of the perplexities."""
    import numpy as np

    from .agreement import compare, spearman

    weak, strong = scores_of(cell, context, "weak"), scores_of(cell, context, "strong")
    found = compare(weak.ifd_ppl, strong.ifd_ppl, resamples=0)
    a, b = (scores.columns["ppl_A_condition"] for scores in (weak, strong))
    finite = np.isfinite(a) & np.isfinite(b)
    figures: dict[str, Any] = {
        "ifd": found.spearman.value, "perplexity": spearman(a[finite], b[finite]),
    }  # fmt: skip
    for overlap in found.overlaps:
        if overlap.ratio.value is not None:
            figures[f"overlap_{100 * overlap.share:g}"] = 100 * overlap.ratio.value
    return figures


def _noise(cell: Cell, context: Context) -> dict[str, Any]:
    """Of the row's kind of records, in percent: discarded (no score, or 1 and more), and within the top share."""
    import numpy as np

    from .selection import select

    weak = scores_of(cell, context, "weak")
    kinds = np.array(data_of(cell, context)[1])
    own = kinds == cell["kind"] if cell["kind"] != "spoilt" else kinds != "clean"
    chosen = np.zeros(len(kinds), bool)
    chosen[select(weak.ifd_ppl, top=cell["share"]).chosen] = True
    discarded = ~(weak.ifd_ppl < 1)
    return {"discarded": 100 * discarded[own].mean(), "selected": 100 * chosen[own].mean(), "records": int(own.sum())}


def chosen_of(cell: Cell, context: Context) -> list[int]:
    """Positions of the records that the row takes."""
    from .selection import select

    rows, _ = data_of(cell, context)
    how, number = cell["choose"], int(len(rows) * cell.get("share", 1.0))
    if how == "all":
        return list(range(len(rows)))
    if how == "random":
        return random.Random(f"choice/{cell['seed']}").sample(range(len(rows)), number)
    scores = scores_of(cell, context, "weak").ifd_ppl
    if how == "top":
        return select(scores, top_n=number).chosen.tolist()
    if how == "worst":
        return select(-scores, top_n=number, maximum=None, minimum=-1.0).chosen.tolist()
    if how == "facility":
        pool = select(scores, top_n=int(len(rows) * cell["pool"])).chosen
        return [int(pool[i]) for i in _diverse(cell, context, pool.tolist(), number)]
    raise TableError(f"unknown choice {how!r}{nearest(how, ['all', 'top', 'random', 'worst', 'facility'])}")


def _embeddings(cell: Cell, context: Context) -> Any:
    from instruct_data.records import read

    from .workflow import embeddings_of

    def make() -> Any:
        return embeddings_of(read(data_of(cell, context)[0], "alpaca", name=cell["data"]), "whole", cell["encoder"])

    return context.once(("embeddings", _data_key(cell), cell["encoder"]), make)


def _diverse(cell: Cell, context: Context, pool: list[int], number: int) -> list[int]:
    from .facility import facility_location

    return facility_location(_embeddings(cell, context)[pool], number).chosen.tolist()


def _student(cell: Cell, context: Context) -> dict[str, Any]:
    """The student's loss on held-out records after fine-tuning on what the row takes."""
    from instruct_data.records import read
    from instruct_data.scoring.heldout import answer_loss
    from instruct_data.writing import write
    from paper_tables.training import config_of

    from .train import TrainConfig, train

    rows, _ = data_of(cell, context)
    chosen = chosen_of(cell, context)
    heldout = read(cell["heldout"], "alpaca", limit=cell.get("heldout_records"))
    length = cell.get("student_length", 512)
    with tempfile.TemporaryDirectory() as room:
        file, folder = Path(room) / "records.jsonl", Path(room) / "student"
        write(file, [rows[i] for i in chosen])
        batch = min(cell["batch"], len(chosen))
        train(config_of(cell, TrainConfig, cell["student"], file, folder,
                        max_length=length, batch_size=batch, log_every=1))  # fmt: skip
        model, tokenizer = _load(cell, Context(), str(folder))
        after = answer_loss(model, tokenizer, heldout, max_length=length)["loss"]
    return {"loss": after, "records": len(chosen)}


def _cost(cell: Cell, context: Context) -> dict[str, Any]:
    """Time of scoring with the strong model over that with the weak one: in turn, the median of the rounds."""
    import time

    from instruct_data.scoring import Pair, score

    rows, _ = data_of(cell, context)
    pairs = [Pair(str(i), f"{row['instruction']}\n", row["output"]) for i, row in enumerate(rows)]
    models = {which: _load(cell, Context(), cell[which]) for which in ("weak", "strong")}
    times: dict[str, list[float]] = {which: [] for which in models}
    for turn in range(cell.get("rounds", 3) + 1):
        for which, (model, tokenizer) in models.items():
            began = time.perf_counter()
            score(model, tokenizer, pairs, max_length=cell.get("max_length", 1024))
            if turn:  # the first round warms up
                times[which].append(time.perf_counter() - began)
    ratios = sorted(strong / weak for weak, strong in zip(times["weak"], times["strong"]))
    sizes = {which: sum(p.numel() for p in model.parameters()) for which, (model, _) in models.items()}
    return {"cheaper": median(ratios), "size": sizes["strong"] / sizes["weak"]}


def _diversity(cell: Cell, context: Context) -> dict[str, Any]:
    """How well what the row takes covers the pool of the best by score."""
    from .facility import coverage
    from .selection import select

    scores = scores_of(cell, context, "weak").ifd_ppl
    rows, _ = data_of(cell, context)
    pool = select(scores, top_n=int(len(rows) * cell["pool"])).chosen.tolist()
    places = {position: k for k, position in enumerate(pool)}
    number = int(len(rows) * cell["share"])
    if cell["choose"] == "random":
        chosen = random.Random(f"choice/{cell['seed']}").sample(pool, number)
    else:
        chosen = chosen_of(cell, context)
    found = coverage(_embeddings(cell, context)[pool], [places[i] for i in chosen])
    return {"distance": found.mean_distance, "records": number}


FIGURES: dict[str, Callable[[Cell, Context], dict[str, Any]]] = {
    "agreement": _agreement, "noise": _noise, "student": _student, "cost": _cost, "diversity": _diversity,
}  # fmt: skip

PAPER = Paper(
    "superfiltering", tables_folder(__file__), run,
    title="Superfiltering: Weak-to-Strong Data Filtering for Fast Instruction-Tuning",
    code=("instruct_data", "model_hooks", "lean_kernels"),
)  # fmt: skip
