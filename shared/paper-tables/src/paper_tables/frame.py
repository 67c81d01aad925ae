"""The frame of every command line here: configuration files, output, errors and exit codes, written once.

    app = make_app("llm-drop", help="Drop layers of a language model.")

    @app.command()
    def score(model: str, samples: int = 256, output: Path = Path("scores.json")) -> dict[str, object]:
        "Measure how much each layer matters."
        ...
        return {"model": model, "dropped": 8, "scores": output}

    def main() -> None:
        app()

A command is a plain typed function that returns what it found: the frame prints it as a small table, or as JSON with
`--json`. Every command takes `--config FILE.yaml` (keys are the names of its options, with `_` or `-`; the line
overrides the file), `--quiet`, `--json` and `--debug`. Exit codes: 0 done; 1 the work failed; 2 the request was wrong
(one line on stderr); 130 interrupted. An exception with an `exit_code`, whoever raises it, ends with that one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
import typer.core

from model_hooks.files import FULL

from .errors import MissingExtra, TableError, WorkFailed, nearest, one_line
from .progress import progress, set_quiet, track

__all__ = ["MissingExtra", "WorkFailed", "make_app", "progress", "require", "track"]

FRAME = ("config", "quiet", "as_json", "debug")
CONFIG = "paper_tables.config"  # of a context's meta: the file that was read


def _use_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the file's values the defaults of this command. Runs before the other options are read."""
    if path is None or context.resilient_parsing:
        return path
    from .yamlfile import read_yaml

    values = read_yaml(path)
    names = {p.name: p for p in context.command.params if p.name and p.name not in ("config", "help")}
    spelled = {"json": "as_json"}  # the option's name where the parameter's differs
    for parameter in names.values():
        for option in getattr(parameter, "opts", ()):
            if option.startswith("--"):
                spelled[option.lstrip("-").replace("-", "_")] = str(parameter.name)
    found: dict[str, Any] = {}
    for key, value in values.items():
        plain = str(key).replace("-", "_")
        name = plain if plain in names else spelled.get(plain, "")
        if name not in names:
            known = [n for n in names if n not in FRAME]
            raise TableError(f"{path}:{values.lines[key]}: unknown key {key!r}{nearest(plain, known)}")
        if value is not None:
            found[name] = value
    context.meta[CONFIG] = path
    context.default_map = {**(context.default_map or {}), **found}
    return path


Config = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", is_eager=True, callback=_use_config, help="YAML file of option values."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars: for logs.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, all else on stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


class _Group(typer.core.TyperGroup):
    """A group whose usage errors, too, are one line on stderr."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        given = (args, prog_name, complete_var, False, windows_expand_args)
        if not standalone_mode:
            return super().main(*given, **extra)
        try:
            code = super().main(*given, **extra)
        except Exception as error:
            if not hasattr(error, "format_message") and getattr(error, "exit_code", None) != 2:
                if isinstance(error, typer.Abort):
                    code = 130
                else:
                    raise
            else:
                code = _say_usage(self.name or "", error)
        sys.exit(code if isinstance(code, int) else 0)


def _say_usage(name: str, error: Exception) -> int:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else name
    message = error.format_message() if hasattr(error, "format_message") else one_line(error)
    if context is not None and message in ("", context.get_help()):  # no command given: the help was wanted
        print(context.get_help())
        return 2
    place = _file_of(context, getattr(error, "param", None))
    hint = f" (try {command} --help)" if context is not None else ""
    print(f"{command}: {place}{' '.join(message.split())}{hint}", file=sys.stderr)
    return 2


def _file_of(context: Any, parameter: Any) -> str:
    """`FILE: ` if the value of `parameter` came from a configuration file."""
    if context is None or parameter is None or CONFIG not in context.meta:
        return ""
    source = context.get_parameter_source(parameter.name)
    return f"{context.meta[CONFIG]}: " if getattr(source, "name", "") == "DEFAULT_MAP" else ""


class App(typer.Typer):
    """A typer app whose commands return their result and never show a traceback unasked."""

    def command(  # type: ignore[override]
        self, *args: Any, **kwargs: Any
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        register = super().command(*args, **kwargs)

        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            register(_framed(function))
            return function

        return decorate


def make_app(name: str, help: str = "") -> App:
    """The app of a console command called `name`; see the module's text for what its commands get."""
    app = App(
        name=name, help=help, cls=_Group, no_args_is_help=True, add_completion=False, rich_markup_mode=None,
        pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]},
    )  # fmt: skip
    app.callback()(_no_options)  # keeps a single command a command with a name
    return app


def _no_options() -> None:
    return None


def _framed(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the frame's four options added, its result printed and its errors said."""
    signature = inspect.signature(function, eval_str=True)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, default, annotation in (
            ("config", None, Config), ("quiet", False, Quiet), ("as_json", False, Json), ("debug", False, Debug),
        )
    ]  # fmt: skip

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in FRAME}
        with _errors(bool(options["debug"])):
            set_quiet(bool(options["quiet"]))
            result = _call(function, args, kwargs, bool(options["as_json"]))
            show(result, as_json=bool(options["as_json"]))

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in signature.parameters.values()]
    run.__signature__ = signature.replace(parameters=[*parameters, *added])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in (*parameters, *added)}
    return run


def _call(function: Callable[..., Any], args: Any, kwargs: Any, as_json: bool) -> Any:
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        try:
            return function(*args, **kwargs)
        except WorkFailed as error:
            failure = error
    if failure.result is not None:  # what there is to show is shown, then the failure said
        show(failure.result, as_json=as_json)
    raise failure


@contextlib.contextmanager
def _errors(debug: bool) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        _stop("interrupted; run the same command again to go on", 130)
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if debug:
            import traceback

            traceback.print_exc()
        if hasattr(error, "format_message"):  # typer's own: said by the group
            raise
        if getattr(error, "exit_code", None) == 2:
            _stop(one_line(error), 2)
        if isinstance(error, OSError) and error.errno in FULL:
            _stop(f"no space left on the disk{f' for {error.filename}' if error.filename else ''}; nothing was "
                  "left half-written: free some and run again", 1)  # fmt: skip
        if isinstance(error, BrokenPipeError):
            raise typer.Exit(1) from None
        code = getattr(error, "exit_code", None)
        if isinstance(code, int):
            _stop(str(error), code)
        _stop(f"{one_line(error)}{'' if debug else ' (--debug shows the traceback)'}", 1)


def _stop(message: str, code: int) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise typer.Exit(code)


def plain(value: Any, other: Callable[[Any], Any] = str) -> Any:
    """`value` as JSON can hold it: paths and tensors become text and lists, what is not finite becomes null.

    `other` says what becomes of a value of any other kind.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int, bool)):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value), other)
    if isinstance(value, Mapping):
        return {str(k): plain(v, other) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        ordered = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        return [plain(v, other) for v in ordered]
    if hasattr(value, "tolist"):
        return plain(value.tolist(), other)
    return other(value)


def show(result: Any, *, as_json: bool = False) -> None:
    """Print a command's result: JSON, or a table of its entries (a list of mappings is a table of its own)."""
    if as_json:
        print(json.dumps(plain({} if result is None else result), indent=1, allow_nan=False))
        return
    if isinstance(result, Shown):
        return
    if not isinstance(result, Mapping):
        if result is not None:
            print(result)
        return
    from rich.console import Console

    console = Console(highlight=False)
    rows = {k: v for k, v in result.items() if not _is_table(v)}
    if rows:
        width = max(len(_label(k)) for k in rows)
        for key, value in rows.items():
            console.print(f"[bold]{_label(key):<{width}}[/bold]  ", end="")
            console.print(_text(value), markup=False, soft_wrap=True)
    for key, value in result.items():
        if _is_table(value):
            console.print(_as_table(_label(key), value))


def keep(result: dict[str, Any], output: Path | None) -> dict[str, Any]:
    """`result`, also written to `output` as JSON if one is given: the `--output` of commands that measure."""
    from .store import write

    if output is not None:
        write(output, json.dumps(plain(result), indent=1, allow_nan=False) + "\n")
    return result


class Shown(dict[str, Any]):
    """A result that its command has printed already: only `--json` prints it."""


def _label(key: Any) -> str:
    return str(key).replace("_", " ")


def _is_table(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(v, Mapping) for v in value)


def _text(value: Any) -> str:
    value = plain(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "-"
    if isinstance(value, list):
        return ", ".join(_text(v) for v in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{_label(k)} {_text(v)}" for k, v in value.items()) or "none"
    return str(value)


def _as_table(title: str, rows: Any) -> Any:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    columns = list(dict.fromkeys(str(k) for row in rows for k in row))
    table = Table(title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in columns:
        numbers = all(isinstance(row.get(column), (int, float, type(None))) for row in rows)
        table.add_column(escape(_label(column)), justify="right" if numbers else "left")
    for row in rows:
        table.add_row(*(escape(_text(row[c])) if c in row else "" for c in columns))
    return table


def require(module: str, *, extra: str, package: str) -> ModuleType:
    """Import an optional dependency. Raises `MissingExtra` (exit 2) that names the extra to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = getattr(error, "name", None) or module
        if missing.partition(".")[0] != module.partition(".")[0] and missing in sys.modules:
            raise  # installed, but broken inside: its own message says more
        raise MissingExtra(
            f"this needs {missing.partition('.')[0]}, which is not installed: install {package} with its extra "
            f'[{extra}], for example `uv pip install "./packages/{package}[{extra}]"`'
        ) from None
