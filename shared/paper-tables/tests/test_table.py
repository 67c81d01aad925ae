"""Table files: what they may say, and that whatever is wrong is named with file, line and the nearest right name."""

from __future__ import annotations

import re
from pathlib import Path

import demo
import pytest

from paper_tables import TableError, read_table


@pytest.fixture
def read(tmp_path):
    def reader(text: str, name: str = "main.yaml"):
        (tmp_path / name).write_text(text)
        return read_table(tmp_path / name, "demo")

    return reader


def test_the_demo_is_read_as_written(read):
    table = read(demo.MAIN)
    assert list(table.columns) == ["bits", "accuracy", "kv"]
    assert table.columns["accuracy"].header == "next line (%)"
    assert [r.id for r in table.rows("quick")] == ["baseline", "attention-2", "attention-4", "mlp-2", "mlp-4"]
    assert [r.id for r in table.rows("paper")] == ["baseline", "attention-8", "mlp-8", "huge"]
    assert table.rows("quick")[1].title == "attention, 2 dropped"
    assert table.rows("quick")[0].reference
    assert not table.rows("quick")[1].reference
    assert table.scales["paper"].settings["layers"] == 80  # a scale's setting goes before the table's
    assert table.scales["paper"].seeds == (0,)
    assert table.inputs == ("model", "data")


def test_the_example_of_the_readme_is_a_table(read):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    table = read(re.search(r"```yaml\n(.*?)```", readme, re.DOTALL)[1])
    assert len(table.claims) == len(table.plots) == 3
    assert list(table.all_rows())[-1] == "llama-2-70b"
    assert "attention-8" in table.all_rows()


def test_a_unit_is_a_row_with_a_seed_and_knows_all_that_decides_it(read):
    units = read(demo.MAIN).units("tiny")
    assert len(units) == 7 * 3
    assert units[4].id == "attention-2#1"
    assert units[4].cell == {
        "layers": 16, "model": "none", "method": "attention", "n": 2,
        "package": "demo", "table": "main", "scale": "tiny", "row": "attention-2", "seed": 1,
    }  # fmt: skip


def test_the_rows_of_all_scales_stand_in_the_order_of_the_grid(read):
    assert list(read(demo.MAIN).all_rows()) == [
        "baseline", "attention-2", "attention-4", "attention-6", "attention-8", "mlp-2", "mlp-4", "mlp-6", "mlp-8",
        "huge",
    ]  # fmt: skip


def test_a_descending_grid_stays_descending(read):
    text = demo.MAIN.replace("n: [2, 4]", "n: [4, 2]").split("claims:")[0]
    assert list(read(text).all_rows())[1:5] == ["attention-4", "attention-2", "attention-6", "attention-8"]


def test_a_recalled_figure_is_kept_but_not_the_papers(read):
    table = read(demo.MAIN)
    assert table.figure("huge", "accuracy").value == 97.6
    assert table.figure("attention-8", "accuracy") is None
    assert [f.shown for f in table.figures] == [True, False]


def test_only_limits_a_scale_and_seeds_a_row(read):
    text = demo.MAIN.replace("quick: {seeds: [0],", "quick: {seeds: [0, 1], only: [baseline, 'mlp-*'],")
    text = text.replace("reference: true}", "reference: true, seeds: [7]}")
    assert [u.id for u in read(text).units("quick")] == ["baseline#7", "mlp-2#0", "mlp-2#1", "mlp-4#0", "mlp-4#1"]


# what is replaced in the demo, by what, and what the error says of it: the line is that of the replacement
WRONG = {
    "unknown key": ("about: Layers", "abuot: Layers", "unknown key 'abuot'; did you mean 'about'?"),
    "unknown key of a column": ("better: lower}", "beter: lower}", "unknown key 'beter'; did you mean 'better'?"),
    "better": ("better: higher", "better: hihger", "better: 'hihger' is not accepted; did you mean 'higher'?"),
    "format": ('".1f"', '".1q"', "format '.1q' is not one for numbers, like '.3f'"),
    "column id": ("  kv: {title", "  k-v: {title", "'k-v' must be a Python name"),
    "column id is a keyword": ("  kv: {title", "  lambda: {title", "'lambda' must be a Python name"),
    "scale": ("  tiny: {seeds", "  tyni: {seeds", "unknown scale 'tyni'; did you mean 'tiny'?"),
    "scale of a row": ("scales: [paper]}", "scales: [papers]}", "unknown scale 'papers'; did you mean 'paper'?"),
    "seeds": ("seeds: [0, 1, 2]", "seeds: [0, x]", "'seeds' must be a list of whole numbers, found [0, 'x']"),
    "seed twice": ("seeds: [0, 1, 2]", "seeds: [0, 0]", "'seeds' holds a seed twice: [0, 0]"),
    "vary": ("n: [2, 4, 6]}", "n: 6}", "vary: 'n' must be a list of values, found 6"),
    "only": ("  tiny: {", "  tiny: {only: [basline], ", "only: no row 'basline'; did you mean 'baseline'?"),
    "scale list": ("mlp], n: $n}", "mlp], n: $m}", "no scale list '$m'; known: n"),
    "template": ('"{method}-{n}", title', '"{mehtod}-{n}", title', "names 'mehtod'; did you mean 'method'?"),
    "template is none": ('"{method}-{n}", title', '"{method-{n}", title', "is not a template"),
    "double id": ("id: huge", "id: baseline", "id 'baseline' belongs to two rows at scale paper"),
    "reserved": ("set: {method: none, n: 0}", "set: {seed: none}", "'seed' is set by the runner"),
    "set and grid": ("grid: {method", "set: {n: 1}, grid: {method", "'n' is both in 'set' and in 'grid'"),
    "reference": ("reference: true", "reference: 1", "'reference' must be true or false, found 1"),
    "row of a figure": ("row: huge, column", "row: hugh, column", "no row 'hugh'; did you mean 'huge'?"),
    "column of a figure": ("column: accuracy, value: 97", "column: accurcy, value: 97", "did you mean 'accuracy'?"),
    "value of a figure": ("value: 97.6", "value: many", "'value' must be a number, found 'many'"),
    "origin of a figure": ("from: abstract", "from: abstrct", "'abstrct' is not accepted; did you mean 'abstract'?"),
    "no origin of a figure": (", from: recalled}", "}", "'from' is missing"),
    "figure twice": ("row: attention-8, column", "row: huge, column", "accuracy of 'huge' is given twice"),
    "plot kind": ("kind: bars", "kind: bar", "kind: 'bar' is not accepted; did you mean 'bars'?"),
    "plot key": ("kind: bars,", "kind: bars, x: n,", "unknown key 'x'"),
    "plot column": ("x: n, y: bits", "x: n, y: bit", "y: no 'bit'; did you mean 'bits'?"),
    "plot parameter": ("by: method, base", "by: metod, base", "by: no 'metod'; did you mean 'method'?"),
    "plot row": ("row: baseline, artefact", "row: bseline, artefact", "row: no 'bseline'; did you mean 'baseline'?"),
    "plot rows": ("kind: bars,", "kind: bars, rows: ['atention-*'],", "rows: no row 'atention-*'"),
    "claim list": ("    for: {n: $n}\n    holds: bits", "    for: {n: $m}\n    holds: bits", "no scale has a list"),
    "claim row": ('holds: accuracy["mlp-4"]', 'holds: accuracy["mpl-4"]', "no row 'mpl-4' at any scale; did you mean"),
    "claim column": ('holds: accuracy["mlp-4"]', 'holds: acuracy["mlp-4"]', "no column 'acuracy'; did you mean 'acc"),
    "claim name": ("(1 - n / layers)", "(1 - n / lyers)", "unknown name 'lyers'; did you mean 'layers'?"),
    "claim function": ("2 * se(accuracy", "2 * ste(accuracy", "unknown function 'ste'; did you mean 'se'?"),
    "claim field": ('bits["attention-{n}"] <', 'bits["attention-{m}"] <', "names 'm'"),
    "claim syntax": ("- (1 - n / layers)) < 1e-9", "- (1 - n / layers) < 1e-9", "not an expression"),
    "tab": ("about: Layers", "about:\tx: Layers", "not valid YAML"),
    "key twice": ("about: Layers", "title: Layers", "key 'title' is given twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named_with_file_line_and_nearest_name(read, tmp_path, name):
    old, new, said = WRONG[name]
    assert demo.MAIN.count(old) >= 1, "the demo changed"
    text = demo.MAIN.replace(old, new, 1)
    with pytest.raises(TableError) as caught:
        read(text)
    message = str(caught.value)
    assert said in message
    assert "\n" not in message
    place = re.match(re.escape(str(tmp_path / "main.yaml")) + r":(\d+): ", message)
    assert place, message
    changed = [i for i, (a, b) in enumerate(zip(demo.MAIN.splitlines(), text.splitlines()), 1) if a != b]
    assert int(place[1]) == changed[0] + new.count("\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("", "'id' is missing", id="empty"),
        pytest.param("- 1\n", "a mapping of keys to values is expected, found list", id="a list"),
        pytest.param(demo.MAIN.replace("id: main", "id: other", 1), "must be the file's name, 'main'", id="id"),
        pytest.param(re.sub(r"rows:\n(  - .*\n)+", "rows: []\n", demo.MAIN), "'rows' is empty", id="no rows"),
        pytest.param(
            re.sub(r"  paper: \{.*\n", "", demo.MAIN), "the table offers no scale 'paper'", id="a row of no scale"
        ),
    ],
)
def test_a_file_that_is_no_table(read, text, said):
    with pytest.raises(TableError, match=re.escape(said)):
        read(text)


def test_a_file_that_is_not_utf8_or_not_there(read, tmp_path):
    (tmp_path / "main.yaml").write_bytes(b"id: m\xe9in\n")
    with pytest.raises(TableError, match=r"main\.yaml is not UTF-8 \(byte 5\)"):
        read_table(tmp_path / "main.yaml", "demo")
    with pytest.raises(TableError, match=r"cannot read .*none\.yaml: No such file"):
        read_table(tmp_path / "none.yaml", "demo")
