"""Every command and code block of the READMEs does what it shows (readme.py has the rules)."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import environment
import pytest
import readme

from paper_tables import readme as results
from paper_tables.paper import installed

READMES = [
    environment.ROOT / "README.md",
    environment.ROOT / "CONTRIBUTING.md",
    *sorted(folder / "README.md" for folder in environment.members()),
]


def identifier(file: Path) -> str:
    return file.relative_to(environment.ROOT).as_posix()


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A folder to work in, with links to the repository's own files and folders."""
    for entry in environment.ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name not in {"results", "dist"}:
            (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / ".venv").symlink_to(environment.ROOT / ".venv")
    monkeypatch.chdir(tmp_path)
    for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):  # of the `make test` that runs this
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


@cache
def own_commands() -> dict[str, EntryPoint]:
    scripts = {name for folder in environment.members() for name in read(folder).get("scripts", {})}
    return {script.name: script for script in entry_points(group="console_scripts") if script.name in scripts}


def read(folder: Path) -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    return project


def call(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run one of the workspace's commands in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", words)
    try:
        return int(own_commands()[words[0]].load()() or 0)
    except SystemExit as end:
        return int(end.code or 0)


def run(block: readme.Block, file: Path, names: dict[str, object], room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if block.language == "python":
        exec(compile("\n" * block.line + block.text, str(file), "exec"), names)
        return
    commands = block.commands()
    if commands and all(words[0] in own_commands() for words in commands):
        for words in commands:
            code = call(words, monkeypatch)
            assert code == 0, f"{identifier(file)}:{block.line} exited {code}\n{shlex.join(words)}"
        return
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", block.text], cwd=room, capture_output=True, text=True)
    output = f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert done.returncode == 0, f"{identifier(file)}:{block.line} exited {done.returncode}\n{block.text}\n{output}"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("file", READMES, ids=identifier)
def test_the_blocks_run(file, room, monkeypatch):
    names: dict[str, object] = {"__name__": "__main__", "__file__": str(file)}
    for block in readme.blocks(file):
        if block.runs:
            run(block, file, names, room, monkeypatch)


@pytest.mark.parametrize("file", READMES, ids=identifier)
def test_every_block_names_its_language_and_every_exception_its_ground(file):
    for block in readme.blocks(file):
        where = f"{identifier(file)}:{block.line}"
        assert block.language, f"{where}: name the block's language: bash, python, or text for what is not code"
        assert block.run_by is None or (environment.ROOT / block.run_by).is_file(), f"{where}: no {block.run_by}"


def test_the_results_in_a_readme_are_the_committed_ones():
    papers, problems = installed()
    assert not problems
    for name, paper in papers.items():
        file = results.readme_of(paper)
        assert file is not None, f"the README of {name} has no place for results"
        fresh = results.with_block(file.read_text(), results.block(paper))
        assert fresh == file.read_text(), f"run `paper-tables run {name} --scale tiny --publish`"


def test_the_figures_of_the_packages_are_those_of_their_results():
    """Each decimal number or percentage of the table is one of the package's results, rounded."""
    rows = re.findall(r"^\| \[([\w-]+)\]\(packages/.*\| (.*) \|$", READMES[0].read_text(), re.MULTILINE)
    assert {name for name, _ in rows} == set(installed()[0])
    for name, text in rows:
        block = (environment.ROOT / "packages" / name / "README.md").read_text().partition("<!-- results -->")[2]
        measured = [float(number) for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?", block.replace(",", ""))]
        said = re.findall(r"\d+\.\d+|\d+(?=(?:, [\d.]+)* %| ± )", text)
        assert len(said) >= 4
        for figure in said:
            half = 0.5000001 * 10.0 ** -len(figure.partition(".")[2])
            assert any(abs(number - float(figure)) <= half for number in measured), f"{name}: {figure}"


def test_the_two_commands_stand_in_the_readme():
    commands = [line for block in readme.blocks(READMES[0]) for line in block.text.splitlines()]
    assert {"make reproduce", "make test"} <= {line.split("  #")[0].strip() for line in commands}


def test_blocks_are_read_with_their_lines_and_exceptions(tmp_path):
    file = tmp_path / "README.md"
    file.write_text(
        "# x\n\n```bash\necho 1\necho 2\n```\n\n<!-- not run: needs a GPU -->\n```python\nimport torch\n```\n\n"
        "<!-- run by tests/test_lock.py -->\n\n```bash\nmake check\n```\ntext\n```text\noutput\n```\n"
    )
    first, second, third, fourth = readme.blocks(file)
    assert (first.text, first.line, first.runs) == ("echo 1\necho 2", 3, True)
    assert (second.language, second.reason, second.runs) == ("python", "needs a GPU", False)
    assert (third.run_by, third.runs) == ("tests/test_lock.py", False)
    assert (fourth.language, fourth.reason, fourth.runs) == ("text", None, False)


def test_a_block_of_commands_needs_no_shell_and_one_with_a_pipe_does():
    block = readme.Block("bash", 'loki eval "zoo:llama" \\\n  --k 0.5  # half\n\n# a comment\nloki analyze b', 1)
    assert block.commands() == [["loki", "eval", "zoo:llama", "--k", "0.5"], ["loki", "analyze", "b"]]
    assert readme.Block("bash", "loki --help\nloki eval m | head", 1).commands() == []
    assert readme.Block("bash", "cd $HOME", 1).commands() == []


def test_a_block_without_an_end_is_an_error(tmp_path):
    (tmp_path / "README.md").write_text("```bash\necho 1\n")
    with pytest.raises(ValueError, match=r"README\.md:1"):
        readme.blocks(tmp_path / "README.md")


def test_a_failing_block_fails_with_its_line(tmp_path, monkeypatch):
    block = readme.Block("bash", "false\necho after", 7)
    with pytest.raises(AssertionError, match=r"README\.md:7 exited 1"):
        run(block, environment.ROOT / "README.md", {}, tmp_path, monkeypatch)
    wrong = readme.Block("bash", "paper-tables run nothing", 9)
    with pytest.raises(AssertionError, match=r"README\.md:9 exited 2\n\s*paper-tables run nothing"):
        run(wrong, environment.ROOT / "README.md", {}, tmp_path, monkeypatch)
    with pytest.raises(ZeroDivisionError):
        run(readme.Block("python", "1 / 0", 1), environment.ROOT / "README.md", {}, tmp_path, monkeypatch)
