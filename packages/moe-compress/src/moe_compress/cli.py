"""The command `moe-compress`: thin verbs over the package's functions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from model_hooks.errors import RequestError
from model_hooks.files import refuse_existing
from moe_compress.finetune import finetune_command
from moe_compress.presets import option
from paper_tables.cli import add_reproduce
from paper_tables.frame import keep, make_app

app = make_app("moe-compress", help="Slim and trim mixtures of experts.")

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, checkpoint folder or zoo:NAME.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where the result goes.")]
Kept = Annotated[Path | None, typer.Option("--output", "-o", help="Also write the result as JSON.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Data = Annotated[str, typer.Option(help="Text: a file, a hub dataset (owner/name[:config[:split]]) or zoo:PART.")]
Samples = Annotated[int, typer.Option(min=1, help="Calibration sequences.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens of each; at most the model's context.")]
Batch = Annotated[int, typer.Option(min=1, help="Sequences at once.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: as the checkpoint is stored.")]
DeviceMap = Annotated[str, typer.Option(help="auto spreads the model over all GPUs; empty: one device.")]
Measure = Annotated[str, typer.Option(help="Text for figures before and after; empty: none.")]


@app.command()
def score(
    model: Model,
    output: Output = Path("scores.json"),
    data: Data = "zoo:calibration",
    samples: Samples = 128,
    length: Length = 2048,
    batch_size: Batch = 4,
    reconstruction: Annotated[
        bool, typer.Option("--reconstruction", help="Also measure the layer without each expert.")
    ] = False,
    layerwise: Annotated[bool, typer.Option("--layerwise", help="One layer in memory at a time.")] = False,
    buffer: Annotated[Path | None, typer.Option(help="With --layerwise: folder for the hidden states.")] = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "",
    preset: option("presets", "score") = "",  # type: ignore[valid-type]
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Measure what every expert, MoE layer and block does: one pass, for all ways to trim.

    A killed run goes on where it was when the same command is given again.
    """
    from moe_compress import workflow

    refuse_existing(output, overwrite)
    found = workflow.score_source(
        model, data, samples=samples, length=length, batch_size=batch_size, reconstruction=reconstruction,
        layerwise=layerwise, buffer=buffer, dtype=dtype, device_map=device_map,
        journal=output.with_name(f".{output.name}.journal"),
    )  # fmt: skip
    found.save(output, overwrite=overwrite)
    rows = [
        {"block": b, "experts": len(e), "least_tokens": min(e.count), "least_gate": min(e.gate) / found.tokens,
         "similarity": found.mlp[b]}
        for b, e in found.experts.items()
    ]  # fmt: skip
    return {"scores": output, "samples": found.samples, "tokens": found.tokens, "layers": rows}


@app.command()
def trim(
    model: Model,
    output: Output = Path("trimmed"),
    scores: Annotated[Path | None, typer.Option(help="What `moe-compress score` wrote for this model.")] = None,
    experts: Annotated[
        int, typer.Option("--experts", "--preserve-n", help="Experts to keep: in each layer, or on average.")
    ] = 0,
    scope: Annotated[
        str, typer.Option(help="layer or global: are experts compared within a layer, or over all?")
    ] = "layer",
    metric: Annotated[str, typer.Option(help="gate, freq, reap, norm, output-cos or reconstruction.")] = "gate",
    reverse: Annotated[
        bool, typer.Option("--reverse", "--reverse-drop", help="Drop the most important ones: an ablation.")
    ] = False,
    allow_lower_topk: Annotated[
        bool, typer.Option("--allow-lower-topk", help="Keep fewer experts than a token uses.")
    ] = False,
    allow_empty: Annotated[
        bool, typer.Option("--allow-empty", help="With --scope global: a layer may lose all experts, and so itself.")
    ] = False,
    preserve_gate: Annotated[
        bool, typer.Option("--preserve-gate", help="Keep all router rows; dropped experts stay, as zeros: an ablation.")
    ] = False,
    layers: Annotated[int, typer.Option(help="MoE layers to drop; their attention stays.")] = 0,
    blocks: Annotated[int, typer.Option(help="Whole blocks to drop.")] = 0,
    consecutive: Annotated[bool, typer.Option("--consecutive", help="With --blocks: the best run of blocks.")] = False,
    plan: Annotated[Path | None, typer.Option(help="A plan file, in place of all that.")] = None,
    plan_only: Annotated[Path | None, typer.Option(help="Write the plan here and stop.")] = None,
    repair_router: Annotated[
        bool, typer.Option("--repair-router", help="Let routers learn to choose among the survivors.")
    ] = False,
    layout: Annotated[
        str, typer.Option(help="auto, or stock: refuse what only `import model_hooks` can load.")
    ] = "auto",
    data: Data = "zoo:calibration",
    samples: Samples = 16,
    length: Length = 512,
    measure: Measure = "zoo:heldout",
    dtype: Dtype = "auto",
    device_map: DeviceMap = "",
    preset: option("presets", "trim") = "",  # type: ignore[valid-type]
    compat: option("compat", "trim") = "",  # type: ignore[valid-type]
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Take out experts, MoE layers or blocks and write the checkpoint."""
    from moe_compress import workflow
    from moe_compress.scores import Scores
    from moe_compress.selection import Plan

    refuse_existing(plan_only or output, overwrite)
    asked = {"experts": experts, "layers": layers, "blocks": blocks}
    found = Scores.load(scores) if scores is not None else None
    if plan is not None:
        if any(asked.values()):
            raise RequestError("--plan says what goes; leave out --experts, --layers and --blocks")
        chosen = Plan.load(plan)
    elif found is None:
        raise RequestError("trimming needs --scores (from `moe-compress score`) or --plan")
    else:
        own = {
            "scope": scope, "metric": metric, "reverse": reverse, "allow_lower_topk": allow_lower_topk,
            "allow_empty": allow_empty, "preserve_gate": preserve_gate,
        }  # fmt: skip
        chosen = workflow.choose(found, {**asked, **own, "consecutive": consecutive})
    if plan_only is not None:
        chosen.save(plan_only, overwrite=overwrite)
        return {"plan": plan_only, "drops": chosen.describe()}
    repair = workflow.sequences_for(model, data, samples, length) if repair_router else None
    report = workflow.trim_to_folder(
        model, chosen, output, repair=repair, layout=layout, measure=measure, dtype=dtype, device_map=device_map,
        overwrite=overwrite, scores=found,
    )  # fmt: skip
    rows = [{"": key, "before": report["before"][key], "after": report["after"][key]} for key in report["before"]]
    return {"folder": output, "drops": report["drops"], "stock": report["stock"], "measured": rows}


@app.command()
def slim(
    model: Model,
    output: Output = Path("slimmed"),
    method: Annotated[
        str, typer.Option(help="magnitude, wanda, sparsegpt (pruning); rtn, gptq, awq (quantisation).")
    ] = "gptq",
    sparsity: Annotated[float, typer.Option("--sparsity", "--sparsity-ratio", help="Share of weights to prune.")] = 0.5,
    pattern: Annotated[str, typer.Option("--pattern", "--sparsity-type", help="2:4, 4:8, or none: anywhere.")] = "",
    bits: Annotated[int, typer.Option(help="Of a weight, 2 to 8.")] = 4,
    group: Annotated[int, typer.Option(help="Inputs that share a scale.")] = 128,
    symmetric: Annotated[
        bool, typer.Option("--symmetric/--asymmetric", help="Codes without or with zero points.")
    ] = True,
    scope: Annotated[str, typer.Option(help="experts (routed and shared), or block: attention too.")] = "experts",
    exclude: Annotated[str, typer.Option(help="Parts of names of matrices to leave, separated by commas.")] = "",
    min_tokens: Annotated[
        int, typer.Option(help="Tokens that cover an expert; 0: 4 * inputs / group, at least 256.")
    ] = 0,
    policy: Annotated[str, typer.Option(help="For fewer: shrink, all-tokens, plain or error.")] = "shrink",
    propagate: Annotated[
        str, typer.Option(help="What the next layer gets: compressed or dense outputs.")
    ] = "compressed",
    form: Annotated[
        str, typer.Option("--format", help="Of quantised weights: compressed-tensors or dense.")
    ] = "compressed-tensors",
    workspace: Annotated[
        float, typer.Option(help="GB for moments of inputs and their factors; more saves passes over the data.")
    ] = 4.0,
    data: Data = "zoo:calibration",
    samples: Samples = 128,
    length: Length = 2048,
    batch_size: Batch = 4,
    measure: Annotated[str, typer.Option(help="Text for figures before and after, by the whole model.")] = "",
    preset: option("presets", "slim") = "",  # type: ignore[valid-type]
    compat: option("compat", "slim") = "",  # type: ignore[valid-type]
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Prune or quantise the experts, one layer in memory at a time.

    A killed run goes on where it was when the same command is given again.
    """
    from moe_compress import workflow
    from moe_compress.slimming import Slimming

    refuse_existing(output, overwrite)
    names = tuple(part.strip() for part in exclude.split(",") if part.strip())
    how = Slimming(
        method, sparsity=sparsity, pattern="" if pattern in ("none", "unstructured") else pattern, bits=bits,
        group=group, symmetric=symmetric, scope=scope, exclude=names, min_tokens=min_tokens, policy=policy,
        propagate=propagate,
    )  # fmt: skip
    report = workflow.slim_to_folder(
        model, output, how, data, samples=samples, length=length, batch_size=batch_size, form=form,
        workspace=workspace * 1e9, measure=measure, overwrite=overwrite,
    )  # fmt: skip
    return {"folder": output, **workflow.slim_summary(report)}


@app.command()
def recipe(
    file: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="YAML file; see configs/recipe.yaml.")] = None,
    output: Output = Path("compressed"),
    model: Annotated[str, typer.Option(help="Without a file: what to compress to a target.")] = "",
    target_bytes: Annotated[float, typer.Option(help="Bytes that the weights' files may have.")] = 0.0,
    target_flops: Annotated[float, typer.Option(help="Share of the operations a token that may remain.")] = 0.0,
    target_latency: Annotated[float, typer.Option(help="Share of the mixtures' time a token that may remain.")] = 0.0,
    method: Annotated[str, typer.Option(help="Quantisation that a target may choose: rtn, gptq or awq.")] = "gptq",
    group: Annotated[int, typer.Option(help="Inputs that share a scale.")] = 128,
    data: Data = "zoo:calibration",
    samples: Samples = 128,
    length: Length = 2048,
    measure: Measure = "zoo:heldout",
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Drop, finetune and slim as a file says, or as a target for bytes, operations or time needs."""
    from moe_compress import recipe as recipes

    refuse_existing(output, overwrite)
    targets = {"bytes": target_bytes, "flops": target_flops, "latency": target_latency}
    given = {unit: value for unit, value in targets.items() if value}
    if (file is None) != bool(given):
        raise RequestError(
            "give a recipe file, or --model with one of --target-bytes, --target-flops, --target-latency"
        )
    if file is not None:
        found = recipes.read(file)
    else:
        if not model:
            raise RequestError("a target needs --model")
        calibration = {"data": data, "samples": samples, "length": length}
        found = recipes.Recipe(model, (), calibration, {**given, "method": method, "group": group})
    report = recipes.run(found, output, measure=measure, overwrite=overwrite)
    return {"folder": output, "steps": report["steps"]}


app.command("finetune")(finetune_command)
app.command("train", hidden=True)(finetune_command)  # the common verb's name


@app.command("eval")
def evaluate(
    model: Model,
    baseline: Annotated[str, typer.Option(help="Another model, to compare with.")] = "",
    data: Data = "zoo:heldout",
    documents: Annotated[int, typer.Option(help="Documents of the data; 0: all.")] = 0,
    characters: Annotated[int, typer.Option(help="Of each document; 0: all.")] = 0,
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, separated by commas.")] = "",
    task_folder: Annotated[Path | None, typer.Option(help="Folder of lm-eval task files of your own.")] = None,
    limit: Annotated[int, typer.Option(help="Questions of each task; 0: all.")] = 0,
    shots: Annotated[int, typer.Option(help="Examples before each question; -1: the task's own.")] = -1,
    batch_size: Batch = 8,
    output: Kept = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "",
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Bits per byte on text, lm-eval tasks, parameters and bytes, beside a baseline."""
    from moe_compress import packing, workflow

    if output is not None:
        refuse_existing(output, overwrite)
    rows = workflow.evaluate(
        model, baseline, load=lambda name: packing.load(name, dtype, device_map), data=data,
        documents=documents or None, characters=characters or None,
        tasks=[t.strip() for t in tasks.split(",") if t.strip()], task_folder=task_folder, limit=limit or None,
        shots=None if shots < 0 else shots, batch_size=batch_size,
    )  # fmt: skip
    return keep({"figures": rows}, output)


@app.command()
def bench(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="Without one: 8 random layers of 8 experts.")] = "",
    context: Annotated[int, typer.Option(min=8, help="Tokens of the prompt.")] = 256,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded after it.")] = 16,
    rounds: Annotated[int, typer.Option(min=3, help="Rounds; medians are printed.")] = 7,
    output: Kept = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "",
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Speed of trimmed models beside the whole one with the same kernels, and the cost of scoring."""
    from moe_compress import bench as benchmark
    from moe_compress import packing

    if output is not None:
        refuse_existing(output, overwrite)
    base = packing.load(model, dtype, device_map)[0] if model else benchmark.probe_mixtral()
    return keep(benchmark.run(base, context=context, new_tokens=new_tokens, rounds=rounds), output)


@app.command()
def inspect(
    model: Model,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every key of a quantised folder by compressed-tensors' own rules.")
    ] = False,
) -> dict[str, Any]:
    """Experts and bytes of every layer, what was dropped, and what loads it."""
    from moe_compress import formats
    from moe_compress.inspecting import inspect as look

    return {**look(model), **({"verified": formats.check(model)} if verify else {})}


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="FOLDER", help="What `moe-compress slim` quantised.")],
    output: Output = Path("exported"),
    to: Annotated[str, typer.Option(help="dense: weights as floats.")] = "dense",
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Write a quantised checkpoint in another form."""
    from moe_compress.inspecting import export_dense

    if to != "dense":
        raise RequestError(f"--to {to} is not accepted; give dense (compressed-tensors is what `slim` writes)")
    refuse_existing(output, overwrite)
    return export_dense(model, output, overwrite=overwrite)


def _paper() -> Any:
    from moe_compress.tables import PAPER

    return PAPER


add_reproduce(app, _paper)


def main() -> None:
    """The console command."""
    app()
