"""A command whose options are the fields of a dataclass: its manual is their help."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Annotated, Any, get_type_hints

from .launch import is_main_process


def command_of(config: type, run: Callable[[Any], dict[str, Any]], help: str) -> Callable[..., dict[str, Any]]:
    """A function for `App.command` that makes a `config` of its options and returns `run(config)`.

    Each field is an option, `output` also as -o, booleans that are true by default with their --no- form; the class's
    own come before inherited ones. A line `    name: text` of a class's docstring is an option's help. Under a launcher
    only rank 0 returns the result: it is printed once.
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

    manual: dict[str, str] = {}
    for part in reversed(config.__mro__):
        manual |= re.findall(r"^    (\w+): (.*)$", inspect.cleandoc(part.__doc__ or ""), re.MULTILINE)
    hints = get_type_hints(config)
    inherited = {name for part in config.__mro__[1:] for name in inspect.get_annotations(part)}
    parameters = []
    for f in sorted(fields(config), key=lambda f: (f.default is not MISSING, f.name in inherited)):
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
