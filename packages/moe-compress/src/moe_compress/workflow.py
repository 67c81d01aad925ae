"""What the commands do: from names of models, data and files to results."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from model_hooks.errors import RequestError
from moe_compress.selection import Plan
from paper_tables.errors import nearest

PAPER = "arXiv 2406.02500"
TRIM_REPORT = "trimming.json"
LAYOUTS = ("auto", "stock")


def sequences_for(source: str, data: str, samples: int, length: int) -> Any:
    """Calibration token ids [samples, T] for a model that is not loaded; a length beyond its context is cut to it.

    Raises `RequestError` where the data has fewer sequences than asked for.
    """
    from transformers import AutoConfig

    from model_hooks.loading import load_tokenizer, resolve
    from model_hooks.text import load_sequences

    tokenizer = load_tokenizer(source)
    config = AutoConfig.from_pretrained(resolve(source)).get_text_config(decoder=True)
    length = min(length, getattr(config, "max_position_embeddings", None) or length)
    found = load_sequences(tokenizer, data, samples=samples, length=length)
    if len(found) < samples:
        raise RequestError(
            f"{data} gives {len(found)} sequences of {length} tokens, {samples} are asked for; ask fewer"
        )
    return found


def score_source(
    name: str, data: str, *, samples: int, length: int, batch_size: int, reconstruction: bool = False,
    layerwise: bool = False, buffer: Path | None = None, dtype: str = "auto", device_map: str = "",
    journal: Path | None = None,
) -> Any:  # fmt: skip
    """Score a model by name: in memory, where a killed run goes on from its `journal`, or layer by layer."""
    from model_hooks.loading import load_placed
    from moe_compress.scores import score, score_layerwise
    from paper_tables import progress

    refuse_packed(name)
    if layerwise and reconstruction:
        raise RequestError("--reconstruction needs the layers' weights after the pass; leave out --layerwise")
    sequences = sequences_for(name, data, samples, length)
    if layerwise:
        with progress("layers scored") as bar:
            return score_layerwise(name, sequences, data=data, batch_size=batch_size, buffer=buffer, progress=bar)
    model, _ = load_placed(name, dtype, device_map)
    with progress("batches scored") as bar:
        return score(
            model, sequences, name=name, data=data, batch_size=batch_size, progress=bar,
            reconstruction_tokens=256 if reconstruction else 0, journal=None if reconstruction else journal,
        )  # fmt: skip


def refuse_packed(name: str) -> None:
    """Raise `RequestError` for a model that is quantised already."""
    from moe_compress.packing import is_packed

    if is_packed(Path(name)):
        raise RequestError(f"{name} is quantised already; trim before that (or `export --to dense` first)")


def choose(scores: Any, request: Mapping[str, Any]) -> Plan:
    """The plan for one step of trimming: {"experts" | "layers" | "blocks": ...} with its options."""
    from moe_compress.selection import select_blocks, select_experts, select_layers

    what = [name for name in ("experts", "layers", "blocks") if request.get(name)]
    if len(what) != 1:
        raise RequestError(f"give one of --experts, --layers, --blocks or --plan, got {what or 'none'}")
    if what == ["experts"]:
        keys = ("scope", "metric", "reverse", "allow_lower_topk", "allow_empty", "preserve_gate")
        return select_experts(scores, request["experts"], **{k: request[k] for k in keys if k in request})
    if what == ["layers"]:
        return select_layers(scores, request["layers"])
    return select_blocks(scores, request["blocks"], consecutive=bool(request.get("consecutive")))


def trim_to_folder(
    name: str, plan: Plan, folder: Path, *, repair: Any = None, layout: str = "auto", measure: str = "zoo:heldout",
    dtype: str = "auto", device_map: str = "", overwrite: bool = False, scores: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """Load, trim, repair routers if asked, measure, write with a card and a report, and read back.

    `repair`: calibration sequences on which routers learn to choose among the survivors; None: they stay as they are.
    `layout`: "stock" refuses a result that only `import model_hooks` can load. The plan's fingerprint must be the
    model's, where it has one.
    """
    from model_hooks import Card, fingerprint, save
    from model_hooks.files import atomic_write, refuse_existing
    from model_hooks.loading import load_placed, resolve
    from moe_compress.trimming import apply, expert_counts, is_stock, repair_routers, sample_outputs
    from paper_tables.quality import size

    refuse_existing(folder, overwrite)
    refuse_packed(name)
    if layout not in LAYOUTS:
        raise RequestError(f"layout {layout!r} is not accepted{nearest(layout, LAYOUTS)}")
    model, tokenizer = load_placed(name, dtype, device_map)
    if plan.fingerprint and fingerprint(model) != plan.fingerprint:
        raise RequestError(f"the plan was made for {plan.model} ({plan.fingerprint}), not for {name}: score this model")
    before = {**size(model), **loss(model, tokenizer, measure)}
    if repair is not None and plan.preserve_gate:
        raise RequestError("--preserve-gate leaves routers as they are, and --repair-router trains them; give one")
    sample = None if repair is None else sample_outputs(model, repair, 512)
    apply(model, plan)
    if layout == "stock" and not is_stock(model):
        raise RequestError(
            f"stock transformers cannot express this: {plan.describe()}; keep equally many experts in every layer, "
            "drop whole blocks, or leave out --layout"
        )
    routers = {} if sample is None else repair_routers({b: s for b, s in sample.items() if b in plan.keep})
    after = {**size(model), **loss(model, tokenizer, measure)}
    how = f"moe-compress: {plan.describe()}" + (", routers repaired" if routers else "")
    card = Card(
        name, how, PAPER, {f"{k}, {w}": v[k] for k in before for w, v in (("before", before), ("after", after))}
    )
    source = Path(resolve(name))
    save(model, folder, tokenizer, card=card, overwrite=overwrite, source=source if source.is_dir() else None)
    report = {
        "model": name, "how": plan.how, "drops": plan.describe(), "plan": {
            "keep": {str(b): list(k) for b, k in plan.keep.items()}, "layers": list(plan.layers),
            "blocks": list(plan.blocks), "preserve_gate": plan.preserve_gate,
        }, "stock": is_stock(model),
        "experts": {str(b): n for b, n in expert_counts(model).items()}, "before": before, "after": after,
        "bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
        "routers": {str(b): errors for b, errors in routers.items()}, "versions": versions(),
    }  # fmt: skip
    if scores is not None:
        report["calibration"] = {
            "data": scores.data, "samples": scores.samples, "tokens": scores.tokens,
            "tokens_of_experts": {str(b): e.count for b, e in scores.experts.items()},
            "routing_scores": {str(b): e.importance("gate", scores.tokens) for b, e in scores.experts.items()},
            "similarity_of_moe_layers": {str(b): value for b, value in scores.mlp.items()},
            "similarity_of_blocks": {str(b): value for b, value in scores.block.items()},
        }  # fmt: skip
    atomic_write(folder / TRIM_REPORT, json.dumps(report, indent=1) + "\n")
    return report


def loss(model: Any, tokenizer: Any, source: str, documents: int = 8, characters: int = 2000) -> dict[str, float]:
    """Bits per byte on a little held-out text, {} where there is none."""
    from paper_tables.quality import excerpts, language

    if not source or tokenizer is None:
        return {}
    return {
        "bits_per_byte": language(model, tokenizer, excerpts(source, documents, characters))["bits_per_byte"]["value"]
    }


def slim_to_folder(
    name: str, folder: Path, how: Any, data: str, *, samples: int, length: int, batch_size: int, form: str,
    workspace: float, measure: str = "", overwrite: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Slim a checkpoint by name; returns its report. With `measure`, a text, also what it loses there: that loads the
    whole model."""
    from model_hooks.files import atomic_write, refuse_existing
    from moe_compress.packing import load
    from moe_compress.slimming import NEEDS_DATA
    from moe_compress.streaming import REPORT, slim
    from paper_tables import progress

    refuse_existing(folder, overwrite)
    before = loss(*load(name), measure) if measure else {}
    sequences = sequences_for(name, data, samples, length) if how.method in NEEDS_DATA else None
    with progress("layers slimmed") as bar:
        report = slim(
            name, folder, sequences, how, form=form, batch_size=batch_size, workspace=workspace, overwrite=overwrite,
            progress=bar,
        )  # fmt: skip
    if measure:
        report |= {"before": before, "after": loss(*load(str(folder)), measure)}
        atomic_write(folder / REPORT, json.dumps(report, indent=1) + "\n")
    return report


def slim_summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """What to tell of a slimming: bytes, error by kind of matrix, and which experts had too few tokens."""
    layers = report["layers"]
    rows = [
        {"layer": block, **layer.get("error", {}),
         "least_tokens": min(layer["tokens"].values()) if layer.get("tokens") else "",
         "under_covered": len(layer.get("under_covered", {}))}
        for block, layer in layers.items() if layer["matrices"]
    ]  # fmt: skip
    measured = [
        {"": key, "before": report["before"][key], "after": report["after"][key]} for key in report.get("before", ())
    ]
    found = {"bytes": report["bytes"], "quantised": len(report["quantised"]), "layers": rows}
    return found | ({"measured": measured} if measured else {})


def evaluate(
    name: str, baseline: str, *, load: Callable[[str], tuple[Any, Any]], data: str, documents: int | None,
    characters: int | None, tasks: Sequence[str], task_folder: Path | None, limit: int | None, shots: int | None,
    batch_size: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each figure: of the model, of the baseline if there is one, and the ratio of the two."""
    from paper_tables.quality import compare, figures

    def measured(source: str) -> dict[str, dict[str, float]]:
        model, tokenizer = load(source)
        found = figures(
            model, tokenizer, data=data, documents=documents, characters=characters, tasks=tasks, folder=task_folder,
            limit=limit, shots=shots, batch_size=batch_size,
        )  # fmt: skip
        return found | {"weight_bytes": {"value": float(weight_bytes(source))}}

    columns = {"baseline": measured(baseline)} if baseline else {}
    return compare({**columns, "model": measured(name)})


def weight_bytes(source: str) -> int:
    """Bytes of the files that hold a checkpoint's tensors; those of a hub id are downloaded into the hub's cache.

    Raises `RequestError` where there are none.
    """
    from model_hooks.layer_stream import checkpoint_files, checkpoint_folder

    return sum(file.stat().st_size for file in set(checkpoint_files(checkpoint_folder(source)).values()))


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {package: version(package) for package in ("moe-compress", "torch", "transformers")}
