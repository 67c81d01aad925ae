"""What the commands do: from names of models and data to results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meo.config import MeoConfig
from model_hooks.errors import RequestError

Rows = list[dict[str, Any]]
HEAD = {"classification": "classification", "clm": "clm", "mlm": "mlm"}  # others: seq2seq, or clm for a decoder

GENERATION = ("target_length", "min_target_length", "beams", "no_repeat_ngram_size")  # settings of generated answers


def load_for(
    source: str, kind: str, meo: MeoConfig | None, *, dtype: Any = "float32", labels: Sequence[str] = (),
    tokenizer: str | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """A model with the head that `kind` needs, converted where `meo` is given and it was not, and its tokenizer.

    Args:
        labels: names of the classes of a new head.
        tokenizer: where it is, if not beside the model; "": none.

    Raises:
        RequestError: a model that is converted already with other settings, and what loading raises.
    """
    from transformers import AutoTokenizer

    from meo.checkpoint import load
    from meo.classes import is_merged
    from meo.converting import convert
    from meo.data import pad_id
    from model_hooks.loading import resolve

    more: dict[str, Any] = {}
    if labels:
        names = dict(enumerate(labels))
        more = {"num_labels": len(labels), "id2label": names, "label2id": {v: k for k, v in names.items()}}
    model, own = load(source, head=_head(source, kind), dtype=dtype, tokenizer=tokenizer is None, **more)
    found = AutoTokenizer.from_pretrained(resolve(tokenizer)) if tokenizer else own
    if found is not None:  # by which a decoder finds a row's last token: what rows are filled with
        model.config.pad_token_id = pad_id(found)
    if meo is not None and not is_merged(model):
        convert(model, meo, found)
    elif meo is not None and MeoConfig.from_dict(model.config.meo["config"]) != meo and meo != MeoConfig():
        raise RequestError(f"{source} is converted already; train it as it is, with --method none, or convert its base")
    return model, found


def _head(source: str, kind: str) -> str:
    if kind in HEAD:
        return HEAD[kind]
    from transformers import AutoConfig

    from model_hooks.loading import resolve

    return "seq2seq" if AutoConfig.from_pretrained(resolve(source)).is_encoder_decoder else "clm"


def placed(model: Any) -> Any:
    """`model`, moved to the first GPU where there is one."""
    import torch

    return model.to("cuda") if torch.cuda.is_available() else model


def scored(model: Any, tokenizer: Any, rows: Rows, config: Any) -> dict[str, dict[str, float]]:
    """Figures of `model` on rows, by the kind, batch size and generation settings of `config`; it is measured on a GPU
    where there is one, and is on the CPU afterwards."""
    from meo.scoring import evaluate

    found = evaluate(
        placed(model), tokenizer, rows, config.kind, batch_size=config.batch_size,
        **{name: getattr(config, name) for name in GENERATION},
    )  # fmt: skip
    model.to("cpu")
    return found


def write_model(
    model: Any, folder: Path, tokenizer: Any, base: str, *, overwrite: bool = False, source: str = ""
) -> None:
    """A converted or a dense model as a checkpoint folder, whole or not at all."""
    from meo.checkpoint import save
    from meo.classes import is_merged
    from model_hooks.files import atomic_folder
    from model_hooks.loading import quiet

    if is_merged(model):
        save(model, folder, tokenizer, base=base, overwrite=overwrite, source=source or None, verify=False)
        return
    with atomic_folder(folder, overwrite, source or None) as part, quiet():
        model.save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)


def convert(config: Any) -> dict[str, Any]:
    """Convert a dense model and write it. Returns what it costs in parameters."""
    from meo.checkpoint import load, save
    from meo.converting import banks
    from meo.converting import convert as convert_model

    head = _head(config.model, config.kind) if config.kind else ""
    model, tokenizer = load(config.model, head=head, dtype=config.dtype)
    before = sum(p.numel() for p in model.parameters())
    convert_model(model, config.meo, tokenizer)
    save(model, config.output, tokenizer, base=config.model, overwrite=config.overwrite)
    found = banks(model)
    levels = sorted({bank.runtime.level for bank in found.values()})
    after = sum(p.numel() for p in model.parameters())
    return {
        "output": config.output,
        "banks": len(found),
        "levels": levels,
        "parameters": after,
        "times": after / before,
    }


def convert_pretrained(config: Any) -> dict[str, Any]:
    """Merge what can be merged of a pretrained mixture of experts, and write which layers that is."""
    import json

    import model_hooks
    from meo.pretrained import merge_pretrained
    from model_hooks.files import atomic_write
    from model_hooks.text import load_sequences

    model, tokenizer = model_hooks.load(config.model, dtype=config.dtype)
    ids = load_sequences(tokenizer, config.data, samples=config.samples, length=config.length)
    rows = merge_pretrained(
        model, ids, threshold=config.threshold, pool=config.pool, allow_future_leak=config.allow_future_leak
    )
    atomic_write(
        config.output, json.dumps({"model": config.model, "pool": config.pool, "layers": rows}, indent=1) + "\n"
    )
    return {"output": config.output, "merged": sum(r["merged"] for r in rows), "of": len(rows), "layers": rows}


def evaluate(
    source: str, kind: str, data: str, *, task: str, samples: int, length: int, batch_size: int, gates: bool,
    generation: dict[str, int],
) -> dict[str, Any]:  # fmt: skip
    """Figures of a model on data, each with its standard error, and on request how its gates decide.

    `generation` has the settings `GENERATION`.
    """
    from meo.classes import is_merged
    from meo.context import with_options
    from meo.data import examples, label_names, records
    from meo.scoring import evaluate as score

    model, tokenizer = load_for(source, kind, None)
    placed(model)
    labels: list[str] = []
    if kind == "classification":
        labels = [str(name) for name in model.config.id2label.values()]
        if labels[0].startswith("LABEL_"):
            labels = label_names(r for s in data.split(",") for r in records(s, samples=samples, split="heldout"))
    tasks = list(model.config.meo["config"]["tasks"]) if is_merged(model) and not task else []
    rows = examples(
        kind, tokenizer, data, samples=samples, length=length, target_length=generation["target_length"],
        split="heldout", tasks=tasks, labels=labels, encoder_decoder=model.config.is_encoder_decoder,
    )  # fmt: skip
    with with_options(task=task or None):
        found = score(model, tokenizer, rows, kind, batch_size=batch_size, **generation)
        report = gate_report(model, tokenizer, rows, kind, batch_size) if gates else []
    figures = [{"figure": name, **figure} for name, figure in found.items()]
    return {"rows": len(rows), "figures": figures, **({"gates": report} if gates else {})}


def evaluate_tasks(
    source: str, names: Sequence[str], *, task: str, folder: Path | None, limit: int | None, shots: int | None,
    batch_size: int,
) -> dict[str, Any]:  # fmt: skip
    """Main figures of a causal language model on lm-eval tasks, such as the zoo's (zoo_name, zoo_recall, ...)."""
    from transformers import AutoConfig

    from meo.classes import is_merged
    from meo.context import with_options
    from meo.lm import prompted_lm
    from meo.stacks import is_causal
    from model_hooks.loading import resolve
    from paper_tables import quality
    from paper_tables.frame import require

    require("lm_eval", extra="eval", package="meo")
    if not is_causal(AutoConfig.from_pretrained(resolve(source))):
        raise RequestError(f"{source} is no causal language model, which lm-eval tasks are for; give --kind and --data")
    model, tokenizer = load_for(source, "clm", None)
    level = model.config.meo["stacks"][0]["level"] if is_merged(model) else ""
    if level in ("sequence", "token") and model.config.meo["config"]["method"] == "meo":
        raise RequestError(f"{source}: gates of level {level} would see the answers that are to be scored")
    with with_options(task=task or None):
        found = quality.accuracies(
            placed(model), tokenizer, names, folder=folder, limit=limit, shots=shots, batch_size=batch_size,
            wrapper=prompted_lm() if level == "prefix" else None,
        )  # fmt: skip
    return {"figures": [{"figure": name, **figure} for name, figure in found.items()]}


def merge(source: str, task: str, output: Path, overwrite: bool) -> dict[str, Any]:
    """Bake a task and write the dense checkpoint."""
    from meo.checkpoint import load
    from meo.deploy import bake

    model, tokenizer = load(source)
    bake(model, task)
    write_model(model, output, tokenizer, source, overwrite=overwrite, source=source)
    return {"output": output, "class": type(model).__name__, "task": task}


def export(source: str, rank: int, output: Path, overwrite: bool) -> dict[str, Any]:
    """Write mean and adapters of a model's experts."""
    from meo.checkpoint import load
    from meo.deploy import export as write

    model, tokenizer = load(source)
    rows = write(model, output, tokenizer, rank=rank, overwrite=overwrite)
    return {"output": output, "rank": rank, "largest_error": max(r["error"] for r in rows), "banks": rows}


def inspect(source: str) -> dict[str, Any]:
    """What a checkpoint's banks are; of a dense model, the linears of its feed-forwards."""
    from meo.checkpoint import read_config

    config = read_config(source)
    record = config.get("meo")
    if record is None:
        return _inspect_dense(source)
    kept = ("method", "experts", "k", "gate", "gate_scope", "init", "tasks")
    rows = [
        {"bank": b["name"], "level": record["stacks"][b["stack"]]["level"], "in": b["inputs"], "out": b["outputs"],
         "bias": b["bias"], "decided by": "itself" if b["leader"] == b["name"] else b["leader"]}
        for b in record["banks"]
    ]  # fmt: skip
    return {**{k: record["config"][k] for k in kept}, "banks": rows}


def _inspect_dense(source: str) -> dict[str, Any]:
    from meo.checkpoint import load
    from meo.converting import would_convert

    model, _ = load(source, tokenizer=False)
    return {"class": type(model).__name__, "linears": would_convert(model, MeoConfig())}


def sizes(source: str) -> Any:
    """Sizes of a model for the formula of operations."""
    from transformers import AutoConfig

    from meo.flops import sizes_of
    from model_hooks.loading import resolve

    return sizes_of(AutoConfig.from_pretrained(resolve(source)))


def gate_report(model: Any, tokenizer: Any, rows: Rows, kind: str, batch_size: int = 8) -> Rows:
    """How each bank's gate decides on some rows.

    entropy: of the mean gate, as a share of that of equal use; coverage: share of the experts that were used at all;
    largest: mean weight of the most used expert; distinct: share of groups that do not make the commonest choice.
    """
    import torch

    from meo.context import gating
    from meo.scoring import batches

    gates: dict[str, list[Any]] = {}
    for batch in batches(model, tokenizer, rows, kind, batch_size):  # with labels: they tell where a prompt ends
        with torch.no_grad(), gating(record=True) as seen:
            model(**batch)
        for name, found in seen.gates.items():
            gates.setdefault(name, []).append(found)
    report = []
    for name, parts in gates.items():
        weights = torch.cat(parts)  # [groups, n]
        mean = weights.mean(0)
        choices = (weights > 0).long().unique(dim=0, return_counts=True)[1]
        entropy = -(mean * mean.clamp_min(1e-12).log()).sum() / torch.tensor(float(len(mean))).log()
        report.append(
            {"bank": name, "entropy": float(entropy), "coverage": float((mean > 0).float().mean()),
             "largest": float(mean.max()), "distinct": 1 - float(choices.max() / choices.sum())}
        )  # fmt: skip
    return report


def flops_rows(sizes: Any, ks: Sequence[int], *, batch: int, tokens: int, groups: int | None) -> Rows:
    """GFLOPs of a dense model, a vanilla mixture and MEO, for each number of selected experts."""
    from meo.flops import count, merge_bytes

    how: dict[str, Any] = {"batch": batch, "tokens": tokens}
    dense = count(sizes, **how)["total"]
    return [
        {
            "k": k, "dense": dense / 1e9, "moe": count(sizes, method="moe", k=k, **how)["total"] / 1e9,
            "meo": count(sizes, method="meo", k=k, groups=groups, **how)["total"] / 1e9,
            "meo with additions": count(sizes, method="meo", k=k, groups=groups, additions=True, **how)["total"] / 1e9,
            "merge bytes (M)": merge_bytes(sizes, k, batch if groups is None else groups) / 1e6,
        }
        for k in ks
    ]  # fmt: skip
