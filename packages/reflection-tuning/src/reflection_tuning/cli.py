"""The command `reflection-tuning`: thin verbs over the package's functions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from model_hooks import RequestError
from model_hooks.files import refuse_existing
from paper_tables import record_options as option
from paper_tables.cli import add_reproduce
from paper_tables.endpoint import endpoint_options
from paper_tables.frame import keep, make_app
from reflection_tuning.train import train_command

app = make_app(
    "reflection-tuning", help="Let a teacher rewrite instruction data, and the student choose what it keeps."
)

Scored = Annotated[str, typer.Argument(metavar="DATA", help="Records as `reflect`, `score` or `gather` write them.")]
Limit = Annotated[int, typer.Option("--records", min=0, help="Only the first so many records; 0: all.")]
Teacher = Annotated[
    str, typer.Option("--teacher", help="Its name at the server, or a checkpoint with --backend local.")
]
What = Annotated[str, typer.Option(help="both, v1 (instruction, then its answer), instruction or response.")]
Checks = Annotated[str, typer.Option(help="careful, none (the paper's), or checks with commas between.")]
Context = Annotated[int, typer.Option(min=0, help="Tokens that the teacher takes, with its reply; 0: not known.")]
AnswerTokens = Annotated[int, typer.Option(min=1, help="Most tokens of a reply.")]
Temperature = Annotated[float, typer.Option(min=0)]
Student = Annotated[str, typer.Option("--student", help="The model to be trained: hub id, checkpoint or zoo:NAME.")]
Template = Annotated[str, typer.Option(help="Prompt: vicuna (the paper's), alpaca, wiz, none or chat.")]
Compat = Annotated[str, typer.Option(help="original (as published) or aligned (same tokens on both sides).")]
MaxLength = Annotated[int, typer.Option(min=2, help="Tokens of prompt and target.")]
Budget = Annotated[int, typer.Option(min=0, help="Padded tokens a batch; 0: by the device.")]
Policy = Annotated[str, typer.Option(help="v2-paper, v2-keep-all, v1, or a YAML file of your own.")]
RankBy = Annotated[str, typer.Option(help="For --top: ifd (highest first) or rifd (lowest first).")]
Top = Annotated[float, typer.Option(min=0, max=1, help="Share of the selected records to keep, such as 0.02; 0: all.")]
TopN = Annotated[int, typer.Option(min=0, help="Number to keep instead.")]
GPT = "gpt-3.5-turbo"
LLAMA = "meta-llama/Llama-2-7b-hf"


def _service(**settings: Any) -> Any:
    from instruct_data.llm.service import Service

    return Service(method="reflection-tuning", **settings)


def _read(
    data: str, schema: str = "auto", on_bad_record: str = "fail", rejects: Path = option.REJECTS,
    encoding_errors: str = "strict", reid: bool = False, limit: int = 0,
) -> Any:  # fmt: skip
    from instruct_data.records import read

    return read(
        data, schema, on_bad_record=on_bad_record, rejects=rejects, encoding_errors=encoding_errors, reid=reid,
        limit=limit or None,
    )  # fmt: skip


def _policy(name: str) -> Any:
    from reflection_tuning.policy import load_policy

    return load_policy(name)


@app.command()
@endpoint_options(_service)
def reflect(
    data: option.Data,
    service: Any,
    teacher: Teacher = GPT,
    output: option.Output = Path("reflected.jsonl"),
    what: What = "both",
    checks: Checks = "careful",
    temperature: Temperature = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    answer_tokens: AnswerTokens = 2048,
    context: Context = 0,
    shard: option.Shard = "",
    dry_run: option.DryRun = False,
    limit: Limit = 0,
    schema: option.Schema = "auto",
    on_bad_record: option.OnBad = "fail",
    rejects: option.Rejects = option.REJECTS,
    encoding_errors: option.Errors = "strict",
    reid: option.Reid = False,
    overwrite: option.Overwrite = False,
) -> dict[str, Any]:
    """Let a teacher criticise and rewrite instructions and answers. The same command again goes on."""
    from instruct_data.llm.shards import parse_shard
    from reflection_tuning import workflow
    from reflection_tuning.checks import chosen
    from reflection_tuning.reflecting import Recipe

    part = parse_shard(shard) if shard else None
    refuse_existing(output, overwrite)
    recipe = Recipe(teacher, what, temperature, top_p, answer_tokens, context, chosen(checks))
    records = _read(data, schema, on_bad_record, rejects, encoding_errors, reid, limit)
    if dry_run:
        return workflow.dry_run(records, recipe, service(output), part)
    records.count()  # a bad record shows before anything is sent
    with option.naming(output):
        return workflow.reflect_records(records, output, recipe, service(output), shard=part, overwrite=overwrite)


@app.command()
def merge(
    data: option.Data,
    parts: Annotated[list[Path], typer.Argument(metavar="PART...", help="What `reflect --shard` wrote, all of it.")],
    output: option.Output = Path("reflected.jsonl"),
    schema: option.Schema = "auto",
    overwrite: option.Overwrite = False,
) -> dict[str, Any]:
    """Join the parts of a sharded reflection; missing and foreign ones are refused."""
    from reflection_tuning import workflow

    refuse_existing(output, overwrite)
    for part in parts:
        if not part.is_file():
            raise RequestError(f"the part {part} does not exist")
    return workflow.merge(_read(data, schema), parts, output, overwrite=overwrite)


@app.command()
def score(
    data: option.Data,
    student: Student = LLAMA,
    output: option.Output = Path("scored.jsonl"),
    template: Template = "vicuna",
    compat: Compat = "original",
    max_length: MaxLength = 2048,
    budget: Budget = 0,
    original_jsonl: Annotated[
        Path | None, typer.Option(help="Folder for the original's JSON lines, a file for each version.")
    ] = None,
    limit: Limit = 0,
    schema: option.Schema = "auto",
    on_bad_record: option.OnBad = "fail",
    rejects: option.Rejects = option.REJECTS,
    encoding_errors: option.Errors = "strict",
    reid: option.Reid = False,
    dtype: option.Dtype = "auto",
    device_map: option.DeviceMap = "",
    overwrite: option.Overwrite = False,
) -> dict[str, Any]:
    """IFD and r-IFD of every version under the student; of the record alone where it was not reflected on.

    A killed run goes on when the same command is given again. `accelerate launch -m reflection_tuning.cli score ...`
    shares the records out; the last process to finish writes the file.
    """
    from model_hooks.loading import load_placed
    from paper_tables import progress
    from reflection_tuning import workflow
    from reflection_tuning.originals import write_originals

    refuse_existing(output, overwrite)
    if original_jsonl is not None:
        refuse_existing(original_jsonl, overwrite)
    workflow.check_request(template, compat)
    records = _read(data, schema, on_bad_record, rejects, encoding_errors, reid, limit)
    records.count()  # a bad record shows before the model is loaded
    loaded, tokenizer = load_placed(student, dtype, device_map)
    engine: dict[str, Any] = {"compat": compat, "max_length": max_length, "budget": budget or None}
    with progress("tokens scored") as bar, option.naming(output):
        said = workflow.score_records(
            loaded, tokenizer, records, output, template=template, name=student, bar=bar, overwrite=overwrite, **engine
        )
    if original_jsonl is not None and "scores" in said:
        write_originals(_read(str(output), records.schema.name), original_jsonl)
    return said


@app.command()
def gather(
    data: option.Data,
    version: Annotated[
        list[str] | None, typer.Option("--version", help="NAME=FILE: the records of one version (Q, A, QA).")
    ] = None,
    scores: Annotated[
        list[str] | None, typer.Option("--scores", help="NAME=FILE: its published scores (ori, Q, A, QA), JSON lines.")
    ] = None,
    output: option.Output = Path("gathered.jsonl"),
    schema: option.Schema = "auto",
    overwrite: option.Overwrite = False,
) -> dict[str, Any]:
    """Bring files that hold one version each, such as the published ones, into one: for `select` and all after it."""
    from reflection_tuning import originals

    refuse_existing(output, overwrite)
    return originals.gather(_read(data, schema), version or [], scores or [], output, overwrite)


@app.command()
def select(
    data: Scored,
    output: option.Output = Path("selected.jsonl"),
    policy: Policy = "v2-paper",
    rank_by: RankBy = "ifd",
    top: Top = 0.0,
    top_n: TopN = 0,
    near_duplicates: Annotated[
        float, typer.Option(min=0, max=1, help="Leave out new instructions this much like one before; 0: none.")
    ] = 0.0,
    bare: option.Bare = False,
    schema: option.Schema = "auto",
    overwrite: option.Overwrite = False,
) -> dict[str, Any]:
    """Keep, of each record, the version that the student accepts. Replays stored scores: no forward pass."""
    from reflection_tuning import showing

    refuse_existing(output, overwrite)
    return showing.select(
        _read(data, schema), output, _policy(policy), rank_by=rank_by, share=top, number=top_n,
        near=near_duplicates, bare=bare, overwrite=overwrite,
    )  # fmt: skip


@app.command()
@endpoint_options(_service)
def run(
    data: option.Data,
    service: Any,
    teacher: Teacher = GPT,
    student: Student = LLAMA,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for all results.")] = Path("reflection"),
    policy: Policy = "v2-paper",
    rank_by: RankBy = "ifd",
    top: Top = 0.0,
    what: What = "both",
    checks: Checks = "careful",
    temperature: Temperature = 0.0,
    answer_tokens: AnswerTokens = 2048,
    context: Context = 0,
    template: Template = "vicuna",
    compat: Compat = "original",
    max_length: MaxLength = 2048,
    limit: Limit = 0,
    schema: option.Schema = "auto",
    dtype: option.Dtype = "auto",
    device_map: option.DeviceMap = "",
) -> dict[str, Any]:
    """Reflect, score, select, and write the page to look at. The same command again goes on, or does nothing twice."""
    from reflection_tuning import workflow
    from reflection_tuning.checks import chosen
    from reflection_tuning.reflecting import Recipe

    workflow.check_request(template, compat)
    chosen_policy = _policy(policy)
    recipe = Recipe(teacher, what, temperature, 1.0, answer_tokens, context, chosen(checks))
    records = _read(data, schema, limit=limit)
    records.count()
    with option.naming(output):
        return workflow.run_all(
            records, output, recipe, service(output / "replies"), student, chosen_policy, rank_by=rank_by, top=top,
            template=template, compat=compat, max_length=max_length, dtype=dtype, device_map=device_map,
        )  # fmt: skip


@app.command()
def stats(
    data: Scored,
    policy: Policy = "v2-paper",
    output: option.Figures = None,
    schema: option.Schema = "auto",
    overwrite: option.Overwrite = False,
) -> dict[str, Any]:
    """The funnel: replies, what the student accepted, what is emitted, and why the rest is not."""
    from reflection_tuning import showing

    if output is not None:
        refuse_existing(output, overwrite)
    return keep(showing.stats(_read(data, schema), _policy(policy)), output)


@app.command()
def view(
    data: Scored,
    policy: Policy = "v2-paper",
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("reflections.html"),
    schema: option.Schema = "auto",
    overwrite: option.Overwrite = False,
) -> dict[str, Any]:
    """Write one HTML page of texts before and after, with filters by task, status and reject reason."""
    from reflection_tuning import showing

    refuse_existing(output, overwrite)
    with option.naming(output):
        return showing.view(_read(data, schema), output, _policy(policy))


@app.command()
def export(
    data: Scored,
    form: Annotated[
        str, typer.Option(help="sft (messages) or preference (chosen: rewritten answer, rejected: the one before).")
    ] = "sft",
    policy: Policy = "v2-paper",
    output: option.Output = Path("export.jsonl"),
    schema: option.Schema = "auto",
    overwrite: option.Overwrite = False,
) -> dict[str, Any]:
    """Write the selected records as trainers read them."""
    from reflection_tuning import showing

    refuse_existing(output, overwrite)
    return showing.export(_read(data, schema), output, _policy(policy), form, overwrite)


app.command("train")(train_command)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, checkpoint folder or zoo:NAME.")],
    data: Annotated[str, typer.Option(help="Held-out records for the loss on their answers.")] = "zoo:pairs:heldout",
    template: Template = "vicuna",
    max_length: MaxLength = 2048,
    limit: Limit = 0,
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, separated by commas.")] = "",
    task_limit: Annotated[int, typer.Option(min=0, help="Questions of each task; 0: all.")] = 0,
    output: option.Figures = None,
    schema: option.Schema = "auto",
    dtype: option.Dtype = "auto",
    device_map: option.DeviceMap = "",
    overwrite: option.Overwrite = False,
) -> dict[str, Any]:
    """Loss on the answers of held-out records, and lm-eval tasks."""
    from reflection_tuning.eval import evaluate as measure

    if output is not None:
        refuse_existing(output, overwrite)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    records = _read(data, schema, limit=limit)
    options: dict[str, Any] = {"template": template, "max_length": max_length, "tasks": names, "task_limit": task_limit}
    return keep(measure(model, records, dtype=dtype, device_map=device_map, **options), output)


@app.command()
def bench(
    data: Annotated[str, typer.Option(help="Records to score.")] = "zoo:pairs",
    student: Student = "zoo:gpt2",
    template: Template = "vicuna",
    max_length: MaxLength = 1024,
    limit: Annotated[int, typer.Option("--records", min=1, help="Records to score.")] = 40,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of scoring; medians are printed.")] = 3,
    latency: Annotated[float, typer.Option(min=0.01, help="Seconds that most replies take.")] = 0.2,
    in_flight: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 64,
    replies: Annotated[int, typer.Option(min=1, help="Replies to wait for.")] = 6400,
    output: option.Figures = None,
    overwrite: option.Overwrite = False,
) -> dict[str, Any]:
    """Speed beside the published ways: requests in batches of ten, and sixteen forward passes a record."""
    from reflection_tuning import bench as benchmark

    if output is not None:
        refuse_existing(output, overwrite)
    found = {"reflection": [benchmark.replies(latency, in_flight, replies)]}
    records = _read(data, "alpaca", limit=limit)
    return keep(found | {"scoring": [benchmark.scoring(student, records, template, max_length, rounds)]}, output)


def _paper() -> Any:
    from reflection_tuning.tables import PAPER

    return PAPER


add_reproduce(app, _paper)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
