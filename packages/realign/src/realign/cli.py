"""The command `realign`: thin verbs over the package's functions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from model_hooks import RequestError
from model_hooks.files import refuse_existing
from paper_tables import record_options as option
from paper_tables.cli import add_reproduce
from paper_tables.frame import keep, make_app
from realign.options import service_options
from realign.train import train_command

app = make_app(
    "realign", help="Rewrite the answers of instruction data into the form that their kind of task asks for."
)

Limit = Annotated[int, typer.Option(min=0, help="Only the first so many records; 0: all.")]
TaxonomyFile = Annotated[str, typer.Option("--taxonomy", help="Your own tasks and formats (YAML).")]
ClassifierName = Annotated[
    str, typer.Option("--classifier", help="local, a file of `classify-train`, model, or causal:MODEL.")
]
Model = Annotated[str, typer.Option(help="The model's name at the server, or a checkpoint with --backend local.")]
Retriever = Annotated[str, typer.Option(help="none, serper, or the file of a corpus (BM25).")]
Tokenizer = Annotated[str, typer.Option(help="Whose tokens lengths are compared in; empty: words and signs.")]
Filters = Annotated[str, typer.Option(help="A preset (open-platypus, alpaca, no-robots, gsm8k, math, careful, none) or "
                                      "filters.")]  # fmt: skip
NMode = Annotated[str, typer.Option(help="client (a request for each candidate) or server (one, with n).")]
Turns = Annotated[str, typer.Option(help="Of conversations: last, all, or none.")]


def _read(
    data: str, schema: str = "auto", on_bad_record: str = "fail", rejects: Path = option.REJECTS,
    encoding_errors: str = "strict", reid: bool = False, limit: int = 0,
) -> Any:  # fmt: skip
    from instruct_data.records import read

    return read(
        data, schema, on_bad_record=on_bad_record, rejects=rejects, encoding_errors=encoding_errors, reid=reid,
        limit=limit or None,
    )  # fmt: skip


def _taxonomy(path: str) -> Any:
    from realign.taxonomy import load_taxonomy

    return load_taxonomy(path or None)


@app.command()
@service_options
def run(
    data: option.Data,
    service: Any,
    model: Model = "gpt-3.5-turbo-1106",
    output: option.Output = Path("realigned.jsonl"),
    filters: Filters = "careful",
    classifier: ClassifierName = "local",
    retriever: Retriever = "none",
    taxonomy: TaxonomyFile = "",
    temperature: Annotated[float, typer.Option(min=0)] = 0.3,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a reply.")] = 2048,
    candidates: Annotated[int, typer.Option("--candidates", "-n", min=1, help="Replies for each record.")] = 2,
    select: Annotated[
        str, typer.Option(help="filter-then-longest, longest (the paper's), first, or reward:MODEL after the filters.")
    ] = "filter-then-longest",
    adaptive: Annotated[bool, typer.Option(help="Let the model judge first whether the format suits.")] = True,
    turns: Turns = "last",
    n_mode: NMode = "client",
    tokenizer: Tokenizer = "",
    shard: option.Shard = "",
    dry_run: option.DryRun = False,
    bare: option.Bare = False,
    limit: Limit = 0,
    schema: option.Schema = "auto",
    on_bad_record: option.OnBad = "fail",
    rejects: option.Rejects = option.REJECTS,
    encoding_errors: option.Errors = "strict",
    reid: option.Reid = False,
    overwrite: option.Overwrite = False,
) -> dict[str, Any]:
    """Classify, support by evidence, rewrite and filter: the paper's pipeline. The same command again goes on."""
    from instruct_data.llm.shards import parse_shard
    from realign import workflow
    from realign.filters import chosen
    from realign.rewriting import Recipe

    part = parse_shard(shard) if shard else None
    refuse_existing(output, overwrite)
    recipe = Recipe(model, temperature, top_p, answer_tokens, candidates, select, chosen(filters), adaptive, turns)
    tasks = _taxonomy(taxonomy)
    models = replace(service(output), n_mode=n_mode)
    records = _read(data, schema, on_bad_record, rejects, encoding_errors, reid, limit)
    if dry_run:
        return workflow.dry_run(records, recipe, models, tasks, classifier, part)
    records.count()  # a bad record shows before anything is sent
    with option.naming(output):
        return workflow.rewrite_records(
            records, output, recipe, models, tasks, classifier=classifier, retriever=retriever, tokenizer=tokenizer,
            shard=part, bare=bare, overwrite=overwrite,
        )  # fmt: skip


@app.command()
@service_options
def classify(
    data: option.Data,
    service: Any,
    output: option.Output = Path("classified.jsonl"),
    classifier: ClassifierName = "local",
    model: Model = "",
    taxonomy: TaxonomyFile = "",
    schema: option.Schema = "auto",
    overwrite: option.Overwrite = False,
) -> dict[str, Any]:
    """Add the kind of task of every record."""
    from realign import workflow

    refuse_existing(output, overwrite)
    records = _read(data, schema)
    return workflow.classify_records(
        records, output, _taxonomy(taxonomy), service(output), classifier, model, overwrite
    )  # fmt: skip


@app.command("classify-train")
def classify_train(
    data: Annotated[
        str, typer.Argument(help="JSON lines or an array of `instruction` and `category`; empty: ours.")
    ] = "",
    output: option.Output = Path("classifier.npz"),
    taxonomy: TaxonomyFile = "",
    heldout: Annotated[float, typer.Option(min=0, max=0.9, help="Share kept for measuring.")] = 0.1,
    seed: int = 0,
    overwrite: option.Overwrite = False,
) -> dict[str, Any]:
    """Train a task classifier in seconds, on labelled instructions of your own."""
    from realign.labels import train_classifier

    refuse_existing(output, overwrite)
    return train_classifier(data, output, _taxonomy(taxonomy), heldout, seed)


@app.command()
@service_options
def retrieve(
    data: option.Data,
    service: Any,
    retriever: Retriever = "none",
    output: option.Output = Path("supported.jsonl"),
    classifier: ClassifierName = "local",
    taxonomy: TaxonomyFile = "",
    schema: option.Schema = "auto",
    overwrite: option.Overwrite = False,
) -> dict[str, Any]:
    """Add evidence to the records whose task asks for it."""
    from realign import workflow

    refuse_existing(output, overwrite)
    records = _read(data, schema)
    return workflow.retrieve_records(
        records, output, _taxonomy(taxonomy), service(output), retriever, classifier, overwrite
    )  # fmt: skip


@app.command()
@service_options
def rewrite(
    data: option.Data,
    service: Any,
    model: Model = "gpt-3.5-turbo-1106",
    output: option.Output = Path("rewritten.jsonl"),
    taxonomy: TaxonomyFile = "",
    candidates: Annotated[int, typer.Option("--candidates", "-n", min=1, help="Replies for each record.")] = 2,
    adaptive: Annotated[bool, typer.Option(help="Let the model judge first whether the format suits.")] = True,
    turns: Turns = "last",
    n_mode: NMode = "client",
    tokenizer: Tokenizer = "",
    schema: option.Schema = "auto",
    overwrite: option.Overwrite = False,
) -> dict[str, Any]:
    """The middle of `run` alone: the longest reply is taken as it is, with the evidence that the records bring."""
    from realign import workflow
    from realign.rewriting import Recipe

    refuse_existing(output, overwrite)
    recipe = Recipe(model, candidates=candidates, select="longest", adaptive=adaptive, turns=turns)
    records, models = _read(data, schema), replace(service(output), n_mode=n_mode)
    with option.naming(output):
        return workflow.rewrite_records(
            records, output, recipe, models, _taxonomy(taxonomy), tokenizer=tokenizer, overwrite=overwrite
        )


@app.command("filter")
def filter_(
    data: option.Data,
    output: option.Output = Path("filtered.jsonl"),
    filters: Filters = "careful",
    tokenizer: Tokenizer = "",
    schema: option.Schema = "auto",
    overwrite: option.Overwrite = False,
) -> dict[str, Any]:
    """Put back the original of every rewritten answer that a filter refuses."""
    from realign import workflow
    from realign.filters import chosen

    refuse_existing(output, overwrite)
    return workflow.filter_records(_read(data, schema), output, chosen(filters), tokenizer, overwrite)


@app.command()
def merge(
    data: option.Data,
    parts: Annotated[list[Path], typer.Argument(metavar="PART...", help="What `run --shard` wrote, all of it.")],
    output: option.Output = Path("realigned.jsonl"),
    bare: option.Bare = False,
    schema: option.Schema = "auto",
    overwrite: option.Overwrite = False,
) -> dict[str, Any]:
    """Join the parts of a sharded run; missing and foreign ones are refused."""
    from realign import workflow

    refuse_existing(output, overwrite)
    for part in parts:
        if not part.is_file():
            raise RequestError(f"the part {part} does not exist")
    return workflow.merge(_read(data, schema), parts, output, bare=bare, overwrite=overwrite)


@app.command()
def stats(
    data: option.Data,
    output: option.Figures = None,
    schema: option.Schema = "auto",
    overwrite: option.Overwrite = False,
) -> dict[str, Any]:
    """What became of the records, by reason and by task."""
    from realign import showing

    if output is not None:
        refuse_existing(output, overwrite)
    return keep(showing.stats(_read(data, schema)), output)


@app.command()
def view(
    data: option.Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("realigned.html"),
    schema: option.Schema = "auto",
    overwrite: option.Overwrite = False,
) -> dict[str, Any]:
    """Write one HTML page of the answers before and after, with filters by task, status and reject reason."""
    from realign import showing

    refuse_existing(output, overwrite)
    with option.naming(output):
        return showing.view(_read(data, schema), output)


@app.command()
def export(
    data: option.Data,
    form: Annotated[
        str, typer.Option(help="sft (messages) or preference (chosen: rewritten, rejected: original).")
    ] = "sft",
    output: option.Output = Path("export.jsonl"),
    schema: option.Schema = "auto",
    overwrite: option.Overwrite = False,
) -> dict[str, Any]:
    """Write records as trainers read them."""
    from realign import showing

    refuse_existing(output, overwrite)
    return showing.export(_read(data, schema), output, form, overwrite)


app.command("train")(train_command)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, checkpoint folder or zoo:NAME.")],
    data: Annotated[str, typer.Option(help="Problems with answers that end in a number (GSM8K's form).")],
    template: Annotated[str, typer.Option(help="Prompt, as in training: none, alpaca, vicuna or chat.")] = "alpaca",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    limit: Limit = 0,
    output: option.Figures = None,
    schema: option.Schema = "auto",
    dtype: option.Dtype = "auto",
    device_map: option.DeviceMap = "",
    overwrite: option.Overwrite = False,
) -> dict[str, Any]:
    """Exact match of the final number on held-out problems."""
    from model_hooks.loading import load_placed
    from realign.eval import exact_match

    if output is not None:
        refuse_existing(output, overwrite)
    records = _read(data, schema, limit=limit)
    loaded, tokenizer = load_placed(model, dtype, device_map)
    options: dict[str, Any] = {"template": template, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    return keep(exact_match(loaded, tokenizer, records, **options), output)


@app.command()
def bench(
    latency: Annotated[float, typer.Option(min=0.01, help="Seconds that the server takes for a reply.")] = 0.2,
    in_flight: Annotated[str, typer.Option(help="Requests in flight, separated by commas.")] = "8,32,128,256",
    rounds: Annotated[int, typer.Option(min=1, help="Replies of each, in multiples of that.")] = 20,
    records: Annotated[
        str, typer.Option(help="Also the memory of the pipeline over so many records, such as 1000,200000 (minutes).")
    ] = "",
    output: option.Figures = None,
    overwrite: option.Overwrite = False,
) -> dict[str, Any]:
    """The client beside one request at a time, on a server of this machine with a fixed latency."""
    from realign import bench as benchmark

    if output is not None:
        refuse_existing(output, overwrite)
    levels, counts = _numbers("in-flight", in_flight), _numbers("records", records) if records else []
    return keep(benchmark.run(latency, levels, rounds, counts), output)


def _numbers(name: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) for part in parts):
        raise RequestError(f"{name} {text!r}: give numbers above 0, such as 8,32")
    return [int(part) for part in parts]


def _paper() -> Any:
    from realign.tables import PAPER

    return PAPER


add_reproduce(app, _paper)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
