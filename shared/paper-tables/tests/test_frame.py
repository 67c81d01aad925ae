"""The frame of the commands: configuration files, exit codes, what goes to stdout and what to stderr."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from paper_tables import MissingExtra, TableError, WorkFailed, progress
from paper_tables.frame import make_app, plain, require
from paper_tables.progress import Bar

app = make_app("tool", help="A tool.")
FAILURES = {
    "table": TableError("no such table"),
    "extra": MissingExtra("this needs ray"),
    "bug": KeyError("x"),
    "many lines": ValueError("first\nsecond"),
    "full": OSError(errno.ENOSPC, "No space left on device", "out.json"),
    "stop": KeyboardInterrupt(),
    "work": WorkFailed("1 of 2 failed", {"done": 1}),
    "pipe": BrokenPipeError(),
}


@app.command()
def score(
    model: str,
    samples: int = 256,
    parts: Annotated[list[str] | None, typer.Option("--part", help="Parts.")] = None,
    output: Path = Path("scores.json"),
    fast: bool = False,
) -> dict[str, object]:
    """Measure."""
    print("on the way")
    with progress("layers", 3) as bar:
        bar.advance()
    return {"model": model, "samples": samples, "parts": parts, "output": output, "fast": fast, "share": 0.123456}


@app.command()
def fail(how: str) -> dict[str, object]:
    """Fail."""
    raise FAILURES[how]


@app.command("list")
def list_things() -> dict[str, object]:
    """List."""
    return {"things": [{"name": "a [b]", "n": 1, "loss": 1.25}, {"name": "c", "n": None}], "nothing": None}


@pytest.fixture
def call():
    def run(*arguments: object):
        return CliRunner().invoke(app, [str(a) for a in arguments])

    return run


def test_a_result_is_printed_for_people(call):
    done = call("score", "zoo:llama", "--part", "a", "--part", "b")
    assert done.exit_code == 0
    lines = dict(line.split("  ", 1) for line in done.stdout.splitlines()[1:])
    assert {k: v.strip() for k, v in lines.items()} == {
        "model": "zoo:llama", "samples": "256", "parts": "a, b", "output": "scores.json", "fast": "no",
        "share": "0.1235",
    }  # fmt: skip


def test_a_list_of_mappings_is_printed_as_a_table(call):
    text = call("list").stdout
    assert "nothing  -" in text
    assert [line.split() for line in text.splitlines() if "a [b]" in line or " c " in line] == [
        ["a", "[b]", "1", "1.25"],
        ["c", "-"],
    ]


def test_json_alone_is_on_stdout(call):
    done = call("score", "zoo:llama", "--json", "--part", "a")
    assert json.loads(done.stdout) == {
        "model": "zoo:llama", "samples": 256, "parts": ["a"], "output": "scores.json", "fast": False,
        "share": 0.123456,
    }  # fmt: skip
    assert done.stderr == "on the way\n"


@pytest.mark.parametrize("option", ["--quiet", "-q"])
def test_quiet_turns_the_bars_off_for_this_command_alone(call, monkeypatch, option):
    from paper_tables import frame

    asked = []
    monkeypatch.setattr(frame, "set_quiet", asked.append)
    assert call("score", "a", option).exit_code == 0
    assert call("score", "a").exit_code == 0
    assert asked == [True, False]


def test_a_file_gives_options_and_the_line_goes_before_it(call, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("model: zoo:gpt2\nsamples: 8\npart: [x, y]\nfast: true\noutput:\njson: true\n")
    from_file = json.loads(call("score", "--config", config).stdout)
    assert from_file == {
        "model": "zoo:gpt2", "samples": 8, "parts": ["x", "y"], "output": "scores.json", "fast": True,
        "share": 0.123456,
    }  # fmt: skip
    both = json.loads(call("score", "zoo:llama", "--samples", 9, "--config", config, "--no-fast").stdout)
    assert (both["model"], both["samples"], both["fast"], both["parts"]) == ("zoo:llama", 9, False, ["x", "y"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("model: a\nsampels: 3\n", "c.yaml:2: unknown key 'sampels'; did you mean 'samples'?"),
        ("model: a\nconfig: b\n", "c.yaml:2: unknown key 'config'"),
        ("model: a\nsamples: many\n", "c.yaml: Invalid value for '--samples'"),
        ("model: [a\n", "c.yaml:2: not valid YAML"),
        ("- model\n", "a mapping of keys to values is expected"),
        (None, "c.yaml: No such file"),
    ],
)
def test_a_wrong_file_is_one_line_and_two(call, tmp_path, content, said):
    if content is not None:
        (tmp_path / "c.yaml").write_text(content)
    done = call("score", "--config", tmp_path / "c.yaml")
    assert done.exit_code == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["score", "a", "--sampels", "3"], "--samples"),
        (["scroe"], "score"),
        (["score"], "Missing argument 'model'"),
        (["score", "a", "--samples", "x"], "tool score: Invalid value for '--samples'"),
        (["score", "a", "b"], "unexpected extra argument"),
    ],
)
def test_a_wrong_line_is_one_line_and_two_and_names_the_nearest(call, arguments, said):
    done = call(*arguments)
    assert done.exit_code == 2
    assert said.lower() in done.stderr.lower()
    assert "try tool" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not done.stdout


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("table", 2, "error: no such table"),
        ("extra", 2, "error: this needs ray"),
        ("bug", 1, "error: KeyError: 'x' (--debug shows the traceback)"),
        ("many lines", 1, "error: ValueError: first (--debug shows the traceback)"),
        ("full", 1, "error: no space left on the disk for out.json; nothing was left half-written: free some and run "
         "again"),
        ("stop", 130, "error: interrupted; run the same command again to go on"),
        ("pipe", 1, None),
    ],
)  # fmt: skip
def test_an_error_is_one_line_with_its_code_and_no_traceback(call, how, code, said):
    done = call("fail", how)
    assert done.exit_code == code
    assert done.stderr.splitlines() == ([] if said is None else [said])
    assert not done.stdout


def test_what_a_failed_work_has_to_show_is_shown(call):
    done = call("fail", "work")
    assert (done.exit_code, done.stdout, done.stderr) == (1, "done  1\n", "error: 1 of 2 failed\n")
    assert json.loads(call("fail", "work", "--json").stdout) == {"done": 1}


def test_debug_shows_the_traceback(call):
    done = call("fail", "bug", "--debug")
    assert done.exit_code == 1
    assert "Traceback" in done.stderr
    assert "raise FAILURES[how]" in done.stderr
    assert done.stderr.splitlines()[-1] == "error: KeyError: 'x'"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["score", "-h"]])
def test_help_is_on_stdout(call, arguments):
    done = call(*arguments)
    assert "Usage: tool" in done.stdout
    assert done.exit_code == (0 if arguments else 2)


def test_the_frames_own_options_are_in_every_help(call):
    text = call("score", "--help").stdout
    assert all(option in text for option in ("--config FILE", "--quiet", "--json", "--debug", "--samples"))


class Terminal:
    """A stderr that is a terminal."""

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        return None


@pytest.mark.parametrize(("quiet", "shown"), [(False, True), (True, False)])
def test_bars_are_shown_in_a_terminal_and_not_when_quiet(monkeypatch, quiet, shown):
    from paper_tables.progress import set_quiet, track

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    set_quiet(quiet)
    with progress("tables", 2) as outer:
        outer(1, 2)
        outer.describe("other")
        assert list(track("abc", "letters")) == ["a", "b", "c"]
    assert ("letters" in terminal.text) is shown
    assert ("left" in terminal.text) is shown


def test_no_bar_where_stderr_is_no_terminal(capsys):
    with progress("tables", 2) as bar:
        bar.advance()
    assert isinstance(bar, Bar)
    assert capsys.readouterr() == ("", "")


def test_a_missing_extra_is_named_and_a_broken_module_is_not_called_missing(tmp_path, monkeypatch):
    with pytest.raises(
        MissingExtra, match=r'install llm-drop with its extra \[eval\], .*"\./packages/llm-drop\[eval\]"'
    ):
        require("not_there_at_all", extra="eval", package="llm-drop")
    assert require("json", extra="eval", package="llm-drop") is json
    (tmp_path / "broken_inside.py").write_text("from json import nothing_of_that_name\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match="nothing_of_that_name") as caught:
        require("broken_inside", extra="eval", package="llm-drop")
    assert not isinstance(caught.value, MissingExtra)


def test_anything_becomes_plain(tmp_path):
    import torch

    found = plain({1: {tmp_path}, "t": torch.tensor([[1.0, float("nan")]]), "b": Bar, "n": (None, True, 1.5)})
    assert found == {"1": [str(tmp_path)], "t": [[1.0, None]], "b": str(Bar), "n": [None, True, 1.5]}
