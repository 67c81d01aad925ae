"""Eight-bit weights on top of the zeros, by llm-compressor: checkpoints in its format, which vLLM loads.

The schemes are symmetric, so that zero stays zero. Only the pruned matrices are quantised.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model_hooks.errors import RequestError
from ressa.merging import SPARSITY

SCHEMES = {"int8": "W8A8", "fp8": "FP8_DYNAMIC"}  # activations are quantised when it runs, token by token
STEPS = {"int8": 1 / 127, "fp8": 1 / 16}  # no weight moves by more than this share of its row's largest


def quantise(folder: str | Path, output: str | Path, form: str, *, overwrite: bool = False) -> dict[str, Any]:
    """Write a sparse checkpoint with its pruned matrices in 8 bits: one scale for each row, no calibration data.

    Args:
        folder: What `ressa prune` or `ressa merge` wrote, with its zeros.
        form: int8 or fp8 (e4m3).

    Returns:
        output, matrices, dense_bytes and bytes of the weights, sparsity, and error: how far a weight has moved at most,
        as a share of the largest of its row.

    Raises:
        RequestError: another folder or form, or the output exists.
        RuntimeError: what was written reads back without a zero, too far away, or with other weights changed.
    """
    from model_hooks import load
    from model_hooks.files import atomic_folder
    from model_hooks.processors import load_processor

    if form not in SCHEMES:
        raise RequestError(f"form {form!r} is not accepted; give {' or '.join(SCHEMES)}")
    modules = _sparse_modules(Path(folder))
    model, _ = load(folder, dtype="auto", tokenizer=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _refuse_dense(folder, modules, before)
    with atomic_folder(output, overwrite, folder) as part:
        with _silent():
            rest = _compress(model, list(modules), SCHEMES[form])
            model.save_pretrained(part, save_compressed=True)
            load_processor(folder).save_pretrained(part)
        _name_the_rest(part / "config.json", rest)
        (part / SPARSITY).write_text((Path(folder) / SPARSITY).read_text())
        error = _check(type(model), part, before, list(modules), STEPS[form])
        written = _bytes(part)
    zeros, numel = (sum(row[key] for row in modules.values()) for key in ("zeros", "numel"))
    return {
        "output": str(output), "matrices": len(modules), "dense_bytes": _bytes(Path(folder)), "bytes": written,
        "sparsity": zeros / numel, "error": error,
    }  # fmt: skip


@contextmanager
def _silent() -> Iterator[None]:
    """Without the libraries' bars, and without warnings of what is wanted here: a config besides the folder's."""
    from model_hooks.loading import quiet

    with quiet(), redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def _sparse_modules(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        modules: dict[str, dict[str, Any]] = json.loads((folder / SPARSITY).read_text())["modules"]
    except (OSError, ValueError, KeyError):
        modules = {}
    if not modules:
        raise RequestError(f"{folder} has no {SPARSITY} of pruned matrices; give what `ressa prune` or `merge` wrote")
    return modules


def _refuse_dense(folder: str | Path, modules: Mapping[str, dict[str, Any]], weights: Mapping[str, Tensor]) -> None:
    for path, row in modules.items():
        found = int((weights[f"{path}.weight"] == 0).sum())
        if found != row["zeros"]:
            raise RequestError(f"{folder}: {path} has {found} zeros, {SPARSITY} says {row['zeros']}; prune it again")
    if not any(row["zeros"] for row in modules.values()):
        raise RequestError(f"{folder} has no zeros to keep; prune without --keep-dense, or merge what was repaired")


def _compress(model: Any, paths: list[str], scheme: str) -> list[str]:
    """Quantise these linear layers of a model in place; returns the paths of the others."""
    from llmcompressor import oneshot

    from model_hooks.pruning import llm_compressor

    rest = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in paths]
    modifier = llm_compressor("quantization", "QuantizationModifier")
    oneshot(model=model, recipe=modifier(targets=["Linear"], scheme=scheme, ignore=rest))
    return rest


def _name_the_rest(file: Path, rest: list[str]) -> None:
    """Add to a checkpoint's config the layers that are not quantised by their paths in the model.

    transformers writes their names in the checkpoint, finds none of them when it loads, and would quantise them too.
    """
    config = json.loads(file.read_text())
    ours = config["quantization_config"]
    ours["ignore"] = sorted({*ours["ignore"], *rest})
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def _check(kind: type, folder: Path, before: Mapping[str, Tensor], paths: list[str], step: float) -> float:
    """The largest error; raise RuntimeError for what `quantise` promises and the folder does not hold."""
    from transformers import CompressedTensorsConfig

    with _silent():
        again: Any = kind
        after = again.from_pretrained(folder, quantization_config=CompressedTensorsConfig(dequantize=True)).state_dict()
    quantised = {f"{path}.weight" for path in paths}
    worst = 0.0
    for name, weight in before.items():
        if name not in after or (name not in quantised and not torch.equal(after[name], weight)):
            raise RuntimeError(f"{folder} reads back with another {name}, which was not to be quantised")
        if name in quantised:
            ours, theirs = weight.double(), after[name].double()
            if bool((theirs[ours == 0] != 0).any()):
                raise RuntimeError(f"{name} has lost zeros when it was quantised")
            largest = ours.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            worst = max(worst, float(((ours - theirs).abs() / largest).max()))
            if not worst <= step:
                raise RuntimeError(f"{name} has moved by {worst:.2%} of its row's largest weight, more than {step:.2%}")
    return worst


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
