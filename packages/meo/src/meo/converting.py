"""Turn a dense model into one of banks: every linear of every feed-forward, found by structure, in the stock model."""

from __future__ import annotations

import re
import warnings
from dataclasses import asdict, replace
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from model_hooks.errors import RequestError
from model_hooks.moe import mixture_of_experts

from .bank import BankSpec, MergedLinear, make_bank
from .classes import become_merged, is_merged
from .config import MeoConfig
from .context import Runtime
from .stacks import CODES, StackSpec, blocks, find_stacks, hook, located

ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
LINEARS = (nn.Linear, Conv1D)


def convert(model: Any, config: MeoConfig | None = None, tokenizer: Any = None, **changes: Any) -> Any:
    """Replace the linears of all feed-forwards by banks, in place; the function stays what it was.

    Args:
        model: a stock transformers model: an encoder, a decoder or both, with any head.
        config: settings; `changes` are made to it.
        tokenizer: of the model, for task descriptions.

    Returns:
        `model`, now of a class such as `MeoBertForMaskedLM`.

    Raises:
        RequestError (a ValueError): converted already, quantized, a mixture of experts, a level that would see future
            tokens, patterns that match nothing, a layer that is no linear. The model is left as it was.
    """
    config = replace(config or MeoConfig(), **changes)
    if is_merged(model):
        raise RequestError("this model is converted already; convert its dense base")
    if getattr(model, "hf_quantizer", None) is not None:
        raise RequestError("this model is quantized; convert the base in its own precision and quantize afterwards")
    if model.config.model_type not in CONFIG_MAPPING_NAMES:
        raise RequestError(f"{model.config.model_type} is no model type of transformers' own; convert its stock base")
    stacks = find_stacks(model, config)
    specs = _bank_specs(model, config, stacks)
    codes = task_codes(model, config, tokenizer) if any(s.level == "task" for s in stacks) else None
    old = {spec.name: model.get_submodule(spec.name) for spec in specs}
    record = {
        "config": config.to_dict(), "codes": None if codes is None else codes.shape[1],
        "stacks": [asdict(s) for s in stacks], "banks": [asdict(s) for s in specs],
    }  # fmt: skip
    with torch.device("meta"):  # what cannot be built says so before anything changes
        for spec in specs:
            make_bank(spec, config, Runtime(config, stacks[spec.stack].level, stacks[spec.stack].causal))
    model.config.meo = record
    with torch.random.fork_rng(devices=[]):  # what is drawn, the seed in `config` decides
        install(model)
    generator = torch.Generator().manual_seed(config.seed)
    for spec in specs:
        linear: Any = old[spec.name]
        weight = linear.weight.detach()
        bank = model.get_submodule(spec.name).to(weight.device, weight.dtype)
        bank.fill(weight.T if spec.conv1d else weight, linear.bias, generator)
        if bank.token is not None:
            bank.token.reset(generator)
        bank.train(linear.training)
    for stack in stacks:
        if codes is not None and stack.level == "task":
            getattr(model.get_submodule(stack.name), CODES).copy_(codes)
    become_merged(model)
    if config.init == "copy":
        warnings.warn("init copy: all experts are alike, so the gates get no gradient until noise has separated them",
                      stacklevel=2)  # fmt: skip
    return model


def install(model: Any) -> None:
    """Build empty banks and hooks as `model.config.meo` says."""
    record = model.config.meo
    config = MeoConfig.from_dict(record["config"])
    runtimes = []
    for spec in (StackSpec(**s) for s in record["stacks"]):
        module = model.get_submodule(located(model, spec.name))
        runtimes.append(Runtime(config, spec.level, spec.causal))
        hook(module, runtimes[-1])
        if spec.level == "task":
            parameter = next(model.parameters())
            empty = torch.empty(len(config.tasks), record["codes"], device=parameter.device)
            module.register_buffer(CODES, empty)
    for bank in (BankSpec(**b) for b in record["banks"]):
        parent, _, leaf = located(model, bank.name).rpartition(".")
        setattr(model.get_submodule(parent), leaf, make_bank(bank, config, runtimes[bank.stack]))


def would_convert(model: Any, config: MeoConfig) -> list[dict[str, Any]]:
    """The linears that `convert` would take, with their sizes."""
    stacks = find_stacks(model, config)
    return [
        {"linear": s.name, "level": stacks[s.stack].level, "in": s.inputs, "out": s.outputs, "bias": s.bias}
        for s in _bank_specs(model, config, stacks)
    ]


def banks(model: Any) -> dict[str, MergedLinear]:
    """All banks by name. Raises `RequestError` where there is none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, MergedLinear)}
    if not found:
        raise RequestError("this model has no banks of experts; convert it first")
    return found


def _bank_specs(model: Any, config: MeoConfig, stacks: list[StackSpec]) -> list[BankSpec]:
    found: list[BankSpec] = []
    width = model.get_input_embeddings().weight.shape[1]
    for number, stack in enumerate(stacks):
        leaders: dict[str, str] = {}
        for block, name, linear in _targets(model, stack, config):
            key = {"linear": name, "model": stack.name}.get(config.gate_scope, block)
            leader = leaders.setdefault(key, name)
            rows, columns = linear.weight.shape
            if isinstance(linear, Conv1D):
                rows, columns = columns, rows
            router = {"task": width, "encoder": _encoder_width(model)}.get(stack.level, columns)
            found.append(
                BankSpec(
                    name, number, columns, rows, linear.bias is not None, router if leader == name else 0, leader,
                    isinstance(linear, Conv1D),
                )
            )  # fmt: skip
    names = [spec.name for spec in found]
    for pattern in config.targets:
        if not any(re.search(pattern, name) for name in names):
            raise RequestError(f"target {pattern!r} matches no linear of the model's layers; see `meo inspect MODEL`")
    if not found:
        raise RequestError("no linear is left to convert; mend the targets or excludes")
    return found


def _encoder_width(model: Any) -> int:
    config = model.config
    return int(getattr(config, "d_model", None) or config.hidden_size)


def _targets(model: Any, stack: StackSpec, config: MeoConfig) -> list[tuple[str, str, Any]]:
    """(block, name, linear) of what is converted in a stack, in the order of the forward pass."""
    found = []
    for block, module in blocks(model, stack.name):
        for path, child in module.named_modules():
            name = f"{block}.{path}"
            if mixture_of_experts(child) is not None:
                raise RequestError(f"{name} is a mixture of experts already; `meo convert --pretrained` merges those")
            if config.targets:
                wanted = any(re.search(p, name) for p in config.targets) and not list(child.children())
            else:
                wanted = type(child) in LINEARS and not ATTENTION.search(path)
            if not wanted or any(re.search(p, name) for p in config.exclude):
                continue
            if type(child) not in LINEARS:
                raise RequestError(f"{name} is a {type(child).__name__}; only Linear and Conv1D layers become banks")
            found.append((block, name, child))
    return found


@torch.no_grad()
def task_codes(model: Any, config: MeoConfig, tokenizer: Any) -> Tensor:
    """What task-level gates look at, [tasks, width], each of unit mean square: the mean of the description's tokens in
    the model's own embeddings (frozen here), or a random vector by the task's name."""
    table = model.get_input_embeddings().weight
    rows = []
    for name, text in config.tasks.items():
        if text.strip():
            if tokenizer is None:
                raise RequestError(f"task {name} has a description; give the tokenizer, to read it")
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            row = table[torch.tensor(ids, device=table.device)].float().mean(0)
        else:
            seed = int.from_bytes(blake2b(name.encode(), digest_size=4).digest(), "little")
            row = torch.randn(table.shape[1], generator=torch.Generator().manual_seed(seed)).to(table.device)
        rows.append(row / row.square().mean().sqrt().clamp_min(1e-12))
    return torch.stack(rows)
