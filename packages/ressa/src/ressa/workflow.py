"""What the commands do: from names of models and data to folders and figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from model_hooks.errors import RequestError
from ressa import folders, specs

PAPER = "arXiv 2404.02424"


@dataclass(frozen=True)
class Calibration:
    """The examples that statistics are taken on."""

    data: str = "zoo:shapes:calibration"
    samples: int = 128
    batch_size: int = 1
    seed: int = 0
    skip_bad_rows: int = 0

    def batches(self, encoder: Any) -> list[dict[str, Any]]:
        """Inputs without labels. Raises `RequestError` where there is nothing to calibrate on."""
        from ressa.data import read
        from ressa.encoding import batches, calibration_inputs, encode_all

        examples = read(self.data, self.samples, seed=self.seed, skip_bad_rows=self.skip_bad_rows)
        rows = encode_all(encoder, examples, self.skip_bad_rows)
        return [calibration_inputs(b, encoder) for b in batches(rows, self.batch_size, encoder.pad)]


@dataclass(frozen=True)
class Where:
    """Which model, how it is loaded, and where its branches are, if that cannot be found out."""

    name: str
    dtype: str = "auto"
    device_map: str = ""
    vision: str = ""
    connector: str = ""
    language: str = ""

    def load(self) -> tuple[Any, Any, Any]:
        """The model, its processor and its branches."""
        from model_hooks.loading import load_placed
        from model_hooks.processors import load_processor
        from ressa.branches import find_branches

        processor = load_processor(self.name)
        model, _ = load_placed(self.name, self.dtype, self.device_map)
        found = find_branches(model, vision=self.vision, connector=self.connector, language=self.language)
        return model, processor, found


def plan(where: Where, how: dict[str, Any], compat: str = "") -> tuple[Any, Any, Any, Any, list[str]]:
    """The loaded model, its processor and branches, what to prune, and how a spec string was read."""
    from ressa.pruning import Pruning

    said: list[str] = []
    read = specs.read_specs(compat) if compat else ()
    model, processor, branches = where.load()
    if read:
        blocks = {name: len(paths) for name, paths in branches.blocks.items()}
        by_branch = specs.by_branch(read, blocks)
        how = how | {"sparsity": max(by_branch.values()), **by_branch}
        said = [spec.say() for spec in read]
    return model, processor, branches, Pruning(**how), said


def describe(branches: Any, how: Any) -> list[dict[str, Any]]:
    """The plan as rows: each branch, its blocks, its matrices, and what goes."""
    rows = []
    for name in ("vision", "language"):
        found = branches.linears(name, exclude=how.ignore)
        weights = sum(layer.weight.numel() for layer in found.values())
        own = getattr(how, name)
        goes = how.sparsity if own is None else own
        rows.append({
            "branch": name, "path": getattr(branches, name), "blocks": len(branches.blocks[name]),
            "matrices": len(found), "weights": weights, "pattern": how.pattern if goes and how.pattern else "anywhere",
            "sparsity": goes,
        })  # fmt: skip
    kept = sum(layer.weight.numel() for layer in branches.linears("connector").values())
    rows.append({"branch": "connector", "path": ", ".join(branches.connector), "weights": kept, "sparsity": 0.0})
    return rows


def prune_to_folder(
    where: Where, folder: Path, how: dict[str, Any], calibration: Calibration, *, compat: str = "",
    overwrite: bool = False, measure: str = "", measured: int = 256,
) -> dict[str, Any]:  # fmt: skip
    """Prune and write the checkpoint with its masks; with `measure`, exact answers before and after.

    Raises `RequestError`; nothing is written then.
    """
    from model_hooks.files import refuse_existing, refuse_overlap
    from paper_tables import progress
    from ressa.pruning import prune

    refuse_existing(folder, overwrite)
    refuse_overlap(folder, where.name)
    from ressa.encoding import encoder_of

    model, processor, branches, pruning, said = plan(where, how, compat)
    encoder = encoder_of(model.config, processor)
    blind = pruning.method in ("magnitude", "random") and pruning.allocation != "owl"
    batches = [] if blind else calibration.batches(encoder)
    before, keep = figures(model, encoder, measure, measured), pruning.keep_dense
    moves = keep and pruning.method == "sparsegpt"  # the weights that stay move too: both are written
    with progress("matrices pruned") as bar:
        pruned = prune(
            model, branches, batches, replace(pruning, keep_dense=keep and not moves), hold_dense=moves,
            image_token_id=encoder.image_token_id, progress=bar,
        )  # fmt: skip
    after = {} if keep and not moves else figures(model, encoder, measure, measured)
    report = {"model": where.name, "method": pruning.method, "dense": keep and not moves, "how": asdict(pruning),
              "calibration": asdict(calibration), "before": before, "after": after, **pruned.report}  # fmt: skip
    if said:
        report["spec"] = said
    write_pruned(model, folder, processor, pruned, report, overwrite=overwrite, source=where.name)
    return report


def write_pruned(
    model: Any, folder: Path, processor: Any, pruned: Any, report: dict[str, Any], *, overwrite: bool, source: str
) -> None:  # fmt: skip
    """The pruned folder, whole or not at all; the model's own files, masks and record."""
    from safetensors.torch import save_file

    from model_hooks.files import atomic_folder
    from model_hooks.loading import quiet
    from paper_tables.frame import plain
    from ressa import masks as mask_files
    from ressa import merging

    with atomic_folder(folder, overwrite, source) as part, quiet():
        merging.save(model, part, processor, masks=pruned.masks)
        weights = {path: model.get_submodule(path).weight for path in pruned.masks}
        report["masks"] = mask_files.mask_digest(pruned.masks)
        mask_files.save_masks(part / folders.MASKS, pruned.masks, weights)
        if pruned.dense:
            save_file(pruned.dense, part / folders.DENSE)
        (part / folders.RECORD).write_text(json.dumps(plain(report), indent=1) + "\n")


def figures(model: Any, encoder: Any, data: str, samples: int) -> dict[str, float]:
    """Exact answers and perplexity on `data`; nothing for an empty name."""
    from ressa.data import read
    from ressa.evaluating import evaluate

    if not data:
        return {}
    found = evaluate(model, encoder, read(data, samples))
    return {name: found[name]["value"] for name in ("exact", "perplexity")}


def merge_to_folder(adapters: str, folder: Path, *, base: str = "", overwrite: bool = False) -> dict[str, Any]:
    """Merge adapters into the base that they name (or `base`) and write an ordinary checkpoint."""
    from model_hooks import load
    from model_hooks.files import atomic_folder, refuse_existing
    from model_hooks.processors import load_processor
    from ressa import merging
    from ressa.adapters import load_adapters

    refuse_existing(folder, overwrite)
    if not folders.is_adapter(adapters):
        raise RequestError(f"{adapters} has no {folders.ADAPTER}; give a folder that `ressa repair` wrote")
    named = json.loads((Path(adapters) / folders.ADAPTER).read_text())["base_model_name_or_path"]
    source = base or named
    if not base and not Path(source).exists() and ":" not in source:
        raise RequestError(f"{adapters} names the base {source}, which is not there; say where with --base")
    model, _ = load(source, tokenizer=False)
    merged = merging.merge(load_adapters(model, adapters))
    with atomic_folder(folder, overwrite, source) as part:
        merging.save(merged, part, load_processor(source))
    return audit(folder)


def audit(folder: str | Path) -> dict[str, Any]:
    """What `ressa inspect` says."""
    from ressa.inspecting import inspect

    return inspect(folder)


def evaluate_all(
    names: Sequence[str], data: str, samples: int, metrics: Sequence[str], *, batch_size: int, new_tokens: int,
    skip_bad_rows: int = 0, dtype: str = "auto", device_map: str = "",
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each model and figure, on the same examples."""
    from ressa.data import read
    from ressa.encoding import encoder_of
    from ressa.evaluating import evaluate

    examples = read(data, samples, skip_bad_rows=skip_bad_rows)
    rows: list[dict[str, Any]] = []
    for name in names:
        model, processor = folders.load_any(name, dtype, device_map)
        found = evaluate(
            model, encoder_of(model.config, processor), examples, metrics, batch_size=batch_size, new_tokens=new_tokens
        )
        rows += [{"model": name, "figure": figure, **value} for figure, value in found.items()]
        del model
    return rows


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """What `prune` prints of its report."""
    keys = ("spec", "sparsity", "tokens", "dead", "before", "after", "masks")
    branches = [{"branch": name, **row} for name, row in report["branches"].items()]
    return {**{key: report[key] for key in keys if report.get(key)}, "branches": branches}


def export(folder: str, output: Path, form: str, overwrite: bool) -> dict[str, Any]:
    """`ressa export`: the bit-mask format, back from it, eight bits, or what torch's 2:4 kernels take."""
    from ressa import export as runtimes
    from ressa import quantising

    if form == "compress":
        return runtimes.compress(folder, output, overwrite=overwrite)
    if form == "decompress":
        return {"output": runtimes.decompress(folder, output, overwrite=overwrite)}
    if form in quantising.SCHEMES:
        return quantising.quantise(folder, output, form, overwrite=overwrite)
    found = runtimes.accelerate_24(folders.load_any(folder)[0])
    reasons: dict[str, int] = {}
    for reason in found["left"].values():
        reasons[reason] = reasons.get(reason, 0) + 1
    return {
        "converted": len(found["converted"]), "notice": found["notice"],
        "left": [{"reason": reason, "matrices": count} for reason, count in reasons.items()],
    }  # fmt: skip
