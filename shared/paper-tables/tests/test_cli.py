"""`paper-tables list | run | report | claims` and the packages' `reproduce`, in process."""

from __future__ import annotations

import importlib.metadata
import json

import demo
import pytest
from typer.testing import CliRunner

from paper_tables import cli, paper
from paper_tables.frame import make_app


@pytest.fixture
def papers(tmp_path, monkeypatch):
    """The installed packages: a dictionary for the test to fill; the working folder is empty."""
    found, broken = {}, {}
    monkeypatch.setattr(cli, "installed", lambda: (dict(found), dict(broken)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    found["demo"] = demo.make_paper(tmp_path / "demo")
    return found, broken


@pytest.fixture
def call(papers):
    def run(*arguments: str, app=cli.app):
        return CliRunner().invoke(app, list(arguments))

    return run


def test_list_run_report_claims(call, tmp_path):
    assert "0/5" in call("list").stdout
    ran = call("run", "demo/main", "--json")
    assert ran.exit_code == 0
    said = json.loads(ran.stdout)
    assert (said["measured"], said["cached"], said["failed"], said["scale"]) == (5, 0, 0, "quick")
    assert json.loads(call("run", "--all", "--json").stdout)["cached"] == 5
    assert json.loads(call("list", "--json").stdout) == {
        "measured_units": [
            {"table": "demo/main", "title": "Dropping layers of a model that does not exist", "quick": "5/5",
             "tiny": "0/21", "paper": "0/4"}
        ]
    }  # fmt: skip
    reported = call("report")
    assert reported.exit_code == 0
    assert "✓ held (quick)  KV memory falls in proportion." in reported.stdout
    assert "56.2 ± 2.5" in reported.stdout
    assert sorted(p.name for p in (tmp_path / "results" / "report").iterdir()) == [
        "plots", "report.html", "report.json", "report.md",
    ]  # fmt: skip
    claims = call("claims")
    assert claims.exit_code == 0
    assert "✗ not held (quick)  Dropping costs nothing." in claims.stdout
    assert "quick: 2 held, 1 not held, 1 not measured" in claims.stdout


def test_the_claims_as_json(call):
    call("run", "demo")
    done = call("claims", "--json")
    found = json.loads(done.stdout)
    assert found["count"] == {"quick": {"held": 2, "not held": 1, "not measured": 1}}
    assert [(c["claim"], c["verdict"]) for c in found["claims"]] == [
        ("cheaper", "held"), ("proportion", "held"), ("free", "not held"), ("large", "not measured"),
    ]  # fmt: skip


def test_results_and_output_go_where_they_are_told(call, tmp_path):
    call("run", "demo", "--results", "r", "--scale", "tiny")
    assert (tmp_path / "r" / "demo" / "main" / "tiny.json").is_file()
    done = call("report", "--results", "r", "--output", "here", "--json")
    assert json.loads(done.stdout)["html"] == "here/report.html"
    assert (tmp_path / "here" / "report.html").is_file()
    assert not (tmp_path / "results").exists()


def test_force_and_publish(call, papers):
    call("run", "demo")
    said = json.loads(call("run", "demo", "--force", "--publish", "--json").stdout)
    assert said["measured"] == 5
    assert said["published"] == [str(papers[0]["demo"].committed / "main" / "quick.json")]
    # a checkout with committed results shows them before anything was run
    assert "5/5" in call("list", "--results", "elsewhere").stdout


def test_publishing_writes_the_results_of_scale_tiny_into_the_readme(call, papers):
    readme = papers[0]["demo"].tables_folder.parent / "README.md"
    readme.write_text("# demo\n\n<!-- results -->\nold figures\n<!-- end of results -->\n\nThe end.\n")
    said = json.loads(call("run", "demo", "--publish", "--json").stdout)
    assert said["written"] == [str(readme)]
    assert "Nothing was measured yet.\n<!-- end of results -->" in readme.read_text()  # quick figures are not for it
    call("run", "demo", "--scale", "tiny", "--publish")
    before, _, rest = readme.read_text().partition("<!-- results -->\n")
    block, _, after = rest.partition("<!-- end of results -->")
    assert (before, after) == ("# demo\n\n", "\n\nThe end.\n")
    assert block.startswith("Measured with `demo reproduce --scale tiny` on ")
    assert "| attention, 6 dropped |" in block
    assert "- ✓ held: Dropping attention costs less than dropping MLPs at every count." in block
    assert "quick" not in block


def test_a_readme_without_a_place_for_results_is_left_alone(call, papers):
    readme = papers[0]["demo"].tables_folder.parent / "README.md"
    readme.write_text("# demo\n\n<!-- results -->\nno end\n")
    assert json.loads(call("run", "demo", "--publish", "--json").stdout)["written"] == []
    assert readme.read_text() == "# demo\n\n<!-- results -->\nno end\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run"], "name a PACKAGE or PACKAGE/TABLE, or give --all; packages with tables: demo"),
        (["run", "demo", "--all"], "--all and demo exclude each other"),
        (["run", "dmo"], "no package 'dmo' with tables is installed; did you mean 'demo'?"),
        (["run", "demo/mian"], "demo has no table 'mian'; did you mean 'main'?"),
        (["run", "demo", "--scale", "quik"], "unknown scale 'quik'; did you mean 'quick'?"),
        (["report", "demo/x"], "demo has no table 'x'"),
        (["claims", "x"], "no package 'x' with tables is installed"),
        (["lst"], "list"),
        (["run", "--scales", "quick"], "--scale"),
    ],
)
def test_a_wrong_request_is_one_line_and_two_and_writes_nothing(call, tmp_path, arguments, said):
    done = call(*arguments)
    assert done.exit_code == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "results").exists()


def test_a_broken_table_is_named_with_its_line_and_takes_no_other_package_with_it(call, papers, tmp_path):
    text = demo.MAIN.replace("better: lower", "beter: lower", 1)
    papers[0]["torn"] = demo.make_paper(tmp_path / "torn", text=text, name="torn")
    asked = call("run", "torn")
    assert asked.exit_code == 2
    assert "main.yaml:6: column bits: unknown key 'beter'; did you mean 'better'?" in asked.stderr
    listed = call("list")
    assert listed.exit_code == 0
    assert "demo/main" in listed.stdout
    assert "warning: the tables of torn cannot be loaded" in listed.stderr
    done = call("run", "--all", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["measured"] == 5
    assert done.stderr.splitlines()[-1] == "error: torn cannot be loaded; the next run tries again"


def test_a_package_that_does_not_import_is_no_matter_to_another(call, papers):
    papers[1]["gone"] = "ModuleNotFoundError: No module named 'gone'"
    assert call("run", "demo").exit_code == 0
    assert call("run", "demo").stderr == ""
    asked = call("run", "gone")
    assert asked.exit_code == 2
    assert "the tables of gone cannot be loaded: ModuleNotFoundError" in asked.stderr
    done = call("report")
    assert done.exit_code == 0
    assert "gone" in done.stderr
    assert call("run", "--all").exit_code == 1


def failing(cell, context):
    if cell["row"] == "mlp-4":
        raise RuntimeError("no memory")
    return demo.run(cell, context)


def test_a_failed_unit_is_shown_and_exits_with_one(call, papers, tmp_path):
    papers[0]["demo"] = demo.make_paper(tmp_path / "demo", failing)
    done = call("run", "demo")
    assert done.exit_code == 1
    assert done.stderr.splitlines() == [
        "failed: demo/main mlp-4#0: RuntimeError: no memory",
        "error: 1 of 5 units failed; the next run tries again",
    ]
    assert "RuntimeError: no memory" in done.stdout
    assert "quick: mlp-4#0 failed: RuntimeError: no memory" in call("report").stdout


def test_a_scale_that_a_table_does_not_offer_is_said(call, papers, tmp_path):
    text = demo.MAIN.replace("  tiny: {", "  # tiny: {")
    papers[0]["demo"] = demo.make_paper(tmp_path / "demo", text=text)
    said = json.loads(call("run", "demo", "--scale", "tiny", "--json").stdout)
    assert said["not offered at this scale"] == ["demo/main"]


@pytest.fixture
def package(papers):
    app = make_app("demo", help="The demo's command.")
    cli.add_reproduce(app, lambda: papers[0]["demo"])
    return app


def test_reproduce_runs_and_reports_the_packages_own_tables(call, package, tmp_path):
    done = call("reproduce", app=package)
    assert done.exit_code == 0
    assert "demo/main  Dropping layers" in done.stdout
    assert "measured" in done.stdout
    assert (tmp_path / "results" / "report" / "report.html").is_file()
    again = json.loads(call("reproduce", "main", "--json", app=package).stdout)
    assert (again["measured"], again["cached"]) == (0, 5)
    wrong = call("reproduce", "mian", app=package)
    assert (wrong.exit_code, wrong.stderr) == (2, "error: demo has no table 'mian'; did you mean 'main'?\n")


def test_reproduce_reports_what_there_is_and_then_fails(call, package, papers, tmp_path):
    papers[0]["demo"] = demo.make_paper(tmp_path / "demo", failing)
    done = call("reproduce", app=package)
    assert done.exit_code == 1
    assert "1.244" in done.stdout
    assert done.stderr.splitlines()[-1] == "error: 1 of 5 units failed; the next run tries again"
    assert (tmp_path / "results" / "report" / "report.md").is_file()


def test_packages_are_found_by_entry_point_and_a_broken_one_is_named(tmp_path, monkeypatch):
    (tmp_path / "good_tables.py").write_text(
        "from pathlib import Path\nfrom paper_tables import Paper\n"
        "PAPER = Paper('good', Path(__file__).parent, lambda cell, context: {})\nNOT_ONE = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    points = [
        importlib.metadata.EntryPoint(name, value, paper.GROUP)
        for name, value in {"a": "good_tables:PAPER", "b": "good_tables:NOT_ONE", "c": "not_there:PAPER"}.items()
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points if group == paper.GROUP else [])
    found, broken = paper.installed()
    assert list(found) == ["a"]
    assert broken == {
        "b": "TypeError: good_tables:NOT_ONE is not a paper_tables.Paper",
        "c": "ModuleNotFoundError: No module named 'not_there'",
    }


def test_tables_lie_beside_the_module_in_a_wheel_and_above_it_in_a_checkout(tmp_path):
    module = tmp_path / "src" / "made_up" / "tables.py"
    module.parent.mkdir(parents=True)
    assert paper.tables_folder(str(module)) == tmp_path / "tables"
    (module.parent / "_tables").mkdir()
    assert paper.tables_folder(str(module)) == module.parent / "_tables"
