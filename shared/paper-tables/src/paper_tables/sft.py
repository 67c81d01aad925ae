"""Fine-tuning on prompts and answers by TRL: SFTTrainer, or DPOTrainer where an answer is preferred to another.

Every process of a launcher runs it. It imports what an extra [train] installs, so it is imported where that is known to
be there.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from transformers.trainer_callback import PrinterCallback

from model_hooks import Card, RequestError, load, save
from model_hooks.files import atomic_write
from model_hooks.loading import quiet

from . import trainer
from .errors import WorkFailed
from .launch import is_main_process
from .progress import progress
from .training import LOG, RECORD, PreferenceRun, SftRun

trl = import_module("trl")  # of the extra [train] of the package that trains
SFTConfig = trl.SFTConfig

Rows = Sequence[dict[str, str]]


class SFTTrainer(trainer.WholeCheckpoints, trl.SFTTrainer):  # type: ignore[misc,name-defined]
    pass


class DPOTrainer(trainer.WholeCheckpoints, trl.DPOTrainer):  # type: ignore[misc,name-defined]
    pass


def arguments(config: SftRun, deepspeed: str | None, package: str) -> Any:
    """The trainer's arguments; `deepspeed` is a file. Making them joins this process to the others of its launcher."""
    kind: Any = SFTConfig
    own: dict[str, Any] = {"completion_only_loss": True}
    if isinstance(config, PreferenceRun) and config.preferred:
        kind, own = trl.DPOConfig, {"beta": config.beta}
    own |= {"max_length": config.max_length, "data_seed": config.seed, "logging_nan_inf_filter": False}
    return trainer.arguments(config, deepspeed, package, kind, **own)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the bars of `datasets`, of which TRL shows one for every step of its preparation."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bar()


def trainer_of(config: SftRun, options: Any, model: Any, tokenizer: Any, rows: Rows, *callbacks: Any) -> Any:
    """TRL's trainer, what has no token of an answer left within `max_length` dropped.

    Raises `RequestError` where that is everything.
    """
    kind = SFTTrainer if isinstance(options, SFTConfig) else DPOTrainer
    made = kind(
        model, args=options, train_dataset=Dataset.from_list(list(rows)), processing_class=tokenizer,
        callbacks=list(callbacks),
    )  # fmt: skip
    if not len(made.train_dataset):
        with suppress(OSError):  # Trainer has made it; it stays where it holds a run
            config.work.rmdir()
        raise RequestError(
            f"none of {len(rows)} answers has a token within --max-length {config.max_length} tokens; give a larger one"
        )
    made.remove_callback(PrinterCallback)
    return made


def _begin(config: SftRun, content: str) -> None:
    """Write down what the run is, `content` a hash of its data; nothing of a request that failed before is left.

    Raises `RequestError` where a run that is to go on was on other data.
    """
    record = config.record()
    if config.resume and record:
        if record.get("content") != content:
            raise RequestError(
                f"{config.work} holds a run on other records than {config.data} has now; --no-resume begins again"
            )
    elif is_main_process():
        shutil.rmtree(config.work, ignore_errors=True)
        record = {"settings": config.settings(), "content": content}
        atomic_write(config.work / RECORD, json.dumps(record, indent=1) + "\n")


def fit(config: SftRun, rows_of: Callable[[Any], Rows], deepspeed: str | None, package: str) -> dict[str, Any]:
    """Train on `rows_of(tokenizer)`, and write the weights, gathered, to the work folder.

    A row has `prompt` and `completion`, or for DPO `prompt`, `chosen` and `rejected`. Returns output, records, steps,
    loss (the last logged) and seconds. Raises `WorkFailed` where the loss is no number any more.
    """
    began = time.monotonic()
    options = arguments(config, deepspeed, package)  # before the model, since ZeRO-3 cuts what loads
    with quiet(), _no_bars(), progress("training steps") as bar:
        model, tokenizer = load(config.model, dtype="bfloat16" if config.bf16 and deepspeed else "float32")
        rows = rows_of(tokenizer)
        made = trainer_of(config, options, model, tokenizer, rows, trainer.Progress(bar))
        _begin(config, hashlib.blake2b(json.dumps(list(rows)).encode(), digest_size=8).hexdigest())
        last = trainer.checkpoint_of(config)
        made.train(resume_from_checkpoint=None if last is None else str(last))
        losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
        loss = float(losses[-1]) if losses else float(made.state.log_history[-1].get("train_loss", math.nan))
        if not math.isfinite(loss):
            raise WorkFailed(f"the training loss became {loss}; nothing was written: lower --learning-rate")
        if made.is_world_process_zero():  # a run that went on has the entries from before too
            log = "".join(json.dumps(entry) + "\n" for entry in made.state.log_history)
            (Path(config.work) / LOG).write_text(log)
        made.save_model(str(Path(config.work) / "trained"))
    return {
        "output": config.output, "records": len(made.train_dataset), "steps": made.state.global_step,
        "loss": loss, "seconds": time.monotonic() - began,
    }  # fmt: skip


def finish(config: SftRun, result: dict[str, Any], method: str, paper: str) -> None:
    """Write the output from the trained weights; one process, whole tensors."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # else ZeRO-3 would cut what is loaded now
    model, _ = load(config.work / "trained", tokenizer=False, dtype="bfloat16" if config.bf16 else "float32")
    _, tokenizer = load(config.model, dtype="auto")
    measured = {"records": result["records"], "steps": result["steps"], "last training loss": result["loss"]}
    card = Card(config.model, f"{method}: fine-tuned on {config.data}", paper, measured, config.settings())
    save(model, config.output, tokenizer, card=card, overwrite=config.overwrite, source=config.model)
    atomic_write(config.output / LOG, (config.work / LOG).read_text())
    shutil.rmtree(config.work)


def train(
    config: SftRun, rows_of: Callable[[Any], Rows], *, module_file: str, package: str, paper: str
) -> dict[str, Any]:
    """The whole of a package's `train`: fit, and write the student as an ordinary checkpoint with a model card.

    module_file: the package's module, beside whose tables/ the DeepSpeed files are.
    """
    from accelerate import PartialState

    from .launch import deepspeed_file

    deepspeed = deepspeed_file(module_file, config.deepspeed)
    config.goes_on()  # refuses another run before anything is loaded
    result = fit(config, rows_of, deepspeed, package)
    if is_main_process():
        finish(config, result, package, paper)
    PartialState().wait_for_everyone()
    return result
