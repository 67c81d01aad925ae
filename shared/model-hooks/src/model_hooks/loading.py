"""Load a model from a hub id, a folder or `zoo:NAME`, and refuse anything that would load wrongly but quietly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import RequestError

ZOO = "zoo:"


def resolve(source: str | Path) -> str:
    """What transformers is given for `source`: the folder of a zoo model, a local folder, or a hub id as it is."""
    text = str(source)
    if text.startswith(ZOO):
        from . import zoo

        try:
            return str(zoo.resolve(text))
        except ValueError as error:
            raise RequestError(str(error)) from error
    path = Path(text)
    if path.is_dir():
        _check_folder(path)
        return text
    if path.exists():
        raise RequestError(f"{text} is a file; a model is a hub id, a checkpoint folder or zoo:NAME")
    looks_local = path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1
    if looks_local:
        raise RequestError(f"no folder {text}; a model is a hub id (owner/name), a checkpoint folder or zoo:NAME")
    return text


def load(
    source: str | Path, *, dtype: Any = "auto", device_map: Any = None, tokenizer: bool = True, **kwargs: Any
) -> tuple[Any, Any]:
    """Load `source` for inference: (model in eval mode, tokenizer or None).

    `source`: hub id, checkpoint folder or `zoo:NAME`. Further arguments go to `from_pretrained` of the Auto class for
    causal language models, or of that for image-text-to-text models where only that one knows the model. Weights are
    read from safetensors only. Raises `RequestError` for a folder that is not a checkpoint, a truncated safetensors
    file, weights missing, left over or of other shapes than the config says.
    """
    where = resolve(source)  # before the imports that take seconds

    from transformers import AutoTokenizer

    kwargs = {"dtype": dtype, "device_map": device_map, "use_safetensors": True, **kwargs}
    with quiet():
        try:
            auto = _auto_class(where, kwargs)
            model, info = auto.from_pretrained(where, output_loading_info=True, **kwargs)
            loaded_tokenizer = AutoTokenizer.from_pretrained(where) if tokenizer else None
        except (OSError, ValueError, RuntimeError) as error:
            raise _explain(source, error) from error
    _refuse_mismatch(source, info)
    model.eval()
    if (getattr(model.config, "lean", None) or {}).get("edits") and not _on_meta(model):
        from .kv import check_once

        check_once(model)
    return model, loaded_tokenizer


def _auto_class(where: str, kwargs: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    hub = {k: kwargs[k] for k in ("revision", "token", "trust_remote_code", "cache_dir") if k in kwargs}
    config = type(kwargs.get("config") or AutoConfig.from_pretrained(where, **hub))
    only_with_images = config in AutoModelForImageTextToText._model_mapping
    only_with_images = only_with_images and config not in AutoModelForCausalLM._model_mapping
    return AutoModelForImageTextToText if only_with_images else AutoModelForCausalLM


def dtype_named(name: str) -> Any:
    """torch's float32, bfloat16 or float16; None for auto, as the checkpoint is stored. `RequestError` for another."""
    if name not in ("auto", "float32", "bfloat16", "float16"):
        raise RequestError(f"dtype {name!r} is not accepted; give auto, float32, bfloat16 or float16")

    import torch

    return None if name == "auto" else getattr(torch, name)


def load_placed(source: str | Path, dtype: str = "auto", device_map: str = "") -> tuple[Any, Any]:
    """`load` as commands want it: on the first GPU where there is one, unless `device_map` ("auto") spreads the model.

    dtype: as `dtype_named` takes it.
    """
    dtype_named(dtype)
    model, tokenizer = load(source, dtype=dtype, device_map=device_map or None)

    import torch

    if torch.cuda.is_available() and not device_map:
        model.to("cuda")
    return model, tokenizer


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of `source` alone."""
    where = resolve(source)

    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise _explain(source, error) from error


def _on_meta(model: Any) -> bool:
    return any(p.device.type == "meta" for p in model.parameters())


def _check_folder(folder: Path) -> None:
    """Refuse, by name, what is broken in a checkpoint folder; reads headers only."""
    if not (folder / "config.json").is_file():
        raise RequestError(f"{folder} has no config.json; a checkpoint folder holds config.json and *.safetensors")
    files = sorted(folder.glob("*.safetensors"))
    pickled = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
    if not files and pickled:
        raise RequestError(f"{folder} holds pickled weights ({pickled[0].name}); only safetensors are read: convert it")
    if not files:
        raise RequestError(f"{folder} holds no *.safetensors; a checkpoint folder holds config.json and weights")
    for file in files:
        check_safetensors(file)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RequestError(f"{index} is not an index of weights; copy it again") from error
        missing = sorted(n for n in named if not (folder / n).is_file())
        if missing:
            raise RequestError(f"{folder} lacks {missing[0]}, which its index names; the copy is incomplete")


def check_safetensors(file: Path) -> None:
    """Raise `RequestError` unless `file` is as long as its header says."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        prefix = handle.read(8)
        length = int.from_bytes(prefix, "little")
        try:
            header = json.loads(handle.read(length)) if len(prefix) == 8 and length < size else None
        except ValueError:
            header = None
    if not isinstance(header, dict):
        raise RequestError(f"{file} is not a safetensors file (broken header); copy it again")
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    if size != 8 + length + end:
        raise RequestError(f"{file} is truncated: {size} bytes, its header says {8 + length + end}; copy it again")


def _refuse_mismatch(source: str | Path, info: dict[str, Any]) -> None:
    said = {"missing_keys": "in the config but not in the weights", "mismatched_keys": "of another shape",
            "unexpected_keys": "in the weights but not in the config", "error_msgs": "reported as errors"}  # fmt: skip
    for key, meaning in said.items():
        wrong = sorted(str(k) for k in info.get(key) or ())
        if wrong:
            raise RequestError(
                f"{source}: config and weights do not match: {len(wrong)} tensors {meaning}, first {wrong[0]}; "
                "nothing was loaded"
            )


def _explain(source: str | Path, error: Exception) -> RequestError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if "mismatch" in str(error):
        reason = "config and weights do not match: some tensors have other shapes than the config says"
    elif "does not appear to have" in lines[0] or "connect" in str(error) or "offline" in str(error).lower():
        reason = "not found on the hub, or the hub cannot be reached; give a local folder or zoo:NAME"
    elif "backend tokenizer" in lines[0]:
        reason = "it holds no tokenizer; copy the base model's tokenizer files into it, or load with tokenizer=False"
    else:
        reason = lines[0]
    return RequestError(f"cannot load {source}: {reason}")


@contextmanager
def quiet() -> Iterator[None]:
    """transformers, and what it imports, without loading bars and messages; what they would say is checked here."""
    import logging

    from transformers.utils import logging as bars

    below, shown = logging.root.manager.disable, bars.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    bars.disable_progress_bar()
    try:
        yield
    finally:
        logging.disable(below)
        if shown:
            bars.enable_progress_bar()
