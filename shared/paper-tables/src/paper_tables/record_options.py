"""The options that verbs over instruction records have in common, and the name of a file that found no room."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from model_hooks.files import FULL

_DATA = typer.Argument(metavar="DATA", help="Records: .json, .jsonl(.gz, .zst), .parquet, a datasets folder, a hub "
                       "name, or zoo:pairs.")  # fmt: skip
Data = Annotated[str, _DATA]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where the result goes; the suffix says the format.")]
Figures = Annotated[Path | None, typer.Option("--output", "-o", help="Also write the result as JSON.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Schema = Annotated[str, typer.Option(help="auto, alpaca, sharegpt, messages, items or instances.")]
OnBad = Annotated[str, typer.Option(help="fail at the first bad record, or skip and write them to --rejects.")]
Rejects = Annotated[Path, typer.Option(help="Where skipped records go, with the reason.")]
Errors = Annotated[str, typer.Option(help="strict, or replace bytes that are no UTF-8.")]
Reid = Annotated[bool, typer.Option("--reid", help="Give every record its position as id.")]
Bare = Annotated[bool, typer.Option("--bare", help="Write no side columns.")]
Shard = Annotated[str, typer.Option(help="PART/OF: do this part alone, for `merge`.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Estimate tokens and price; send nothing.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: as the checkpoint is stored.")]
DeviceMap = Annotated[str, typer.Option(help="auto spreads the model over all GPUs; empty: one device.")]
REJECTS = Path("rejects.jsonl")


@contextmanager
def naming(output: Path) -> Iterator[None]:
    """A full disk that names no file is said to be `output`'s."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL and error.filename is None:
            raise OSError(error.errno, error.strerror, str(output)) from error
        raise
