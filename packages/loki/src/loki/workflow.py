"""What the commands do: from names of models, texts and files to results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from model_hooks.errors import RequestError

from .basis import Basis
from .config import Amount, Variance, make_config
from .method import find, method_of

Load = Callable[[], tuple[Any, Any]]
Settings = dict[str, Any]
VARIANCE = "var:"


@contextmanager
def refusals() -> Iterator[None]:
    """What a model, a file or a machine cannot do is a wrong request to a command: one line, exit 2."""
    try:
        yield
    except (NotImplementedError, FileNotFoundError) as error:
        raise RequestError(str(error)) from error
    except RuntimeError as error:
        if "TRITON_INTERPRET" not in str(error):
            raise
        raise RequestError(str(error)) from error


def amount(name: str, said: str) -> Amount | Variance:
    """ "0.25" is a share, "64" a count, and for d "var:0.9" what explains that share of the variance."""
    try:
        if name == "d" and said.startswith(VARIANCE):
            return Variance(float(said.removeprefix(VARIANCE)))
        return int(said) if said.strip().lstrip("+-").isdigit() else float(said)
    except ValueError as error:
        if isinstance(error, RequestError):
            raise
        form = "a share such as 0.25 or a count such as 64" + (", or var:0.9" if name == "d" else "")
        raise RequestError(f"--{name} {said!r} is not a number; give {form}") from None


def settings(method: str, k: str, d: str, **others: Any) -> Settings:
    """Settings of `LokiConfig` from what was said on the command line, checked."""
    found: Settings = {"method": method, "k": amount("k", k), "d": amount("d", d), **others}
    method_of(make_config(None, found))
    return found


def calibrate_source(
    name: str, text: str, *, tokens: int, length: int, rotary: str, batch_size: int, load: Load,
    journal: Path | None = None,
) -> Basis:  # fmt: skip
    """Load the model and fit a basis to `tokens` tokens of `text`; a killed run goes on from `journal`."""
    from model_hooks.text import load_sequences
    from paper_tables import progress

    from .calibration import calibrate

    model, tokenizer = load()
    length = min(length, context_of(model))
    sequences = load_sequences(tokenizer, text, samples=max(1, -(-tokens // length)), length=length)
    with progress("batches read") as bar, refusals():
        return calibrate(
            model, sequences, rotary=rotary, batch_size=batch_size, name=name, text=text, journal=journal,
            progress=bar,
        )  # fmt: skip


def context_of(model: Any) -> int:
    """The model's context in tokens; a large number where its config names none."""
    config = model.config.get_text_config(decoder=True)
    return int(getattr(config, "max_position_embeddings", None) or 1 << 20)


def check_context(model: Any, tokens: int) -> None:
    """Raise `RequestError` for questions on more tokens than the model can read."""
    if tokens > context_of(model):
        raise RequestError(f"a context of {tokens} tokens: the model reads {context_of(model)}; give a shorter one")


def analyse_files(files: Sequence[Path], folder: Path | None, dimensions: str) -> dict[str, Any]:
    """Ranks of the first basis, pictures of it, and how far the others agree with it."""
    from .analysis import draw, overlap, ranks, summary
    from .config import dimensions as counted

    with refusals():
        bases = [Basis.load(file) for file in files]
    first = bases[0]
    about = first.about
    title = f"{about.model or files[0].stem}, {about.rotary} rotary, {about.text or 'text not named'}"
    found: dict[str, Any] = {"model": about.model, "rotary": about.rotary, "text": about.text, "tokens": about.tokens}
    found |= summary(first) | {"layers": ranks(first)}
    if len(files) > 1:
        wanted = amount("d", dimensions)
        if isinstance(wanted, Variance):
            raise RequestError("bases are compared in a fixed number of dimensions; give --d as a share or a count")
        d = counted(wanted, first.head_dim)
        found["agreement"] = [
            {"basis": file, "text": other.about.text, "rotary": other.about.rotary, "d": d,
             "rank_90": float(other.rank(0.9).double().mean()), "overlap": float(overlap(first, other, d).mean()),
             "least": float(overlap(first, other, d).min()), "of_random_spaces": d / first.head_dim}
            for file, other in zip(files[1:], bases[1:], strict=True)
        ]  # fmt: skip
    if folder is not None:
        found["pictures"] = list(draw(first, folder, title).values())
    return found


def evaluate_methods(
    load: Load, basis_file: Path | None, methods: Sequence[str], options: Mapping[str, Any], *, data: str,
    documents: int | None, characters: int | None, length: int, prompt: int, samples: int, tasks: Sequence[str],
    task_folder: Path | None, limit: int | None, pairs: Sequence[int], needles: Sequence[int], questions: int,
    batch_size: int,
) -> dict[str, Any]:  # fmt: skip
    """Figures and their standard errors, a column for each method, all at the same `options`."""
    from .sessions import session

    with refusals():
        basis = Basis.load(basis_file) if basis_file is not None else None
        for method in methods:
            method_of(make_config(None, {**options, "method": method}))
    model, tokenizer = load()
    length = min(length, context_of(model))
    for asked in (*pairs, *needles):
        check_context(model, asked)
    rows: dict[str, dict[str, Any]] = {}
    for method in methods:
        changes = {**options, "method": method}
        row: dict[str, Any] = {}
        with refusals():
            if find(method).masked and (data or tasks):
                with session(model, basis, **{**changes, "prefill": "masked"}):
                    row |= _whole_texts(model, tokenizer, data, documents, characters, length, tasks, task_folder,
                                        limit, batch_size)  # fmt: skip
            with session(model, basis, **changes):
                row |= _decoding(model, tokenizer, data, length, prompt, samples, pairs, needles, questions, batch_size)
        rows[method] = row
    return {"figures": _by_figure(rows, "value"), "standard_errors": _by_figure(rows, "se")}


def _whole_texts(
    model: Any, tokenizer: Any, data: str, documents: int | None, characters: int | None, length: int,
    tasks: Sequence[str], task_folder: Path | None, limit: int | None, batch_size: int,
) -> dict[str, Any]:  # fmt: skip
    from paper_tables.quality import accuracies, excerpts

    from .quality import perplexity

    found: dict[str, Any] = {}
    if data:
        texts = excerpts(data, documents, characters)
        found["perplexity"] = perplexity(model, tokenizer, texts, length=length, batch_size=batch_size)
    if tasks:
        found |= accuracies(model, tokenizer, tasks, folder=task_folder, limit=limit, batch_size=batch_size)
    return found


def _decoding(
    model: Any, tokenizer: Any, data: str, length: int, prompt: int, samples: int, pairs: Sequence[int],
    needles: Sequence[int], questions: int, batch_size: int,
) -> dict[str, Any]:  # fmt: skip
    from model_hooks.text import load_sequences
    from paper_tables import progress

    from . import retrieval
    from .quality import decoding_perplexity, recall

    found: dict[str, Any] = {}
    if data and samples:
        sequences = load_sequences(tokenizer, data, samples=samples, length=length)
        with progress("sequences decoded") as bar:
            found["decoding_perplexity"] = decoding_perplexity(
                model, sequences, prompt or length // 2, batch_size=batch_size, progress=bar
            )
    for tokens in pairs:
        asked = [retrieval.key_values(tokenizer, tokens, seed) for seed in range(questions)]
        with progress(f"questions on {tokens} tokens") as bar:
            found[f"pairs_{tokens}"] = recall(model, tokenizer, asked, batch_size=batch_size, progress=bar)
    for tokens in needles:
        asked = retrieval.needles(tokenizer, data or "zoo:heldout", tokens, questions)
        with progress(f"needles in {tokens} tokens") as bar:
            found[f"needle_{tokens}"] = recall(model, tokenizer, asked, batch_size=batch_size, progress=bar)
    return found


def _by_figure(rows: Mapping[str, Mapping[str, Any]], part: str) -> list[dict[str, Any]]:
    """A row for each figure, with a column for each method."""
    names = dict.fromkeys(name for row in rows.values() for name in row)
    return [
        {"figure": name, **{method: row[name][part] for method, row in rows.items() if part in row.get(name, {})}}
        for name in names
    ]


def generate_text(
    load: Load, basis_file: Path | None, options: Settings, prompt: str, max_new_tokens: int, rounds: int = 0
) -> dict[str, Any]:
    """Greedy text with the method beside that of ordinary attention, and over `rounds` how much quicker it was."""
    from paper_tables.timing import interleaved

    from .sessions import session
    from .telemetry import stats

    model, tokenizer = load()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    if not ids.numel():
        raise RequestError("the prompt is empty; give some text")
    with refusals():
        basis = Basis.load(basis_file) if basis_file is not None else None
    # stated, since text, stats and time are all to be of what a user gets, and stats alone would make it 0
    min_length = make_config(None, options).on(model.device.type).min_length

    def plain() -> Any:
        return model.generate(ids, do_sample=False, max_new_tokens=max_new_tokens)

    def sparse(**more: Any) -> Any:
        with session(model, basis, **{**options, "min_length": min_length, **more}):
            out = plain()
            return (out, stats(model)) if more.get("stats") else out

    with refusals():
        text, seen = sparse(stats=True, stats_every=1)
        whole = plain()
        timed = interleaved({"plain": plain, "sparse": sparse}, rounds=rounds, warmup=1) if rounds else None
    new = text[0, ids.shape[1] :]
    same = int((new == whole[0, ids.shape[1] : ids.shape[1] + len(new)]).long().cumprod(0).sum())
    return {
        "text": tokenizer.decode(text[0], skip_special_tokens=True), "prompt_tokens": ids.shape[1],
        "new_tokens": len(new), "as_without": same, "min_length": min_length,
        **({"speedup": timed["sparse"].speedup} if timed else {}),
        **_means(seen),
    }  # fmt: skip


def _means(seen: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Means over layers of what telemetry saw; nothing where no step was sparse."""
    names = ("selected", "captured", "recall")
    return {name: sum(layer[name] for layer in seen.values()) / len(seen) for name in names if seen}
