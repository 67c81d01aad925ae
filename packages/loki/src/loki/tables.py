"""The paper's tables: how a row is measured. The tables themselves are YAML files in the package's folder tables/.

A row names a method and its budget; the scale's `figures` name what is measured of it. Every parameter:

    model, dtype                       the model; by `pre-training` nothing is changed
    calibration, tokens, window        text of the basis, how much of it, and the length of its sequences
    rotary                             take keys of the basis "post" (default) or "pre" rotary embedding
    basis                              "pca" (default), or "random" directions (a control)
    method, k, d, select, block, mass, sink, recent, min_k      as in `LokiConfig`; of the last three the paper's 0
    budgets                            instead of k for all layers: solved per layer for this mean (loki.layer_budgets)
    text, documents, characters, length    held-out text and its windows, for perplexity
    samples, prompt                    sequences for the perplexity of decoding, and how many tokens they start with
    context, questions, form           retrieval: tokens of a context, how many are asked, "lookup" (the zoo's),
                                       "pairs" or "needle"
    reference                          the calibration whose directions `overlap` compares with
    batch_size                         of perplexity (4), decoding and retrieval (16)
    read, cached                       speed: share of the tokens that is read, and how many there are
    heads                              query and KV heads of the speed of attention alone (those of `loki bench`)
    figures                            perplexity, decoding, recall, selection, rank, overlap, attention, steps
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from loki.config import dimensions
from paper_tables import Context, Paper, tables_folder
from paper_tables.errors import TableError, nearest

if TYPE_CHECKING:
    from loki.basis import Basis

Cell = Mapping[str, Any]
SETTINGS = ("method", "k", "d", "select", "group_reduce", "block", "mass", "sink", "recent", "min_k", "prefill")
BASES = ("pca", "random")
PLAIN = {"sink": 0, "recent": 0, "min_k": 0, "min_length": 0}  # the paper's; up to 2048 tokens a CPU would stay dense


def run(cell: Cell, context: Context) -> dict[str, Any]:
    """Measure one row for one seed."""
    found: dict[str, Any] = {}
    for name in cell["figures"]:
        if name not in FIGURES:
            raise TableError(f"unknown figure {name!r}{nearest(name, FIGURES)}")
        found |= FIGURES[name](cell, context)
    return found


def _model(cell: Cell, context: Context) -> tuple[Any, Any]:
    import torch

    import model_hooks

    def load() -> tuple[Any, Any]:
        device_map = "auto" if torch.cuda.is_available() else None
        return model_hooks.load(cell["model"], dtype=cell.get("dtype", "float32"), device_map=device_map)

    pair: tuple[Any, Any] = context.latest("model", (cell["model"], cell.get("dtype")), load)
    return pair


TEXTS = {  # names that tables give to calibration texts
    "code": "zoo:calibration",
    "wikitext": "Salesforce/wikitext:wikitext-2-raw-v1:validation",
    "c4": "allenai/c4:en:validation",
    "bookcorpus": "rojagtap/bookcorpus",  # a copy in Parquet: `datasets` no longer runs the scripts of the first
}


def _documents(source: str) -> Any:
    """A text source; "english" is that of the zoo's calibration part, its docstrings without the code."""
    if source != "english":
        from model_hooks.text import read_documents

        return read_documents(TEXTS.get(source, source))
    from model_hooks import zoo

    return (docstring for docstring, _ in zoo.pairs("calibration"))


def _sequences(cell: Cell, context: Context, source: str, samples: int, length: int) -> Any:
    """Token ids [samples, length]; another seed takes the samples after those of the seed before."""
    from model_hooks.text import pack

    _, tokenizer = _model(cell, context)

    def make() -> Any:
        ids, seen = pack(tokenizer, _documents(source), samples * (cell["seed"] + 1), length)
        chosen = ids[samples * cell["seed"] :]
        if not len(chosen):
            raise TableError(f"{source} has {seen} tokens, too few for seed {cell['seed']} of {samples} x {length}")
        return chosen

    return context.once(("sequences", cell["model"], source, samples, length, cell["seed"]), make)


def _basis_key(cell: Cell) -> tuple[Any, ...]:
    names = ("model", "dtype", "basis", "rotary", "calibration", "tokens", "window", "seed")
    return ("basis", *(cell.get(name) for name in names))


def basis_of(cell: Cell, context: Context) -> Basis:
    """The basis of the row, made once for all rows that share it."""
    from loki.calibration import calibrate

    model, _ = _model(cell, context)
    kind, rotary = cell.get("basis", "pca"), cell.get("rotary", "post")
    if kind not in BASES:
        raise TableError(f"unknown basis {kind!r}{nearest(kind, BASES)}")
    source = cell.get("calibration", "code")
    key = (
        "basis",
        cell["model"],
        cell.get("dtype"),
        kind,
        rotary,
        source,
        cell["tokens"],
        cell["window"],
        cell["seed"],
    )

    def make() -> Basis:
        if kind == "random":
            return _random(model, cell["seed"])
        ids = _sequences(cell, context, source, -(-cell["tokens"] // cell["window"]), cell["window"])
        with context.progress("calibration") as bar:
            return calibrate(model, ids, rotary=rotary, name=cell["model"], text=source, progress=bar)

    return context.once(key, make)


def _random(model: Any, seed: int) -> Basis:
    import torch

    from loki.basis import Basis, shape_of

    layers, heads, width = shape_of(model)
    square = torch.randn(layers, heads, width, width, generator=torch.Generator().manual_seed(seed))
    values = torch.ones(layers, heads, width)
    return Basis(torch.linalg.qr(square).Q.contiguous(), values, values, tuple(range(layers)))


def _settings(cell: Cell, context: Context) -> dict[str, Any]:
    found = {**PLAIN, **{name: cell[name] for name in SETTINGS if cell.get(name) is not None}}
    for name in ("k", "d"):
        if found.get(name) == 1:  # YAML reads 1.0 and 1 alike where it was written by another program
            found[name] = 1.0
    if cell.get("budgets"):
        found["k"] = _budgets(cell, context)
    return found


def _budgets(cell: Cell, context: Context) -> list[float]:
    """Shares of the tokens by layer, solved on calibration text for the mean `budgets`."""
    from loki.beyond import captured_curves, layer_budgets

    model, _ = _model(cell, context)
    basis = basis_of(cell, context)
    ids = _sequences(cell, context, cell["calibration"], 2, min(cell["window"], 512))
    key = ("curves", cell["model"], cell["calibration"], cell.get("d"), cell["seed"])
    curves = context.once(key, lambda: captured_curves(model, basis, ids, d=cell.get("d", 0.25)))
    return layer_budgets(curves, mean=float(cell["budgets"]))


def _once(what: str, cell: Cell, context: Context, make: Callable[[], Any]) -> Any:
    """`make()`, once for all tables that measure the same method in the same way."""
    from loki.method import find

    basis = _basis_key(cell) if find(cell["method"]).needs_basis else ()
    asked = ("model", "dtype", *SETTINGS, "budgets", "text", "documents", "characters", "length")
    return context.once((what, basis, *(str(cell.get(name)) for name in asked)), make)


def _session(cell: Cell, context: Context, **more: Any) -> Any:
    from loki.method import find
    from loki.sessions import session

    model, _ = _model(cell, context)
    basis = basis_of(cell, context) if find(cell["method"]).needs_basis else None
    return session(model, basis, **{**_settings(cell, context), **more})


def _perplexity(cell: Cell, context: Context) -> dict[str, Any]:
    """Every token reads what it would when decoding, the prompt's too: how the paper measured."""
    from loki.method import find
    from loki.quality import perplexity
    from paper_tables.quality import excerpts

    model, tokenizer = _model(cell, context)
    if not find(cell["method"]).masked:
        return {}

    def measure() -> dict[str, float]:
        texts = excerpts(cell["text"], cell.get("documents"), cell.get("characters"))
        with _session(cell, context, prefill="masked"):
            return perplexity(model, tokenizer, texts, length=cell["length"], batch_size=cell.get("batch_size", 4))

    return {"ppl": _once("perplexity", cell, context, measure)}


def _decoding(cell: Cell, context: Context) -> dict[str, Any]:
    from loki.quality import decoding_perplexity

    model, _ = _model(cell, context)
    ids = _sequences({**cell, "seed": 0}, context, cell["text"], cell["samples"], cell["length"])
    with _session(cell, context), context.progress("decoding", len(ids)) as bar:
        return {"decoding": decoding_perplexity(model, ids, cell["prompt"], batch_size=_batch(cell), progress=bar)}


def _recall(cell: Cell, context: Context) -> dict[str, Any]:
    from loki.quality import recall
    from loki.workflow import check_context

    model, tokenizer = _model(cell, context)
    check_context(model, cell["context"])
    with _session(cell, context), context.progress("questions", cell["questions"]) as bar:
        asked = _questions(cell, tokenizer)
        return {"recall": recall(model, tokenizer, asked, batch_size=_batch(cell), progress=bar)}


def _batch(cell: Cell) -> int:
    return int(cell.get("batch_size", 16))


def _questions(cell: Cell, tokenizer: Any) -> list[Any]:
    """As many questions on contexts of as many tokens as the row says; another seed asks others."""
    from loki.retrieval import key_values, lookups, needles

    form, tokens, count = cell.get("form", "lookup"), cell["context"], cell["questions"]
    first = cell["seed"] * count
    if form == "pairs":
        return [key_values(tokenizer, tokens, first + i) for i in range(count)]
    if form == "needle":
        return needles(tokenizer, cell["text"], tokens, count, first)
    if form != "lookup":
        raise TableError(f"unknown form {form!r} of retrieval{nearest(form, ('lookup', 'pairs', 'needle'))}")
    return lookups(tokens, count, cell["seed"])


def _selection(cell: Cell, context: Context) -> dict[str, Any]:
    """Of what queries read: how much of the exact top-k, and of the exact attention; means over layers, in percent."""
    from loki.method import find

    if find(cell["method"]).reads_all or find(cell["method"]).evicts:
        return {}
    layers = _once("selection", cell, context, lambda: _telemetry(cell, context))
    context.artefact("overlap", [[layer["jaccard"] for layer in layers.values()]])
    return {
        name: 100 * sum(layer[field] for layer in layers.values()) / len(layers)
        for name, field in (("agreement", "recall"), ("captured", "captured"), ("read", "selected"))
    }


def _telemetry(cell: Cell, context: Context) -> dict[int, dict[str, float]]:
    """What `loki.stats` tells by layer, over all queries of two sequences."""
    import torch

    from loki.sessions import runtime_of
    from loki.telemetry import Telemetry

    model, _ = _model(cell, context)
    ids = _sequences({**cell, "seed": 0}, context, cell["text"], 2, cell["length"])
    with _session(cell, context, prefill="masked", stats=True, stats_every=1), torch.no_grad():
        telemetry = runtime_of(model).telemetry = Telemetry(1, timed=False)
        for row in ids:
            model(input_ids=row[None].to(model.device), use_cache=False)
    return telemetry.means()


def _rank(cell: Cell, context: Context) -> dict[str, Any]:
    basis = basis_of(cell, context)
    rank = basis.rank(0.9).double()
    context.artefact("rank", rank.T)
    context.artefact("explained", basis.explained.mean(1))
    return {"rank": float(rank.mean()), "width": basis.head_dim, "share": 100 * float(rank.mean()) / basis.head_dim}


def _overlap(cell: Cell, context: Context) -> dict[str, Any]:
    """How far the leading quarter of the directions agrees with that of the reference calibration."""
    from loki.analysis import overlap

    basis = basis_of(cell, context)
    reference = basis_of({**cell, "basis": "pca", "rotary": "post", **cell["reference"]}, context)
    d = dimensions(0.25, basis.head_dim)
    return {"overlap": 100 * float(overlap(basis, reference, d).mean())}


def _attention(cell: Cell, context: Context) -> dict[str, Any]:
    """One call of attention for one new token, beside the quickest dense form."""
    import torch

    from loki.bench import DTYPES, attention

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = DTYPES[cell.get("dtype", "float32")]
    found = attention(cell["cached"], float(cell["read"]), dtype, device, cell["rounds"], cell.get("heads"))
    return {"attention": found["speedup"]}


def _steps(cell: Cell, context: Context) -> dict[str, Any]:
    """Whole decoding steps, beside transformers' sdpa and beside Loki's cache when all of it is read."""
    import torch

    from loki.bench import DTYPES, decoding, probe_model, random_basis

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = context.once(
        "probe", lambda: probe_model(cell["layers"], 1 << 17).to(device, DTYPES[cell.get("dtype", "float32")])
    )
    rows = {row["attention"]: row for row in
            decoding(model, random_basis(model), cell["cached"], [float(cell["read"])], cell["rounds"])}  # fmt: skip
    own, whole, auto = (rows[name] for name in (f"loki, {cell['read']:g}", "loki, all", "loki, auto"))
    return {
        "steps": own["over_sdpa"], "over_own": whole["ms_a_token"] / own["ms_a_token"],
        "auto": whole["ms_a_token"] / auto["ms_a_token"],
    }  # fmt: skip


FIGURES: dict[str, Callable[[Cell, Context], dict[str, Any]]] = {
    "perplexity": _perplexity, "decoding": _decoding, "recall": _recall, "selection": _selection, "rank": _rank,
    "overlap": _overlap, "attention": _attention, "steps": _steps,
}  # fmt: skip

PAPER = Paper(
    "loki", tables_folder(__file__), run, title="Loki: Low-rank Keys for Efficient Sparse Attention",
)  # fmt: skip
