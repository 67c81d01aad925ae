"""Out of the bank again: a task as a plain dense checkpoint, experts as LoRA adapters for engines that serve those."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from model_hooks.errors import RequestError
from model_hooks.files import atomic_folder
from model_hooks.loading import quiet

from .bank import MergedLinear
from .classes import is_merged
from .context import Frame, options, with_options
from .converting import banks
from .stacks import CODES, located, unhook


@torch.no_grad()
def bake(model: Any, task: str) -> Any:
    """Turn a model whose banks are all gated by task into a plain dense one of its stock class, in place, for `task`.

    Raises `RequestError` for another level, a token block, an unknown task; the model is then as it was.
    """
    found = banks(model)
    for name, bank in found.items():
        if bank.runtime.level != "task":
            raise RequestError(f"{name} is gated by {bank.runtime.level}, not by task: its matrix depends on the input")
        if bank.token is not None:
            raise RequestError(f"{name} has a token block, which no dense linear can hold; train without it")
    with with_options(task=task, task_ids=None):
        matrices = _task_matrices(model, found)
    for name, (matrix, shift) in matrices.items():
        _replace(model, name, dense_linear(found[name], matrix, shift))
    _become_stock(model)
    return model


def _task_matrices(model: Any, found: dict[str, MergedLinear]) -> dict[str, tuple[Tensor, Tensor | None]]:
    frames: dict[int, Frame] = {}
    matrices = {}
    for name, bank in found.items():
        spec = model.config.meo["stacks"][bank.spec.stack]
        codes = getattr(model.get_submodule(located(model, spec["name"])), CODES)
        frame = frames.setdefault(bank.spec.stack, Frame(bank.runtime, options(), 1, 1, codes.device, codes=codes))
        task = frame.task_rows[0]
        was, bank.training = bank.training, False
        decision = bank.decision(codes, frame)
        matrix, shift = bank.merged(decision.idx[task : task + 1], decision.g[task : task + 1])
        bank.training = was
        matrices[name] = (matrix[0], None if shift is None else shift[0])
    return matrices


def dense_linear(bank: MergedLinear, matrix: Tensor, shift: Tensor | None) -> nn.Module:
    """A linear of the stock model's kind with this matrix [out, in] and bias [out]."""
    linear: Any
    if bank.spec.conv1d:
        linear = Conv1D(bank.out_features, bank.in_features)
        matrix = matrix.T.contiguous()
    else:
        linear = nn.Linear(bank.in_features, bank.out_features, bias=shift is not None)
    linear.weight = nn.Parameter(matrix.clone())
    if shift is not None:
        linear.bias = nn.Parameter(shift.clone())
    return linear.train(bank.training)


def _replace(model: Any, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _become_stock(model: Any) -> None:
    """Take the hooks off and give model and config back their stock classes."""
    assert is_merged(model)
    for stack in model.config.meo["stacks"]:
        unhook(model.get_submodule(located(model, stack["name"])))
    stock = type(model).meo_base
    model.__class__ = stock
    model.config.__class__ = stock.config_class
    del model.config.meo
    model.config.architectures = [stock.__name__]


@torch.no_grad()
def export(
    model: Any, folder: str | Path, tokenizer: Any = None, *, rank: int = 8, overwrite: bool = False
) -> list[dict[str, Any]]:
    """Write the mean of the experts as a dense checkpoint, `dense/`, and each expert's difference as a LoRA adapter,
    `expert-0/` and so on, by truncated SVD. The model becomes that mean.

    Returns:
        per bank: relative error of rank `rank`, ‖W_i − mean − low rank‖ / ‖W_i − mean‖ over all experts, and the
        largest difference of a bias, which an adapter cannot hold.
    """
    found = banks(model)
    if any(bank.token is not None for bank in found.values()):
        raise RequestError("token blocks cannot be exported as adapters; train without them")
    n = next(iter(found.values())).config.experts
    adapters: list[dict[str, Tensor]] = [{} for _ in range(n)]
    rows = []
    for name, bank in found.items():
        experts, biases = bank.merged(*_each(n, bank.weight.device))  # [n, out, in]
        mean = experts.mean(0)
        low = min(rank, *mean.shape)
        left, size, right = torch.linalg.svd((experts - mean).float(), full_matrices=False)
        root = size[:, :low].sqrt()
        up, down = left[:, :, :low] * root[:, None], right[:, :low] * root[..., None]
        for i in range(n):
            adapters[i][f"base_model.model.{name}.lora_A.weight"] = down[i].contiguous()
            adapters[i][f"base_model.model.{name}.lora_B.weight"] = up[i].contiguous()
        whole = size.square().sum().clamp_min(1e-30)
        offset = 0.0 if biases is None else float((biases - biases.mean(0)).abs().max())
        rows.append({"bank": name, "error": float((size[:, low:].square().sum() / whole).sqrt()), "bias": offset})
        _replace(model, name, dense_linear(bank, mean, None if biases is None else biases.mean(0)))
    conv1d = any(bank.spec.conv1d for bank in found.values())
    _become_stock(model)
    with atomic_folder(folder, overwrite) as part, quiet():
        model.save_pretrained(part / "dense")
        if tokenizer is not None:
            tokenizer.save_pretrained(part / "dense")
        for i, adapter in enumerate(adapters):
            _write_adapter(part / f"expert-{i}", adapter, rank, conv1d)
    return rows


def _each(n: int, device: Any) -> tuple[Tensor, Tensor]:
    """The decision of n groups that select one expert each."""
    return torch.arange(n, device=device)[:, None], torch.ones(n, 1, device=device)


def _write_adapter(folder: Path, tensors: dict[str, Tensor], rank: int, conv1d: bool) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    names = sorted({key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in tensors})
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "task_type": None,
        "target_modules": names, "fan_in_fan_out": conv1d, "inference_mode": True,
        "rank_pattern": {name: tensors[f"base_model.model.{name}.lora_A.weight"].shape[0] for name in names},
        "alpha_pattern": {name: tensors[f"base_model.model.{name}.lora_A.weight"].shape[0] for name in names},
    }  # fmt: skip
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
