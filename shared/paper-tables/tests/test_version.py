"""Which of our own code a result depends on."""

from __future__ import annotations

import sys
from types import ModuleType

import demo

import paper_tables.training
from paper_tables import version
from paper_tables.version import Code


def test_our_training_code_counts_where_it_was_imported(tmp_path, monkeypatch):
    paper = demo.make_paper(tmp_path)
    assert Code(paper).modules["paper_tables/training.py"][0].samefile(paper_tables.training.__file__)
    assert "paper_tables/training.py" in Code(paper).used()
    ours = tmp_path / "paper_tables"
    ours.mkdir()
    for name in ("sft", "trainer", "training"):
        (ours / f"{name}.py").write_text("X = 1\n")
    monkeypatch.setattr(version, "__file__", str(ours / "version.py"))
    without = Code(paper).used()
    assert not [name for name in without if name.startswith("paper_tables/")]
    trainer = ModuleType("a_trainer")
    trainer.__file__ = str(ours / "trainer.py")
    monkeypatch.setitem(sys.modules, "a_trainer", trainer)
    used = Code(paper).used()
    assert used.keys() - without.keys() == {"paper_tables/trainer.py"}
    (ours / "sft.py").write_text("X = 22\n")
    assert Code(paper).holds(used)
    (ours / "trainer.py").write_text("X = 22\n")
    assert not Code(paper).holds(used)
    assert Code(paper).holds(without)  # what did not train, and what was recorded before these files counted
