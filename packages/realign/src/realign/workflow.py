"""What the command does: files in, files out, everything resumable. Nothing here is imported before a verb runs."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any

from instruct_data import Journal, Record, Records, write
from instruct_data.json_stream import dump
from instruct_data.llm import Client, Endpoint, Ledger, Request, read_key, stream
from instruct_data.llm.cost import Usage, estimate
from instruct_data.llm.service import Service
from instruct_data.llm.shards import merge_parts, only, write_part
from instruct_data.schemas import question_of
from instruct_data.texts import count_words
from model_hooks.errors import RequestError
from model_hooks.files import atomic_write
from paper_tables import progress

from .classify import Asked, Classifier, Likeliest, Local
from .filters import Change, refuse
from .linear import SHIPPED, LinearClassifier
from .prompts import REVISION, VERSION, probe, rewriting
from .retrieval import Corpus, Retriever, Serper, evidence_for
from .reward import Reward
from .rewriting import Outcome, Recipe, Rewriter, given_category
from .taxonomy import Taxonomy
from .turns import Answer, answers_of, apply, put_back, types


def classifier_of(name: str, taxonomy: Taxonomy) -> Local | Likeliest | None:
    """local (the shipped one), a file that `classify-train` wrote, or causal:MODEL; None: the model is asked."""
    if name == "model":
        return None
    if name.startswith("causal:"):
        from model_hooks.loading import load_placed

        return Likeliest(*load_placed(name.removeprefix("causal:"), "auto"), taxonomy)
    return Local(LinearClassifier.load(SHIPPED if name == "local" else name), taxonomy)


def asked(client: Client, model: str, taxonomy: Taxonomy, service: Service) -> Classifier:
    return Asked(client, model, taxonomy, service.forms(client, probe(model), REVISION))


def _local(name: str, taxonomy: Taxonomy) -> Local | Likeliest:
    found = classifier_of(name, taxonomy)
    if found is None:
        raise RequestError(
            "classifier model needs requests, which are not made here; choose local, or `classify` first"
        )
    return found


def retriever_of(name: str, key_variable: str = "SERPER_API_KEY") -> Retriever | None:
    """none, serper, or the file of a corpus."""
    if name in ("", "none"):
        return None
    return Serper(read_key(key_variable)) if name == "serper" else Corpus.read(name)


def tokens_of(name: str) -> Callable[[str], int]:
    """Counts the tokens of a tokenizer, without BOS; words and signs for an empty name."""
    if not name:
        return count_words
    from model_hooks.loading import load_tokenizer

    tokenizer = load_tokenizer(name)
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def rewrite_records(
    records: Records, output: Path, recipe: Recipe, service: Service, taxonomy: Taxonomy, *, classifier: str = "local",
    retriever: str = "none", tokenizer: str = "", shard: tuple[int, int] | None = None, bare: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The pipeline: every record classified, supported by evidence, rewritten and filtered; written in its order."""
    counts: Counter[str] = Counter()
    # what is wrong with the request shows before the journal is made
    sorter, found, tokens, ledger = (
        classifier_of(classifier, taxonomy), retriever_of(retriever), tokens_of(tokenizer), service.ledger(),
    )  # fmt: skip
    reward = Reward.load(recipe.reward_model) if recipe.reward_model else None
    with service.client(recipe.model, ledger) as client:
        rewriter = Rewriter(
            client, recipe, taxonomy, sorter or asked(client, recipe.model, taxonomy, service), found,
            service.forms(client, probe(recipe.model), REVISION), tokens, reward,
        )  # fmt: skip

        def outcomes() -> Iterator[tuple[Record, Outcome]]:
            total = records.count()
            with progress("records rewritten", total if shard is None else None) as bar:
                for record, outcome in stream(client, rewriter, only(records, shard)):
                    counts[outcome.reason or outcome.status] += 1
                    bar.advance()
                    yield record, outcome

        head = manifest(records, recipe, taxonomy, classifier, retriever, bare)
        if shard is None:
            side = types(bare, recipe.turns)
            write(output, apply_all(records, outcomes(), bare), like=records, types=side, overwrite=overwrite)
            counted = {"records": sum(counts.values()), "outcomes": dict(counts)}
            atomic_write(f"{output}.manifest.json", dump(head | counted | {"sha256": sha256(output)}) + b"\n")
        else:
            write_part(output, shard, head, ((r, asdict(o)) for r, o in outcomes()), overwrite)
        fallbacks = rewriter.classifier.fallbacks
        return {"output": output, **tell(counts, client.ledger), **({"fallbacks": fallbacks} if fallbacks else {})}


def apply_all(records: Records, outcomes: Iterator[tuple[Record, Outcome]], bare: bool) -> Iterator[dict[str, Any]]:
    for record, outcome in outcomes:
        yield apply(records.schema.name, record, outcome, bare)


def manifest(
    records: Records, recipe: Recipe, taxonomy: Taxonomy, classifier: str, retriever: str, bare: bool
) -> dict[str, Any]:
    """What decided the result, without any path of this machine or key."""
    return {
        "data": Path(records.name).name, "schema": records.schema.name, "recipe": recipe.told(), "bare": bare,
        "prompt_version": VERSION, "classifier": Path(classifier).name, "retriever": Path(retriever).name,
        "taxonomy": hashlib.sha256(repr(list(taxonomy.tasks.values())).encode()).hexdigest()[:16],
        "versions": {name: version(name) for name in ("realign", "instruct-data")},
    }  # fmt: skip


def sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tell(counts: Counter[str], ledger: Ledger) -> dict[str, Any]:
    """What to say of a run."""
    total = sum(counts.values())
    said: dict[str, Any] = {"records": total, "rewritten": counts["rewrite"], "original": total - counts["rewrite"]}
    said["why_original"] = [{"reason": k, "records": n} for k, n in counts.most_common() if k != "rewrite"]
    said["requests"], said["from_journal"] = ledger.sent, ledger.journalled
    return said | {"account": ledger.rows()}


def merge(records: Records, parts: Sequence[Path], output: Path, *, bare: bool, overwrite: bool) -> dict[str, Any]:
    """Join the parts of a sharded run into what the run in one piece would have written."""
    counts: Counter[str] = Counter()
    found = merge_parts(records, parts)
    first = list(islice(found, 1))  # parts that do not fit are refused here

    def rows() -> Iterator[dict[str, Any]]:
        for record, value in chain(first, found):
            outcome = Outcome(**value)
            counts[outcome.reason or outcome.status] += 1
            yield apply(records.schema.name, record, outcome, bare)

    side = types(bare, "all" if first and first[0][1].get("turns") is not None else "last")
    write(output, rows(), like=records, types=side, overwrite=overwrite)
    return {"output": output, "records": sum(counts.values()), "rewritten": counts["rewrite"], "parts": len(parts)}


def dry_run(
    records: Records, recipe: Recipe, service: Service, taxonomy: Taxonomy, classifier: str, shard: Any
) -> dict[str, Any]:
    """Tokens and price that a run may take, by the length of its texts: nothing is sent, nothing written."""
    found = _local(classifier, taxonomy)
    requests, usage = 0, Usage()
    for record in only(records, shard):
        for example in recipe.examples_of(record):
            question = question_of(example)
            given = given_category(record.data, taxonomy) if example is record.examples[-1] else None
            task = taxonomy[given or asyncio.run(found(question))[0]]
            if task.rewrite and example.response.strip():
                messages = rewriting(question, example.response, task.format, history=example.history)
                most = min(recipe.max_tokens, 2 * count_words(example.response) + 200)
                each = estimate(Request("rewrite", recipe.model, messages, {**recipe.sampling, "max_tokens": most}))
                requests += recipe.candidates
                usage += Usage(recipe.candidates * each.prompt, recipe.candidates * each.completion)
    return {
        "requests": requests, "prompt_tokens_about": usage.prompt, "completion_tokens_about": usage.completion,
        "cost_about": service.ledger().prices.of(recipe.model, usage),
    }  # fmt: skip


def classify_records(
    records: Records, output: Path, taxonomy: Taxonomy, service: Service, classifier: str, model: str, overwrite: bool
) -> dict[str, Any]:
    """Add `realign_category`, null where the request failed, and, where it is defined, `realign_category_score`."""
    counts: Counter[str] = Counter()
    local = classifier_of(classifier, taxonomy)
    with service.client(model, service.ledger()) as client:
        found: Classifier = local or asked(client, model, taxonomy, service)

        async def one(record: Record) -> dict[str, Any]:
            name, score = await found(question_of(record.examples[-1]))
            counts[name or "(failed)"] += 1
            return {**record.data, "realign_category": name, "realign_category_score": score}

        side = {k: v for k, v in types().items() if k in ("realign_category", "realign_category_score")}
        write(output, stream(client, one, records), like=records, types=side, overwrite=overwrite)
        told = [{"task": name, "records": count} for name, count in counts.most_common()]
        return {"output": output, "records": sum(counts.values()), "fallbacks": found.fallbacks, "tasks": told}


def retrieve_records(
    records: Records, output: Path, taxonomy: Taxonomy, service: Service, retriever: str, classifier: str,
    overwrite: bool,
) -> dict[str, Any]:  # fmt: skip
    """Add `realign_evidence` and its sources to the single-turn records whose task asks for it."""
    found = retriever_of(retriever)
    if found is None:
        raise RequestError("retrieve needs --retriever: the file of a corpus, or serper")
    sorter = _local(classifier, taxonomy)
    counts: Counter[str] = Counter()
    with Journal(service.journal, service.settings, service.writer) as journal:

        async def one(record: Record) -> dict[str, Any]:
            question = question_of(record.examples[-1])
            name = given_category(record.data, taxonomy) or (await sorter(question))[0]
            wanted = taxonomy[name].retrieve and len(record.examples) == 1
            evidence = await evidence_for(question, found, journal) if wanted else []
            counts["supported" if evidence else "nothing found" if wanted else "not asked for"] += 1
            texts, sources = ([e.text for e in evidence] or None, [e.source for e in evidence] or None)
            return {**record.data, "realign_evidence": texts, "realign_evidence_sources": sources}

        client = Client(Endpoint(["http://127.0.0.1"]), journal)  # sends nothing: its stream and journal are used
        side = {
            "realign_evidence": types()["realign_evidence"],
            "realign_evidence_sources": types()["realign_evidence"],
        }
        write(output, stream(client, one, records), like=records, types=side, overwrite=overwrite)
    return {"output": output, **counts}


def filter_records(
    records: Records, output: Path, names: Sequence[str], tokenizer: str, overwrite: bool
) -> dict[str, Any]:
    """Put back the original of every rewritten answer that the filters refuse."""
    tokens = tokens_of(tokenizer)
    counts: Counter[str] = Counter()

    def rows() -> Iterator[dict[str, Any]]:
        for record in records:
            refused: list[tuple[Answer, str]] = []
            for answer in answers_of(record):
                reason = None if answer.original is None else refuse(change_of(answer, tokens), names)
                kept = "rewrite" if answer.original is not None else "original before"
                counts[reason.partition(":")[0] if reason else kept] += 1
                refused += [(answer, reason)] if reason else []
            yield put_back(records.schema.name, record.data, refused) if refused else record.data

    written = write(output, rows(), like=records, types=types(), overwrite=overwrite)
    told = [{"outcome": name, "answers": count} for name, count in counts.most_common()]
    return {"output": output, "records": written, "rewritten": counts["rewrite"], "filters": told}


def change_of(answer: Answer, tokens: Callable[[str], int]) -> Change:
    """A rewritten answer as the filters see it."""
    original, rewritten = answer.original or "", answer.example.response
    return Change(
        question_of(answer.example), original, rewritten, answer.category or "", tokens(original), tokens(rewritten)
    )
