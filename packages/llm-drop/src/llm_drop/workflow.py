"""What the commands do: from names of models, data and files to results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_drop.plan import Plan
from llm_drop.repair import apply
from llm_drop.scoring import Scores, score, score_layerwise
from llm_drop.selection import select, select_iteratively
from model_hooks import FingerprintMismatch, RequestError

Load = Callable[[], tuple[Any, Any]]
PAPER = "arXiv 2406.15786"


def sequences_for(config: Any, tokenizer: Any, data: str, samples: int, length: int) -> Any:
    """Calibration sequences of `data`; a length beyond the model's context is cut to it."""
    from model_hooks.text import load_sequences

    context = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or length
    return load_sequences(tokenizer, data, samples=samples, length=min(length, context))


def score_source(
    name: str, data: str, *, samples: int, length: int, batch_size: int, load: Load, journal: Path | None = None
) -> Scores:
    """Load the model and score it on `data`; `journal` lets a killed run go on."""
    from paper_tables import progress

    model, tokenizer = load()
    sequences = sequences_for(model.config, tokenizer, data, samples, length)
    with progress("batches scored") as bar:
        return score(model, sequences, name=name, data=data, batch_size=batch_size, journal=journal, progress=bar)


def score_source_layerwise(
    name: str, data: str, *, samples: int, length: int, batch_size: int, buffer: Path | None = None, dtype: str = "auto"
) -> Scores:
    """As `score_source`, with the weights of one layer in memory at a time."""
    from transformers import AutoConfig

    from model_hooks.loading import dtype_named, load_tokenizer, resolve
    from paper_tables import progress

    how = {"batch_size": batch_size, "buffer": buffer, "dtype": dtype_named(dtype)}
    tokenizer = load_tokenizer(name)
    sequences = sequences_for(AutoConfig.from_pretrained(resolve(name)), tokenizer, data, samples, length)
    with progress("layers scored") as bar:
        return score_layerwise(name, sequences, data=data, **how, progress=bar)


def summary(scores: Scores, least: int = 8) -> dict[str, Any]:
    """What to tell of some scores: the data, and the units that change the residual stream least."""
    importance = scores.importance()
    order = sorted((u for u in importance if u[0] != "block"), key=importance.__getitem__)
    rows = [{"sublayer": kind, "index": i, "importance": importance[kind, i]} for kind, i in order[:least]]
    return {"samples": scores.samples, "tokens": scores.tokens, "least_important": rows}


def make_plan(
    scores: Scores,
    counts: Mapping[str, int],
    budgets: Mapping[str, float],
    *,
    load: Load,
    consecutive: bool = False,
    iterative: bool = False,
    objective: Any = "cosine",
    context: int = 512,
    stability: bool = False,
) -> tuple[Plan, dict[str, Any]]:
    """The plan that was asked for, and what to tell of it."""
    if budgets and (counts or consecutive or iterative):
        raise RequestError("a budget and a count exclude each other; give --kv-budget and the like, or --attention N")
    if stability and (budgets or iterative or consecutive or objective != "cosine"):
        raise RequestError("--stability is for discrete selection by cosine; leave out what else was asked for")
    if budgets:
        return _budget_plan(scores, budgets, load, objective, context), {}
    if consecutive and iterative:
        raise RequestError("--consecutive and --iterative exclude each other: a run of blocks is chosen at once")
    if iterative:
        return _iterative(scores, counts, load, objective), {}
    plan = select(scores, **counts, consecutive=consecutive, objective=objective)
    return plan, _stability(scores, plan, counts) if stability else {}


def _budget_plan(scores: Scores, budgets: Mapping[str, float], load: Load, objective: Any, context: int) -> Plan:
    from llm_drop import budget

    model, _ = load()
    _same_model(scores, model)
    costs: dict[Any, budget.Costs] = {}
    if "kv" in budgets:
        costs["kv"] = budget.kv_costs(model, context)
    if "latency" in budgets:
        costs["latency"] = budget.latency_costs(model, context)
    if "parameters" in budgets:
        costs["parameters"] = budget.parameter_costs(model)
    return budget.plan_for_budget(scores, costs, budgets, objective)  # type: ignore[arg-type]


def _iterative(scores: Scores, counts: Mapping[str, int], load: Load, objective: Any) -> Plan:
    """One unit of each kind asked for is dropped in each round, and what is left is measured again."""
    from llm_drop.scoring import data_fingerprint
    from llm_drop.speculative import sharing_copy

    rounds = set(counts.values())
    if len(rounds) != 1:
        raise RequestError(f"--iterative takes one count (or equal ones), got {dict(counts)}")
    model, tokenizer = load()
    _same_model(scores, model)
    sequences = sequences_for(model.config, tokenizer, scores.data, scores.samples, scores.tokens // scores.samples)
    scores.check(data=data_fingerprint(sequences))

    def measure(taken: Plan | None) -> Scores:
        if taken is None:
            return scores
        return score(apply(sharing_copy(model), taken, check=False), sequences, name=scores.model, data=scores.data)

    return select_iteratively(measure, dict.fromkeys(counts, 1), rounds.pop(), objective)


def _same_model(scores: Scores, model: Any) -> None:
    from model_hooks import fingerprint

    scores.check(model=fingerprint(model))


def _stability(scores: Scores, plan: Plan, counts: Mapping[str, int]) -> dict[str, Any]:
    from llm_drop.stability import bootstrap

    found = bootstrap(scores, **counts)
    rows = [
        {"sublayer": kind, "index": i, "importance": scores.importance()[kind, i],
         "low": found.interval[kind, i][0], "high": found.interval[kind, i][1],
         "chosen_in": share, "in_the_plan": (kind, i) in plan.units}
        for (kind, i), share in found.frequency.items()
    ]  # fmt: skip
    return {"agreement": found.agreement, "resampled": rows}


def drop_to_folder(
    name: str, plan_file: Path, folder: Path, *, load: Load, to: str = "hf", repair: Path | None = None,
    measure: str = "zoo:heldout", overwrite: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Load, drop, measure, write with a model card that says what it cost, and read back."""
    from llm_drop.formats import FORMATS, export
    from model_hooks import Card
    from model_hooks.loading import resolve
    from paper_tables.quality import size

    if to not in FORMATS:
        raise RequestError(f"unknown format {to!r}; there are {', '.join(FORMATS)}")
    plan = Plan.load(plan_file)
    constants = Scores.load(repair) if repair is not None else None
    model, tokenizer = load()
    before = {**size(model), **_loss(model, tokenizer, measure)}
    apply(model, plan, repair=constants)
    after = {**size(model), **_loss(model, tokenizer, measure)}
    card = Card(
        base=name,
        method=f"llm-drop: {plan.describe()}" + (", each leaving its mean change behind" if constants else ""),
        source=PAPER,
        measured={f"{key}, {when}": value for key in before for when, value in
                  (("before", before[key]), ("after", after[key]))},
        settings={"plan": plan.how, "measured on": measure or "nothing", "format": to},
    )  # fmt: skip
    source = Path(resolve(name))
    export(model, tokenizer, folder, to, card=card, overwrite=overwrite, source=source if source.is_dir() else None)
    rows = [{"": key, "before": before[key], "after": after[key]} for key in before]
    return {"folder": folder, "format": to, "drops": plan.describe(), "measured": rows}


def _loss(model: Any, tokenizer: Any, source: str, documents: int = 16, characters: int = 2000) -> dict[str, float]:
    from paper_tables.quality import excerpts, language

    if not source or tokenizer is None:
        return {}
    found = language(model, tokenizer, excerpts(source, documents, characters))
    return {"bits_per_byte": found["bits_per_byte"]["value"]}


def evaluate_models(
    name: str, plan_file: Path | None, baseline: str, *, load: Callable[[str], tuple[Any, Any]], data: str,
    documents: int | None, characters: int | None, tasks: Sequence[str], task_folder: Path | None, limit: int | None,
    shots: int | None, batch_size: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each figure: of the model, of the baseline if there is one, and the ratio of the two."""
    from paper_tables.quality import compare, figures

    if plan_file is not None and baseline:
        raise RequestError("--plan drops from MODEL, whose figures are then the baseline; leave out --baseline")
    plan = Plan.load(plan_file) if plan_file is not None else None
    how: dict[str, Any] = {
        "data": data, "documents": documents, "characters": characters, "tasks": tasks, "folder": task_folder,
        "limit": limit, "shots": shots, "batch_size": batch_size,
    }  # fmt: skip
    columns: dict[str, dict[str, dict[str, float]]] = {}
    if baseline:
        columns["baseline"] = figures(*load(baseline), **how)
    model, tokenizer = load(name)
    if plan is not None:
        columns["baseline"] = figures(model, tokenizer, **how)
        apply(model, plan)
    columns["model"] = figures(model, tokenizer, **how)
    return compare(columns)


def generate_text(
    model: Any, tokenizer: Any, plan: Plan, prompt: str, max_new_tokens: int, rounds: int = 3
) -> dict[str, Any]:
    """Greedy text of the whole model, drafted by the dropped one, beside plain generation: same text, other speed."""
    from llm_drop.speculative import draft_of, generate
    from paper_tables.timing import interleaved

    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    if not ids.numel():
        raise RequestError("the prompt is empty; give some text")
    if plan.fingerprint:
        from model_hooks import fingerprint

        if fingerprint(model) != plan.fingerprint:
            raise FingerprintMismatch(f"the plan was made from {plan.model}; give that model, or plan again")
    draft = draft_of(model, plan)
    drafted = generate(model, draft, ids, max_new_tokens=max_new_tokens)
    timed = interleaved(
        {
            "plain": lambda: model.generate(ids, do_sample=False, max_new_tokens=max_new_tokens),
            "drafted": lambda: generate(model, draft, ids, max_new_tokens=max_new_tokens),
        },
        rounds=rounds, warmup=1,
    )  # fmt: skip
    return {
        "text": tokenizer.decode(drafted.sequences[0], skip_special_tokens=True),
        "new_tokens": drafted.new_tokens, "acceptance": drafted.acceptance, "parent_steps": drafted.parent_steps,
        "draft_steps": drafted.draft_steps, "speedup": timed["drafted"].speedup,
    }  # fmt: skip
