"""Repair a pruned vision-language model: sparse adapters that learn from the data and from the dense model.

    ressa repair --model sparse --output repaired
    torchrun --nproc-per-node 8 -m ressa.train --config configs/repair.yaml --model sparse --output repaired
    accelerate launch -m ressa.train ...            deepspeed --module ressa.train ...

A killed run goes on from its last checkpoint when the same command is given again, and gives the same weights bit for
bit on a CPU.
"""

from __future__ import annotations

import shutil
import sys
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_hooks.errors import RequestError
from paper_tables.errors import nearest
from paper_tables.launch import deepspeed_file, is_main_process, run_module
from paper_tables.options import command_of
from paper_tables.training import LOG, Run, prepare
from ressa.sharding import is_stage3

if TYPE_CHECKING:
    from ressa.data import Example

METHODS = ("sparselora", "full")
BACKWARDS = ("exact", "ste", "auto")
POSITIONS = ("target", "text", "all")
BRANCHES = ("vision", "connector", "language")


@dataclass(frozen=True)
class RepairConfig(Run):
    """What to repair, on what, and how.

    Args:
        model: Folder that `ressa prune` wrote: weights, dense or with their zeros, and masks.
        output: Folder for the adapters; with method full, for the repaired model itself.
        method: sparselora (masked adapters, merged by `ressa merge`) or full (all pruned weights, zeros kept).
        backward: Of masked adapters: exact, ste (no mask in the backward pass: faster, biased) or auto.
        rank: Of the adapters.
        rank_vision: Of the vision tower's; 0: as rank.
        rank_connector: Of the connector's; 0: as rank.
        rank_language: Of the language model's; 0: as rank.
        alpha: The adapters' scale is alpha / rank.
        branches: Which get adapters: vision, connector, language, separated by commas.
        teacher: The dense model, where the folder has zeros; empty: its own dense weights; none: the data alone.
        teacher_cache: Folder that `ressa teacher-cache` wrote, instead of a teacher that runs in each step.
        teacher_kind: What of the teacher is dense: DD (both towers), DS (vision alone) or SD (language alone).
        kl_weight: Share of the loss that is the divergence from the teacher.
        temperature: Of both sides of it.
        positions: Tokens where it counts: target (answers), text or all.
        loss_mode: ours, or original (summed over positions, no factor of the squared temperature).
        feature_weight: Weight of a loss on the connector's output.
        data: zoo:shapes, a .jsonl file, a folder of datasets or a hub name.
        samples: Examples to train on, one for each answer to an image; fewer where the data has fewer.
        max_length: Tokens of an example at most, with its image; 0: no limit.
        skip_bad_rows: So many records that cannot be used are passed over.
        learning_rate: Peak, after which it falls as a cosine to a tenth.
        deepspeed: zero2, zero3, or a DeepSpeed file of your own; needs a launcher.

    Raises:
        RequestError: a value is not accepted.
    """

    method: str = "sparselora"
    backward: str = "exact"
    rank: int = 16
    rank_vision: int = 0
    rank_connector: int = 0
    rank_language: int = 0
    alpha: float = 16.0
    branches: str = "vision,connector,language"
    teacher: str = ""
    teacher_cache: str = ""
    teacher_kind: str = "DD"
    kl_weight: float = 0.5
    temperature: float = 2.0
    positions: str = "target"
    loss_mode: str = "ours"
    feature_weight: float = 0.0
    data: str = "zoo:shapes"
    samples: int = 25_000
    max_length: int = 0
    skip_bad_rows: int = 0
    learning_rate: float = 2e-4
    batch_size: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("method", METHODS), ("backward", BACKWARDS), ("positions", POSITIONS),
                            ("loss_mode", ("ours", "original")), ("teacher_kind", ("DD", "DS", "SD"))):  # fmt: skip
            value = getattr(self, name)
            if value not in known:
                raise RequestError(f"{name} {value!r} is not accepted{nearest(value, known)}")
        self.at_least(1, "rank", "samples")
        self.at_least(
            0, "rank_vision", "rank_connector", "rank_language", "max_length", "skip_bad_rows", "feature_weight"
        )
        if self.method == "full" and self.teacher_kind != "DD":
            raise RequestError(f"teacher_kind {self.teacher_kind} needs masked adapters; leave out --method full")
        self._check_cache()
        if not 0 <= self.kl_weight <= 1:
            raise RequestError(f"kl_weight is {self.kl_weight}; a share of the loss, 0 to 1, is needed")
        if not self.temperature > 0 or not self.alpha > 0:
            raise RequestError(f"temperature is {self.temperature} and alpha {self.alpha}; numbers above 0 are needed")
        if not self.learning_rate:
            raise RequestError("learning_rate is 0; a number above 0 is needed")
        unknown = [name for name in self.chosen if name not in BRANCHES]
        if unknown or not self.chosen:
            raise RequestError(f"branches {self.branches!r} is not accepted{nearest(self.branches, BRANCHES)}")

    def _check_cache(self) -> None:
        if not self.teacher_cache:
            return
        if self.teacher:
            raise RequestError("teacher and teacher_cache both name a teacher; give one of them")
        needed = {"positions": "target", "loss_mode": "ours", "teacher_kind": "DD", "feature_weight": 0}
        for name, only in needed.items():
            value = getattr(self, name)
            if value != only:
                raise RequestError(
                    f"{name} {value} needs a teacher that runs; a teacher_cache holds the dense model's answers at the "
                    "tokens with a label"
                )

    @property
    def chosen(self) -> tuple[str, ...]:
        """The branches that get adapters."""
        return tuple(part.strip() for part in self.branches.split(",") if part.strip())

    @property
    def wanted_teacher(self) -> str:
        """`teacher`, or none where the loss has no use for one."""
        runs = (self.kl_weight or self.feature_weight) and not self.teacher_cache
        return self.teacher if runs else "none"

    def examples(self) -> list[Example]:
        """What to train on, read."""
        from ressa.data import read

        return read(self.data, self.samples, seed=self.seed, skip_bad_rows=self.skip_bad_rows, apart=True)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank by branch."""
        return {name: getattr(self, f"rank_{name}") or self.rank for name in self.chosen}


def repair(config: RepairConfig) -> dict[str, Any]:
    """Repair as `config` says and write the result; call it in every process of a launcher.

    Returns:
        output, examples, steps, loss (the last logged), trainable parameters, seconds.

    Raises:
        RequestError: the request cannot be met, nothing is written.
        WorkFailed: the loss is no number any more; the checkpoints are kept, the output is not written.
    """
    from model_hooks.files import refuse_existing, refuse_overlap
    from paper_tables.frame import require

    for module in ("accelerate", "datasets", *(["deepspeed"] if config.deepspeed else [])):
        require(module, extra="train", package="ressa")
    refuse_existing(config.output, config.overwrite)
    refuse_overlap(config.output, config.model)
    deepspeed = deepspeed_file(__file__, config.deepspeed)
    if config.method == "full" and is_stage3(deepspeed):
        raise RequestError(f"method full keeps zeros in whole weights, which {deepspeed} splits; use zero2")
    if is_main_process():
        prepare(config, partial(_start, config))
    from accelerate import PartialState

    from ressa import repairing

    arguments = repairing.arguments(config, deepspeed)  # joins the other processes
    PartialState().wait_for_everyone()
    try:
        result, write = repairing.fit(config, arguments)
    except RequestError:
        if is_main_process() and not any(config.work.glob("checkpoint-*")):
            shutil.rmtree(config.work)  # refused before a step was made: nothing to go on with
        raise
    write(config.output)
    if is_main_process():
        shutil.copyfile(config.work / LOG, config.output / LOG)
        shutil.rmtree(config.work)
    PartialState().wait_for_everyone()
    return result


def _start(config: RepairConfig, part: Path) -> dict[str, Any]:
    """Refuse before any training what cannot work; all processes read the data themselves."""
    from transformers import AutoConfig

    from model_hooks.processors import load_processor
    from ressa.data import BadRow
    from ressa.encoding import encoder_of
    from ressa.folders import has_dense, pruned_folder

    record = pruned_folder(config.model)
    has_dense(config.model, config.wanted_teacher)
    model = AutoConfig.from_pretrained(config.model)
    if config.teacher_cache:
        from ressa.teachercache import Cache

        Cache(config.teacher_cache).refuse_others(config, model.get_text_config(decoder=True).vocab_size)
    encoder = encoder_of(model, load_processor(config.model), config.max_length)
    examples = config.examples()
    if len(examples) < config.samples:
        warnings.warn(f"{config.data} gives {len(examples)} examples, {config.samples} are asked for", stacklevel=2)
    left_out = []
    for i, one in enumerate(examples if config.max_length else examples[:1]):  # lengths are known once encoded
        try:
            encoder.encode(one)
        except BadRow:
            left_out.append(i)
            if len(left_out) > config.skip_bad_rows:
                raise
    if len(left_out) == len(examples):
        raise RequestError(f"none of {len(examples)} examples of {config.data} can be used")
    return {"masks": record["masks"], "left_out": left_out}


repair_command = command_of(RepairConfig, repair, "Repair a pruned model with masked adapters: every zero stays.")


def main(argv: list[str] | None = None) -> None:
    """`python -m ressa.train`, for launchers; the same as the verb `repair` of `ressa`."""
    run_module("ressa.train", repair_command, sys.argv[1:] if argv is None else argv, "Repair a pruned model.")


if __name__ == "__main__":
    main()
