"""Save a changed model as an ordinary checkpoint folder, and prove that it reads back as the same model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .files import atomic_folder
from .lean import needs_lean
from .loading import _auto_class, load, quiet
from .processors import processor_for


@dataclass(frozen=True)
class Card:
    """What the model card says: which base, what was done to it, with what measured effect, how it is loaded."""

    base: str
    method: str  # e.g. "llm-drop: attention of blocks 3, 4 and 7 dropped"
    source: str = ""  # paper, e.g. "arXiv 2406.15786"
    measured: Mapping[str, object] = field(default_factory=dict)  # name -> value, with the unit in the name
    settings: Mapping[str, object] = field(default_factory=dict)
    use: str = ""  # Markdown; default: transformers' Auto class, after `import model_hooks` where that is needed
    library: str = "transformers"  # what the hub calls the one that loads it

    def markdown(self, model: Any) -> str:
        lines = [
            "---",
            f"library_name: {self.library}",
            f"base_model: {json.dumps(self.base)}",
            "tags: [leanformers]",
            "---",
            "",
            f"# {self.base}, changed",
            "",
            f"{self.method}." + (f" Method: {self.source}." if self.source else ""),
            "",
            f"{sum(p.numel() for p in model.parameters()):,} parameters, {model.dtype}.",
            "",
            *_table("Measured", self.measured),
            *_table("Settings", self.settings),
            "## Use",
            "",
            self.use or _use(model),
            "",
        ]
        return "\n".join(lines)


def _use(model: Any) -> str:
    auto = _auto_class("", {"config": model.config}).__name__
    needs_us = needs_lean(getattr(model.config, "lean", None))
    lines = [
        "```python",
        *(["import model_hooks  # teaches transformers this checkpoint's model type"] if needs_us else []),
        f"from transformers import {auto}",
        "",
        f'model = {auto}.from_pretrained("this folder")',
        "```",
    ]
    return "\n".join(lines)


def _table(title: str, values: Mapping[str, object]) -> list[str]:
    if not values:
        return []
    rows = [f"| {k} | {f'{v:.6g}' if isinstance(v, float) else v} |" for k, v in values.items()]
    return [f"## {title}", "", "| | |", "|---|---|", *rows, ""]


def save(
    model: Any,
    folder: str | Path,
    tokenizer: Any = None,
    *,
    card: Card,
    overwrite: bool = False,
    source: str | Path | None = None,
    verify: bool = True,
    like: Any = None,
    max_shard_size: str = "5GB",
) -> Path:
    """Write `model` (and `tokenizer`) to `folder`: safetensors, config with its `lean` section, model card.

    Beside a model that takes images goes the processor that it came with. The folder appears whole or not at all.
    `source` is the folder it came from, never written into. With `verify` the result is loaded again, on the devices of
    `like` (default: `model`), and must give the logits of `like` bit for bit (takes the model's memory a second time;
    without it, names and shapes are still checked). Raises `RequestError` if `folder` exists, RuntimeError if it reads
    back otherwise than it was.
    """
    with atomic_folder(folder, overwrite, source) as part:
        with quiet():
            model.save_pretrained(part, max_shard_size=max_shard_size)
            if tokenizer is not None:
                processor_for(model, tokenizer).save_pretrained(part)
        (part / "README.md").write_text(card.markdown(model))
        _check_structure(model, part)
        if verify:
            _check_logits(model if like is None else like, part)
    return Path(folder)


def _check_structure(model: Any, folder: Path) -> None:
    """The config alone must build a model with this model's tensors."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"), quiet():
        rebuilt = type(model)(config)
    want = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    got = {k: tuple(v.shape) for k, v in rebuilt.state_dict().items()}
    wrong = sorted(k for k in want.keys() | got.keys() if want.get(k) != got.get(k))
    if wrong:
        raise RuntimeError(f"the saved config does not describe the model: {len(wrong)} tensors differ, {wrong[:3]}")


@torch.no_grad()
def _check_logits(model: Any, folder: Path) -> None:
    from .trace import eval_mode, small_input

    ids = small_input(model)
    again, _ = load(folder, dtype=model.dtype, device_map=getattr(model, "hf_device_map", None), tokenizer=False)
    again = again if hasattr(again, "hf_device_map") else again.to(ids.device)
    _cast_buffers_alike(model, again)
    for weight in again.parameters():  # mapped from a file a weight may lie where sums are rounded otherwise
        if weight.device.type == "cpu" and weight.data_ptr() % 64:
            weight.data = weight.data.clone()
    with eval_mode(model):
        want = model(input_ids=ids, use_cache=False).logits
    got = again(input_ids=ids, use_cache=False).logits
    if not torch.equal(want, got):
        error = float((want - got).abs().max())
        raise RuntimeError(f"the saved checkpoint reads back with other logits (off by {error:.2e}); nothing was kept")


def _cast_buffers_alike(model: Any, again: Any) -> None:
    """`model.to(bfloat16)` casts buffers that no checkpoint holds (rotary frequencies); a reload has them in float32.

    Where the cast is all that differs, `again` gets it too, so that what is compared is what was saved.
    """
    ours = dict(model.named_buffers())
    for name, buffer in list(again.named_buffers()):
        mine = ours.get(name)
        if mine is not None and mine.dtype != buffer.dtype and torch.equal(buffer.to(mine), mine):
            path, _, leaf = name.rpartition(".")
            again.get_submodule(path).register_buffer(leaf, mine.clone(), persistent=False)
