"""Named options: the settings of the paper's own runs (`--preset`) and its definitions where ours differ (`--compat`).

Both are YAML files of configs/, by verb; what is on the command line, or in the file of `--config`, comes first.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from model_hooks.errors import RequestError
from paper_tables import tables_folder
from paper_tables.errors import nearest


def folder(kind: str) -> Path:
    """Where the files of a kind are: "presets" or "compat"."""
    tables = tables_folder(__file__)
    return tables.with_name(tables.name.replace("tables", "configs")) / kind


def options(kind: str, name: str, verb: str) -> dict[str, Any]:
    """The options that `name` (a file, or FILE/PART where it has several for a verb) gives a verb.

    Raises `RequestError` for a name that is not known, naming those that are.
    """
    from paper_tables.yamlfile import read_yaml

    file, _, part = name.partition("/")
    known: dict[str, dict[str, Any]] = {}
    for path in sorted(folder(kind).glob("*.yaml")):
        found = read_yaml(path).get(verb) or {}
        if all(isinstance(value, Mapping) for value in found.values()):
            known |= {f"{path.stem}/{key}": dict(value) for key, value in found.items()}
        else:
            known[path.stem] = dict(found)
    if name not in known:
        given = f"{file}/{part}" if part else file
        raise RequestError(f"{given!r} is no {kind.removesuffix('s')} of {verb}{nearest(given, known)}")
    return known[name]


def _fill(kind: str, verb: str) -> Callable[[typer.Context, str], str]:
    def callback(context: typer.Context, name: str) -> str:
        if name and not context.resilient_parsing:
            context.default_map = {**options(kind, name, verb), **(context.default_map or {})}
        return name

    return callback


def option(kind: str, verb: str) -> Any:
    """The annotation of an option `--preset` or `--compat` of a verb; it runs before the others are read."""
    texts = {
        "presets": "The paper's own settings: paper-mixtral or paper-deepseek, /PART where there are several.",
        "compat": "original: the published code's definitions where they differ.",
    }
    flag = f"--{kind.removesuffix('s')}"
    return Annotated[str, typer.Option(flag, is_eager=True, callback=_fill(kind, verb), help=texts[kind])]


def with_preset(command: Callable[..., dict[str, Any]], verb: str) -> Callable[..., dict[str, Any]]:
    """A command whose options come from a dataclass, with `--preset`."""

    def run(preset: str = "", **given: Any) -> dict[str, Any]:
        return command(**given)

    signature = inspect.signature(command)
    own = inspect.Parameter(
        "preset", inspect.Parameter.KEYWORD_ONLY, default="", annotation=option("presets", verb)
    )  # fmt: skip
    run.__doc__ = command.__doc__
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), own])  # type: ignore[attr-defined]
    return run
