"""The tables say what they measure, every figure is measured on tiny data, and noise is what it says."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from superfiltering.agreement import spearman
from superfiltering.noise import CLEAN, KINDS, spoil
from superfiltering.tables import FIGURES, PAPER, chosen_of, data_of, run, scores_of

from paper_tables import Context
from paper_tables.errors import TableError

pytestmark = pytest.mark.filterwarnings("ignore:max_length 1024 is lowered")


@pytest.fixture(scope="module")
def rows(alpaca: Any, lines: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(lines(tmp_path_factory.mktemp("rows") / "rows.jsonl", alpaca(60)))


@pytest.fixture
def cell(rows: str, weak: Path, strong: Path) -> dict[str, Any]:
    return {
        "data": rows, "weak": str(weak), "strong": str(strong), "encoder": str(weak), "student": str(weak),
        "noise": 0.4, "share": 0.1, "pool": 0.2, "seed": 0, "max_length": 128, "heldout": rows, "heldout_records": 8,
        "epochs": 3, "batch": 3, "learning_rate": 1e-2, "student_length": 128, "choose": "all", "kind": "clean",
        "rounds": 1, "package": "superfiltering", "table": "t", "scale": "quick", "row": "r",
    }  # fmt: skip


@pytest.fixture(scope="module")
def context() -> Context:
    return Context()


def test_every_table_reads_and_names_known_figures() -> None:
    tables = PAPER.tables()
    assert set(tables) == {"agreement", "cost", "diversity", "noise", "students"}
    for table in tables.values():
        for scale in table.scales:
            for unit in table.units(scale):
                assert set(unit.cell["figures"]) <= set(FIGURES), f"{table.id}/{scale}"
    assert all({"quick", "tiny", "paper"} <= set(table.scales) for table in tables.values())
    assert all(table.claims for table in tables.values())


def test_the_papers_figures_are_there_and_no_other() -> None:
    figures = {(t.id, f.row, f.column): (f.value, f.provenance) for t in PAPER.tables().values() for f in t.figures}
    assert figures == {
        ("cost", "filter", "cheaper"): (18.8, "repo"), ("students", "all", "winning_score"): (1.0, "repo"),
        ("students", "top", "winning_score"): (1.14, "repo"),
    }  # fmt: skip
    assert round(161.3 / 8.6, 1) == 18.8


def test_agreement_is_that_of_the_scores(cell: dict[str, Any], context: Context) -> None:
    found = run({**cell, "figures": ["agreement"]}, context)
    a, b = (scores_of(cell, context, which).ifd_ppl for which in ("weak", "strong"))
    both = np.isfinite(a) & np.isfinite(b)
    assert found["ifd"] == spearman(a[both], b[both])
    assert -1 < found["perplexity"] < 1
    tops = [
        set(np.flatnonzero(both)[np.argsort(np.where(v[both] < 1, -v[both], 9), kind="stable")[:5]]) for v in (a, b)
    ]
    assert found["overlap_10"] == pytest.approx(20 * len(tops[0] & tops[1]))
    itself = run({**cell, "strong": cell["weak"], "figures": ["agreement"]}, context)
    assert {name: itself[name] for name in ("ifd", "perplexity", "overlap_10")} == {
        "ifd": 1, "perplexity": 1, "overlap_10": 100,
    }  # fmt: skip


def test_settings_that_change_scores_are_not_mixed_up(cell: dict[str, Any], context: Context) -> None:
    first = scores_of(cell, context, "weak")
    assert scores_of(dict(cell), context, "weak") is first
    for change in ({"template": "alpaca"}, {"compat": "aligned"}, {"dtype": "bfloat16"}, {"seed": 1}, {"noise": 0.2}):
        other = scores_of({**cell, **change}, context, "weak")
        assert not np.array_equal(other.ifd_ppl, first.ifd_ppl, equal_nan=True), change


def test_noise_is_counted_by_kind(cell: dict[str, Any], context: Context) -> None:
    found = {
        kind: run({**cell, "kind": kind, "figures": ["noise"]}, context) for kind in (CLEAN, "spoilt", *KINDS)
    }  # fmt: skip
    assert {kind: row["records"] for kind, row in found.items()} == {
        CLEAN: 36, "spoilt": 24, **dict.fromkeys(KINDS, 6),
    }  # fmt: skip
    assert (found["empty"]["discarded"], found["empty"]["selected"]) == (100, 0)
    for figure in ("discarded", "selected"):
        parts = sum(found[kind][figure] * found[kind]["records"] for kind in (CLEAN, *KINDS))
        scores = scores_of(cell, context, "weak").ifd_ppl
        below = int((scores < 1).sum())
        wanted = 60 - below if figure == "discarded" else min(6, below)
        assert parts / 100 == pytest.approx(wanted)


def test_choices_are_what_they_say(cell: dict[str, Any], context: Context) -> None:
    scores = scores_of(cell, context, "weak").ifd_ppl
    usable = [k for k in range(60) if scores[k] < 1]
    falling = sorted(usable, key=lambda k: -scores[k])
    assert len(usable) > 12
    assert chosen_of({**cell, "choose": "all"}, context) == list(range(60))
    assert chosen_of({**cell, "choose": "top"}, context) == falling[:6]
    assert chosen_of({**cell, "choose": "worst"}, context) == falling[::-1][:6]
    facility = chosen_of({**cell, "choose": "facility"}, context)
    assert set(facility) <= set(falling[:12])
    assert len(set(facility)) == 6
    lots = {tuple(chosen_of({**cell, "choose": "random", "seed": seed}, context)) for seed in range(4)}
    assert len(lots) == 4
    assert all(len(set(lot)) == 6 for lot in lots)
    with pytest.raises(TableError, match="did you mean 'random'"):
        chosen_of({**cell, "choose": "randm"}, context)


def test_data_is_drawn_by_the_seed(cell: dict[str, Any], context: Context, alpaca: Any) -> None:
    plain = {**cell, "noise": 0.0}
    assert data_of(plain, context) == (alpaca(60), [CLEAN] * 60)
    some = [data_of({**plain, "records": 20, "seed": seed}, context)[0] for seed in (0, 1)]
    assert [len(part) for part in some] == [20, 20]
    assert some[0] != some[1]
    assert all(row in alpaca(60) for row in some[0])


def test_diversity_is_best_by_facility_location(cell: dict[str, Any], context: Context) -> None:
    cell |= {"figures": ["diversity"], "pool": 0.4, "noise": 0.0}
    found = {how: run({**cell, "choose": how}, context) for how in ("facility", "top", "random")}
    assert {row["records"] for row in found.values()} == {6}
    assert found["facility"]["distance"] < min(found["top"]["distance"], found["random"]["distance"])


def test_cost_is_a_ratio(cell: dict[str, Any], context: Context) -> None:
    found = run(
        {**cell, "strong": cell["weak"], "figures": ["cost"], "records": 20, "noise": 0.0, "rounds": 3}, context
    )
    assert found["size"] == 1
    assert 0.2 < found["cheaper"] < 5


def test_a_student_is_measured_after_its_training(cell: dict[str, Any], context: Context) -> None:
    pytest.importorskip("trl", reason="needs the extra [train]")
    cell |= {"figures": ["student"], "choose": "top", "noise": 0.0}
    found = run(cell, context)
    assert found["records"] == 6
    assert found == run(cell, context)  # the seed decides
    least = run({**cell, "learning_rate": 1e-9}, context)
    assert found["loss"]["value"] < least["loss"]["value"]
    assert found["loss"]["se"] > 0


def test_a_student_is_trained_as_its_row_says(
    cell: dict[str, Any], context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Trained(Exception):
        pass

    def training(config: Any) -> None:
        raise Trained(config)

    monkeypatch.setattr("superfiltering.train.train", training)
    paper = PAPER.tables()["students"].units("paper")[0].cell
    for own, again in ((cell, False), ({**cell, "batch": 99, **{k: paper[k] for k in PASSED}}, True)):
        with pytest.raises(Trained) as found:
            run({**own, "figures": ["student"]}, context)
        (config,) = found.value.args
        assert config.gradient_checkpointing is again
        assert (config.max_length, config.accumulation) == (own["student_length"], own.get("accumulation", 1))
        assert (config.batch_size, config.template, config.log_every) == (min(own["batch"], 60), "alpaca", 1)


PASSED = ("accumulation", "gradient_checkpointing", "student_length")


def test_unknown_words_name_the_nearest(cell: dict[str, Any], context: Context) -> None:
    with pytest.raises(TableError, match="did you mean 'student'"):
        run({**cell, "figures": ["students"]}, context)


@given(st.lists(st.text(max_size=30), min_size=8, max_size=60), st.floats(0.1, 1), st.integers(0, 5))
def test_noise_is_what_it_says(answers: list[str], share: float, seed: int) -> None:
    records = [{"instruction": f"i{k}", "output": answer} for k, answer in enumerate(answers)]
    each = int(len(records) * share) // 4
    if each < 2:
        with pytest.raises(ValueError, match="fewer than two of each"):
            spoil(records, share, seed)
        return
    made, kinds = spoil(records, share, seed)
    assert (made, kinds) == spoil(records, share, seed)
    assert records == [{"instruction": f"i{k}", "output": answer} for k, answer in enumerate(answers)]
    assert Counter(kinds) == Counter({CLEAN: len(records) - 4 * each} | dict.fromkeys(KINDS, each)) - Counter()
    shuffled = [k for k, kind in enumerate(kinds) if kind == "shuffled"]
    assert sorted(made[k]["output"] for k in shuffled) == sorted(answers[k] for k in shuffled)
    for k, (record, kind) in enumerate(zip(made, kinds)):
        assert record["instruction"] == f"i{k}"
        if kind == "shuffled":
            if answers.count(answers[k]) == 1:
                assert record["output"] != answers[k]
        else:
            cut = math.floor(len(answers[k]) / 5)
            twice = f"{answers[k]}\n{answers[k]}"
            wanted = {CLEAN: answers[k], "truncated": answers[k][:cut], "empty": "", "duplicated": twice}
            assert record["output"] == wanted[kind]


def test_other_seeds_spoil_other_records(alpaca: Any) -> None:
    assert len({tuple(spoil(alpaca(40), 0.25, seed)[1]) for seed in range(5)}) == 5
