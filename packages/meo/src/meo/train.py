"""Train a model whose feed-forwards are banks of experts (or a dense one, or a vanilla mixture: the baselines).

    meo train --model zoo:gpt2 --output tuned --data zoo:glue:order --experts 8 --k 4
    torchrun --nproc-per-node 8 -m meo.train --config configs/glue.yaml --model bert-base-uncased --output tuned
    accelerate launch -m meo.train ...        deepspeed --module meo.train ...

The first process loads the model, converts it, makes the rows and writes all that into a work folder beside the output
(`tuned.training`); then every process loads from there. A killed run goes on from its last checkpoint when the same
command is given again.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from meo.options import KINDS, Conversion, translate
from model_hooks.errors import RequestError
from paper_tables.errors import nearest
from paper_tables.launch import deepspeed_file, is_main_process, on_cpu, run_module
from paper_tables.options import command_of
from paper_tables.training import LOG, Run, prepare

START, TRAINED = "start", "trained"  # folders of the work folder
PARTS = ("all", "experts", "gates", "peft")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Conversion, Run):
    """What to convert, on what to train it, and how.

    Args:
        model: Hub id, checkpoint folder or zoo:NAME, dense or converted already; it is not written to.
        kind: classification, clm, mlm, qa or summarization.
        data: Text (clm, mlm: zoo:train, a file, a hub dataset) or records (zoo:glue:TASK, JSON, JSONL, CSV, hub, cola).
        heldout: Data to measure on; empty: the last rows of the data, which are then not trained on.
        samples: Rows to train on, fewer where the data has fewer.
        heldout_samples: Rows to measure on.
        length: Most tokens of an input.
        target_length: Most tokens of an answer or a summary.
        min_target_length: Least tokens of what is generated.
        beams: Of generated answers and summaries.
        no_repeat_ngram_size: So many tokens never come twice in what is generated; 0: they may.
        parts: What is trained: all, experts (the banks), gates, or peft (gates, token blocks, low-rank differences).
        decay_experts: Let weight decay act on the banks as on all else.
        fsdp: Cut the model over the processes by PyTorch's FSDP2.
    """

    kind: str = "classification"
    data: str = "zoo:glue:order"
    heldout: str = ""
    samples: int = 2000
    heldout_samples: int = 200
    length: int = 128
    target_length: int = 64
    min_target_length: int = 0
    beams: int = 1
    no_repeat_ngram_size: int = 0
    parts: str = "all"
    decay_experts: bool = True
    fsdp: bool = False
    learning_rate: float = 1e-4
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        Run.__post_init__(self)
        Conversion.__post_init__(self)
        for name, accepted in (("kind", KINDS), ("parts", PARTS)):
            value = getattr(self, name)
            if value not in accepted:
                raise RequestError(f"unknown {name} {value!r}{nearest(value, accepted)}")
        self.at_least(1, "samples", "heldout_samples", "target_length", "beams")
        self.at_least(2, "length")
        self.at_least(0, "min_target_length", "no_repeat_ngram_size")
        if self.fsdp:
            self._check_fsdp()

    def _check_fsdp(self) -> None:
        if self.deepspeed:
            raise RequestError("deepspeed and fsdp both cut the model; give one of them")
        self.needs_launcher("fsdp")
        if on_cpu():
            raise RequestError("fsdp: accelerate cuts models over GPUs only, and there is none; take --deepspeed zero3")


def train(config: TrainConfig) -> dict[str, Any]:
    """Train as `config` says and write the result; call it in every process of a launcher.

    Returns:
        output, steps, parameters, trainable, seconds; figures: a row each, measured on held-out data, before and after;
        reference: the paper's figures for this kind of task, see `published`.

    Raises:
        RequestError: the request cannot be met; nothing is written.
        WorkFailed: the loss is no number any more; the checkpoints are kept, the output is not written.
    """
    from model_hooks.files import refuse_existing, refuse_overlap
    from paper_tables.frame import require

    for module in ("accelerate", *(["deepspeed"] if config.deepspeed else [])):
        require(module, extra="train", package="meo")
    refuse_existing(config.output, config.overwrite)
    refuse_overlap(config.output, config.model)
    deepspeed = deepspeed_file(__file__, config.deepspeed)
    if is_main_process():
        prepare(config, partial(make_start, config))
    from accelerate import PartialState

    from meo import tuning

    arguments = tuning.arguments(config, deepspeed)  # joins the other processes
    PartialState().wait_for_everyone()
    prepared = config.record()
    result = tuning.fit(config, arguments)
    if is_main_process():
        result |= _finish(config, prepared)
    PartialState().wait_for_everyone()
    return result


def make_start(config: TrainConfig, part: Path) -> dict[str, Any]:
    """Write the converted model and the rows to the folder `part`; returns what the run must know beside them."""
    from transformers import set_seed

    from meo.workflow import load_for, scored, write_model

    set_seed(config.seed)  # a new head is drawn by lot
    labels = _labels(config)
    model, tokenizer = load_for(config.model, config.kind, config.meo, labels=labels)
    rows, held = _rows(config, model, tokenizer, labels)
    before = scored(model, tokenizer, held, config)
    write_model(model, part / START, tokenizer, config.model)
    for name, found in (("train", rows), ("heldout", held)):
        plain = [{k: v for k, v in row.items() if k not in ("prompt", "answers") or name == "heldout"} for row in found]
        (part / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    return {"before": before, "labels": labels}


def _labels(config: TrainConfig) -> list[str]:
    from meo.data import label_names, records

    if config.kind != "classification":
        return []
    found = [(source, "train") for source in config.data.split(",")]
    found += [(source, "heldout") for source in config.heldout.split(",") if source]
    how = {"samples": config.samples, "seed": config.seed}
    return label_names(r for source, split in found for r in records(source, split=split, **how))


def _rows(config: TrainConfig, model: Any, tokenizer: Any, labels: list[str]) -> tuple[list[Any], list[Any]]:
    """Rows to train on and rows to measure on."""
    from meo.classes import is_merged
    from meo.data import examples
    from paper_tables.training import split

    context = getattr(model.config, "max_position_embeddings", None) or config.length
    if config.length > context:
        raise RequestError(f"length {config.length} is more than the model's context of {context} tokens")
    tasks = list(model.config.meo["config"]["tasks"]) if is_merged(model) else []
    how: dict[str, Any] = {
        "length": config.length, "target_length": config.target_length, "seed": config.seed, "labels": labels,
        "tasks": tasks, "encoder_decoder": model.config.is_encoder_decoder,
    }  # fmt: skip
    if config.heldout:
        held = examples(config.kind, tokenizer, config.heldout, samples=config.heldout_samples, split="heldout", **how)
        return examples(config.kind, tokenizer, config.data, samples=config.samples, **how), held
    wanted = config.samples + config.heldout_samples
    return split(config, examples(config.kind, tokenizer, config.data, samples=wanted, **how), "rows")


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Rows as `make_start` wrote them."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def _finish(config: TrainConfig, prepared: dict[str, Any]) -> dict[str, Any]:
    """Measure what was trained and write it to the output."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from meo.workflow import load_for, scored, write_model
    from model_hooks.files import atomic_write

    unset_hf_deepspeed_config()  # else ZeRO-3 would cut what is loaded now
    model, tokenizer = load_for(str(config.work / TRAINED), config.kind, None, tokenizer=str(config.work / START))
    held = read_rows(config.work / "heldout.jsonl")
    after = scored(model, tokenizer, held, config)
    write_model(model, config.output, tokenizer, config.model, overwrite=config.overwrite)
    reference = published(config.kind)
    line = json.dumps({"reference only": reference})
    atomic_write(config.output / LOG, (config.work / LOG).read_text() + line + "\n")
    shutil.rmtree(config.work)
    before = prepared["before"]
    rows = [
        {"figure": k, "before": before[k]["value"], "after": v["value"], "se": v.get("se")} for k, v in after.items()
    ]
    return {"figures": rows, "reference": reference}


def published(kind: str) -> list[dict[str, Any]]:
    """The paper's figures for this kind of task, to be read beside a result and not as its target.

    They are from the abstract; models, seeds and settings behind them are not published in full. For kinds other than
    classification none is known for certain, so the list is empty.
    """
    from meo.tables import PAPER

    table = PAPER.tables()["levels" if kind == "classification" else "architectures"]
    titles = table.all_rows()
    return [
        {"figure": f"{titles[one.row]}: {table.columns[one.column].header}", "published": one.value,
         "source": f"{table.source}; {one.provenance}; for reference only"}
        for one in table.figures if one.shown
    ]  # fmt: skip


train_command = command_of(TrainConfig, train, "Train a model of merged experts, or a baseline, on one device or many.")


def main(argv: list[str] | None = None) -> None:
    """`python -m meo.train`, for launchers; the same as the verb `train` of `meo`."""
    given = translate(sys.argv[1:] if argv is None else argv)
    run_module("meo.train", train_command, given, "Train a model of merged experts.")


if __name__ == "__main__":
    main()
