"""What a row of the tables does to a model: prunes it, and repairs it by one of several ways (the table's arms).

All arms of a row get the same base, masks, batches, steps and rate. Those that train a dense update show what is lost
when its zeros are put back:

    none                    pruned, not repaired
    lora                    LoRA on the pruned model, merged dense: an upper bound that is not sparse
    lora-mask               its zeros put back where they were
    lora-prune              pruned again, by the same method
    lora-kd-prune           the same, with LoRA taught by the dense model
    sparselora              masked adapters, from the data alone
    ressa, ressa-ste        masked adapters taught by the dense model, with the exact backward pass or without the mask
    full                    all weights that are left are trained
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from paper_tables import Context

Cell = Mapping[str, Any]
ARMS = ("dense", "none", "lora", "lora-mask", "lora-prune", "lora-kd-prune", "sparselora", "ressa", "ressa-ste", "full")
TAUGHT = ("lora-kd-prune", "ressa", "ressa-ste", "full")


def keyed(cell: Cell, names: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple((name, str(cell.get(name))) for name in names)


MODEL = ("model", "dtype")
PRUNED = (*MODEL, "calibration", "calibration_samples", "prune", "metric", "pruned_branches", "share", "total",
          "token_balance", "calibration_inputs")  # fmt: skip
TRAINED = (*PRUNED, "data", "samples", "steps", "batch", "rate", "rank", "alpha", "kl_weight", "temperature",
           "positions", "loss_mode", "feature_weight", "adapted", "seed")  # fmt: skip


@dataclass
class Model:
    """The dense model of a row with what is needed to feed it."""

    model: Any
    processor: Any
    branches: Any
    encoder: Any
    rows: dict[Any, Any] = field(default_factory=dict)  # by what `encoded` was given

    def encoded(self, source: str, count: int, seed: int = 0, train: bool = False) -> tuple[list[Any], Any]:
        """Examples and their inputs, made once. train: An example for each answer; what is not drawn is encoded only
        when it is asked for, since the images of a whole data set do not fit in memory."""
        from ressa.data import SHAPES, read
        from ressa.encoding import encode_all

        key = (source, count, seed, train)
        if key not in self.rows:
            examples = read(source, count, seed=seed, apart=train, whole=True)
            if train and not source.startswith(SHAPES):
                from ressa.repairing import Rows

                self.rows[key] = (examples, Rows(self.encoder, examples))
            else:
                self.rows[key] = (examples, encode_all(self.encoder, examples))
        found: tuple[list[Any], Any] = self.rows[key]
        return found


def base_of(cell: Cell, context: Context) -> Model:
    """The dense model of a row."""

    def load() -> Model:
        from ressa.encoding import encoder_of
        from ressa.workflow import Where

        where = Where(cell["model"], cell.get("dtype", "float32"))
        model, processor, branches = where.load()
        return Model(model, processor, branches, encoder_of(model.config, processor))

    found: Model = context.once(("base", *keyed(cell, MODEL)), load)
    return found


def pruning_of(cell: Cell) -> Any:
    """What the row prunes: `prune` is N-M or a percentage; or of `total` percent `share` go to the vision tower."""
    from ressa.pruning import Pruning

    how: dict[str, Any] = {"method": cell.get("metric", "wanda"), "keep_dense": True}
    for name in ("token_balance", "calibration_inputs"):
        if name in cell:
            how[name] = cell[name]
    if "share" in cell:
        vision, language = cell["share"] / 100, (cell["total"] - cell["share"]) / 100
        return Pruning(**how, sparsity=max(vision, language), vision=vision, language=language)
    text = str(cell["prune"])
    how |= {"pattern": text.replace("-", ":"), "sparsity": 0.5} if "-" in text else {"sparsity": float(text) / 100}
    if "-" in text:
        kept, of = map(int, text.split("-"))
        how["sparsity"] = 1 - kept / of
    for name in ("vision", "language"):
        if name not in cell.get("pruned_branches", "vision,language"):
            how[name] = 0.0
    return Pruning(**how)


def masks_of(cell: Cell, context: Context) -> dict[str, Any]:
    """The row's masks, made once."""
    base = base_of(cell, context)
    found: dict[str, Any] = context.once(("masks", *keyed(cell, PRUNED)), lambda: _masks(cell, base, base.model))
    return found


def _masks(cell: Cell, base: Model, model: Any, keep_dense: bool = True) -> dict[str, Any]:
    from ressa.branches import find_branches
    from ressa.encoding import batches, calibration_inputs
    from ressa.pruning import prune

    _, rows = base.encoded(cell["calibration"], cell["calibration_samples"])
    inputs = [calibration_inputs(b, base.encoder) for b in batches(rows, 16, base.encoder.pad)]
    branches = base.branches if model is base.model else find_branches(model)
    masks: dict[str, Any] = prune(
        model, branches, inputs, replace(pruning_of(cell), keep_dense=keep_dense),
        image_token_id=base.encoder.image_token_id,
    ).masks  # fmt: skip
    return masks


@dataclass(frozen=True)
class Result:
    """A row's model; `masks` are the zeros that it should have, none for the dense model."""

    model: Any
    masks: dict[str, Any]


def result_of(cell: Cell, context: Context) -> Result:
    """The model that the row's arm leaves."""
    arm, base = cell["arm"], base_of(cell, context)
    if arm == "dense":
        return Result(base.model, {})
    masks = masks_of(cell, context)
    if arm == "none":
        return Result(_sparse(cell, base, masks), masks)
    if arm.startswith("lora"):
        return _from_lora(cell, context, base, masks)
    return Result(_trained(cell, base, masks, arm), masks)


def _sparse(cell: Cell, base: Model, masks: dict[str, Any]) -> Any:
    """The pruned model; SparseGPT's has other values where it is not zero."""
    from ressa.repairing import apply_masks

    model = copy.deepcopy(base.model)
    if cell.get("metric") == "sparsegpt":
        _masks(cell, base, model, keep_dense=False)
    apply_masks(model, masks)
    return model


def _from_lora(cell: Cell, context: Context, base: Model, masks: dict[str, Any]) -> Result:
    """LoRA is trained once for the arms that differ only in what they do with the merged weights."""
    from ressa.repairing import apply_masks

    arm, taught = cell["arm"], "kd" in cell["arm"]
    merged = context.latest("lora", (taught, *keyed(cell, TRAINED)), lambda: _trained(cell, base, masks, arm))
    if arm == "lora":
        return Result(merged, masks)
    model = copy.deepcopy(merged)
    if arm != "lora-mask":
        masks = _masks(cell, base, model)
    apply_masks(model, masks)
    return Result(model, masks)


def _trained(cell: Cell, base: Model, masks: dict[str, Any], arm: str) -> Any:
    """A plain model, trained and merged."""
    from ressa import repairing
    from ressa.folders import Base

    with tempfile.TemporaryDirectory() as room:
        config = config_of(cell, arm, Path(room) / "out")
        repairing.set_seed(config.seed)
        dense = Base(copy.deepcopy(base.model), base.processor, masks, dense=arm in TAUGHT)
        if arm.startswith("lora"):
            model, teach = _lora(cell, base, dense, arm)
        else:
            from ressa.branches import find_branches

            model, teach, _ = repairing.prepared(config, dense, find_branches(dense.model))
        _, rows = base.encoded(cell["data"], cell["samples"], cell["seed"], train=True)
        arguments = repairing.arguments(config, None)
        repairing.run(config, arguments, model, teach, rows, base.encoder)
    return _merged(model, masks, arm)


def _lora(cell: Cell, base: Model, dense: Any, arm: str) -> tuple[Any, Callable[[Any], Any] | None]:
    from model_hooks.lora import add_lora
    from ressa.repairing import apply_masks

    apply_masks(dense.model, dense.masks)
    how = {"rank": cell.get("rank", 8), "alpha": cell.get("alpha", 16), "seed": cell["seed"]}
    model = add_lora(dense.model, list(dense.masks), [], **how)
    return model, (lambda inputs: base.model(**inputs, use_cache=False)) if arm in TAUGHT else None


def _merged(model: Any, masks: dict[str, Any], arm: str) -> Any:
    from ressa import merging
    from ressa.repairing import apply_masks

    if arm == "full":
        apply_masks(model, masks)
        return model.requires_grad_(False)
    if arm.startswith("lora"):
        return model.merge_and_unload()
    merged = merging.merge(model)
    wrong = [p for p, m in masks.items() if bool((merged.get_submodule(p).weight[~m] != 0).any())]
    if wrong:
        raise RuntimeError(f"{wrong[0]} has lost zeros in merging; please report it")
    return merged


def config_of(cell: Cell, arm: str, output: Path) -> Any:
    """The settings of the arm's training run."""
    from ressa.train import RepairConfig

    taught = arm in TAUGHT
    own = {name: cell[name] for name in ("temperature", "positions", "loss_mode", "feature_weight") if name in cell}
    return RepairConfig(
        model=cell["model"], output=output, method="full" if arm == "full" else "sparselora",
        backward="ste" if arm == "ressa-ste" else "exact", rank=cell.get("rank", 8), alpha=cell.get("alpha", 16.0),
        branches=cell.get("adapted", "vision,connector,language"), teacher="" if taught else "none",
        kl_weight=cell.get("kl_weight", 0.5) if taught else 0.0, data=cell["data"], samples=cell["samples"],
        max_steps=cell["steps"], batch_size=cell["batch"], seed=cell["seed"], save_every=10**6,
        learning_rate=cell["full_rate"] if arm == "full" else cell["rate"], bf16=cell.get("dtype") == "bfloat16", **own,
    )  # fmt: skip
