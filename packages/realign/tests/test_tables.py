"""The tables: they read at every scale, their parts do as they say, and the quick one runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from realign import tables
from realign.filters import result_of
from realign.problems import MOST, apart, problems
from realign.tables import ANSWERS, PAPER, data_of, read_problems, run

from paper_tables import Context
from paper_tables.errors import TableError


def test_the_table_reads_and_names_what_is_known() -> None:
    found = PAPER.tables()
    assert set(found) == {"main"}
    for scale in ("quick", "tiny", "paper"):
        for unit in found["main"].units(scale):
            assert unit.cell["answers"] in ANSWERS
    figures = {(f.row, f.column): (f.value, f.provenance) for f in found["main"].figures}
    assert figures == {("original", "exact_match"): (46.77, "repo"), ("realigned", "exact_match"): (56.63, "repo")}


@given(st.integers(1, 5), st.integers(0, 10**6))
def test_problems_are_what_their_answers_say(steps: int, seed: int) -> None:
    for made in problems(4, steps, str(seed)):
        lines = made.worked.splitlines()
        assert len(lines) == steps + 1
        total = None
        for number, line in enumerate(lines[:-1], 1):
            index, _, sum_ = line.partition(". ")
            left, _, right = sum_.partition(" = ")
            assert (int(index), eval(left)) == (number, int(right))
            assert total in (None, int(left.split()[0]))
            total = int(right)
            assert 0 <= total <= MOST
            assert left.split()[2] in made.question
        assert total == made.result
        assert result_of(made.terse) == result_of(made.worked) == str(made.result)


def test_no_problem_is_in_two_sets() -> None:
    first = problems(50, 2, "a")
    assert len({p.question for p in first}) == 50
    second = apart(50, 2, "a", first)
    assert len(second) == 50
    assert not {p.question for p in first} & {p.question for p in second}
    assert problems(50, 2, "a") == first


CELL: dict[str, Any] = {
    "data": "generated", "steps": 2, "problems": 6, "teacher_problems": 5, "heldout": 4, "seed": 0,
    "answers": "original", "row": "r", "backend": "local",
}  # fmt: skip


@pytest.mark.parametrize(("answers", "new", "share"), [("original", 0, 0), ("half", 3, 50), ("realigned", 6, 100)])
def test_a_row_learns_from_the_answers_that_it_names(
    answers: str, new: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def rewritten(cell: Any, context: Any, rows: Any, others: Any) -> Any:
        return [{**row, "output": "new", "realign_status": "rewrite"} for row in rows]

    monkeypatch.setattr(tables, "realigned", rewritten)
    monkeypatch.setattr(tables, "student", lambda cell, rows, heldout: seen.append((rows, heldout)) or {"value": 1.0})
    found = run({**CELL, "answers": answers}, Context())
    ((rows, heldout),) = seen
    assert sum(row["output"] == "new" for row in rows) == new
    assert (found["rewritten"], found["records"], len(heldout)) == (share, 6, 4)


def test_data_come_from_the_generator_or_a_file(tmp_path: Path) -> None:
    train, heldout, others = data_of(CELL, Context())
    assert (len(train), len(heldout), len(others)) == (6, 4, 5)
    assert {row["category"] for row in train} == {"math_puzzles"}
    file = tmp_path / "gsm.jsonl"
    file.write_text('{"question": "1 + 1?", "answer": "It is 2. #### 2"}\n')
    assert read_problems({"data": str(file)}, None)[0]["instruction"] == "1 + 1?"  # type: ignore[arg-type]
    file.write_text('{"question": "1 + 1?"}\n')
    with pytest.raises(TableError, match="needs question and answer"):
        read_problems({"data": str(file)}, None)  # type: ignore[arg-type]
    with pytest.raises(TableError, match="did you mean 'half'"):
        run({**CELL, "answers": "hlf"}, Context())


@pytest.mark.slow
def test_the_quick_scale_runs_whole() -> None:
    """`realign reproduce main --scale quick`: the teacher learns, rewrites by the pipeline, and students follow."""
    pytest.importorskip("trl", reason="needs the extra [train]")
    context = Context()
    found = {unit.cell["row"]: run(unit.cell, context) for unit in PAPER.tables()["main"].units("quick")}
    assert set(found) == {"original", "realigned"}
    assert 0 <= found["realigned"]["rewritten"] <= 100
    assert 0 <= found["realigned"]["exact_match"]["value"] <= 100
