"""The options of `meo convert` and `meo train`, and the flags of the original's scripts that mean the same."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

from meo.config import MeoConfig
from model_hooks.errors import RequestError
from paper_tables.errors import nearest

METHODS = ("none", "meo", "moe")
KINDS = ("classification", "clm", "mlm", "qa", "summarization")

# Of the original's scripts, which are transformers' examples with five flags more -> ours.
ALIASES = {
    "use-moe": "method", "n-experts": "experts", "moe-level": "level", "model-name-or-path": "model",
    "output-dir": "output", "num-train-epochs": "epochs", "per-device-train-batch-size": "batch-size",
    "gradient-accumulation-steps": "accumulation", "dataset-name": "data", "train-file": "data",
    "task-name": "data", "validation-file": "heldout", "max-seq-length": "length", "max-source-length": "length",
    "block-size": "length", "max-answer-length": "target-length", "max-train-samples": "samples",
    "max-eval-samples": "heldout-samples",
    "save-steps": "save-every", "logging-steps": "log-every", "overwrite-output-dir": "overwrite",
    "warmup-ratio": "warmup", "max-target-length": "target-length", "num-beams": "beams",
}  # fmt: skip
VALUES = {"none": "none", "MoE": "moe", "MEO": "meo", "Conv1D_MoE": "moe", "Conv1D_MEO": "meo"}
SWITCHES = ("overwrite-output-dir", "do-train", "do-eval", "do-predict", "only-tune-moe", "predict-with-generate",
            "load-best-model-at-end", "pad-to-max-length", "fp16", "overwrite-cache", "line-by-line")  # fmt: skip
LEFT_OUT = {
    "description-size": "descriptions are read with the model's own embeddings",
    "only-tune-moe": "it had no effect; --parts experts trains the experts alone",
    "max-tokens-per-batch": "it had no effect",
    "per-device-eval-batch-size": "evaluation takes batches of --batch-size",
    "predict-with-generate": "answers and summaries are always generated",
    "load-best-model-at-end": "the model of the last step is written",
    "metric-for-best-model": "the model of the last step is written",
    "fp16": "training is in float32; --bf16 halves it", "mlm-probability": "15 % of the tokens are to be found",
    "doc-stride": "what is longer than --length is cut", "lr-scheduler-type": "the rate falls as a cosine",
    "evaluation-strategy": "evaluation is before and after training",
    "eval-strategy": "evaluation is before and after training",
    "eval-steps": "evaluation is before and after training",
    "save-strategy": "checkpoints are written each --save-every steps",
    "do-train": "", "do-eval": "", "do-predict": "", "dataset-config-name": "give --data NAME:CONFIG",
    "pad-to-max-length": "", "overwrite-cache": "", "line-by-line": "", "save-total-limit": "",
    "preprocessing-num-workers": "", "report-to": "", "logging-dir": "", "logging-strategy": "",
}  # fmt: skip


def translate(given: Sequence[str]) -> list[str]:
    """A command line with the original's flags as one with ours; what has no meaning here is left out, with a note."""
    out: list[str] = []
    rest = list(given)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            out.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("_", "-")
        known = name in ALIASES or name in LEFT_OUT
        values = [value] if equals else []
        has_value = known and not equals and bool(rest) and not rest[0].startswith("--")
        if has_value and (name not in SWITCHES or rest[0].lower() in ("true", "false")):
            values = [rest.pop(0)]
        if name in LEFT_OUT:
            if LEFT_OUT[name]:
                print(f"note: --{name} is left out: {LEFT_OUT[name]}", file=sys.stderr)
            continue
        if name in SWITCHES:
            out += [] if values and values[0].lower() == "false" else [f"--{ALIASES[name]}"]
            continue
        if name == "use-moe" and values:
            if values[0] not in VALUES:
                raise RequestError(f"unknown use_moe {values[0]!r}{nearest(values[0], VALUES)}")
            values = [VALUES[values[0]]]
        spelled = f"--{ALIASES.get(name, name)}"
        out += [f"{spelled}={values[0]}"] if equals else [spelled, *values]
    return out


class WithAliases(TyperCommand):
    """A command that also takes the original's flags."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, translate(args))


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """How a model is converted; see `MeoConfig`.

    Args:
        method: none (a dense model), meo (merge the experts) or moe (mix their outputs).
        experts: Experts of each bank.
        k: Experts that are selected.
        level: task, sequence, token, prefix, chunk or cumulative; empty: sequence, and prefix for decoders.
        decoder_gate: Of an encoder-decoder's decoder: encoder, task, prefix, chunk or cumulative; empty: encoder.
        gate: noisy-topk, topk, softmax, sigmoid, gumbel-st or hash.
        gate_scope: Who shares a decision: linear (no one), ffn, layer or model.
        token_block: The token-level block, at levels other than token too.
        reduce: The block's width is that of the tokens divided by this.
        balance_coef: Weight of the balance loss.
        z_coef: Weight of the loss on the size of the gates' logits.
        bias_rate: Balance without a loss: each step moves the experts' biases of selection by this; 0: none.
        temperature: Divides the gates' logits.
        straight_through: Give gates of experts that were not selected a gradient too.
        init: noise, copy (the paper's), split or lora.
        lora_rank: With lora: rank of the experts' differences; 0: width / 48.
        targets: Regular expression of the linears to convert; empty: all of the feed-forwards.
        exclude: Regular expression of those to leave.
        chunk: Tokens of a chunk, at level chunk.
        order: auto, merge or output.
        tasks: JSON or YAML file, task -> description; or names separated by commas.
        allow_future_leak: Let a decoder's gates see later tokens, as the original did.
        seed: Of all that is drawn by lot.
    """

    method: str = "meo"
    experts: int = 8
    k: int = 2
    level: str = ""
    decoder_gate: str = ""
    gate: str = "noisy-topk"
    gate_scope: str = "linear"
    token_block: bool = False
    reduce: int = 64
    balance_coef: float = 0.01
    z_coef: float = 0.0
    bias_rate: float = 0.0
    temperature: float = 1.0
    straight_through: bool = False
    init: str = "noise"
    lora_rank: int = 0
    targets: str = ""
    exclude: str = ""
    chunk: int = 64
    order: str = "auto"
    tasks: str = ""
    allow_future_leak: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise RequestError(f"unknown method {self.method!r}{nearest(self.method, METHODS)}")
        _ = self.meo  # checked now, not when the model is loaded

    @cached_property
    def meo(self) -> MeoConfig | None:
        """The settings; None for a dense model."""
        if self.method == "none":
            return None
        same = ("method", "experts", "k", "level", "decoder_gate", "gate", "gate_scope", "reduce", "balance_coef",
                "z_coef", "bias_rate", "temperature", "straight_through", "init", "lora_rank", "chunk", "order",
                "allow_future_leak", "seed")  # fmt: skip
        return MeoConfig(
            **{name: getattr(self, name) for name in same}, token_block=self.token_block or None,
            targets=(self.targets,) if self.targets else (), exclude=(self.exclude,) if self.exclude else (),
            tasks=read_tasks(self.tasks),
        )  # fmt: skip


def read_tasks(given: str) -> dict[str, str]:
    """Task -> description, of a file or of names separated by commas. Raises `RequestError` for an empty file."""
    if not given.endswith((".json", ".yaml", ".yml")):
        return {name.strip(): "" for name in given.split(",") if name.strip()}
    import yaml

    path = Path(given)
    if not path.is_file():
        raise RequestError(f"no file {given}; it holds tasks and their descriptions")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RequestError(f"{given} is neither JSON nor YAML: {str(error).splitlines()[0]}") from None
    if not found or not isinstance(found, Mapping):
        raise RequestError(f"{given} holds no task; a mapping of names to descriptions is needed")
    return {str(name): str(text or "") for name, text in found.items()}
