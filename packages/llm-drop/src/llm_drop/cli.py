"""The command `llm-drop`: thin verbs over the package's functions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llm_drop.train import train_command
from model_hooks import RequestError
from model_hooks.files import refuse_existing
from model_hooks.loading import load_placed
from paper_tables.cli import add_reproduce
from paper_tables.frame import keep, make_app

app = make_app("llm-drop", help="Remove the attention layers, MLPs or blocks that a language model uses least.")

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, checkpoint folder or zoo:NAME.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where the result goes.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Data = Annotated[str, typer.Option(help="Text: a file, a hub dataset (owner/name[:config[:split]]) or zoo:PART.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: as the checkpoint is stored.")]
DeviceMap = Annotated[str, typer.Option(help="auto spreads the model over all GPUs; empty: one device.")]


@app.command()
def score(
    model: Model,
    output: Output = Path("scores.json"),
    data: Data = "zoo:calibration",
    samples: Annotated[int, typer.Option(min=1, help="Sequences to score on.")] = 256,
    length: Annotated[int, typer.Option(help="Tokens of each; at most the model's context.")] = 2048,
    batch_size: Annotated[int, typer.Option(min=1)] = 4,
    layerwise: Annotated[
        bool, typer.Option("--layerwise", help="One layer in memory at a time: for models larger than the memory.")
    ] = False,
    buffer: Annotated[
        Path | None, typer.Option(help="With --layerwise: folder for the hidden states, which are in RAM otherwise.")
    ] = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "",
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Measure how much each sublayer and block changes the residual stream: one pass, for all plans.

    A killed run goes on where it was when the same command is given again.
    """
    from llm_drop import workflow
    from llm_drop.scoring import refuse_taken

    refuse_taken(output, overwrite)
    if layerwise and device_map:
        raise RequestError("--layerwise holds one layer on one device: leave out --device-map")
    if buffer and not layerwise:
        raise RequestError("--buffer is where --layerwise keeps hidden states: give --layerwise with it")
    sizes = {"samples": samples, "length": length, "batch_size": batch_size}
    if layerwise:
        found = workflow.score_source_layerwise(model, data, **sizes, buffer=buffer, dtype=dtype)
    else:
        journal = output.with_name(f".{output.name}.journal")
        found = workflow.score_source(
            model, data, **sizes, load=lambda: load_placed(model, dtype, device_map), journal=journal
        )
    found.save(output, overwrite=overwrite)
    return {"scores": output, **workflow.summary(found)}


@app.command()
def plan(
    scores: Annotated[Path, typer.Argument(metavar="SCORES", help="What `llm-drop score` wrote.")],
    output: Output = Path("plan.json"),
    attention: Annotated[int | None, typer.Option(help="Attention sublayers to drop.")] = None,
    mlp: Annotated[int | None, typer.Option(help="Feed-forward sublayers to drop.")] = None,
    blocks: Annotated[int | None, typer.Option(help="Whole blocks to drop.")] = None,
    joint: Annotated[int | None, typer.Option(help="Sublayers of both kinds to drop.")] = None,
    consecutive: Annotated[bool, typer.Option("--consecutive", help="With --blocks: a run of blocks.")] = False,
    iterative: Annotated[bool, typer.Option("--iterative", help="Measure again after each drop.")] = False,
    objective: Annotated[str, typer.Option(help="cosine (the paper's) or norm.")] = "cosine",
    kv_budget: Annotated[float | None, typer.Option(help="Share of the KV-cache bytes that may remain.")] = None,
    latency_budget: Annotated[float | None, typer.Option(help="Share of the decoding time that may remain.")] = None,
    parameter_budget: Annotated[float | None, typer.Option(help="Share of the parameters that may remain.")] = None,
    model: Annotated[str, typer.Option(help="Where the scored model is now, if not where it was.")] = "",
    context: Annotated[int, typer.Option(help="Tokens in the cache, for the KV and latency budgets.")] = 512,
    stability: Annotated[bool, typer.Option("--stability", help="How sure is the choice? Resamples the data.")] = False,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "",
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Choose what to drop: by count, or by what may remain of cache bytes, decoding time or parameters."""
    from llm_drop import workflow
    from llm_drop.scoring import Scores

    refuse_existing(output, overwrite)
    found = Scores.load(scores)
    chosen, said = workflow.make_plan(
        found, _given(attention=attention, mlp=mlp, blocks=blocks, joint=joint),
        _given(kv=kv_budget, latency=latency_budget, parameters=parameter_budget),
        consecutive=consecutive, iterative=iterative, objective=objective, context=context, stability=stability,
        load=lambda: load_placed(model or found.model, dtype, device_map),
    )  # fmt: skip
    chosen.save(output, overwrite=overwrite)
    return {"plan": output, "drops": chosen.describe(), **said}


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


@app.command("import")
def import_lists(
    lists: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="config.json of the paper's own code, or its folder.")
    ],
    output: Output = Path("plan.json"),
    layers: Annotated[int, typer.Option(help="Number of layers, where the file does not say it.")] = 0,
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Turn the drop lists of the paper's own code (drop_attn_list, drop_mlp_list) into a plan."""
    from llm_drop.plan import Plan

    found = Plan.load(lists, num_layers=layers or None)
    found.save(output, overwrite=overwrite)
    return {"plan": output, "drops": found.describe()}


@app.command()
def drop(
    model: Model,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="What `llm-drop plan` or `llm-drop import` wrote.")],
    output: Output = Path("dropped"),
    to: Annotated[str, typer.Option(help="hf, hf-remote, zeroed or nemotron-nas.")] = "hf",
    repair: Annotated[
        Path | None, typer.Option(metavar="SCORES", help="Leave the mean change of each dropped sublayer behind.")
    ] = None,
    measure: Annotated[str, typer.Option(help="Text for the model card's figures; empty: none.")] = "zoo:heldout",
    dtype: Dtype = "auto",
    device_map: DeviceMap = "",
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Write the model without what the plan drops: an ordinary checkpoint folder with a model card."""
    from llm_drop import workflow

    refuse_existing(output, overwrite)
    return workflow.drop_to_folder(
        model, plan, output, to=to, repair=repair, measure=measure, overwrite=overwrite,
        load=lambda: load_placed(model, dtype, device_map),
    )  # fmt: skip


@app.command("eval")
def evaluate(
    model: Model,
    plan: Annotated[Path | None, typer.Option(help="Drop this first, in memory.")] = None,
    baseline: Annotated[str, typer.Option(help="Another model to compare with; with --plan it is MODEL itself.")] = "",
    data: Data = "zoo:heldout",
    documents: Annotated[int, typer.Option(help="Documents of the text to use; 0: all.")] = 0,
    characters: Annotated[int, typer.Option(help="Characters of each; 0: all.")] = 0,
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, separated by commas.")] = "",
    task_folder: Annotated[Path | None, typer.Option(help="Folder of lm-eval task files of your own.")] = None,
    limit: Annotated[int, typer.Option(help="Questions of each task; 0: all.")] = 0,
    shots: Annotated[int, typer.Option(help="Examples before each question; -1: the task's own.")] = -1,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the result as JSON.")] = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "",
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Bits per byte on text, lm-eval tasks, parameters and cache bytes, beside those of a baseline."""
    from llm_drop import workflow

    if output is not None:
        refuse_existing(output, overwrite)
    rows = workflow.evaluate_models(
        model, plan, baseline, load=lambda source: load_placed(source, dtype, device_map), data=data,
        documents=documents or None, characters=characters or None,
        tasks=[t.strip() for t in tasks.split(",") if t.strip()], task_folder=task_folder, limit=limit or None,
        shots=None if shots < 0 else shots, batch_size=batch_size,
    )  # fmt: skip
    return keep({"figures": rows}, output)


@app.command()
def generate(
    model: Model,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="What the draft lacks.")],
    prompt: Annotated[str, typer.Option(help="Text to go on from.")] = "def main(",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "",
) -> dict[str, Any]:
    """Self-speculative decoding: the dropped model drafts, the whole one verifies; its own greedy text, sooner."""
    from llm_drop import workflow
    from llm_drop.plan import Plan

    chosen = Plan.load(plan)
    whole, tokenizer = load_placed(model, dtype, device_map)
    return workflow.generate_text(whole, tokenizer, chosen, prompt, max_new_tokens)


@app.command()
def bench(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="Without one: 16 random layers of width 512.")] = "",
    plan: Annotated[list[Path] | None, typer.Option(help="Plans to compare; without: 1/4 and 1/2 attention.")] = None,
    context: Annotated[int, typer.Option(min=8, help="Tokens of the prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded after it.")] = 32,
    rounds: Annotated[int, typer.Option(min=3, help="Rounds; medians are printed.")] = 9,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the result as JSON.")] = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "",
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Speed beside its ideal, cache bytes, and what calibration and loading cost, on this machine."""
    from llm_drop import bench as benchmark
    from llm_drop.plan import Plan
    from paper_tables.probe import probe_model

    if output is not None:
        refuse_existing(output, overwrite)
    parent = load_placed(model, dtype, device_map)[0] if model else probe_model()
    plans = {file.stem: Plan.load(file) for file in plan or []}
    found = benchmark.run(parent, plans, context=context, new_tokens=new_tokens, rounds=rounds)
    return keep(found, output)


app.command("train")(train_command)


def _paper() -> Any:
    from llm_drop.tables import PAPER

    return PAPER


add_reproduce(app, _paper)


def main() -> None:
    """The console command."""
    app()
