"""The options that every verb with requests to a model has: where the models are, what may be spent, how fast."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import TableError


def _settings(
    base_url: Annotated[
        list[str] | None, typer.Option(help="Of a server of OpenAI's protocol; again for more.")
    ] = None,
    api_key_env: Annotated[str, typer.Option(help="Environment variable that holds the key.")] = "OPENAI_API_KEY",
    api_key_file: Annotated[Path | None, typer.Option(help="File that holds the key, instead.")] = None,
    backend: Annotated[
        str, typer.Option(help="server, batch (the batch API), local or vllm (in this process), ray or ray-http.")
    ] = "server",
    workers: Annotated[int, typer.Option(min=1, help="Of a Ray cluster: vLLM engines, or callers of servers.")] = 1,
    concurrency: Annotated[int, typer.Option(min=1, help="Most requests in flight.")] = 32,
    timeout: Annotated[float, typer.Option(help="Seconds of one attempt.")] = 120.0,
    attempts: Annotated[int, typer.Option(min=1, help="Attempts for each request.")] = 8,
    rpm: Annotated[float, typer.Option(min=0, help="Requests a minute; 0: no limit.")] = 0,
    tpm: Annotated[float, typer.Option(min=0, help="Tokens a minute; 0: no limit.")] = 0,
    prices: Annotated[Path | None, typer.Option(help="YAML of prices of a million tokens, by model.")] = None,
    max_cost: Annotated[float, typer.Option(min=0, help="Stop there (exit 4); 0: no limit.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=0, help="The same in tokens.")] = 0,
    max_requests: Annotated[int, typer.Option(min=0, help="The same in requests.")] = 0,
    structured: Annotated[str, typer.Option(help="auto, schema or labels: how replies are asked for.")] = "auto",
    journal: Annotated[Path | None, typer.Option(help="Folder of all replies; default: OUTPUT.journal.")] = None,
    writer: Annotated[str, typer.Option(help="Of a journal that several processes share: this one's name.")] = "0",
    fsync: Annotated[str, typer.Option(help="group, or each: every reply is safe from a power cut at once.")] = "group",
) -> Callable[[Path], dict[str, Any]]:
    """A function from the output's path to the settings of a service, by the names of its fields."""
    from .yamlfile import read_yaml

    if fsync not in ("group", "each"):
        raise TableError(f"fsync {fsync!r}; give group or each")
    return lambda output: {
        "journal": journal or output.with_name(f"{output.name}.journal"),
        "base_url": tuple(base_url or ("https://api.openai.com/v1",)),
        "key_variable": api_key_env, "key_file": api_key_file, "backend": backend, "workers": workers,
        "concurrency": concurrency, "timeout": timeout, "attempts": attempts, "requests_per_minute": rpm,
        "tokens_per_minute": tpm,
        "prices": read_yaml(prices) if prices else {}, "max_cost": max_cost or None, "max_tokens": max_tokens or None,
        "max_requests": max_requests or None, "structured": structured, "writer": writer, "fsync_each": fsync == "each",
    }  # fmt: skip


def endpoint_options(make: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator of commands: these options stand in the place of the parameter `service`, which the command gets as a
    function of its output (the journal is beside it), `make` called with the settings by name."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        own = inspect.signature(function, eval_str=True)
        added = inspect.signature(_settings, eval_str=True).parameters
        kept = [p for name, p in own.parameters.items() if name != "service"]
        both = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*kept, *added.values())]

        @functools.wraps(function)
        def command(**given: Any) -> Any:
            settings = _settings(**{name: given.pop(name) for name in added if name in given})
            return function(**given, service=lambda output: make(**settings(output)))

        command.__signature__ = own.replace(parameters=both)  # type: ignore[attr-defined]
        return command

    return decorate
