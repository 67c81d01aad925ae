"""Running: what is measured again and what is not, failures, full disks, two runs at once, and kill -9."""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import demo
import pytest

from paper_tables import Paper, TableError, runner, store
from paper_tables.runner import run_tables

SMALL = demo.MAIN.split("claims:")[0]


class Counting:
    """The demo's `run`, which remembers what it was asked and fails where it is told to."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.failing: dict[str, Exception] = {}

    def __call__(self, cell, context):
        self.asked.append(f"{cell['row']}#{cell['seed']}")
        if error := self.failing.get(cell["row"]):
            raise error
        return demo.run(cell, context)


@pytest.fixture
def counting():
    return Counting()


@pytest.fixture
def measure(tmp_path, counting):
    """Run the demo with `text` as its table; returns (units measured, summary)."""

    def run(text: str = SMALL, scale: str = "quick", **options):
        paper = demo.make_paper(tmp_path, counting, text)
        counting.asked.clear()
        summary = run_tables([(paper, paper.tables()["main"])], scale=scale, results=tmp_path / "results", **options)
        return list(counting.asked), summary

    return run


def read(tmp_path: Path, scale: str = "quick") -> dict:
    return json.loads((tmp_path / "results" / "demo" / "main" / f"{scale}.json").read_text())


ALL = ["baseline#0", "attention-2#0", "attention-4#0", "mlp-2#0", "mlp-4#0"]


def test_a_run_measures_everything_once(measure, tmp_path):
    asked, summary = measure()
    assert (asked, summary.measured, summary.cached, summary.failed) == (ALL, 5, 0, {})
    units = read(tmp_path)["units"]
    assert list(units) == ALL
    assert units["attention-2#0"]["values"]["accuracy"] == {"value": pytest.approx(60 - 4 + 0.2 * 0.909297), "se": 2.5}
    assert len(units["baseline#0"]["artefacts"]["similarity"]) == 16
    machine = read(tmp_path)["machines"][units["baseline#0"]["machine"]]
    assert {"cpu", "cores", "python"} <= set(machine) <= {"cpu", "cores", "gpu", "python", "torch", "transformers"}
    asked, summary = measure()
    assert (asked, summary.measured, summary.cached) == ([], 0, 5)
    assert measure(force=True)[0] == ALL


MLP = ["mlp-2#0", "mlp-4#0"]


@pytest.mark.parametrize(
    ("old", "new", "again"),
    [
        ("title: next line", "title: next", []),
        ("value: 97.6", "value: 97.7", []),
        ('format: ".1f"', 'format: ".2f"', []),
        ("about: Layers", "about: All layers", []),
        ("settings: {layers: 16}", "settings: {layers: 8}", ALL),
        ("quick: {seeds: [0]", "quick: {seeds: [0, 1]", [f"{unit[:-1]}1" for unit in ALL]),
        ("n: [2, 4]}", "n: [4, 3]}", ["attention-3#0", "mlp-3#0"]),
        ("set: {method: none, n: 0}", "set: {method: none, n: 0, x: 1}", ["baseline#0"]),
        ("settings: {model: none}}\n  tiny", "settings: {model: other}}\n  tiny", ALL),
    ],
)
def test_a_changed_table_measures_what_changed(measure, old, new, again):
    measure()
    assert SMALL.count(old) == 1
    assert measure(SMALL.replace(old, new))[0] == again


def test_rows_that_the_table_lost_leave_the_results(measure, tmp_path):
    measure()
    measure(SMALL.replace("n: [2, 4]}", "n: [2, 3]}"))
    assert list(read(tmp_path)["units"]) == ["baseline#0", "attention-2#0", "attention-3#0", "mlp-2#0", "mlp-3#0"]


def test_inputs_count_by_their_content(measure, tmp_path):
    model, data = tmp_path / "model", tmp_path / "data.txt"
    model.mkdir()
    (model / "model.safetensors").write_bytes(bytes(64))
    (model / "README.md").write_text("a card")
    data.write_text("some text")
    text = SMALL.replace("settings: {layers: 16}", f"settings: {{layers: 16, data: {data}}}")
    text = text.replace("set: {method: none, n: 0}", f"set: {{method: none, n: 0, model: {model}}}")
    assert measure(text)[0] == ALL
    os.utime(model / "model.safetensors", (1, 1))  # newer or older is not other
    (model / "README.md").write_text("another card")
    assert measure(text)[0] == []
    (model / "model.safetensors").write_bytes(bytes(63) + b"\1")
    assert measure(text)[0] == ["baseline#0"]  # the only row with this model
    (model / "checkpoints").mkdir()
    (model / "checkpoints" / "config.json").write_text("{}")
    assert measure(text)[0] == ["baseline#0"]
    data.write_text("other text")
    assert measure(text)[0] == ALL
    assert measure(text)[0] == []


def test_an_input_that_changes_during_the_run_is_measured_again(tmp_path, counting):
    data = tmp_path / "data.txt"
    data.write_text("before")
    paper = demo.make_paper(tmp_path, counting, SMALL.replace("layers: 16", f"layers: 16, data: {data}"))
    tables, results = [(paper, paper.tables()["main"])], tmp_path / "results"
    # a unit may have loaded the file before it changed: nothing may be kept under the new content
    counting.failing["mlp-2"] = ValueError("stop")
    run_tables(tables, results=results, report=lambda line: data.write_text("after"))
    counting.asked.clear()
    counting.failing.clear()
    run_tables(tables, results=results)
    assert counting.asked == ALL


def test_a_zoo_model_counts_by_its_weights(measure, tmp_path, monkeypatch):
    from model_hooks import zoo

    shutil.copytree(zoo.resolve("zoo:gpt2"), tmp_path / "zoo" / "gpt2")
    monkeypatch.setattr(zoo, "CHECKPOINTS", tmp_path / "zoo")
    text = SMALL.replace("settings: {layers: 16}", 'settings: {layers: 16, draft: "zoo:gpt2", text: "zoo:calibration"}')
    assert measure(text)[0] == ALL
    for told in ("README.md", "measurements.json", "training_log.jsonl"):  # of the model, and nothing that it reads
        (tmp_path / "zoo" / "gpt2" / told).write_text("")
    assert measure(text)[0] == []
    weights = tmp_path / "zoo" / "gpt2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\7")
    assert measure(text)[0] == ALL


def test_code_counts_by_its_files(tmp_path, monkeypatch):
    package, helper = tmp_path / "src" / "made_up", tmp_path / "src" / "made_up_helper.py"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "tables.py").write_text(
        "import made_up_helper, made_up_shared.used\ndef run(cell, context):\n    return {'bits': 1.0}\n"
    )
    shared = tmp_path / "src" / "made_up_shared"
    shared.mkdir()
    for name in ("__init__", "used", "unused"):
        (shared / f"{name}.py").write_text("X = 1\n")
    helper.write_text("X = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path / "src"))
    from made_up.tables import run

    folder = demo.make_paper(tmp_path, text=SMALL).tables_folder
    paper = Paper("made-up", folder, run, code=("made_up_helper", "made_up_shared"))

    def measured() -> int:
        return run_tables([(paper, paper.tables()["main"])], results=tmp_path / "results").measured

    assert (measured(), measured()) == (5, 0)
    (package / "README.md").write_text("words")
    (package / "__pycache__").mkdir(exist_ok=True)
    (package / "__pycache__" / "tables.py").write_text("compiled")
    (tmp_path / "src" / "other.py").write_text("")
    (package / "verb.py").write_text("X = 1\n")  # what no row imports decides nothing
    (package / "cli.py").write_text("X = 1\n")
    importlib.import_module("made_up.cli")
    assert measured() == 0
    (package / "defaults.yaml").write_text("samples: 64\n")
    assert (measured(), measured()) == (5, 0)
    (package / "tables.py").write_text("def run(cell, context):\n    return {'bits': 2.0}\n")
    assert (measured(), measured()) == (5, 0)
    helper.write_text("X = 2\n")
    assert (measured(), measured()) == (5, 0)
    (shared / "unused.py").write_text("X = 2\n")
    (shared / "new.py").write_text("X = 2\n")
    assert measured() == 0
    (shared / "used.py").write_text("X = 2\n")
    assert (measured(), measured()) == (5, 0)
    (shared / "words.txt").write_text("data may be read by any of them")
    assert (measured(), measured()) == (5, 0)
    (shared / "used.py").unlink()
    assert measured() == 5


def test_a_hub_model_gets_its_revision_when_it_has_come(tmp_path, monkeypatch, counting):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    reference = tmp_path / "hub" / "models--owner--model" / "refs" / "main"

    def download(cell, context):
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text("abc")
        return counting(cell, context)

    paper = demo.make_paper(tmp_path, download, SMALL.replace("model: none", "model: owner/model"))
    tables, results = [(paper, paper.tables()["main"])], tmp_path / "results"
    assert run_tables(tables, results=results).measured == 5
    assert read(tmp_path)["units"]["baseline#0"]["key"]["inputs"]["model"] == ["owner/model@abc"]
    assert run_tables(tables, results=results).measured == 0
    shutil.rmtree(tmp_path / "hub")  # no ground to doubt what was measured
    assert run_tables(tables, results=results).measured == 0
    reference.parent.mkdir(parents=True)
    reference.write_text("def")
    assert run_tables(tables, results=results).measured == 5


def test_a_failure_stops_no_other_unit_and_is_tried_again(measure, counting, tmp_path):
    said: list[str] = []
    counting.failing["attention-4"] = RuntimeError("out of memory\nand more of it")
    asked, summary = measure(report=said.append)
    assert asked == ALL
    assert (summary.measured, summary.failed) == (4, {"demo/main attention-4#0": "RuntimeError: out of memory"})
    assert said == ["demo/main attention-4#0: RuntimeError: out of memory"]
    record = read(tmp_path)["units"]["attention-4#0"]
    assert record["error"] == "RuntimeError: out of memory"
    assert record["where"].startswith("test_runner.py:")  # the file's name, not its folder
    counting.failing.clear()
    assert measure()[0] == ["attention-4#0"]
    assert "error" not in read(tmp_path)["units"]["attention-4#0"]


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (None, "run returned NoneType, a mapping of columns to figures is expected"),
        ({"bit": 1.0}, "run returned 'bit', which is no column; did you mean 'bits'?"),
        ({"bits": float("nan")}, "column bits is nan, not a finite number; leave it out if it was not measured"),
        ({"bits": {"value": 1, "se": -1}}, "not a finite number"),
        ({"bits": {"se": 1}}, "column bits: a number or {'value', 'se'} is expected"),
        ({"bits": {"value": 1, "error": 1}}, "column bits: a number or {'value', 'se'} is expected"),
        ({"bits": "many"}, "column bits: a number or {'value', 'se'} is expected, found 'many'"),
    ],
)
def test_what_run_may_not_return_is_a_failure_that_says_so(tmp_path, returned, said):
    paper = demo.make_paper(
        tmp_path, lambda cell, context: returned, SMALL.replace("quick: {", "quick: {only: [mlp-2], ")
    )
    summary = run_tables([(paper, paper.tables()["main"])], results=tmp_path / "results")
    assert list(summary.failed) == ["demo/main mlp-2#0"]
    assert said in summary.failed["demo/main mlp-2#0"]


def test_artefacts_are_plain_numbers_or_refused(tmp_path):
    import torch

    matrix = torch.tensor([[0.5, float("inf")]], dtype=torch.bfloat16)

    def run(cell, context):
        context.artefact("matrix", object() if cell["row"] == "mlp-4" else matrix)
        return {"bits": torch.tensor(1.5)}

    paper = demo.make_paper(tmp_path, run, SMALL)
    summary = run_tables([(paper, paper.tables()["main"])], results=tmp_path / "results")
    assert list(summary.failed.values()) == ["artefact 'matrix' holds object; lists of numbers are expected"]
    unit = read(tmp_path)["units"]["mlp-2#0"]
    assert (unit["artefacts"], unit["values"]) == ({"matrix": [[0.5, None]]}, {"bits": {"value": 1.5}})


def test_a_full_disk_stops_the_run_and_leaves_what_was_there(measure, counting, monkeypatch, tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    counting.failing["attention-4"] = full  # in the work
    with pytest.raises(OSError, match="No space left"):
        measure()
    assert list(read(tmp_path)["units"]) == ALL[:2]
    counting.failing.clear()
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(full))  # in the writing
    before = (tmp_path / "results" / "demo" / "main" / "quick.json").read_bytes()
    with pytest.raises(OSError, match="No space left"):
        measure()
    folder = tmp_path / "results" / "demo" / "main"
    assert (folder / "quick.json").read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == [".quick.json.lock", "quick.json"]
    monkeypatch.undo()
    assert measure()[0] == ALL[2:]


def test_a_second_run_of_the_same_table_is_refused_before_it_reads(measure, tmp_path):
    path = tmp_path / "results" / "demo" / "main" / "quick.json"
    with store.locked(path):
        with pytest.raises(TableError, match=r"another run is writing .*quick\.json; wait for it"):
            measure()
        assert measure(scale="tiny")[1].measured == 21  # another file
    assert measure()[1].measured == 5


def test_results_that_are_none_of_ours_are_not_overwritten(measure, tmp_path):
    path = tmp_path / "results" / "demo" / "main" / "quick.json"
    path.parent.mkdir(parents=True)
    for content in ("{", "[]", '{"format": 99, "units": {}}'):
        path.write_text(content)
        with pytest.raises(TableError, match=r"quick\.json is not a results file.*move it away and run again"):
            measure()
        assert path.read_text() == content


def test_a_scale_that_is_not_offered_is_said_and_one_that_is_none_refused(measure):
    asked, summary = measure(SMALL.replace("  tiny: {", "  # tiny: {"), scale="tiny")
    assert (asked, summary.skipped) == ([], ["demo/main"])
    with pytest.raises(TableError, match="unknown scale 'quik'; did you mean 'quick'"):
        measure(scale="quik")


def test_units_share_what_was_made_and_papers_do_not(tmp_path):
    made: list[str] = []
    held: list[tuple[str, int]] = []

    def run(cell, context):
        context.once("small", lambda: made.append(f"small {cell['package']}"))
        context.latest("model", cell["n"], lambda: made.append(f"model {cell['n']}") or object())
        held.append((cell["package"], len(context.memo)))
        return {"bits": 1.0}

    papers = [demo.make_paper(tmp_path / name, run, SMALL, name) for name in ("one", "two")]
    run_tables([(p, p.tables()["main"]) for p in papers], results=tmp_path / "results")
    models = ["model 0", "model 2", "model 4", "model 2", "model 4"]
    assert made == ["small one", *models, "small two", *models]


def test_publishing_takes_what_was_measured_and_leaves_failures(measure, counting, tmp_path):
    counting.failing["mlp-4"] = ValueError("no")
    measure()
    paper = demo.make_paper(tmp_path, counting, SMALL)
    written = runner.publish([(paper, paper.tables()["main"])], "quick", tmp_path / "results")
    assert written == [tmp_path / "tables" / "results" / "main" / "quick.json"]
    assert list(json.loads(written[0].read_text())["units"]) == ALL[:-1]
    assert list(paper.tables()) == ["main"]  # the results' folder is no table


SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import demo
from paper_tables.runner import run_tables

def run(cell, context):
    with open("asked", "a") as file:
        print(cell["row"], file=file)
    if cell["row"] == "mlp-2" and len(sys.argv) > 2:
        Path("stuck").touch()
        time.sleep(600)
    return demo.run(cell, context)

paper = demo.make_paper(Path("."), run, Path("table.yaml").read_text())
print(run_tables([(paper, paper.tables()["main"])], results=Path("results")).measured)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was_and_ends_as_if_never_killed(tmp_path):
    (tmp_path / "table.yaml").write_text(SMALL)
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent)]
    process = subprocess.Popen([*command, "stop"], cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not (tmp_path / "stuck").exists():
        assert process.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    folder = tmp_path / "results" / "demo" / "main"
    (folder / ".quick.json.part").write_text("{")  # as a kill in the middle of writing leaves it
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert list(read(tmp_path)["units"]) == ALL[:3]

    (tmp_path / "asked").unlink()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2"]
    assert (tmp_path / "asked").read_text().split() == ["mlp-2", "mlp-4"]
    assert sorted(p.name for p in folder.iterdir()) == [".quick.json.lock", "quick.json"]

    paper = demo.make_paper(tmp_path / "other", demo.run, SMALL)
    run_tables([(paper, paper.tables()["main"])], results=tmp_path / "other" / "results")

    def lasting(root: Path) -> dict:
        passing = ("seconds", "measured", "key", "code", "machine")  # the other run has other code: the script above
        units = read(root)["units"].items()
        return {name: {k: v for k, v in unit.items() if k not in passing} for name, unit in units}

    assert lasting(tmp_path) == lasting(tmp_path / "other")
