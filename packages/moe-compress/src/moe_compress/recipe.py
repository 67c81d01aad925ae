"""Recipes: drop, finetune, slim, in an order that is legal, from one file; each step done is kept, so a run goes on.

    model: zoo:mixtral
    calibration: {data: "zoo:calibration", samples: 16, length: 256}
    steps:
      - layer_drop: {n: 1}
      - finetune: {max_steps: 20}
      - quantize: {method: awq, bits: 4, group: 32}

In place of drops and quantisation a `budget` says what the result may cost (`budget: {bytes: 3e6}`), and `budget.solve`
chooses.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_hooks.errors import RequestError
from paper_tables.errors import nearest

if TYPE_CHECKING:
    from moe_compress.slimming import Slimming

Options = dict[str, Any]
DROPS: dict[str, tuple[str, ...]] = {
    "block_drop": ("n", "consecutive", "blocks"),
    "layer_drop": ("n", "layers"),
    "expert_drop": (
        "keep",
        "scope",
        "metric",
        "reverse",
        "allow_lower_topk",
        "allow_empty",
        "preserve_gate",
        "repair",
        "experts",
    ),
}
CALIBRATION = {"data": "zoo:calibration", "samples": 128, "length": 2048, "batch_size": 4}
BUDGET = ("bytes", "flops", "latency", "bits", "shares", "drop_layers", "method", "group", "metric")
REPORT = "recipe.json"


@dataclass(frozen=True)
class Recipe:
    """What to do to `model`, step by step: (name, options)."""

    model: str
    steps: tuple[tuple[str, Options], ...] = ()
    calibration: Options = field(default_factory=dict)
    budget: Options = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "calibration", CALIBRATION | self.calibration)
        _known("calibration", self.calibration, tuple(CALIBRATION))
        check_order([name for name, _ in self.steps])
        for name, options in self.steps:
            _known(name, options, _options_of(name))
            if name in ("prune", "quantize"):
                slimming_of(name, options)
        if self.budget:
            _known("budget", self.budget, BUDGET)
            if len([unit for unit in ("bytes", "flops", "latency") if unit in self.budget]) != 1:
                raise RequestError("a budget has one of bytes, flops and latency")
            others = [name for name, _ in self.steps if name != "finetune"]
            if others:
                raise RequestError(f"a budget chooses drops and quantisation itself; leave out {others[0]}")
        elif not self.steps:
            raise RequestError("the recipe has no steps and no budget; give one of them")

    @property
    def fingerprint(self) -> str:
        text = json.dumps([self.model, self.steps, self.calibration, self.budget], sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def read(path: str | Path) -> Recipe:
    """A recipe from a YAML file. Raises `RequestError` or `TableError` for what cannot be; no weight is read."""
    from paper_tables.yamlfile import read_yaml

    values = dict(read_yaml(Path(path)))
    _known(str(path), values, ("model", "steps", "calibration", "budget"))
    if not values.get("model"):
        raise RequestError(f"{path}: model is missing; name a hub id, a checkpoint folder or zoo:NAME")
    steps = []
    for number, entry in enumerate(values.get("steps") or [], 1):
        if not isinstance(entry, Mapping) or len(entry) != 1:
            raise RequestError(
                f"{path}: step {number} must be one name with its options, such as `layer_drop: {{n: 2}}`"
            )
        (name, options), *_ = entry.items()
        steps.append((str(name), dict(options or {})))
    return Recipe(
        str(values["model"]), tuple(steps), dict(values.get("calibration") or {}), dict(values.get("budget") or {})
    )


def check_order(names: list[str]) -> None:
    """Raise `RequestError` unless every step can follow those before it."""
    slim = ("prune", "quantize")
    accepted = (*DROPS, "finetune", *slim)
    for number, name in enumerate(names):
        if name not in accepted:
            raise RequestError(f"step {name!r} is not known{nearest(name, accepted)}")
        before = names[:number]
        if "quantize" in before:
            raise RequestError(f"{name} after quantize: rounded weights are final; put quantize last")
        if name == "finetune" and "prune" in before:
            raise RequestError("finetune after prune would fill the zeros; finetune first, then prune")
        if name in slim and name in before:
            raise RequestError(f"{name} twice: once is enough, with its own options")


def _options_of(name: str) -> tuple[str, ...]:
    if name in DROPS:
        return DROPS[name]
    if name == "finetune":
        from moe_compress.finetune import TuneConfig

        return tuple(f.name for f in fields(TuneConfig) if f.name not in ("model", "output"))
    from moe_compress.slimming import Slimming

    return (*(f.name for f in fields(Slimming)), "format", "workspace")


def _known(where: str, options: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in options:
        if key not in known:
            raise RequestError(f"{where}: unknown key {key!r}{nearest(str(key), known)}")


def run(
    recipe: Recipe, folder: Path, *, measure: str = "zoo:heldout", overwrite: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:  # fmt: skip
    """Carry out a recipe. The work folder `NAME.recipe` beside the output holds the steps done, each a checkpoint.

    Returns a report of each step (also kept in the result as recipe.json): its bytes and bits per byte.
    """
    from model_hooks.files import atomic_write, refuse_existing, refuse_overlap

    refuse_existing(folder, overwrite)
    refuse_overlap(folder, recipe.model)
    room = folder.with_name(f"{folder.name}.recipe")
    _enter(room, recipe)
    steps = recipe.steps if not recipe.budget else _solved(recipe, room)
    current, rows = recipe.model, [_row("start", recipe.model, measure)]
    for number, (name, options) in enumerate(steps, 1):
        following = room / f"{number:02d}-{name}"
        if not following.is_dir():
            say(f"step {number} of {len(steps)}: {name}")
            _step(name, options, recipe, current, following)
        current = str(following)
        rows.append(_row(name, current, measure))
    report = {"model": recipe.model, "steps": rows, "recipe": [{n: o} for n, o in steps]}
    atomic_write(Path(current) / REPORT, json.dumps(report, indent=1, default=str) + "\n")
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(current, folder)
    shutil.rmtree(room)
    return report


def _enter(room: Path, recipe: Recipe) -> None:
    file = room / REPORT
    if file.is_file():
        if json.loads(file.read_text())["fingerprint"] != recipe.fingerprint:
            raise RequestError(f"{room} holds another recipe, not done; give that one to go on, or remove the folder")
        return
    if room.exists():
        raise RequestError(f"{room} is in the way: the steps done are kept there; move it")
    room.mkdir(parents=True)
    file.write_text(json.dumps({"fingerprint": recipe.fingerprint}))


def _row(name: str, folder: str, measure: str) -> dict[str, Any]:
    from moe_compress.packing import load
    from moe_compress.workflow import loss, weight_bytes

    model, tokenizer = load(folder)
    return {"step": name, "bytes": weight_bytes(folder), **loss(model, tokenizer, measure)}


def _step(name: str, options: Options, recipe: Recipe, source: str, folder: Path) -> None:
    if name in DROPS:
        _drop(name, options, recipe, source, folder)
    elif name == "finetune":
        from moe_compress.finetune import TuneConfig, finetune

        finetune(TuneConfig(model=source, output=folder, **options))
    else:
        from moe_compress.workflow import slim_to_folder

        extra = {"form": options.get("format", "compressed-tensors"), "workspace": float(options.get("workspace", 4e9))}
        slim_to_folder(source, folder, slimming_of(name, options), **recipe.calibration, **extra)


def slimming_of(name: str, options: Options) -> Slimming:
    """What a step "prune" or "quantize" asks for. Raises `RequestError`."""
    from moe_compress.slimming import PRUNING, QUANTISING, Slimming

    own: Options = {k: v for k, v in options.items() if k not in ("format", "workspace")}
    own["exclude"] = tuple(own.get("exclude", ()))
    own.setdefault("method", "wanda" if name == "prune" else "gptq")
    how = Slimming(**own)
    if how.prunes != (name == "prune"):
        raise RequestError(
            f"{name} takes one of {', '.join(PRUNING if name == 'prune' else QUANTISING)}, not {how.method}"
        )
    return how


def _drop(name: str, options: Options, recipe: Recipe, source: str, folder: Path) -> None:
    from moe_compress.selection import Plan
    from moe_compress.workflow import choose, score_source, sequences_for, trim_to_folder

    explicit = options.get({"block_drop": "blocks", "layer_drop": "layers", "expert_drop": "experts"}[name])
    scores = None
    if explicit:
        how = f"{name} as the recipe says"
        if name == "expert_drop":
            plan = Plan(keep={int(b): tuple(kept) for b, kept in explicit.items()}, how=how)
        else:
            plan = Plan(**{f"{name.split('_')[0]}s": tuple(explicit)}, how=how)  # type: ignore[arg-type]
    else:
        reconstruction = options.get("metric") == "reconstruction"
        scores = score_source(source, **recipe.calibration, reconstruction=reconstruction)
        what = {"block_drop": "blocks", "layer_drop": "layers", "expert_drop": "experts"}[name]
        request = {what: options.get("keep" if what == "experts" else "n"), **options}
        plan = choose(scores, {k: v for k, v in request.items() if k not in ("n", "keep", "repair")})
    c = recipe.calibration
    sequences = sequences_for(source, c["data"], c["samples"], c["length"]) if options.get("repair") else None
    trim_to_folder(source, plan, folder, repair=sequences, measure="", scores=scores)


def _solved(recipe: Recipe, room: Path) -> tuple[tuple[str, Options], ...]:
    """The steps that meet the budget, with what is to be finetuned between drops and quantisation."""
    file = room / "solution.json"
    if not file.is_file():
        steps = solve_budget(recipe.model, recipe.budget, recipe.calibration)
        file.write_text(json.dumps(steps))
    found = [(name, options) for entry in json.loads(file.read_text()) for name, options in entry.items()]
    drops, quantise = [s for s in found if s[0] in DROPS], [s for s in found if s[0] not in DROPS]
    for _, options in quantise:
        options["layer_bits"] = {int(b): bits for b, bits in options["layer_bits"].items()}
    return (*drops, *recipe.steps, *quantise)


def solve_budget(model: str, budget: Options, calibration: Options) -> list[dict[str, Any]]:
    """Measure every choice and solve: the steps. Shares of flops and latency are of the whole model's."""
    from moe_compress.budget import UNITS, measure, solve, steps_for
    from moe_compress.workflow import refuse_packed, sequences_for
    from paper_tables import progress

    refuse_packed(model)
    unit = next(u for u in UNITS if u in budget)
    group, method = int(budget.get("group", 128)), str(budget.get("method", "gptq"))
    c = calibration
    sequences = sequences_for(model, c["data"], c["samples"], c["length"])
    options = {key: budget[key] for key in ("shares", "bits", "drop_layers", "metric") if key in budget}
    if unit != "bytes":
        options["bits"] = [16]  # fewer would cost quality and save none of it
    with progress("layers measured") as bar:
        found = measure(model, sequences, group=group, batch_size=c["batch_size"], progress=bar, **options)
    allowed = float(budget[unit]) * (found.total(unit) if unit != "bytes" else 1.0)
    chosen = solve(found.offers(unit), allowed - found.fixed[unit])
    steps = steps_for(found, chosen, method, group)
    if not steps:
        raise RequestError(f"the model meets this budget as it is ({found.total(unit):.4g} {unit}); nothing to do")
    return steps
