"""The report: what stands beside what, what is never shown, and files that need nothing beside themselves."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser

import demo
import pytest
from PIL import Image

from paper_tables import plots
from paper_tables.claims import HELD, NOT_HELD, NOT_MEASURED
from paper_tables.files import write_report
from paper_tables.report import collect, figure_text, tally
from paper_tables.runner import publish, run_tables
from paper_tables.table import Column
from paper_tables.terminal import print_report


def failing(cell, context):
    if cell["row"] == "mlp-4" and cell["scale"] == "quick":
        raise RuntimeError("a <b>bad</b> | thing")
    return demo.run(cell, context)


def measured(folder, run=demo.run, scales=("quick", "tiny"), text=demo.MAIN):
    paper = demo.make_paper(folder, run, text)
    for scale in scales:
        run_tables([(paper, paper.tables()["main"])], scale=scale, results=folder / "results")
    return paper


def report_of(folder, paper):
    return collect(paper, paper.tables()["main"], folder / "results")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def report(folder):
    return report_of(folder, measured(folder, failing))


@pytest.fixture(scope="module")
def files(folder, report):
    return write_report([report], {"other": "ImportError: no <module>"}, folder / "out")


class Page(HTMLParser):
    """The page's tags, all must be closed; its attributes and its text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open, self.attributes, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *attribute) for attribute in attrs]
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_needs_nothing_beside_itself(files):
    text = files["html"].read_text()
    page = Page(text)
    links = [value for _, name, value in page.attributes if name in ("src", "href", "srcset", "action")]
    assert links
    assert all(value.startswith(("data:", "#")) for value in links)
    assert not re.search(r"@import|url\(|<script|<link|http-equiv", text)
    assert "a <b>bad</b> | thing" in page.text  # what others wrote is text, not markup
    assert "no <module>" in page.text


def _image(png: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(png))
    image.load()
    return image


def test_pictures_are_pictures_of_sane_size(files, folder):
    names = sorted(p.name for p in (folder / "out" / "plots").iterdir())
    assert names == [f"demo-main-{p}-{s}.png" for p in ("bars", "curve", "similarity") for s in ("quick", "tiny")]
    embedded = re.findall(r"base64,([A-Za-z0-9+/=]+)", files["html"].read_text())
    pictures = [(folder / "out" / "plots" / name).read_bytes() for name in names]
    assert sorted(base64.b64decode(text) for text in embedded) == sorted(pictures)
    for png in pictures:
        image = _image(png).convert("L")
        assert 600 <= image.width <= 1200
        assert 200 <= image.height <= 1000
        assert image.getextrema()[1] - image.getextrema()[0] > 100  # something is drawn
    assert len(set(pictures)) == len(pictures)


def _axes(folder, plot, text):
    """The axes of one plot of the demo paper's table `text` at scale tiny."""
    report = report_of(folder, measured(folder, scales=("tiny",), text=text))
    (found,) = (p for p in report.table.plots if p.id == plot)
    return report, {"curve": plots._curve, "heatmap": plots._heatmap}[found.kind](report, found, "tiny").axes[0]


def test_a_curve_runs_over_a_parameter_or_over_what_was_measured(tmp_path):
    report, by_number = _axes(tmp_path / "a", "curve", demo.MAIN)
    assert list(by_number.containers[0].lines[0].get_xdata()) == [2, 4, 6]
    assert by_number.get_xlabel() == "n"
    _, by_figure = _axes(tmp_path / "b", "curve", demo.MAIN.replace("x: n, y: bits", "x: kv, y: bits"))
    cells = report.scales["tiny"].cells
    wanted = [cells[f"attention-{n}", "kv"].value for n in (6, 4, 2)]  # from left to right
    assert list(by_figure.containers[0].lines[0].get_xdata()) == wanted
    assert list(by_figure.containers[0].lines[0].get_ydata()) == [
        cells[f"attention-{n}", "bits"].value for n in (6, 4, 2)
    ]
    assert by_figure.get_xlabel() == "KV share, lower is better"


def test_lines_of_a_number_say_what_it_is_of(tmp_path):
    text = demo.MAIN.replace("x: n, y: bits, by: method", "x: method, y: bits, by: n")
    _, axes = _axes(tmp_path, "curve", text)
    assert [label.get_text() for label in axes.get_legend().get_texts()] == ["Baseline", "n = 2", "n = 4", "n = 6"]


def test_a_curve_of_one_place_is_bars_beside_the_baseline(tmp_path):
    text = demo.MAIN.replace("n: [2, 4, 6]}", "n: [4]}").replace(
        "baseline: baseline}", "baseline: baseline, rows: [a*]}"
    )
    report, axes = _axes(tmp_path, "curve", text)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["Baseline", "attention, 4 dropped"]
    cells = report.scales["tiny"].cells
    assert [bar.get_width() for bar in axes.patches] == [cells[r, "bits"].value for r in ("baseline", "attention-4")]


@pytest.mark.parametrize(("count", "shown"), [(16, True), (3, False)])
def test_rows_of_a_heat_map_have_names_where_there_are_as_many(tmp_path, count, shown):
    names = [f"layer{i}" for i in range(count)]
    text = demo.MAIN.replace("x: gap, y: layer}", f"x: gap, labels: {names}}}")
    _, axes = _axes(tmp_path, "similarity", text)
    assert ([label.get_text() for label in axes.get_yticklabels()] == names) == shown


def test_columns_of_a_heat_map_are_numbered_from_its_start(tmp_path):
    _, axes = _axes(tmp_path, "similarity", demo.MAIN.replace("x: gap, y: layer}", "x: gap, start: 1}"))
    left, right, bottom, top = axes.images[0].get_extent()
    rows, columns = axes.images[0].get_array().shape
    assert (left, right, bottom, top) == (0.5, columns + 0.5, rows - 0.5, -0.5)


def test_the_json_holds_cells_with_errors_and_seeds_figures_and_verdicts(files):
    found = json.loads(files["json"].read_text())
    table = found["tables"][0]
    assert list(table["scales"]) == ["tiny", "quick"]  # most telling first
    cell = table["scales"]["tiny"]["cells"]["mlp-4"]["bits"]
    by_seed = [demo.run({"method": "mlp", "n": 4, "layers": 16, "seed": s}, None)["bits"] for s in (0, 1, 2)]
    assert list(cell["by_seed"].values()) == by_seed
    assert cell["value"] == pytest.approx(sum(by_seed) / 3)
    assert "mlp-4" not in table["scales"]["quick"]["cells"]
    assert table["published"] == [
        {"row": "huge", "column": "accuracy", "value": 97.6, "se": None, "from": "abstract",
         "source": "second sentence"}
    ]  # fmt: skip
    assert {c: v["verdict"] for c, v in table["scales"]["tiny"]["claims"].items()} == {
        "cheaper": HELD, "proportion": HELD, "free": NOT_HELD, "large": NOT_MEASURED,
    }  # fmt: skip
    assert table["scales"]["quick"]["claims"]["cheaper"]["verdict"] == NOT_MEASURED
    assert found["claims"]["tiny"] == {HELD: 2, NOT_HELD: 1, NOT_MEASURED: 1}
    assert found["problems"] == {"other": "ImportError: no <module>"}


def test_the_papers_figure_stands_beside_the_measured_one(files):
    lines = files["markdown"].read_text().splitlines()
    head = next(line for line in lines if "bits per byte, tiny" in line)
    names = [cell.strip() for cell in head.split("|")]
    at = names.index("next line (%), published")
    assert names[at + 1 : at + 3] == ["next line (%), tiny", "next line (%), quick"]
    row = [cell.strip() for cell in next(line for line in lines if "A huge model" in line).split("|")]
    assert (row[at], row[at + 1]) == ("97.6", "")
    page = files["html"].read_text()
    assert re.search(r"<th>A huge model</th>.*?<td class=\"first published\">97\.6</td>", page)


def test_a_recalled_figure_is_nowhere(files, report):
    for file in files.values():
        assert "98.8" not in file.read_text()
        assert "98.7654" not in file.read_text()
    assert "attention-8" not in report.rows  # nothing to show of it
    assert "1 of the paper's figures, known only from memory, not shown" in report.notes()


@pytest.mark.parametrize("kind", ["html", "markdown"])
def test_verdicts_and_their_numbers_are_shown(files, kind):
    text = files[kind].read_text()
    text = Page(text).text if kind == "html" else text
    for said in ("held", "not held", "not measured", "n=2: 1.239 < 1.299", "39.97 >= 59.73", 'no accuracy["huge"]'):
        assert said in text


def test_the_best_is_marked_but_never_the_reference(report):
    columns = report.table.columns
    assert report.best(columns["bits"], "tiny") == {"attention-2"}  # the baseline has less
    assert report.best(columns["accuracy"], "tiny") == {"attention-2"}  # the baseline has more
    assert report.best(columns["kv"], "tiny") == {"attention-6"}
    assert report.best(columns["accuracy"], "published") == set()


def test_markdown_keeps_its_columns_whatever_a_cell_holds(files):
    text = files["markdown"].read_text()
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == 2
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert "a <b>bad</b> \\| thing" in text
    links = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(links) == 6
    assert all((files["markdown"].parent / link).is_file() for link in links)


def test_notes_name_machine_seeds_and_failures(report):
    notes = report.notes()
    assert re.match(r"tiny: 21 of 21 units, 3 seeds, .*\d core.*, \d{4}-\d\d-\d\d$", notes[0])
    assert notes[1].startswith("quick: 4 of 5 units, 1 seed, ")
    assert "quick: mlp-4#0 failed: RuntimeError: a <b>bad</b> | thing" in notes
    assert "published (abstract, second sentence): next line of A huge model" in notes
    assert "KV share: keys and values in bytes" in notes


def test_a_table_of_which_every_unit_failed_is_reported(tmp_path):
    def broken(cell, context):
        raise RuntimeError("no luck")

    found = report_of(tmp_path, measured(tmp_path, broken, scales=("quick",)))
    assert "quick: 0 of 5 units, 1 seed" in found.notes()
    assert sum("failed: RuntimeError: no luck" in note for note in found.notes()) == 5


def test_what_was_measured_otherwise_is_called_stale(tmp_path):
    measured(tmp_path, scales=["quick"])
    paper = demo.make_paper(tmp_path, text=demo.MAIN.replace("settings: {layers: 16}", "settings: {layers: 8}"))
    report = report_of(tmp_path, paper)
    assert report.scales["quick"].stale == 5
    assert any("5 units were measured by other code or from other inputs" in note for note in report.notes())
    assert not any("other code" in note for note in report_of(tmp_path, demo.make_paper(tmp_path)).notes())


def test_committed_results_are_shown_where_nothing_valid_is_fresher(tmp_path):
    paper = measured(tmp_path, scales=["quick"])
    table = paper.tables()["main"]
    publish([(paper, table)], "quick", tmp_path / "results")
    empty = tmp_path / "empty"
    assert collect(paper, table, empty).scales["quick"].measured == 5
    # results of an older table do not hide committed ones that are valid
    other = demo.make_paper(tmp_path, text=demo.MAIN.replace("settings: {layers: 16}", "settings: {layers: 8}"))
    run_tables([(other, other.tables()["main"])], results=empty)
    paper = demo.make_paper(tmp_path)
    found = collect(paper, paper.tables()["main"], empty).scales["quick"]
    assert (found.stale, found.cells["attention-2", "kv"].value) == (0, 0.875)


def test_a_table_of_which_nothing_was_measured(tmp_path):
    paper = demo.make_paper(tmp_path)
    report = report_of(tmp_path, paper)
    files = write_report([report], {}, tmp_path / "out")
    assert "Nothing of this table was measured yet." in Page(files["html"].read_text()).text
    assert "97.6" in files["markdown"].read_text()
    assert tally([report]) == {}
    assert not (tmp_path / "out" / "plots").exists()


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_the_terminal_shows_everything_within_its_width(report, width):
    from rich.console import Console

    console = Console(width=width, file=io.StringIO(), highlight=False)
    print_report(console, report)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    for said in ("1.239 ± 0.002", "56.2 ± 2.5", "97.6", "✗ not held (tiny", "✓ held (tiny)", "mlp-4#0 failed"):
        assert said in text


def test_a_published_figure_with_nothing_beside_it_is_printed_once(tmp_path):
    from rich.console import Console

    text = demo.MAIN.replace("columns:\n", "columns:\n  win: {title: win rate}\n").replace(
        "paper:\n  - {row", "paper:\n  - {row: huge, column: win, value: 76.99, from: table, source: 2}\n  - {row"
    )
    console = Console(width=60, file=io.StringIO(), highlight=False)
    print_report(console, report_of(tmp_path, measured(tmp_path, text=text)))
    printed = console.file.getvalue()
    assert printed.count("76.99") == printed.count("win rate") - 1 == 1  # a footnote names its source
    assert printed.count("97.6") == 2  # beside what each scale measured


@pytest.mark.parametrize(
    ("form", "value", "error", "text"),
    [
        (".3f", 1.23456, 0.0, "1.235"),
        (".3f", 1.23456, 0.0041, "1.235 ± 0.004"),
        (".1f", 61.0, 0.004, "61.0 ± 0.004"),  # an error is never shown as 0
        (".4g", 1.5, 0.00123456, "1.5 ± 0.0012"),
        (".1%", 0.5, 0.0123, "50.0% ± 1.2%"),
        (".1%", 0.5, 0.00002, "50.0% ± 0.002%"),
        (",.0f", 2097152, 0.0, "2,097,152"),
    ],
)
def test_figures_and_errors_as_text(form, value, error, text):
    assert figure_text(Column("x", "x", format=form), value, error) == text
