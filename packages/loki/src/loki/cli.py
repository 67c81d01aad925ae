"""The command `loki`: thin verbs over the package's functions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from model_hooks.files import refuse_existing
from model_hooks.loading import load_placed
from paper_tables.cli import add_reproduce
from paper_tables.frame import keep, make_app

app = make_app("loki", help="Attention that reads a part of the cached tokens, found in few dimensions of the keys.")

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, checkpoint folder or zoo:NAME.")]
BasisFile = Annotated[Path | None, typer.Option("--basis", help="What `loki calibrate` wrote.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Also write the result as JSON.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: as the checkpoint is stored.")]
DeviceMap = Annotated[str, typer.Option(help="auto spreads the model over all GPUs; empty: one device.")]
K = Annotated[str, typer.Option("--k", help="Tokens read: a share (0.25) or a count (64).")]
D = Annotated[str, typer.Option("--d", help="Dimensions they are picked by: a share, a count, or var:0.9.")]
Select = Annotated[str, typer.Option(help="group: one choice for all queries of a KV head; head: one for each.")]
Sink = Annotated[int, typer.Option(help="First tokens that are always read.")]
Recent = Annotated[int, typer.Option(help="Last tokens that are always read.")]
MinK = Annotated[int, typer.Option(help="Least number of tokens read.")]
Block = Annotated[int, typer.Option(help="Tokens are picked in runs of 1, 16, 32 or 64.")]
Mass = Annotated[float | None, typer.Option(help="Read the fewest tokens with this share of the attention.")]
BatchSize = Annotated[int, typer.Option(min=1)]


@app.command()
def calibrate(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The basis: one safetensors file.")] = Path(
        "basis.safetensors"
    ),
    text: Annotated[
        str, typer.Option(help="A file, a hub dataset (owner/name[:config[:split]]) or zoo:PART.")
    ] = "zoo:calibration",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to read.")] = 131072,
    length: Annotated[int, typer.Option(min=2, help="Of a sequence; at most the model's context.")] = 4096,
    rotary: Annotated[str, typer.Option(help="Take keys post or pre rotary embedding.")] = "post",
    batch_size: BatchSize = 4,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "",
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Fit the directions in which a model's keys vary most: one pass over a text, whose keys are not kept.

    A killed run goes on where it was when the same command is given again.
    """
    from loki import workflow
    from loki.analysis import summary

    refuse_existing(output, overwrite)
    found = workflow.calibrate_source(
        model, text, tokens=tokens, length=length, rotary=rotary, batch_size=batch_size,
        load=lambda: load_placed(model, dtype, device_map), journal=output.with_name(f".{output.name}.journal"),
    )  # fmt: skip
    found.save(output)
    return {"basis": output, "tokens": found.about.tokens, **summary(found)}


@app.command()
def analyze(
    bases: Annotated[list[Path], typer.Argument(metavar="BASIS...", help="The first is looked at, others compared.")],
    plots: Annotated[Path | None, typer.Option(help="Folder for three pictures.")] = None,
    d: D = "0.25",
    output: Output = None,
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """How many dimensions hold 80, 90 and 95 % of the variance, by layer; and whether other texts agree."""
    from loki import workflow

    if output is not None:
        refuse_existing(output, overwrite)
    return keep(workflow.analyse_files(bases, plots, d), output)


@app.command("eval")
def evaluate(
    model: Model,
    basis: BasisFile = None,
    method: Annotated[
        str, typer.Option(help="full, topk, h2o, pca, quest, snapkv, loki; several with commas.")
    ] = "full,loki",
    k: K = "0.25",
    d: D = "0.25",
    select: Select = "group",
    sink: Sink = 0,
    recent: Recent = 0,
    min_k: MinK = 0,
    block: Block = 1,
    mass: Mass = None,
    data: Annotated[str, typer.Option(help="Text for perplexity: a file, hub dataset, zoo:PART; empty: none.")] = (
        "zoo:heldout"
    ),
    documents: Annotated[int, typer.Option(help="Documents of the text to use; 0: all.")] = 0,
    characters: Annotated[int, typer.Option(help="Characters of each; 0: all.")] = 0,
    length: Annotated[int, typer.Option(min=8, help="Tokens of a window; at most the model's context.")] = 1024,
    prompt: Annotated[int, typer.Option(min=0, help="Tokens before decoding starts; 0: half of a window.")] = 0,
    samples: Annotated[int, typer.Option(min=0, help="Sequences for the perplexity of decoding; 0: none.")] = 8,
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, separated by commas.")] = "",
    task_folder: Annotated[Path | None, typer.Option(help="Folder of lm-eval task files of your own.")] = None,
    limit: Annotated[int, typer.Option(help="Questions of each task; 0: all.")] = 0,
    pairs: Annotated[str, typer.Option(help="Context lengths for recall of key-value pairs: 1024,4096")] = "",
    needle: Annotated[str, typer.Option(help="Context lengths for a needle in the text: 4096,8192")] = "",
    questions: Annotated[int, typer.Option(min=1, help="Questions for each length.")] = 20,
    batch_size: BatchSize = 8,
    output: Output = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "",
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Perplexity, lm-eval tasks and retrieval by context length, for several methods at one budget.

    `perplexity` and tasks let every token read what it would when decoding, the prompt's too (the paper's tables);
    `decoding perplexity` and retrieval read the prompt as the method does, and decode what follows. No tokens are
    read beyond the budget unless --sink, --recent or --min-k say so.
    """
    from loki import workflow

    if output is not None:
        refuse_existing(output, overwrite)
    options = workflow.settings("full", k, d, select=select, sink=sink, recent=recent, min_k=min_k, block=block,
                                mass=mass, min_length=0)  # fmt: skip
    found = workflow.evaluate_methods(
        lambda: load_placed(model, dtype, device_map), basis, _names(method), options, data=data,
        documents=documents or None, characters=characters or None, length=length, prompt=prompt, samples=samples,
        tasks=_names(tasks), task_folder=task_folder, limit=limit or None, pairs=_lengths("pairs", pairs),
        needles=_lengths("needle", needle), questions=questions, batch_size=batch_size,
    )  # fmt: skip
    return keep({"k": k, "d": d, **found}, output)


@app.command()
def generate(
    model: Model,
    basis: BasisFile = None,
    method: Annotated[str, typer.Option(help="full, topk, h2o, pca, quest, snapkv or loki.")] = "loki",
    k: K = "0.25",
    d: D = "0.25",
    select: Select = "group",
    sink: Sink = 4,
    recent: Recent = 64,
    min_k: MinK = 64,
    block: Block = 1,
    mass: Mass = None,
    min_length: Annotated[
        int | None, typer.Option(help="Queries that see so few tokens read all; none given: what is quicker here.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="Text to go on from.")] = "def main(",
    prompt_file: Annotated[Path | None, typer.Option(help="Take the prompt from a file.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    rounds: Annotated[int, typer.Option(min=0, help="Time it beside ordinary decoding, so often; 0: not.")] = 0,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "",
) -> dict[str, Any]:
    """Greedy text with Loki, how much of it is as without, and what was read."""
    from loki import workflow

    if prompt_file is not None:
        prompt = _text_of(prompt_file)
    options = workflow.settings(method, k, d, select=select, sink=sink, recent=recent, min_k=min_k, block=block,
                                mass=mass, min_length=min_length)  # fmt: skip
    return workflow.generate_text(
        lambda: load_placed(model, dtype, device_map), basis, options, prompt, max_new_tokens, rounds
    )


@app.command()
def bench(
    context: Annotated[str, typer.Option(help="Cached tokens, separated by commas.")] = "8192,32768",
    share: Annotated[str, typer.Option(help="Shares of them to read, separated by commas.")] = "0.25,0.125",
    layers: Annotated[int, typer.Option(min=1, help="Of the model for whole decoding steps.")] = 4,
    rounds: Annotated[int, typer.Option(min=3, help="Rounds; medians are printed.")] = 9,
    output: Output = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Attention alone beside the best dense form, whole decoding steps, cache bytes, and what calibration needs."""
    from loki import bench as benchmark

    if output is not None:
        refuse_existing(output, overwrite)
    return keep(
        benchmark.run(_lengths("context", context), _shares(share), layers=layers, rounds=rounds, dtype=dtype), output
    )


def _names(said: str) -> list[str]:
    return [name.strip() for name in said.split(",") if name.strip()]


def _lengths(option: str, said: str) -> list[int]:
    from model_hooks.errors import RequestError

    found = _names(said)
    wrong = [n for n in found if not n.isdigit() or int(n) < 16]
    if wrong:
        raise RequestError(f"--{option} {wrong[0]!r}: give numbers of tokens from 16 on, separated by commas")
    return [int(n) for n in found]


def _shares(said: str) -> list[float]:
    from model_hooks.errors import RequestError

    try:
        found = [float(n) for n in _names(said)]
    except ValueError:
        found = []
    if not found or not all(0 < n <= 1 for n in found):
        raise RequestError(f"--share {said!r}: give shares in (0, 1], separated by commas")
    return found


def _text_of(file: Path) -> str:
    from model_hooks.errors import RequestError

    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--prompt-file {file} cannot be read ({type(error).__name__}); give a text file") from None


def _paper() -> Any:
    from loki.tables import PAPER

    return PAPER


add_reproduce(app, _paper)


def main() -> None:
    """The console command."""
    app()
