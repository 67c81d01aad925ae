"""The command `meo`: thin verbs over the package's functions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from meo.options import Conversion, WithAliases
from meo.train import train_command
from model_hooks.errors import RequestError
from model_hooks.files import refuse_existing, refuse_overlap
from paper_tables.cli import add_reproduce
from paper_tables.frame import keep, make_app
from paper_tables.options import command_of

app = make_app("meo", help="Many experts at the price of one: banks that are merged before they are used.")

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder, hub id or zoo:NAME.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where the result goes.")]
Kept = Annotated[Path | None, typer.Option("--output", "-o", help="Also write the result as JSON.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Kind = Annotated[str, typer.Option(help="classification, clm, mlm, qa or summarization.")]
Data = Annotated[str, typer.Option(help="Text, or records: zoo:glue:TASK, JSON, JSONL, CSV, a hub dataset.")]


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(Conversion):
    """What to convert, and where to.

    Args:
        model: Checkpoint folder, hub id or zoo:NAME.
        output: Folder for the result.
        kind: Gives the model the head for it: classification, clm, mlm, qa, summarization; empty: its own.
        pretrained: The model is a mixture of experts: merge its own experts where that is close enough.
        data: With --pretrained: text on which the error is measured.
        samples: Sequences of it.
        length: Their tokens.
        threshold: With --pretrained: the largest relative error at which a layer is merged.
        pool: With --pretrained: task (the mean over the data) or sequence (a comparison: it sees future tokens).
        dtype: float32, bfloat16, float16, or auto: as the checkpoint is stored.
        overwrite: Replace what is at the output.
    """

    model: str
    output: Path
    kind: str = ""
    pretrained: bool = False
    data: str = "zoo:calibration"
    samples: int = 8
    length: int = 128
    threshold: float = 0.1
    pool: str = "task"
    dtype: str = "auto"
    overwrite: bool = False


def convert(config: ConvertConfig) -> dict[str, Any]:
    """Convert a dense model, or report on a mixture of experts."""
    from meo import workflow

    refuse_existing(config.output, config.overwrite)
    refuse_overlap(config.output, config.model)
    if config.pretrained:
        return workflow.convert_pretrained(config)
    if config.meo is None:
        raise RequestError("method none converts nothing; give meo or moe")
    return workflow.convert(config)


app.command("convert")(
    command_of(ConvertConfig, convert, "Make banks of experts of a dense model's feed-forwards; the same function.")
)
app.command("train", cls=WithAliases)(train_command)


@app.command("eval")
def evaluate(
    model: Model,
    kind: Kind = "classification",
    data: Data = "zoo:glue:order",
    task: Annotated[str, typer.Option(help="At level task: which one, if the records do not say.")] = "",
    samples: Annotated[int, typer.Option(min=1, help="Rows.")] = 200,
    length: Annotated[int, typer.Option(min=2, help="Most tokens of an input.")] = 128,
    target_length: Annotated[int, typer.Option(min=1, help="Most tokens of an answer or a summary.")] = 64,
    min_target_length: Annotated[int, typer.Option(min=0, help="Least tokens of what is generated.")] = 0,
    beams: Annotated[int, typer.Option(min=1, help="Of generated answers and summaries.")] = 1,
    no_repeat_ngram_size: Annotated[int, typer.Option(min=0, help="No so many tokens come twice in them; 0: may.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, separated by commas, in place of --kind and --data.")] = "",
    task_folder: Annotated[Path | None, typer.Option(help="Folder of lm-eval task files of your own.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="Questions of each lm-eval task; 0: all.")] = 0,
    shots: Annotated[int, typer.Option(help="Examples before each question; -1: the task's own.")] = -1,
    gates: Annotated[bool, typer.Option("--gates", help="Also tell how each bank's gate decides.")] = False,
    output: Kept = None,
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Measure a model, dense or converted, on held-out data, or a causal language model on lm-eval tasks."""
    from meo import workflow

    _free(output, overwrite)
    if tasks:
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        how: dict[str, Any] = {"limit": limit or None, "shots": None if shots < 0 else shots, "batch_size": batch_size}
        return keep(workflow.evaluate_tasks(model, names, task=task, folder=task_folder, **how), output)
    found = workflow.evaluate(
        model, kind, data, task=task, samples=samples, length=length, batch_size=batch_size, gates=gates,
        generation={"target_length": target_length, "min_target_length": min_target_length, "beams": beams,
                    "no_repeat_ngram_size": no_repeat_ngram_size},
    )  # fmt: skip
    return keep(found, output)


@app.command()
def flops(
    model: Annotated[str, typer.Argument(metavar="SIZE|MODEL", help="small, base, large (the paper's), or a model.")],
    k: Annotated[str, typer.Option(help="Selected experts, separated by commas.")] = "1,2,4,8,16,32",
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 128,
    groups: Annotated[int, typer.Option(min=0, help="Merges of each bank; 0: one a sequence.")] = 0,
    output: Kept = None,
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Operations of a forward pass: dense, vanilla mixture and MEO, in GFLOPs (a multiply-add is two)."""
    from meo import workflow
    from meo.flops import SIZES, named

    _free(output, overwrite)
    if not k.replace(",", "").strip().isdigit() or min(ks := [int(n) for n in k.split(",") if n]) < 1:
        raise RequestError(f"k {k!r}: numbers from 1 on, separated by commas, are needed")
    sizes = named(model) if model in SIZES or not _is_model(model) else workflow.sizes(model)
    return keep({"flops": workflow.flops_rows(sizes, ks, batch=batch, tokens=tokens, groups=groups or None)}, output)


@app.command()
def merge(
    model: Model,
    task: Annotated[str, typer.Option(help="The task to bake.")],
    output: Output = Path("merged"),
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Bake one task of a task-level model into a plain dense checkpoint of its stock class."""
    from meo import workflow

    refuse_existing(output, overwrite)
    refuse_overlap(output, model)
    return workflow.merge(model, task, output, overwrite)


@app.command()
def export(
    model: Model,
    rank: Annotated[int, typer.Option(min=1, help="Rank of each expert's difference from their mean.")] = 8,
    output: Output = Path("experts"),
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Write the experts' mean as a dense checkpoint and each expert as a LoRA adapter, for engines that serve those."""
    from meo import workflow

    refuse_existing(output, overwrite)
    refuse_overlap(output, model)
    return workflow.export(model, rank, output, overwrite)


@app.command()
def inspect(model: Model) -> dict[str, Any]:
    """What a checkpoint's banks are; of a dense model, which linears would become some."""
    from meo import workflow

    return workflow.inspect(model)


@app.command()
def bench(
    hidden: Annotated[int, typer.Option(min=8, help="Width of the tokens.")] = 768,
    inner: Annotated[int, typer.Option(min=8, help="Width of the feed-forward.")] = 3072,
    experts: Annotated[int, typer.Option(min=8, help="Experts of each bank.")] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 8,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; medians are printed.")] = 5,
    output: Kept = None,
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Speed of merging, of MEO beside a vanilla mixture and beside a dense feed-forward, on this machine; memory."""
    from meo import bench as benchmark

    _free(output, overwrite)
    found = benchmark.run(hidden=hidden, inner=inner, experts=experts, batch=batch, tokens=tokens, rounds=rounds)
    return keep(found, output)


def _free(path: Path | None, overwrite: bool) -> None:
    if path is not None:
        refuse_existing(path, overwrite)


def _is_model(name: str) -> bool:
    return ":" in name or "/" in name or Path(name).exists()


def _paper() -> Any:
    from meo.tables import PAPER

    return PAPER


add_reproduce(app, _paper)


def main() -> None:
    """The console command."""
    app()
