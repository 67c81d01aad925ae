"""A command whose options are the fields of a dataclass: its manual is their help."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from .errors import TableError
from .paper import tables_folder


def command_of(config: type, run: Callable[[Any], dict[str, Any]], help: str) -> Callable[..., dict[str, Any]]:
    """A function for `App.command` that makes a `config` of its options and returns `run(config)`.

    Each field is an option, `output` also as -o, booleans that are true by default with their --no- form; a line
    `    name: text` of the class's docstring is its help. Under a launcher only rank 0 returns the result: it is
    printed once.
    """
    import typer

    def command(**options: Any) -> dict[str, Any]:
        result = run(config(**options))
        if not is_main_process():
            raise typer.Exit
        return result

    command.__doc__ = help
    command.__signature__ = _signature(config)  # type: ignore[attr-defined]
    return command


def _signature(config: type) -> inspect.Signature:
    import typer

    manual = dict(re.findall(r"^    (\w+): (.*)$", inspect.getdoc(config) or "", re.MULTILINE))
    hints = get_type_hints(config)
    parameters = []
    for f in fields(config):
        spelled = [f"--{f.name.replace('_', '-')}"]
        if f.name == "output":
            spelled.append("-o")
        elif f.default is True:
            spelled = [f"{spelled[0]}/--no-{f.name.replace('_', '-')}"]
        option = typer.Option(*spelled, help=manual.get(f.name, ""))
        default = inspect.Parameter.empty if f.default is MISSING else f.default
        annotation = Annotated[hints[f.name], option]  # type: ignore[valid-type,name-defined]
        parameters.append(
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )
    return inspect.Signature(parameters)


def run_module(name: str, command: Callable[..., Any], arguments: list[str], help: str = "") -> None:
    """Run `command` as `python -m name`, for launchers. Drops the --local_rank that the deepspeed launcher adds."""
    from .frame import make_app

    given = [a for a in arguments if not a.startswith(("--local_rank=", "--local-rank="))]
    app = make_app(name, help=help)
    app.command("run")(command)
    app(["run", *given], prog_name=f"python -m {name}")


def is_main_process() -> bool:
    """Whether this process, of those that a launcher started, is the one that writes."""
    return os.environ.get("RANK", "0") == "0"


def deepspeed_file(module_file: str, given: str) -> str | None:
    """The DeepSpeed configuration `given`: one that ships in configs/deepspeed/ beside the package's tables/, by its
    name, or the user's file. None for an empty name. Raises `TableError`."""
    if not given:
        return None
    tables = tables_folder(module_file)
    shipped = tables.with_name(tables.name.replace("tables", "configs")) / "deepspeed"
    names = {file.stem: file for file in shipped.glob("*.json")}
    path = names.get(given, Path(given))
    if not path.is_file():
        raise TableError(f"deepspeed {given!r} is neither a file nor one of {', '.join(sorted(names))}")
    return str(path)
