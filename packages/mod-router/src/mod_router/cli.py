"""The command `mod-router`: thin verbs over the package's functions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mod_router.tune import tune_command
from model_hooks.files import atomic_write, refuse_existing
from paper_tables.cli import add_reproduce
from paper_tables.frame import keep, make_app

app = make_app("mod-router", help="Let the layers of a language model decide, for each sequence, whether to run.")

Routers = Annotated[
    str, typer.Argument(metavar="ROUTERS", help="Folder that `mod-router tune` wrote, or a merged checkpoint.")
]
Base = Annotated[str, typer.Option("--model", help="The base, if it is not where the routers say.")]
Tau = Annotated[float, typer.Option(min=0.0, max=1.0, help="Another threshold; 0: the trained one.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where the result goes.")]
Kept = Annotated[Path | None, typer.Option("--output", "-o", help="Also write the result as JSON.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Data = Annotated[str, typer.Option(help="Text (zoo:heldout, a file, a hub dataset) or instruction records.")]
Samples = Annotated[int, typer.Option(min=1, help="Examples of the data.")]
Length = Annotated[int, typer.Option(min=2, help="Most tokens of each.")]
Kind = Annotated[str, typer.Option(help="Of the data: auto, text or records.")]
Template = Annotated[str, typer.Option(help="Prompt of records: none, alpaca, vicuna or chat.")]
Mismatch = Annotated[bool, typer.Option("--allow-mismatch", help="Take a base of the same sizes with other weights.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: as the checkpoint is stored.")]
DeviceMap = Annotated[str, typer.Option(help="auto spreads the model over all GPUs; empty: one device.")]


@app.command("eval")
def evaluate(
    routers: Routers,
    model: Base = "",
    data: Data = "zoo:heldout",
    samples: Samples = 64,
    length: Length = 512,
    kind: Kind = "auto",
    template: Template = "none",
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, separated by commas.")] = "",
    task_folder: Annotated[Path | None, typer.Option(help="Folder of lm-eval task files of your own.")] = None,
    limit: Annotated[int, typer.Option(help="Questions of each task; 0: all.")] = 0,
    shots: Annotated[int, typer.Option(help="Examples before each question; -1: the task's own.")] = -1,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    tau: Tau = 0.0,
    output: Kept = None,
    allow_mismatch: Mismatch = False,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "",
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Loss and lm-eval tasks, routed and ungated, and the share of layers that ran. Prompts and contexts decide."""
    from mod_router import workflow

    _free(output, overwrite)
    loaded, tokenizer, _ = workflow.load_routed(
        routers, model=model, tau=tau, dtype=dtype, device_map=device_map, allow_mismatch=allow_mismatch
    )
    found = workflow.evaluate(
        loaded, tokenizer, data=data, samples=samples, length=length, kind=kind, template=template,
        tasks=[t.strip() for t in tasks.split(",") if t.strip()], task_folder=task_folder, limit=limit or None,
        shots=None if shots < 0 else shots, batch_size=batch_size,
    )  # fmt: skip
    return keep(found, output)


@app.command()
def sweep(
    routers: Routers,
    model: Base = "",
    capacities: Annotated[str, typer.Option(help="Target shares, separated by commas.")] = "0.25,0.5,0.75,1",
    data: Data = "zoo:heldout",
    calibration: Annotated[str, typer.Option(help="Data on which thresholds are found.")] = "zoo:calibration",
    samples: Samples = 64,
    length: Length = 512,
    kind: Kind = "auto",
    template: Template = "none",
    output: Kept = None,
    allow_mismatch: Mismatch = False,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "",
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """The whole capacity curve of one trained router, by moving its threshold: nothing is trained again."""
    from mod_router import measuring, workflow

    _free(output, overwrite)
    targets = _shares(capacities)
    loaded, tokenizer, _ = workflow.load_routed(
        routers, model=model, dtype=dtype, device_map=device_map, allow_mismatch=allow_mismatch
    )
    examples, found = (
        workflow.examples_for(loaded, tokenizer, source, samples, length, kind, template)
        for source in (data, calibration)
    )
    return keep({"curve": measuring.sweep(loaded, examples, targets, calibration=found)}, output)


@app.command()
def usage(
    routers: Annotated[str, typer.Argument(metavar="ROUTERS", help="Routers, a merged checkpoint, or a plain model.")],
    model: Base = "",
    data: Annotated[list[str] | None, typer.Option(help="Data sets to compare; again for more.")] = None,
    layers: Annotated[str, typer.Option(help="Of a plain model: the layers that untrained routers gate.")] = "last",
    unit: Annotated[str, typer.Option(help="Of a plain model: attention, mlp or block.")] = "attention",
    samples: Samples = 64,
    length: Length = 512,
    kind: Kind = "auto",
    template: Template = "none",
    tau: Tau = 0.0,
    output: Kept = None,
    picture: Annotated[Path | None, typer.Option(help="Also draw a heat map (PNG).")] = None,
    allow_mismatch: Mismatch = False,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "",
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Which layers run on which data: a row for each data set, a column for each gated layer."""
    from mod_router import workflow
    from mod_router.usage import heat_map

    for path in (output, picture):
        _free(path, overwrite)
    if workflow.is_routed_source(routers):
        loaded, tokenizer, _ = workflow.load_routed(
            routers, model=model, tau=tau, dtype=dtype, device_map=device_map, allow_mismatch=allow_mismatch
        )
    else:
        loaded, tokenizer = workflow.untrained(routers, layers, unit, dtype, device_map)
    sources = data or ["zoo:heldout"]
    found = workflow.usage(loaded, tokenizer, sources, samples=samples, length=length, kind=kind, template=template)
    if picture is not None:
        atomic_write(picture, heat_map(found, f"layers used, {routers}"))
    rows = [
        {"data": source, "capacity": sum(shares.values()) / len(shares), **{str(k): v for k, v in shares.items()}}
        for source, shares in found.items()
    ]
    return keep({"usage": rows}, output)


@app.command()
def freeze(
    routers: Routers,
    model: Base = "",
    data: Data = "zoo:calibration",
    below: Annotated[
        float, typer.Option(help="Layers that run for a smaller share of the sequences are dropped.")
    ] = 0.1,
    output: Output = Path("plan.json"),
    samples: Samples = 64,
    length: Length = 512,
    kind: Kind = "auto",
    template: Template = "none",
    tau: Tau = 0.0,
    allow_mismatch: Mismatch = False,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "",
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Turn layers that hardly ever run on your data into a static plan: `llm-drop drop BASE plan.json` applies it."""
    from mod_router import workflow
    from mod_router.usage import write_plan

    refuse_existing(output, overwrite)
    loaded, tokenizer, name = workflow.load_routed(
        routers, model=model, tau=tau, dtype=dtype, device_map=device_map, allow_mismatch=allow_mismatch
    )
    shares = workflow.usage(
        loaded, tokenizer, [data], samples=samples, length=length, kind=kind, template=template
    )[data]  # fmt: skip
    plan = workflow.freeze(loaded, shares, below, name)
    write_plan(plan, output, overwrite)
    return {"plan": output, "attention": plan["attention"], "mlp": plan["mlp"], "of": plan["num_layers"]}


@app.command()
def merge(
    routers: Routers,
    model: Base = "",
    output: Output = Path("routed"),
    tau: Tau = 0.0,
    allow_mismatch: Mismatch = False,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "",
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Write base and routers as one checkpoint, which loads by the Auto classes after `import mod_router`."""
    from mod_router import merged, workflow
    from model_hooks.loading import resolve

    refuse_existing(output, overwrite)
    loaded, tokenizer, name = workflow.load_routed(
        routers, model=model, tau=tau, dtype=dtype, device_map=device_map, allow_mismatch=allow_mismatch
    )
    source = Path(resolve(name))
    if hasattr(loaded, "merge_and_unload"):
        loaded = loaded.merge_and_unload()
    merged.merge(
        loaded, output, tokenizer, base=name, overwrite=overwrite, source=source if source.is_dir() else None
    )  # fmt: skip
    return {"folder": output, "model_type": type(loaded.config).model_type, "base": name}


@app.command()
def inspect(routers: Routers) -> dict[str, Any]:
    """What a folder of routers holds: base, settings, what was measured, the size of each router."""
    from mod_router import workflow

    return workflow.inspect(routers)


@app.command()
def generate(
    routers: Routers,
    model: Base = "",
    prompt: Annotated[str, typer.Option(help="Text to go on from.")] = "def main(",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    lossless: Annotated[
        bool, typer.Option("--lossless", help="The base's own text, drafted by the routed model.")
    ] = False,
    tau: Tau = 0.0,
    allow_mismatch: Mismatch = False,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "",
) -> dict[str, Any]:
    """Greedy text, the layers that its prompt let run, and the cache that they needed."""
    from mod_router import workflow

    loaded, tokenizer, _ = workflow.load_routed(
        routers, model=model, tau=tau, dtype=dtype, device_map=device_map, allow_mismatch=allow_mismatch
    )
    return workflow.generate(loaded, tokenizer, prompt, max_new_tokens, lossless)


@app.command()
def bench(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="Without one: 16 random layers of width 512.")] = "",
    layers: Annotated[str, typer.Option(help="Gated layers.")] = "last",
    context: Annotated[int, typer.Option(min=8, help="Tokens of the prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded after it.")] = 32,
    rounds: Annotated[int, typer.Option(min=3, help="Rounds; medians are printed.")] = 9,
    output: Kept = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "",
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Speed at several capacities beside static dropping and the ideal, cache bytes, and the cost of training."""
    from mod_router import bench as benchmark
    from model_hooks.loading import load_placed
    from paper_tables.probe import probe_model

    _free(output, overwrite)
    base = load_placed(model, dtype, device_map)[0] if model else probe_model()
    return keep(benchmark.run(base, layers, context=context, new_tokens=new_tokens, rounds=rounds), output)


def _free(path: Path | None, overwrite: bool) -> None:
    if path is not None:
        refuse_existing(path, overwrite)


def _shares(text: str) -> list[float]:
    from model_hooks.errors import RequestError

    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < share <= 1 for share in found):
        raise RequestError(f"capacities {text!r}: shares in (0, 1] separated by commas are needed, such as 0.25,0.5")
    return found


app.command("tune")(tune_command)
app.command("train", hidden=True)(tune_command)  # the common verb's name


def _paper() -> Any:
    from mod_router.tables import PAPER

    return PAPER


add_reproduce(app, _paper)


def main() -> None:
    """The console command."""
    app()
