"""Masked adapters from a folder and onto a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from model_hooks.errors import RequestError
from ressa.sparselora import NAME, attach, set_backward

__all__ = ["attach", "load_adapters", "set_backward"]


def load_adapters(model: Any, folder: str | Path, *, trainable: bool = False) -> Any:
    """`model`, the base of these adapters, dense or pruned, with them: a PeftModel.

    Raises:
        RequestError: no folder of masked adapters.
        MaskMismatchError: the masks were made for another model; names the first module and both hashes.
    """
    from peft import PeftConfig, PeftModel

    if not (Path(folder) / "adapter_config.json").is_file():
        raise RequestError(f"{folder} has no adapter_config.json; give a folder that `ressa repair` wrote")
    kind = PeftConfig._get_peft_type(str(folder))
    if kind != NAME:
        raise RequestError(f"{folder} holds {kind} adapters; {NAME} is needed, as `ressa repair` writes")
    return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
