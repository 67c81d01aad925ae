"""The options that every verb with requests has, once: where the models are, what may be spent, how fast."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer


def _service(
    base_url: Annotated[
        list[str] | None, typer.Option(help="Of a server of OpenAI's protocol; again for more.")
    ] = None,
    api_key_env: Annotated[str, typer.Option(help="Environment variable that holds the key.")] = "OPENAI_API_KEY",
    api_key_file: Annotated[Path | None, typer.Option(help="File that holds the key, instead.")] = None,
    backend: Annotated[str, typer.Option(help="server, batch (the batch API) or local (in this process).")] = "server",
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
) -> Callable[[Path], Any]:
    """A function from the output's path to the `Service` of these options."""
    from model_hooks.errors import RequestError

    from .service import Service

    if fsync not in ("group", "each"):
        raise RequestError(f"fsync {fsync!r}; give group or each")
    return lambda output: Service(
        journal or output.with_name(f"{output.name}.journal"), tuple(base_url or ("https://api.openai.com/v1",)),
        api_key_env, api_key_file, backend, concurrency, timeout, attempts, rpm, tpm, prices, max_cost or None,
        max_tokens or None, max_requests or None, structured, writer, fsync == "each",
    )  # fmt: skip


def service_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with these options in the place of its parameter `service`, which it gets as a function of its output:
    the journal is beside it."""
    own = inspect.signature(function, eval_str=True)
    added = inspect.signature(_service, eval_str=True).parameters
    kept = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for name, p in own.parameters.items() if name != "service"]
    both = [*kept, *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in added.values())]

    @functools.wraps(function)
    def command(**given: Any) -> Any:
        service = _service(**{name: given.pop(name) for name in added if name in given})
        return function(**given, service=service)

    command.__signature__ = own.replace(parameters=both)  # type: ignore[attr-defined]
    return command
