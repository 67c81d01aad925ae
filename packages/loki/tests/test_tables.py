"""The tables: every row's parameters are measured as they say, and the files read at every scale."""

from __future__ import annotations

from typing import Any

import pytest
from loki.tables import FIGURES, PAPER, basis_of, run

from model_hooks import RequestError
from paper_tables import Context
from paper_tables.errors import TableError

CELL: dict[str, Any] = {
    "package": "loki", "table": "t", "scale": "quick", "row": "r", "seed": 0, "figures": ["perplexity"],
    "model": "zoo:gpt2", "dtype": "float32", "calibration": "zoo:calibration", "tokens": 1024, "window": 128,
    "text": "zoo:heldout", "documents": 2, "characters": 600, "length": 64, "samples": 3, "prompt": 32,
    "method": "loki", "k": 0.25, "d": 0.25,
}  # fmt: skip


@pytest.fixture(scope="module")
def context() -> Context:
    return Context()


def measured(shared: Context, figure: str, **changes: Any) -> dict[str, Any]:
    return run({**CELL, "figures": [figure], **changes}, shared)


def value(context: Context, **changes: Any) -> float:
    found: float = measured(context, "perplexity", **changes)["ppl"]["value"]
    return found


def test_every_table_reads_and_names_known_figures() -> None:
    tables = PAPER.tables()
    assert set(tables) == {"main", "rank", "dimensions", "transfer", "beyond", "retrieval", "speed"}
    for table in tables.values():
        assert {"quick", "tiny", "paper"} <= set(table.scales)
        for scale in table.scales:
            for unit in table.units(scale):
                assert set(unit.cell["figures"]) <= set(FIGURES), f"{table.id}/{scale}"
    assert sum(len(t.claims) for t in tables.values()) >= 20


def test_the_figure_of_the_abstract_is_there_and_no_other() -> None:
    figures = {(t.id, f.row, f.column): (f.value, f.provenance) for t in PAPER.tables().values() for f in t.figures}
    assert figures == {("speed", "llama-2-13b", "attention"): (1.45, "abstract")}


def test_everything_read_is_full_attention_and_less_is_not(context: Context) -> None:
    full = value(context, method="full", k=1.0)
    assert value(context, k=1.0) == pytest.approx(full, rel=1e-4)
    assert value(context) != pytest.approx(full, rel=1e-3)
    assert measured(context, "perplexity", method="snapkv") == {}


@pytest.mark.parametrize(
    "changes",
    [
        {"k": 0.125}, {"d": 0.125}, {"basis": "random"}, {"calibration": "english"}, {"seed": 1},
        {"select": "head", "group_reduce": "max", "block": 16}, {"mass": 0.5}, {"sink": 4, "recent": 8},
        {"method": "h2o"}, {"method": "pca"}, {"method": "quest"}, {"method": "topk"},
    ],
    ids=str,
)  # fmt: skip
def test_every_parameter_changes_what_is_measured(context: Context, changes: dict[str, Any]) -> None:
    assert value(context, **changes) != value(context)


def test_the_same_measurement_is_made_once(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    from loki import quality

    known = value(context)
    monkeypatch.setattr(quality, "perplexity", None)
    assert value(context, table="another", row="another") == known


def test_selection_knows_what_was_read(context: Context) -> None:
    half, quarter = (measured(context, "selection", k=k) for k in (0.5, 0.25))
    assert 45 < half["read"] < 60
    assert 22 < quarter["read"] < 35
    assert half["captured"] > quarter["captured"]
    exact = measured(context, "selection", method="topk")
    assert exact["agreement"] == pytest.approx(100)
    assert exact["captured"] >= quarter["captured"]
    assert measured(context, "selection", method="full") == measured(context, "selection", method="h2o") == {}
    assert len(context.artefacts["overlap"][0]) == 4


def test_budgets_by_layer_keep_the_mean(context: Context) -> None:
    found = measured(context, "selection", budgets=0.25)
    assert found["read"] <= 1.2 * measured(context, "selection")["read"]
    assert found["captured"] != measured(context, "selection")["captured"]


def test_ranks_and_overlap(context: Context) -> None:
    found = run({**CELL, "figures": ["rank", "overlap"], "reference": {"calibration": "zoo:calibration"}}, context)
    assert found["rank"] == pytest.approx(float(basis_of(CELL, context).rank(0.9).double().mean()))
    assert found["share"] == pytest.approx(100 * found["rank"] / found["width"])
    assert found["overlap"] == pytest.approx(100, abs=1e-3)
    other = run(
        {**CELL, "figures": ["overlap"], "calibration": "english", "reference": {"calibration": "code"}}, context
    )
    assert 25 < other["overlap"] < 100


@pytest.mark.parametrize("form", ["lookup", "pairs", "needle"])
def test_retrieval_asks_as_many_questions_as_it_says(
    context: Context, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loki import quality

    asked: list[Any] = []
    monkeypatch.setattr(
        quality, "hits", lambda model, tokenizer, questions, **_: asked.extend(questions) or [True, False]
    )
    with pytest.raises(RequestError, match="a context of 1025 tokens: the model reads 1024"):
        measured(context, "recall", form=form, context=1025, questions=2)
    found = measured(context, "recall", form=form, context=96, questions=2)
    assert found["recall"] == {"value": 50, "se": pytest.approx(35.36, abs=0.01)}
    measured(context, "recall", form=form, context=96, questions=2, seed=1)
    assert len({q.context for q in asked}) == 4


def test_batches_are_as_large_as_the_row_says(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    from loki import quality

    sizes: list[int] = []
    monkeypatch.setattr(quality, "recall", lambda *_, batch_size, **__: sizes.append(batch_size))
    monkeypatch.setattr(quality, "decoding_perplexity", lambda *_, batch_size, **__: sizes.append(batch_size))
    for changes in ({}, {"batch_size": 2}):
        measured(context, "decoding", **changes)
        measured(context, "recall", form="pairs", context=96, questions=1, **changes)
    assert sizes == [16, 16, 2, 2]


def test_unknown_words_are_refused(context: Context) -> None:
    with pytest.raises(TableError, match="did you mean 'perplexity'"):
        measured(context, "perplexty")
    with pytest.raises(TableError, match="did you mean 'pairs'"):
        measured(context, "recall", form="pair", context=96, questions=1)
    with pytest.raises(TableError, match="unknown basis 'query'"):
        value(context, basis="query")
    with pytest.raises(TableError, match="too few for seed 9"):
        value(context, seed=9, tokens=1 << 20)


def test_speed_is_measured_against_the_best_dense_form(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    from loki import bench

    from lean_kernels.bench import loki as harness

    monkeypatch.setattr(bench, "HEADS", 4)
    monkeypatch.setattr(bench, "KV_HEADS", 2)
    cell = {"cached": 256, "read": 0.25, "rounds": 3, "layers": 1, "figures": ["attention", "steps"]}
    found = run({**CELL, **cell}, context)
    assert set(found) == {"attention", "steps", "over_own", "auto"}
    assert all(v > 0 for v in found.values())
    shapes: list[Any] = []
    forms = harness.dense_forms
    monkeypatch.setattr(harness, "dense_forms", lambda q, k, *rest: shapes.extend((q, k)) or forms(q, k, *rest))
    assert run({**CELL, **cell, "heads": [5, 5], "figures": ["attention"]}, context)["attention"] > 0
    assert [t.shape[1] for t in shapes] == [5, 5]
