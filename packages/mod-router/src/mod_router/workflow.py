"""What the commands do: from names of routers, models and data to results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mod_router.config import RouterConfig
from model_hooks.errors import RequestError

Rows = list[dict[str, Any]]


def is_adapter(folder: str) -> bool:
    """Whether `folder` is what `mod-router tune` writes."""
    return (Path(folder) / "router_config.json").is_file()


def load_routed(
    source: str, *, model: str = "", tau: float = 0.0, dtype: str = "auto", device_map: str = "",
    allow_mismatch: bool = False,
) -> tuple[Any, Any, str]:  # fmt: skip
    """A routed model, its tokenizer and its base's name, from an adapter folder (its base is in its record, or is
    `model`) or a merged checkpoint. Raises `RequestError` for anything else."""
    from mod_router import checkpoint
    from mod_router.attaching import set_tau
    from mod_router.gate import runtime_of
    from model_hooks.loading import load_placed

    if is_adapter(source):
        name = model or checkpoint.read_record(source)["base"]["name"]
        if not name:
            raise RequestError(f"the routers in {source} do not say what their base is called; give --model")
        base, tokenizer = load_placed(name, dtype, device_map)
        base = checkpoint.load(base, source, allow_mismatch=allow_mismatch)
    else:
        if not _is_merged(source):
            raise RequestError(
                f"{source} is no folder of routers and no merged checkpoint; `mod-router tune` makes one"
            )
        name = source
        base, tokenizer = load_placed(source, dtype, device_map)
        runtime_of(base)
    if tau:
        set_tau(base, tau)
    return base, tokenizer, name


def is_routed_source(source: str) -> bool:
    """Whether `source` is a folder of routers or a merged checkpoint."""
    return is_adapter(source) or _is_merged(source)


def _is_merged(source: str) -> bool:
    file = Path(source) / "config.json"
    try:
        return str(json.loads(file.read_text())["model_type"]).startswith("routed_")
    except (OSError, ValueError, KeyError):
        return False


def examples_for(model: Any, tokenizer: Any, data: str, samples: int, length: int, kind: str, template: str) -> Any:
    """Examples of `data`; a length beyond the model's context is cut to it."""
    from mod_router.data import read_examples

    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or length
    return read_examples(data, tokenizer, samples=samples, length=min(length, context), kind=kind, template=template)


def evaluate(
    model: Any, tokenizer: Any, *, data: str, samples: int, length: int, kind: str, template: str, tasks: Sequence[str],
    task_folder: Path | None, limit: int | None, shots: int | None, batch_size: int,
) -> dict[str, Any]:  # fmt: skip
    """Rows for loss and tasks, routed and ungated; what ran; and whether each difference is within two errors."""
    from mod_router.lm import routed_lm
    from mod_router.measuring import measure, ungated_model
    from paper_tables.quality import accuracies

    rows: Rows = []
    found: dict[str, Any] = {}
    if data:
        examples = examples_for(model, tokenizer, data, samples, length, kind, template)
        measured = measure(model, examples, batch_size=batch_size)
        assert measured.base is not None
        assert measured.kl is not None
        cost = measured.cost
        rows.append(
            {"figure": "loss (nats a token)", "ungated": float(measured.base.mean()),
             "routed": float(measured.loss.mean()), "difference": cost["value"], "se": cost["se"]}
        )  # fmt: skip
        found = {"capacity": measured.capacity, "kl": float(measured.kl.mean())}
    if tasks:
        how = {"folder": task_folder, "limit": limit, "shots": shots, "batch_size": batch_size, "wrapper": routed_lm()}
        routed = accuracies(model, tokenizer, tasks, **how)
        with ungated_model(model):
            ungated = accuracies(model, tokenizer, tasks, **how)
        for task in tasks:
            a, b = ungated[task], routed[task]
            se = (a.get("se", 0.0) ** 2 + b.get("se", 0.0) ** 2) ** 0.5
            rows.append({"figure": task, "ungated": a["value"], "routed": b["value"],
                         "difference": b["value"] - a["value"], "se": se,
                         "kept": abs(b["value"] - a["value"]) <= 2 * se})  # fmt: skip
    return {**found, "figures": rows}


def usage(
    model: Any, tokenizer: Any, data: Sequence[str], *, samples: int, length: int, kind: str, template: str
) -> dict[str, dict[int, float]]:
    """data set -> layer -> share of its sequences that ran the layer."""
    from mod_router.measuring import measure

    found = {}
    for source in data:
        examples = examples_for(model, tokenizer, source, samples, length, kind, template)
        measured = measure(model, examples, compare=False)
        found[source] = {layer: float(used.mean()) for layer, used in measured.used.items()}
    return found


def untrained(name: str, layers: str, unit: str, dtype: str, device_map: str) -> tuple[Any, Any]:
    """A model with routers at zero: what attaching finds, before any training."""
    from mod_router.attaching import attach
    from model_hooks.loading import load_placed

    model, tokenizer = load_placed(name, dtype, device_map)
    return attach(model, RouterConfig(layers=layers, unit=unit)), tokenizer  # type: ignore[arg-type]


def freeze(model: Any, shares: dict[int, float], below: float, name: str) -> dict[str, Any]:
    """A static plan for llm-drop from the usage of an attached model."""
    from mod_router.attaching import base_of
    from mod_router.checkpoint import identity
    from mod_router.gate import runtime_of
    from mod_router.usage import plan

    target = base_of(model)
    lean = getattr(target.config, "lean", None) or {}
    depth = runtime_of(model).depth
    return plan(
        shares, runtime_of(model).config.unit, below, num_layers=lean.get("num_original_layers", depth),
        original=tuple(lean.get("original_index", range(depth))), name=name, fingerprint=identity(model)["fingerprint"],
    )  # fmt: skip


def inspect(source: str) -> dict[str, Any]:
    """What an adapter folder holds, without loading its base."""
    from safetensors.torch import load_file

    from mod_router.checkpoint import LORA, WEIGHTS, read_record
    from model_hooks.loading import check_safetensors

    record = read_record(source)
    file = Path(source) / WEIGHTS
    if not file.is_file():
        raise RequestError(f"{source} lacks {WEIGHTS}; the copy is incomplete")
    check_safetensors(file)
    weights = load_file(file)
    norms = {name.split(".")[1]: float(w.norm()) for name, w in weights.items() if name.endswith(".weight")}
    settings = {k: record["config"][k] for k in ("unit", "level", "pool", "tau", "objective", "target_capacity")}
    settings["repair"] = record["config"].get("repair", "none")
    rows = [{"layer": layer, "router_norm": norms[str(layer)]} for layer in record["config"]["layers"]]
    base = record["base"]
    return {
        "base": base["name"], "fingerprint": base["fingerprint"], **settings, **record["measured"],
        "lora": (Path(source) / LORA).is_dir(),
        "bytes": sum(f.stat().st_size for f in Path(source).rglob("*") if f.is_file()), "gates": rows,
    }  # fmt: skip


def generate(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, lossless: bool = False) -> dict[str, Any]:
    """Greedy text, and what the prompt decided: which layers ran, and the cache they need beside the base's.

    With `lossless` the text is the base's, drafted by the routed model: how many tokens each pass of the base gave.
    """
    from mod_router.cache import RoutedCache
    from mod_router.gate import runtime_of
    from model_hooks.kv import kv_bytes

    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    if not ids.numel():
        raise RequestError("the prompt is empty; give some text")
    if lossless:
        from mod_router.draft import generate_lossless

        out, passes = generate_lossless(
            model, ids, attention_mask=ids.new_ones(ids.shape), do_sample=False, max_new_tokens=max_new_tokens
        )
        new = out.shape[1] - ids.shape[1]
        text = tokenizer.decode(out[0], skip_special_tokens=True)
        return {"text": text, "new_tokens": new, "passes_of_the_base": passes, "tokens_a_pass": new / passes}
    cache = RoutedCache(model)
    out = model.generate(
        input_ids=ids, attention_mask=ids.new_ones(ids.shape), past_key_values=cache, do_sample=False,
        max_new_tokens=max_new_tokens,
    )  # fmt: skip
    gates = {layer: bool(d[0]) for layer, d in cache.decisions.items()}
    runtime = runtime_of(model)
    return {
        "text": tokenizer.decode(out[0], skip_special_tokens=True), "new_tokens": out.shape[1] - ids.shape[1],
        "ran": [layer for layer, is_open in gates.items() if is_open],
        "skipped": [layer for layer, is_open in gates.items() if not is_open],
        "cache_bytes": kv_bytes(cache), "gated_layers": list(runtime.layers),
    }  # fmt: skip
