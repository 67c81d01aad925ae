"""What every command that trains shares: its settings, its work folder, and the way on after a kill. Without torch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model_hooks.errors import RequestError

RECORD = "prepared.json"  # in the work folder: what the run is
LOG = "training_log.jsonl"
FREE = ("output", "resume", "overwrite", "save_every", "log_every")  # may change when a run goes on


@dataclass(frozen=True)
class Run:
    """Settings that all training runs have. A package's own are a subclass: more fields, and other defaults.

    Args:
        model: Hub id, checkpoint folder or zoo:NAME.
        output: Folder for the result.
        epochs: Times that the data is seen.
        max_steps: Optimizer steps; 0: as the epochs say.
        learning_rate: Peak, after which it falls as a cosine.
        warmup: Share of the steps in which the learning rate rises.
        weight_decay: Of AdamW.
        batch_size: Examples a process takes at once.
        accumulation: Batches whose gradients make one step.
        gradient_checkpointing: Compute activations again in the backward pass: less memory, a third more time.
        bf16: Compute in bfloat16.
        deepspeed: zero2, zero3, or a DeepSpeed file of your own; empty: none. Needs a launcher.
        save_every: Steps between checkpoints.
        log_every: Steps between lines of training_log.jsonl.
        seed: Of all that is drawn by lot.
        resume: Go on from the last checkpoint of a run that was stopped; --no-resume begins again.
        overwrite: Replace what is at the output.

    Raises:
        RequestError: a value is not accepted.
    """

    model: str
    output: Path
    epochs: float = 1.0
    max_steps: int = 0
    learning_rate: float = 0.0
    warmup: float = 0.03
    weight_decay: float = 0.0
    batch_size: int = 1
    accumulation: int = 1
    gradient_checkpointing: bool = False
    bf16: bool = False
    deepspeed: str = ""
    save_every: int = 100
    log_every: int = 10
    seed: int = 0
    resume: bool = True
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not self.model or str(self.output) in ("", "."):
            raise RequestError("model and output must be given: what to train, and the folder for the result")
        self.at_least(1, "batch_size", "accumulation", "save_every", "log_every")
        self.at_least(0, "max_steps", "learning_rate", "weight_decay", "warmup")
        if not 0 < self.epochs < math.inf:
            raise RequestError(f"epochs is {self.epochs}; a number above 0 is needed")
        if self.warmup >= 1:
            raise RequestError(f"warmup is {self.warmup}; a share of the steps, below 1, is needed")
        if self.deepspeed:
            self.needs_launcher("deepspeed")

    def at_least(self, least: float, *names: str) -> None:
        """Raise `RequestError` unless these settings are finite numbers from `least` on."""
        for name in names:
            value = getattr(self, name)
            if not least <= value < math.inf:
                raise RequestError(f"{name} is {value}; at least {least} is needed")

    def needs_launcher(self, name: str) -> None:
        """Raise `RequestError` unless torchrun, accelerate or deepspeed started this process."""
        if "RANK" not in os.environ:
            module = type(self).__module__
            raise RequestError(f"{name} needs a launcher: torchrun --nproc-per-node N -m {module} ...")

    @property
    def work(self) -> Path:
        """Where the run keeps its data, checkpoints and log until it is done."""
        return self.output.with_name(f"{self.output.name}.training")

    @property
    def rate(self) -> float:
        """The learning rate's peak."""
        return self.learning_rate

    def settings(self) -> dict[str, Any]:
        """What decides the result: a run goes on only with the same."""
        values = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items() if k not in FREE}
        return values | {"processes": int(os.environ.get("WORLD_SIZE", "1"))}

    def record(self) -> dict[str, Any]:
        """What was written down when the run began; {} where none has."""
        file = self.work / RECORD
        found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
        return found

    def goes_on(self) -> bool:
        """Whether the work folder holds this run, begun and not done.

        Raises `RequestError` where it holds another one, or what is no run.
        """
        record = self.record()
        if not record and self.work.exists() and any(self.work.iterdir()):
            raise RequestError(
                f"{self.work} is in the way: the run keeps its checkpoints there; move it or rename --output"
            )
        if not record or not self.resume:
            return False
        then, now = record["settings"], self.settings()
        changed = [k for k in now if now[k] != then.get(k)]
        if changed:
            k = changed[0]
            raise RequestError(
                f"{self.work} holds an unfinished run with {k} {then.get(k)!r}, now {now[k]!r}; give the same "
                "settings to go on, or --no-resume to begin again"
            )
        return True


def prepare(run: Run, make: Callable[[Path], dict[str, Any]]) -> None:
    """Make the work folder, whole or not at all: what `make(folder)` writes, and a record of what it returns.

    Nothing is made for a run that goes on. Raises `RequestError` where the folder holds another run.
    """
    from model_hooks.files import atomic_folder

    if run.goes_on():
        return
    with atomic_folder(run.work, overwrite=True) as part:
        found = make(part)
        (part / RECORD).write_text(json.dumps({"settings": run.settings(), **found}, indent=1) + "\n")


def split(run: Any, found: Any, unit: str) -> tuple[Any, Any]:
    """Examples to train on and, the last `run.heldout_samples` of them, to measure on.

    Raises `RequestError` where nothing is left to train on.
    """
    if len(found) <= run.heldout_samples:
        raise RequestError(
            f"{run.data} gives {len(found)} {unit} of {run.length} tokens, and {run.heldout_samples} are to be held "
            "out; give more data, a smaller --length or --heldout-samples, or --heldout with other data"
        )
    return found[: -run.heldout_samples], found[-run.heldout_samples :]


def token_sequences(run: Any, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Token ids "train" [n, length] and "heldout" [m, length] of `run.data`, or of `run.heldout` where that is named.

    `run` has data, samples, length, heldout and heldout_samples. Raises `RequestError`.
    """
    from model_hooks.text import load_sequences

    refuse_longer_than_context(run, model)
    if run.heldout:
        heldout = load_sequences(tokenizer, run.heldout, samples=run.heldout_samples, length=run.length)
        train = load_sequences(tokenizer, run.data, samples=run.samples, length=run.length)
        return {"train": train, "heldout": heldout}
    wanted = run.samples + run.heldout_samples
    ids = load_sequences(tokenizer, run.data, samples=wanted, length=run.length)
    train, heldout = split(run, ids, "sequences")
    return {"train": train.clone(), "heldout": heldout.clone()}


def refuse_longer_than_context(run: Any, model: Any) -> None:
    """Raise `RequestError` where `run.length` is more than the model's context."""
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or math.inf
    if run.length > context:
        raise RequestError(f"length {run.length} is more than the model's context of {context} tokens")


@dataclass(frozen=True)
class SftRun(Run):
    """What to fine-tune, on which records, and how; `paper_tables.sft` does it.

    Args:
        model: Hub id, checkpoint folder or zoo:NAME.
        data: Records: a file, a folder of datasets, a hub name or zoo:pairs.
        output: Folder for the student: an ordinary checkpoint with a model card.
        template: How a record becomes a prompt: none, alpaca, vicuna or chat.
        schema: Of the records; auto tells it from the first.
        max_length: Tokens of prompt and answer; what is longer is cut.
        deepspeed: zero2, zero3, zero3-offload or a file; needs a launcher (torchrun, deepspeed).
        seed: Of the order of the records.

    Raises:
        RequestError: a value is not accepted.
    """

    data: str = ""
    template: str = "alpaca"
    schema: str = "auto"
    max_length: int = 2048
    epochs: float = 3.0
    learning_rate: float = 2e-5
    accumulation: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise RequestError("data must be given: the records to learn from")
        self.at_least(2, "max_length")
        if not self.learning_rate:
            raise RequestError("learning_rate is 0; a number above 0 is needed")


@dataclass(frozen=True)
class PreferenceRun(SftRun):
    """A run that can also learn from preferences.

    Args:
        preferred: The records are pairs of a chosen and a rejected answer, learned from by DPO.
        beta: Of DPO: how closely the student stays at the model it began as.
    """

    preferred: bool = False
    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0:
            raise RequestError(f"beta is {self.beta}; a number above 0 is needed")


def fine_tune(
    config: SftRun, rows_of: Callable[[Any], Any], *, module_file: str, package: str, paper: str
) -> dict[str, Any]:
    """`paper_tables.sft.train`, after what can be wrong with the request: a missing extra [train], an output that is
    there already. Call it in every process of a launcher."""
    from model_hooks.files import refuse_existing, refuse_overlap

    from .frame import require

    for module in ("trl", "deepspeed") if config.deepspeed else ("trl",):
        require(module, extra="train", package=package)
    refuse_existing(config.output, config.overwrite)
    refuse_overlap(config.output, config.model)
    from . import sft

    return sft.train(config, rows_of, module_file=module_file, package=package, paper=paper)


def config_of(cell: Mapping[str, Any], kind: Any, model: str, data: Path, output: Path, **own: Any) -> Any:
    """The settings, of class `kind`, of a training run of a table's row; `own` go first."""
    given = {
        "model": model, "data": str(data), "output": output, "template": "alpaca", "epochs": cell["epochs"],
        "batch_size": cell["batch"], "accumulation": cell.get("accumulation", 1), "seed": cell["seed"],
        "learning_rate": cell["learning_rate"], "max_length": cell.get("length", 512),
        "bf16": cell.get("dtype") == "bfloat16", "deepspeed": cell.get("deepspeed", ""), "save_every": 10**6,
        "gradient_checkpointing": cell.get("gradient_checkpointing", False),
    }  # fmt: skip
    return kind(**given | own)
