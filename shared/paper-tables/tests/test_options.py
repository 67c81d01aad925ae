"""A dataclass becomes a command: its fields are the options, its docstring the help."""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from paper_tables.errors import TableError
from paper_tables.frame import make_app
from paper_tables.launch import deepspeed_file, last_checkpoint, run_module
from paper_tables.options import command_of


@dataclass(frozen=True)
class Config:
    """What to bake.

    Args:
        kind: Of bread: rye, wheat.
        output: Where it goes.
        rise_hours: Time to rise.
        glaze: Brush it with egg.
        salt: In it; --no-salt for the saltless.
        loaves: How many.
    """

    kind: str
    output: Path
    rise_hours: float = 1.5
    glaze: bool = False
    salt: bool = True
    loaves: int = 1
    bare: str = ""

    def __post_init__(self) -> None:
        if self.loaves < 1:
            raise TableError(f"loaves is {self.loaves}; at least 1 is needed")


def bake(config: Config) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}


def app() -> Any:
    made = make_app("bakery")
    made.command("bake")(command_of(Config, bake, "Bake bread."))
    return made


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app(), ["bake", *arguments])


def test_the_signature_is_that_of_the_dataclass() -> None:
    command = command_of(Config, bake, "Bake bread.")
    parameters = inspect.signature(command).parameters
    assert list(parameters) == list(inspect.signature(Config).parameters)
    empty = inspect.Parameter.empty
    assert [p.default for p in parameters.values()] == [empty, empty, 1.5, False, True, 1, ""]
    assert {p.kind for p in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}
    assert command.__doc__ == "Bake bread."


def test_options_reach_the_dataclass_with_their_types() -> None:
    assert json.loads(call("--kind", "rye", "-o", "x", "--json").stdout) == {
        "kind": "rye", "output": "x", "rise_hours": 1.5, "glaze": False, "salt": True, "loaves": 1, "bare": "",
    }  # fmt: skip
    found = call(
        "--kind", "rye", "--output", "x/y", "--rise-hours", "2", "--glaze", "--no-salt", "--loaves", "3", "--json"
    )
    assert json.loads(found.stdout) == {
        "kind": "rye", "output": "x/y", "rise_hours": 2.0, "glaze": True, "salt": False, "loaves": 3, "bare": "",
    }  # fmt: skip


def test_the_help_is_the_docstrings() -> None:
    said = " ".join(call("--help").stdout.split())
    for text in (
        "Bake bread.",
        "Of bread: rye, wheat.",
        "Time to rise.",
        "-o",
        "--salt",
        "--no-salt",
        "How many.",
        "1.5",
    ):
        assert text in said
    assert "--no-glaze" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "x"], "--kind"),
        (["--kind", "rye", "-o", "x", "--loaves", "0"], "loaves is 0; at least 1"),
        (["--kind", "rye", "-o", "x", "--loaves", "many"], "'--loaves'"),
        (["--kind", "rye", "-o", "x", "--glazed"], "--glazed"),
    ],
)
def test_wrong_values_are_one_line(arguments: list[str], message: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_values_come_from_a_file_too(tmp_path: Path) -> None:
    file = tmp_path / "bread.yaml"
    file.write_text("kind: wheat\nrise_hours: 3\nsalt: false\n")
    found = json.loads(call("--config", str(file), "-o", "x", "--kind", "rye", "--json").stdout)
    assert (found["kind"], found["rise_hours"], found["salt"]) == ("rye", 3.0, False)


def test_only_the_first_process_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Config] = []

    def note(config: Config) -> dict[str, Any]:
        done.append(config)
        return {"baked": 1}

    made = make_app("bakery")
    made.command("bake")(command_of(Config, note, "Bake bread."))
    said = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        result = CliRunner().invoke(made, ["bake", "--kind", "rye", "-o", "x"])
        assert result.exit_code == 0
        said.append(result.output)
    assert "baked" in said[0]
    assert said[1] == ""
    assert len(done) == 2  # both have worked


def test_a_module_takes_what_launchers_add(capsys: pytest.CaptureFixture[str]) -> None:
    command = command_of(Config, bake, "Bake bread.")
    with pytest.raises(SystemExit) as end:
        run_module("bakery.bake", command, ["--local_rank=1", "--local-rank=0", "--kind", "rye", "-o", "x", "--json"])
    assert end.value.code == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "rye"
    with pytest.raises(SystemExit) as end:
        run_module("bakery.bake", command, ["--kind"])
    assert end.value.code == 2
    assert "bakery.bake: Option '--kind' requires an argument" in capsys.readouterr().err


def test_deepspeed_files_are_named_or_given(tmp_path: Path) -> None:
    (tmp_path / "src" / "bakery").mkdir(parents=True)
    (tmp_path / "tables").mkdir()
    shipped = tmp_path / "configs" / "deepspeed"
    shipped.mkdir(parents=True)
    for name in ("zero2", "zero3"):
        (shipped / f"{name}.json").write_text("{}")
    (tmp_path / "own.json").write_text("{}")
    module = str(tmp_path / "src" / "bakery" / "train.py")
    assert deepspeed_file(module, "") is None
    assert deepspeed_file(module, "zero3") == str(shipped / "zero3.json")
    assert deepspeed_file(module, str(tmp_path / "own.json")) == str(tmp_path / "own.json")
    with pytest.raises(TableError, match="'zero4' is neither a file nor one of zero2, zero3"):
        deepspeed_file(module, "zero4")


def test_the_last_whole_checkpoint(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step, text in ((4, "{}"), (30, '{"step": 30}'), (100, "{"), (200, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if text is not None:
            (folder / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-30"
