"""What the command does: files in, files out, everything resumable. Nothing here is imported before a verb runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from instruct_data import Record, Records, read, write
from instruct_data.json_stream import dump
from instruct_data.llm import Ledger, stream
from instruct_data.llm.cost import Usage, estimate
from instruct_data.llm.service import Service
from instruct_data.llm.shards import merge_parts, only, write_part
from instruct_data.scoring.pairs import Compat
from instruct_data.scoring.shards import ranks
from instruct_data.templates import TEMPLATES
from instruct_data.templates import template as template_named
from model_hooks.errors import RequestError
from model_hooks.files import atomic_write
from paper_tables import WorkFailed, progress

from .parsing import INSTRUCTION, RESPONSE, form_of
from .policy import SelectionPolicy
from .prompts import VERSION, probe
from .reflecting import Recipe, Reflector, request_for
from .reverse import heads_of, pairs_of, scored
from .versions import Version, Versions, columns, types

NOTHING = "no record was reflected on: every reply was unusable or refused (see the outcomes); the originals are kept"


class Incomplete(WorkFailed):
    """The result is written, and something in it is missing."""

    exit_code = 3


def reflect_records(
    records: Records, output: Path, recipe: Recipe, service: Service, *, shard: tuple[int, int] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Ask the teacher; write every record, in order, with its versions.

    Raises `Incomplete` where not one was reflected on.
    """
    counts: Counter[tuple[str, str]] = Counter()
    with service.client(recipe.model, service.ledger()) as client:
        reflector = Reflector(client, recipe, service.forms(client, probe(recipe.model), form_of(RESPONSE)))

        def found() -> Iterator[tuple[Record, Versions]]:
            total = records.count()
            with progress("records reflected on", total if shard is None else None) as bar:
                for record, versions in stream(client, reflector, only(records, shard)):
                    count(counts, versions)
                    bar.advance()
                    yield record, versions

        if shard is None:
            write(output, rows(found()), like=records, types=types(), overwrite=overwrite)
            about = manifest(records, recipe) | {"outcomes": outcomes(counts)}
            atomic_write(f"{output}.manifest.json", dump(about) + b"\n")
        else:
            values = ((record, {name: asdict(v) for name, v in versions.items()}) for record, versions in found())
            write_part(output, shard, manifest(records, recipe), values, overwrite)
        said = {"output": output, **tell(counts, client.ledger)}
    if not said["reflected"]:
        raise Incomplete(NOTHING, said)
    return said


def rows(found: Iterator[tuple[Record, Versions]]) -> Iterator[dict[str, Any]]:
    for record, versions in found:
        yield {**record.data, **columns(versions)}


def count(counts: Counter[tuple[str, str]], versions: Versions) -> None:
    """One record more: by version and what became of it, and as a whole."""
    counts["records", ""] += 1
    counts["reflected", ""] += any(v.usable for name, v in versions.items() if name != "ori")
    for name, made in versions.items():
        if name != "ori":
            counts[name, (made.reject_reason or made.status).partition(":")[0]] += 1


def outcomes(counts: Counter[tuple[str, str]]) -> list[dict[str, Any]]:
    return [
        {"version": name, "outcome": outcome, "records": n} for (name, outcome), n in sorted(counts.items()) if outcome
    ]


def tell(counts: Counter[tuple[str, str]], ledger: Ledger) -> dict[str, Any]:
    """What to say of a run."""
    return {
        "records": counts["records", ""], "reflected": counts["reflected", ""], "outcomes": outcomes(counts),
        "requests": ledger.sent, "from_journal": ledger.journalled, "account": ledger.rows(),
    }  # fmt: skip


def manifest(records: Records, recipe: Recipe) -> dict[str, Any]:
    """What decided the result, without any path of this machine or key."""
    return {
        "data": Path(records.name).name, "schema": records.schema.name, "recipe": asdict(recipe),
        "prompt_version": VERSION,
        "versions": {name: version(name) for name in ("reflection-tuning", "instruct-data")},
    }  # fmt: skip


def merge(records: Records, parts: Sequence[Path], output: Path, *, overwrite: bool) -> dict[str, Any]:
    """Join the parts of a sharded run into what the run in one piece would have written."""
    counts: Counter[tuple[str, str]] = Counter()

    def found() -> Iterator[tuple[Record, Versions]]:
        for record, value in merge_parts(records, parts):
            versions = {name: Version(**made) for name, made in value.items()}
            count(counts, versions)
            yield record, versions

    write(output, rows(found()), like=records, types=types(), overwrite=overwrite)
    reflected = counts["reflected", ""]
    return {"output": output, "records": counts["records", ""], "reflected": reflected, "parts": len(parts)}


def dry_run(records: Records, recipe: Recipe, service: Service, shard: tuple[int, int] | None) -> dict[str, Any]:
    """Tokens and price that a run may take, by the length of its texts: nothing is sent, nothing written. A text that
    is not there yet counts as twice as long as the one that it replaces."""
    requests, usage = 0, Usage()
    for record in only(records, shard):
        example = record.examples[-1]
        for name in recipe.versions:
            names, twice = (INSTRUCTION, 1) if name == "Q" else (RESPONSE, 2 if name == "QA" else 1)
            instruction = example.instruction if twice == 1 else 2 * example.instruction
            request = request_for(recipe, names, instruction, twice * example.response, example, True)
            if request is not None:
                each = estimate(request)
                requests += 1
                usage += Usage(each.prompt, min(each.completion, each.prompt))
    return {
        "requests": requests, "prompt_tokens_about": usage.prompt, "completion_tokens_about": usage.completion,
        "cost_about": service.ledger().prices.of(recipe.model, usage),
    }  # fmt: skip


def score_records(
    model: Any, tokenizer: Any, records: Records, output: Path, *, template: str = "vicuna", name: str = "",
    folder: Path | None = None, bar: Callable[[int, int], Any] | None = None, overwrite: bool = False, **engine: Any,
) -> dict[str, Any]:  # fmt: skip
    """Score every version and write `output`. Returns the run's facts.

    A killed run goes on when it is called again: what is done is in a folder beside the output until it is written, or
    in `folder`, which stays. Under a launcher each process scores its share, and the last one to finish writes; for the
    others the facts have `pending`, the ranks still at work. `engine`: options of `instruct_data.scoring.score`.

    Raises `Incomplete`, after writing, where a version could not be scored because its forward pass failed.
    """
    from instruct_data.scoring import score
    from instruct_data.scoring.together import finished

    work = folder or output.with_name(f".{output.name}.run")
    rank, world = ranks(engine.pop("rank", None), engine.pop("world", None))
    prompt = template_named(template, tokenizer)
    score(
        model, tokenizer, pairs_of(records, prompt), folder=work, rank=rank, world=world,
        settings={"template": template}, progress=bar, heads=heads_of(prompt), **engine,
    )  # fmt: skip
    statuses: Counter[str] = Counter()
    with finished(work, rank, world, keep=folder is not None) as scores:
        if isinstance(scores, list):
            return {"waiting_for_ranks": scores}

        def found() -> Iterator[tuple[Record, Versions]]:
            for record, versions in scored(records, iter(scores)):
                statuses.update((made.score_status or "").partition(";")[0] for made in versions.values())
                yield record, versions

        written = write(output, rows(found()), like=records, types=types(), overwrite=overwrite)
        facts = scores.facts
    kept = ("segments", "tokens", "journalled", "forwarded", "forwarded_tokens", "failed", "how", "settings")
    about = {"student": name, **{key: facts[key] for key in kept}}
    atomic_write(f"{output}.manifest.json", dump(about) + b"\n")
    told = [{"status": status, "versions": n} for status, n in statuses.most_common()]
    said = {"scores": output, "records": written, "statuses": told, "from_journal": facts["journalled"],
            "forwarded": facts["forwarded"], "forwarded_tokens": facts["forwarded_tokens"],
            "seconds": facts["seconds"]}  # fmt: skip
    if facts["failed"]:
        raise Incomplete(f"{facts['failed']} losses could not be computed (out of memory?): unscored, never 0", said)
    return said


def check_request(template: str, compat: str) -> None:
    """Raise `RequestError` for names that are not known: before a model is loaded, not after."""
    for what, given, known in (("template", template, TEMPLATES), ("compat", compat, get_args(Compat))):
        if given not in known:
            raise RequestError(f"no {what} {given!r}; choose one of {', '.join(known)}")


def run_all(
    records: Records, folder: Path, recipe: Recipe, service: Service, student: str, policy: SelectionPolicy, *,
    rank_by: str = "ifd", top: float = 0.0, template: str = "vicuna", dtype: str = "auto", device_map: str = "",
    **engine: Any,
) -> dict[str, Any]:  # fmt: skip
    """Reflect, score, select and show, into `folder`. What was answered or scored before is not done again: replies and
    losses stay in the folder's journals."""
    from model_hooks.loading import load_placed

    from . import showing

    if ranks(None, None)[1] > 1:
        raise RequestError("run is one process; under a launcher give `score` what `reflect` wrote")
    reflected, scores, chosen = (folder / f"{name}.jsonl" for name in ("reflected", "scored", "selected"))
    said = reflect_records(records, reflected, recipe, service, overwrite=True)
    again = read(str(reflected), records.schema.name)
    incomplete: Incomplete | None = None
    if policy.needs_scores:
        loaded, tokenizer = load_placed(student, dtype, device_map)
        try:
            with progress("tokens scored") as bar:
                told = score_records(
                    loaded, tokenizer, again, scores, template=template, name=student, folder=folder / "losses",
                    bar=bar, overwrite=True, **engine,
                )  # fmt: skip
        except Incomplete as error:
            incomplete, told = error, dict(error.result or {})
        said |= {"forwarded": told["forwarded"], "losses_from_journal": told["from_journal"]}
        again = read(str(scores), records.schema.name)
    found = showing.select(again, chosen, policy, rank_by=rank_by, share=top, overwrite=True)
    showing.view(again, folder / "reflections.html", policy)
    said = {k: v for k, v in said.items() if k not in ("outcomes", "account")} | found | {"output": folder}
    if incomplete:
        raise Incomplete(str(incomplete), said)
    return said
