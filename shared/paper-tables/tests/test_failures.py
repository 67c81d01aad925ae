"""A unit that fails: what was measured of it before stays, in the results, in the report and among the published."""

from __future__ import annotations

import json
from pathlib import Path

import demo
import pytest
from typer.testing import CliRunner

from paper_tables import cli
from paper_tables.report import collect

FAILED = "MemoryError: no room"


@pytest.fixture
def failing():
    """The rows that fail, for the test to fill."""
    return set()


@pytest.fixture
def start(tmp_path, monkeypatch, failing):
    """`paper-tables run demo` in an empty folder, with `text` as the table: (exit code, counts)."""
    monkeypatch.chdir(tmp_path)

    def measure(cell, context):
        if cell["row"] in failing:
            raise MemoryError("no room")
        return demo.run(cell, context)

    def run(*options: str, text: str = demo.MAIN):
        paper = demo.make_paper(tmp_path, measure, text)
        monkeypatch.setattr(cli, "installed", lambda: ({"demo": paper}, {}))
        done = CliRunner().invoke(cli.app, ["run", "demo", "--json", *options])
        said = json.loads(done.stdout)
        return done.exit_code, (said["measured"], said["cached"], said["failed"])

    return run


def read(path: str = "results/demo/main/quick.json") -> dict:
    return json.loads(Path(path).read_text())


def reported(results: str = "results"):
    """The demo's table at scale quick, and its notes."""
    paper = cli.installed()[0]["demo"]
    report = collect(paper, paper.tables()["main"], Path(results))
    return report.scales["quick"], report.notes()


def test_a_forced_run_that_fails_keeps_the_figure_and_the_next_run_tries_again(start, failing):
    start()
    before = read()
    failing.add("mlp-4")
    assert start("--force") == (1, (4, 0, 1))
    record = read()["units"]["mlp-4#0"]
    where = record["where"]
    assert where.startswith("test_failures.py:")
    assert record == {**before["units"]["mlp-4#0"], "error": FAILED, "where": where}
    assert read()["code"][record["code"]] == before["code"][record["code"]]
    found, notes = reported()
    assert (found.measured, found.stale, found.failed) == (5, 0, {"mlp-4#0": FAILED})
    assert found.cells["mlp-4", "bits"].value == record["values"]["bits"]["value"]
    assert f"quick: mlp-4#0 failed: {FAILED}" in notes
    assert start() == (1, (0, 4, 1))
    failing.clear()
    assert start() == (0, (1, 4, 0))
    assert read()["units"]["mlp-4#0"].keys() == before["units"]["mlp-4#0"].keys()


def test_a_figure_of_an_older_cell_is_stale_where_the_new_one_failed(start, failing):
    start()
    before = read()["units"]["attention-4#0"]
    failing.add("attention-4")
    assert start(text=demo.MAIN.replace("settings: {layers: 16}", "settings: {layers: 8}")) == (1, (4, 0, 1))
    found, notes = reported()
    assert (found.measured, found.stale) == (5, 1)
    assert found.cells["attention-4", "kv"].value == before["values"]["kv"]["value"] == 0.75
    assert found.cells["attention-2", "kv"].value == 0.75  # measured anew
    assert f"quick: attention-4#0 failed: {FAILED}" in notes
    assert any("1 units were measured by other code or from other inputs" in note for note in notes)


def test_publishing_keeps_what_is_committed_of_a_failed_unit(start, failing):
    start("--publish")
    committed = "tables/results/main/quick.json"
    before = read(committed)
    assert before == read()
    failing.add("mlp-2")
    lost = demo.MAIN.replace("settings: {layers: 16}", "settings: {layers: 8}").replace("n: [2, 4]}", "n: [2]}")
    assert start("--publish", text=lost) == (1, (2, 0, 1))
    after = read(committed)
    assert list(after["units"]) == ["baseline#0", "attention-2#0", "mlp-2#0"]  # the table has no others now
    assert after["units"]["mlp-2#0"] == before["units"]["mlp-2#0"]
    assert after["units"]["attention-2#0"] == read()["units"]["attention-2#0"] != before["units"]["attention-2#0"]
    assert {unit["code"] for unit in after["units"].values()} == set(after["code"])
    assert {unit["machine"] for unit in after["units"].values()} == set(after["machines"])


def test_a_failure_hides_no_committed_figure(start, failing):
    start("--publish")
    committed = Path("tables/results/main/quick.json").read_bytes()
    failing.update(("baseline", "attention-2", "attention-4", "mlp-2", "mlp-4"))
    assert start("--results", "new", "--publish") == (1, (0, 0, 5))
    assert Path("tables/results/main/quick.json").read_bytes() == committed
    found, _ = reported("new")
    assert (found.measured, found.stale, len(found.failed)) == (5, 0, 5)


def test_publishing_a_failed_unit_leaves_its_figure_in_the_readme(start, failing):
    readme = Path("README.md")
    readme.write_text("<!-- results -->\n<!-- end of results -->\n")
    start("--scale", "tiny", "--publish")
    before = readme.read_text()
    assert "| attention, 6 dropped | 1.3" in before
    failing.add("attention-6")
    assert start("--scale", "tiny", "--force", "--publish") == (1, (18, 0, 3))
    assert readme.read_text() == before
