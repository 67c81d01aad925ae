"""The command `superfiltering`: thin verbs over the package's functions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from model_hooks import RequestError
from model_hooks.files import refuse_existing
from paper_tables.cli import add_reproduce
from paper_tables.frame import keep, make_app
from paper_tables.record_options import (
    REJECTS,
    Data,
    DeviceMap,
    Dtype,
    Errors,
    OnBad,
    Output,
    Overwrite,
    Reid,
    Rejects,
    Schema,
)
from superfiltering.train import train_command

app = make_app("superfiltering", help="Let a small language model select the instruction data for a large one.")

ScoresFile = Annotated[
    Path | None, typer.Option("--scores", help="What `score` wrote; without it the records carry their scores.")
]
By = Annotated[str, typer.Option(help="ifd_ppl (the paper's) or ifd_loss (Cherry_LLM's).")]
Turns = Annotated[str, typer.Option(help="Score of a conversation: mean, min, token-weighted or last of its turns.")]


def _read(
    data: str, schema: str = "auto", on_bad_record: str = "fail", rejects: Path = REJECTS,
    encoding_errors: str = "strict", reid: bool = False, limit: int = 0,
) -> Any:  # fmt: skip
    from instruct_data.records import read

    return read(
        data, schema, on_bad_record=on_bad_record, rejects=rejects, encoding_errors=encoding_errors, reid=reid,
        limit=limit or None,
    )  # fmt: skip


@app.command()
def score(
    data: Data,
    model: Annotated[str, typer.Option(help="The filter: hub id, checkpoint folder or zoo:NAME.")] = "gpt2",
    output: Output = Path("scores.parquet"),
    template: Annotated[str, typer.Option(help="Prompt: none (the paper's), alpaca, vicuna or chat.")] = "none",
    compat: Annotated[
        str, typer.Option(help="original (as published) or aligned (same tokens on both sides).")
    ] = "original",
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of prompt and answer.")] = 1024,
    budget: Annotated[str, typer.Option(help="Padded tokens a batch; auto measures; empty: 1,024 (GPU: 32,768).")] = "",
    limit: Annotated[int, typer.Option(min=0, help="Only the first so many records; 0: all.")] = 0,
    original_jsonl: Annotated[Path | None, typer.Option(help="Also write the original's JSON lines there.")] = None,
    schema: Schema = "auto",
    on_bad_record: OnBad = "fail",
    rejects: Rejects = REJECTS,
    encoding_errors: Errors = "strict",
    reid: Reid = False,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "",
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Instruction-following difficulty of every record under a small model.

    A killed run goes on where it was when the same command is given again. `accelerate launch -m superfiltering.cli
    score ...` shares the records out; the last process to finish writes the file.
    """
    from model_hooks.loading import load_placed
    from paper_tables import progress
    from superfiltering import workflow
    from superfiltering.scores import check_request, read_scores, score_records, write_original
    from superfiltering.summary import stats as describe_scores

    for file in (output, original_jsonl):
        if file is not None:
            refuse_existing(file, overwrite)
            _writable(file)
    check_request(template, compat)
    if budget not in ("", "auto") and not budget.isdigit():
        raise RequestError(f"budget {budget!r}: give a number of tokens, auto, or nothing")
    records = _read(data, schema, on_bad_record, rejects, encoding_errors, reid, limit)
    records.count()  # a bad record shows before the model is loaded
    loaded, tokenizer = load_placed(model, dtype, device_map)
    engine = {"compat": compat, "max_length": max_length, "budget": int(budget) if budget.isdigit() else budget or None}
    with progress("tokens scored") as bar:
        facts = score_records(loaded, tokenizer, records, output, template=template, name=model, progress=bar, **engine)
    if "pending" in facts:
        return {"waiting_for_ranks": facts["pending"]}
    if original_jsonl is not None:
        write_original(output, original_jsonl)
    found = read_scores(output)
    told = describe_scores(found.ifd_ppl, statuses=found.statuses)
    return {"scores": output, **workflow.tell_scores(told, facts)}


@app.command()
def select(
    data: Data,
    scores: ScoresFile = None,
    output: Output = Path("selected.jsonl"),
    top: Annotated[str, typer.Option(help="Share to choose, such as 10%, of all records (see --of).")] = "",
    top_n: Annotated[int, typer.Option(min=0, help="Number to choose instead.")] = 0,
    of: Annotated[
        str, typer.Option(help="all records (the paper's meaning) or kept: those within the bounds.")
    ] = "all",
    maximum: Annotated[float, typer.Option("--max", help="Scores from here on are dropped; 0: no bound.")] = 1.0,
    minimum: Annotated[float, typer.Option("--min", help="Scores up to here are dropped; 0: no bound.")] = 0.0,
    by: By = "ifd_ppl",
    turns: Turns = "mean",
    group_by: Annotated[str, typer.Option(help="Key of the records: choose the share within each of its values.")] = "",
    bare: Annotated[bool, typer.Option("--bare", help="Write the records without their scores.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 3 where fewer were chosen than asked for.")] = False,
    schema: Schema = "auto",
    on_bad_record: OnBad = "fail",
    rejects: Rejects = REJECTS,
    encoding_errors: Errors = "strict",
    reid: Reid = False,
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Choose the records with the highest scores below 1; without --top or --top-n the paper's 10%."""
    from superfiltering import workflow

    refuse_existing(output, overwrite)
    records = _read(data, schema, on_bad_record, rejects, encoding_errors, reid)
    found = workflow.scores_for(records, scores, by, turns)
    said = workflow.select_records(
        records, found, output, by=by, group_by=group_by, bare=bare, overwrite=overwrite,
        top=top or (None if top_n else "10%"), top_n=top_n or None, of=of, maximum=maximum or None,
        minimum=minimum or None,
    )  # fmt: skip
    if strict and "warning" in said:
        raise workflow.TooFew(f"{said['warning']} (--strict)", said)
    return said


@app.command()
def diversify(
    data: Data,
    output: Output = Path("diverse.jsonl"),
    top: Annotated[str, typer.Option(help="Share of the records to choose, such as 10%.")] = "",
    top_n: Annotated[int, typer.Option(min=0, help="Number to choose instead.")] = 0,
    text: Annotated[str, typer.Option(help="What is embedded: whole, instruction or response.")] = "whole",
    encoder: Annotated[str, typer.Option(help="minilm, or a model: its mean hidden states.")] = "minilm",
    long: Annotated[str, typer.Option(help="Texts beyond the encoder's length: cut, or mean over windows.")] = "cut",
    kernel: Annotated[str, typer.Option(help="exp-euclidean/d (the paper's), cosine or rbf.")] = "exp-euclidean/d",
    optimiser: Annotated[str, typer.Option(help="lazy, naive or stochastic.")] = "lazy",
    neighbours: Annotated[int, typer.Option(min=0, help="Keep so many similarities a record; 0: all.")] = 0,
    group_by: Annotated[str, typer.Option(help="Key of the records: quotas in proportion to its values.")] = "",
    given: Annotated[str, typer.Option(help="Records (a file) that count as chosen already.")] = "",
    curve: Annotated[Path | None, typer.Option(help="Write the gain of every choice there, as JSON.")] = None,
    schema: Schema = "auto",
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Choose records that stand for all of them (Superfiltering.D: facility location over embeddings)."""
    from superfiltering import workflow

    for file in (output, curve):
        if file is not None:
            refuse_existing(file, overwrite)
    records = _read(data, schema)
    number = workflow.number_of(records.count(), top, top_n)
    return workflow.diversify_records(
        records, output, number=number, text=text, encoder=encoder, long=long, kernel=kernel, optimiser=optimiser,
        neighbours=neighbours or None, group_by=group_by, curve=curve, overwrite=overwrite,
        given=workflow.positions_of(records, _read(given, records.schema.name)) if given else (),
    )  # fmt: skip


@app.command()
def run(
    data: Data,
    model: Annotated[str, typer.Option(help="The filter: hub id, checkpoint folder or zoo:NAME.")] = "gpt2",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for all results.")] = Path("filtered"),
    top: Annotated[str, typer.Option(help="Share chosen by score.")] = "10%",
    diverse: Annotated[str, typer.Option(help="Share of all records left after diversification; empty: none.")] = "",
    encoder: Annotated[str, typer.Option(help="For --diverse: minilm, or a model.")] = "minilm",
    template: Annotated[str, typer.Option(help="Prompt: none (the paper's), alpaca, vicuna or chat.")] = "none",
    compat: Annotated[str, typer.Option(help="original or aligned.")] = "original",
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of prompt and answer.")] = 1024,
    schema: Schema = "auto",
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Score, select, diversify if asked, and write the page to look at: the paper's pipeline in one line."""
    from superfiltering import workflow

    records = _read(data, schema)
    return workflow.run_all(
        records, model, output, top=top, diverse=diverse, encoder=encoder, template=template, compat=compat,
        max_length=max_length, dtype=dtype, overwrite=overwrite,
    )  # fmt: skip


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="SCORES", help="Of one filter model.")],
    second: Annotated[Path, typer.Argument(metavar="SCORES", help="Of another, on the same records.")],
    by: By = "ifd_ppl",
    turns: Turns = "mean",
    resamples: Annotated[int, typer.Option(min=0, help="Bootstrap resamples for the intervals.")] = 1000,
) -> dict[str, Any]:
    """Do two filter models agree? Rank correlation and overlap of what each would choose."""
    from superfiltering import workflow

    return workflow.compare_scores(first, second, by=by, turns=turns, resamples=resamples)


@app.command()
def stats(
    scores: Annotated[Path, typer.Argument(metavar="SCORES", help="What `score` wrote.")],
    by: By = "ifd_ppl",
    turns: Turns = "mean",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write all of it as JSON.")] = None,
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Quantiles, statuses, and how scores go with the length of the answer."""
    from superfiltering import workflow
    from superfiltering.scores import read_scores

    if output is not None:
        refuse_existing(output, overwrite)
    found = read_scores(scores, turns)  # type: ignore[arg-type]
    told = workflow.describe(found, by)
    return workflow.short(keep(told, output))


@app.command()
def view(
    data: Data,
    scores: ScoresFile = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("scores.html"),
    selected: Annotated[str, typer.Option(help="Records (a file) to mark as selected.")] = "",
    by: By = "ifd_ppl",
    turns: Turns = "mean",
    schema: Schema = "auto",
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Write one HTML page to look at the records by score: histogram, sort, filter, search."""
    from superfiltering import workflow

    refuse_existing(output, overwrite)
    records = _read(data, schema)
    found = workflow.scores_for(records, scores, by, turns)
    chosen = workflow.positions_of(records, _read(selected, records.schema.name)) if selected else ()
    return {"page": workflow.write_viewer(records, found, output, by=by, chosen=chosen), "records": len(found.ids)}


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, checkpoint folder or zoo:NAME.")],
    data: Annotated[str, typer.Option(help="Held-out records for the loss on their answers.")] = "zoo:pairs:heldout",
    template: Annotated[str, typer.Option(help="Prompt, as in training: none, alpaca, vicuna or chat.")] = "alpaca",
    max_length: Annotated[int, typer.Option(min=2)] = 1024,
    limit: Annotated[int, typer.Option(min=0, help="Only the first so many records; 0: all.")] = 0,
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, separated by commas.")] = "",
    task_limit: Annotated[int, typer.Option(min=0, help="Questions of each task; 0: all.")] = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the result as JSON.")] = None,
    schema: Schema = "auto",
    dtype: Dtype = "auto",
    device_map: DeviceMap = "",
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Loss on the answers of held-out records, and lm-eval tasks."""
    from instruct_data.scoring.heldout import answer_loss
    from model_hooks.loading import load_placed
    from paper_tables import progress
    from paper_tables.quality import accuracies

    if output is not None:
        refuse_existing(output, overwrite)
    records = _read(data, schema, limit=limit)
    loaded, tokenizer = load_placed(model, dtype, device_map)
    with progress("tokens scored") as bar:
        found = answer_loss(loaded, tokenizer, records, template=template, max_length=max_length, progress=bar)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    return keep(found | accuracies(loaded, tokenizer, names, limit=task_limit or None), output)


@app.command()
def bench(
    data: Annotated[str, typer.Option(help="Records to score.")] = "zoo:pairs",
    tokenizer: Annotated[str, typer.Option(help="Tokenizer of the scoring model's shape.")] = "zoo:gpt2",
    records: Annotated[int, typer.Option(min=4, help="Records of each set.")] = 60,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; medians are printed.")] = 3,
    scaling: Annotated[
        int, typer.Option(min=8, help="Records of the largest of four sets, each double the one before.")
    ] = 960,
    small: Annotated[
        bool, typer.Option("--small", help="A 4-layer model of width 256 instead of GPT-2's shape.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the result as JSON.")] = None,
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Scoring beside the published procedure, one record at a time: CPU seconds on the same model and data."""
    from superfiltering import bench as benchmark

    if output is not None:
        refuse_existing(output, overwrite)
    found = benchmark.run(
        records=records, rounds=rounds, scaling=scaling, small=small, data=data, tokenizer=tokenizer
    )  # fmt: skip
    return keep(found, output)


app.command("train")(train_command)


def _writable(output: Path) -> None:
    """Raise `RequestError` before the work where the output's folder cannot be written to, or made."""
    import tempfile

    there = next(folder for folder in output.absolute().parents if folder.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise RequestError(f"cannot write to {output.parent}: {error.strerror}; give another --output") from None


def _paper() -> Any:
    from superfiltering.tables import PAPER

    return PAPER


add_reproduce(app, _paper)


def main() -> None:
    """The console command."""
    app()


if __name__ == "__main__":
    main()
