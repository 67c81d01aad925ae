"""The command `ressa`: thin verbs over the package's functions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from model_hooks.errors import RequestError
from model_hooks.files import refuse_existing
from paper_tables.cli import add_reproduce
from paper_tables.frame import keep, make_app
from ressa.train import repair_command

app = make_app("ressa", help="Prune vision-language models and repair them so that every zero stays.")

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, checkpoint folder or zoo:NAME.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where the result goes.")]
Kept = Annotated[Path | None, typer.Option("--output", "-o", help="Also write the result as JSON.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Method = Annotated[str, typer.Option(help="magnitude, wanda, sparsegpt or random.")]
Pattern = Annotated[str, typer.Option(help="N:M keeps N of M neighbours, such as 2:4; none: anywhere.")]
Data = Annotated[str, typer.Option(help="zoo:shapes:PART, a .jsonl file, a folder of datasets, or owner/name.")]
Samples = Annotated[int, typer.Option(min=1, help="Examples, fewer where there are fewer.")]
Batch = Annotated[int, typer.Option(min=1, help="Examples at once.")]
SkipBad = Annotated[int, typer.Option(min=0, help="So many records that cannot be used are passed over.")]
Inputs = Annotated[str, typer.Option(help="What later blocks are calibrated on: pruned or dense outputs.")]
Balance = Annotated[str, typer.Option(help="none, or equal: image and text tokens weigh alike.")]
Ignore = Annotated[str, typer.Option(help="Parts of names of matrices to leave, separated by commas.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: as the checkpoint is stored.")]
DeviceMap = Annotated[str, typer.Option(help="auto spreads the model over all GPUs; empty: one device.")]
VisionPath = Annotated[str, typer.Option(help="Module path of the vision tower, if it is not found.")]
ConnectorPath = Annotated[str, typer.Option(help="Module path of the connector, if it is not found.")]
LanguagePath = Annotated[str, typer.Option(help="Module path of the language model, if it is not found.")]


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _pattern(text: str) -> str:
    return "" if text in ("none", "unstructured") else text


@app.command()
def prune(
    model: Model,
    output: Output = Path("pruned"),
    method: Method = "wanda",
    sparsity: Annotated[
        float | None, typer.Option(help="Share of weights to prune; else the pattern's, or 0.5.")
    ] = None,
    pattern: Pattern = "",
    vision: Annotated[float | None, typer.Option(help="Sparsity of the vision tower alone; 0 leaves it.")] = None,
    language: Annotated[float | None, typer.Option(help="Sparsity of the language model alone; 0 leaves it.")] = None,
    compat_spec: Annotated[str, typer.Option(help="The original's form: LAYERS-KEEP-1.0-1.0.")] = "",
    allocation: Annotated[str, typer.Option(help="Between blocks: uniform, owl or parameter_budget.")] = "uniform",
    calibration_inputs: Inputs = "pruned",
    token_balance: Balance = "none",
    ignore: Ignore = "",
    keep_dense: Annotated[
        bool, typer.Option("--keep-dense", help="Write the dense weights with the masks: one copy for repair.")
    ] = False,
    data: Data = "zoo:shapes:calibration",
    samples: Samples = 128,
    batch_size: Batch = 1,
    skip_bad_rows: SkipBad = 0,
    measure: Annotated[str, typer.Option(help="Data for figures before and after; empty: none.")] = "",
    skip_experts: Annotated[
        bool, typer.Option("--skip-experts", help="Leave experts that are one 3-D tensor dense, instead of refusing.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of method random.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print branches and plan, and stop.")] = False,
    vision_path: VisionPath = "",
    connector_path: ConnectorPath = "",
    language_path: LanguagePath = "",
    dtype: Dtype = "auto",
    device_map: DeviceMap = "",
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Prune the vision tower and the language model in one pass, and write the checkpoint with its masks."""
    from ressa import specs, workflow

    if sparsity is not None and compat_spec:
        raise RequestError("--sparsity and --compat-spec exclude each other; give one of them")
    for flag, value in (("--sparsity", sparsity), ("--vision", vision), ("--language", language)):
        if value is not None:
            specs.share(value, flag)
    if not dry_run:
        refuse_existing(output, overwrite)
    how = {
        "method": method, "sparsity": specs.implied(_pattern(pattern)) if sparsity is None else sparsity,
        "pattern": _pattern(pattern), "skip_experts": skip_experts, "seed": seed,
        "vision": vision, "language": language, "allocation": allocation, "calibration_inputs": calibration_inputs,
        "token_balance": token_balance, "ignore": _words(ignore), "keep_dense": keep_dense,
    }  # fmt: skip
    where = workflow.Where(model, dtype, device_map, vision_path, connector_path, language_path)
    if dry_run:
        _, _, branches, pruning, said = workflow.plan(where, how, compat_spec)
        return {**({"spec": said} if said else {}), "plan": workflow.describe(branches, pruning)}
    calibration = workflow.Calibration(data, samples, batch_size, skip_bad_rows=skip_bad_rows)
    report = workflow.prune_to_folder(
        where, output, how, calibration, compat=compat_spec, overwrite=overwrite, measure=measure
    )
    return {"folder": output, **workflow.summary(report)}


app.command("repair")(repair_command)
app.command("train", hidden=True)(repair_command)  # the common verb's name


@app.command("teacher-cache")
def teacher_cache(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="The dense model: hub id, folder or zoo:NAME.")],
    output: Output = Path("taught"),
    data: Data = "zoo:shapes",
    samples: Annotated[int, typer.Option(min=1, help="Examples, as many as `repair` is given.")] = 25_000,
    seed: Annotated[int, typer.Option(help="As `repair` is given.")] = 0,
    max_length: Annotated[int, typer.Option(min=0, help="As `repair` is given.")] = 0,
    temperature: Annotated[float, typer.Option(help="As `repair` is given.")] = 2.0,
    top: Annotated[int, typer.Option(min=1, help="Tokens kept of each place; the others are one.")] = 64,
    batch_size: Batch = 16,
    skip_bad_rows: SkipBad = 0,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "",
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Ask the dense model once about all examples, so that `repair --teacher-cache` needs neither it nor its time."""
    from ressa import teachercache

    if not temperature > 0:
        raise RequestError(f"--temperature is {temperature}; a number above 0 is needed")
    asked = teachercache.Request(teacher, data, samples, seed, max_length, temperature, top, dtype)
    return teachercache.write(
        asked, output, batch_size=batch_size, skip_bad_rows=skip_bad_rows, device_map=device_map, overwrite=overwrite
    )


@app.command()
def merge(
    adapters: Annotated[str, typer.Argument(metavar="ADAPTERS", help="Folder that `ressa repair` wrote.")],
    output: Output = Path("merged"),
    base: Annotated[str, typer.Option(help="The pruned folder, where the adapters' record is out of date.")] = "",
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Merge adapters into their base: an ordinary checkpoint with every zero where it was."""
    from ressa import workflow

    return {"folder": output, **workflow.merge_to_folder(adapters, output, base=base, overwrite=overwrite)}


@app.command("eval")
def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Checkpoints or adapters, side by side.")],
    data: Data = "zoo:shapes:heldout",
    samples: Samples = 256,
    metrics: Annotated[str, typer.Option(help="exact, perplexity, vqa, cider, recall.")] = "exact,perplexity",
    batch_size: Batch = 32,
    new_tokens: Annotated[int, typer.Option(min=1, help="Of a generated answer, for vqa and cider.")] = 32,
    skip_bad_rows: SkipBad = 0,
    output: Kept = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "",
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Exact answers, perplexity, VQA accuracy, CIDEr or retrieval, with standard errors."""
    from ressa import workflow

    if output is not None:
        refuse_existing(output, overwrite)
    rows = workflow.evaluate_all(
        models, data, samples, _words(metrics), batch_size=batch_size, new_tokens=new_tokens,
        skip_bad_rows=skip_bad_rows, dtype=dtype, device_map=device_map,
    )  # fmt: skip
    return keep({"figures": rows}, output)


@app.command()
def sweep(
    model: Model,
    output: Output = Path("sweep.json"),
    ratios: Annotated[str, typer.Option(help="VISION:LANGUAGE sparsities in percent, separated by commas.")] = "",
    method: Method = "wanda",
    calibration: Annotated[str, typer.Option(help="Data to calibrate on.")] = "zoo:shapes:calibration",
    calibration_samples: Samples = 128,
    data: Data = "zoo:shapes:heldout",
    samples: Samples = 256,
    batch_size: Batch = 8,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "",
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """The paper's curve: sparsity shared out between vision and language. A killed sweep goes on where it was."""
    from ressa import specs, sweeping, workflow

    pairs = specs.ratios(ratios or sweeping.RATIOS)
    how = {"method": method}
    rows = sweeping.sweep(
        workflow.Where(model, dtype, device_map), output, pairs, how,
        workflow.Calibration(calibration, calibration_samples, batch_size), data=data, samples=samples,
        overwrite=overwrite,
    )  # fmt: skip
    return {"written": [output, output.with_suffix(".csv")], "points": rows}


@app.command()
def bench(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="Without one: a random LLaVA.")] = "",
    batch_size: Batch = 8,
    rounds: Annotated[int, typer.Option(min=3, help="Rounds; medians are printed.")] = 20,
    output: Kept = None,
    dtype: Dtype = "float32",
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Time and memory of a training step by way of the backward pass beside LoRA's, and latency once merged."""
    from ressa import bench as benchmark

    if output is not None:
        refuse_existing(output, overwrite)
    return keep(benchmark.run(model, batch_size=batch_size, rounds=rounds, dtype=dtype), output)


@app.command()
def inspect(model: Model) -> dict[str, Any]:
    """Zeros and patterns of every branch and matrix of any checkpoint, ours or not."""
    from model_hooks.loading import resolve
    from ressa import workflow

    return workflow.audit(resolve(model))


@app.command()
def export(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A checkpoint with zeros.")],
    output: Output = Path("exported"),
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="compress (a bit for each weight, and values), decompress, int8 or fp8 (zeros stay), or torch-24.",
        ),
    ] = "compress",
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Store a sparse checkpoint small, and back; or say what torch's 2:4 kernels would take of it on this machine."""
    from ressa import workflow

    if form not in ("compress", "decompress", "int8", "fp8", "torch-24"):
        raise RequestError(f"--format {form} is not accepted; give compress, decompress, int8, fp8 or torch-24")
    if form != "torch-24":
        refuse_existing(output, overwrite)
    return workflow.export(folder, output, form, overwrite)


def _paper() -> Any:
    from ressa.tables import PAPER

    return PAPER


add_reproduce(app, _paper)


def main() -> None:
    """The console command."""
    app()
