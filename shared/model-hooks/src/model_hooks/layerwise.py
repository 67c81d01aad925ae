"""Watch and change models that are larger than memory: the weights of one decoder layer are resident at a time.

`watch_layerwise` carries the hidden states of all samples from layer to layer, so that each layer is read from disk
once (and once more to learn the anatomy). They take samples * length * hidden_size numbers of the model's precision: in
RAM, which is fast, or in a memory-mapped file (`buffer`), which costs a write and a read of that size per layer.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import RequestError
from .files import atomic_folder
from .layer_stream import LayerStream
from .lean import _pack
from .structure import Anatomy, Block
from .trace import eval_mode, first_tensor, unpack
from .watch import Hooks, Progress, ResidualWatcher, check_data, own_share, reduce_sums

NOT_COPIED = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".md")


def watch_layerwise(
    source: str | Path | LayerStream,
    sequences: Tensor,
    watcher: ResidualWatcher,
    *,
    attention_mask: Tensor | None = None,
    batch_size: int = 4,
    buffer: Path | None = None,
    progress: Progress | None = None,
) -> Anatomy:
    """As `model_hooks.watch.watch`, with the weights of one layer resident at a time; returns the model's anatomy.

    Args:
        buffer: folder for the file of hidden states; without it they stay in RAM.
        progress: called with (layers done, layers).

    Raises `RequestError` also for a watcher with `whole_batches`: blocks come one by one, each with all batches.
    """
    if watcher.whole_batches:
        raise RequestError(f"this {type(watcher).__name__} compares blocks with each other (gaps); turn that off here")
    stream = source if isinstance(source, LayerStream) else LayerStream(source)
    mask = check_data(stream.model, sequences, attention_mask)
    parts = stream.anatomy()
    share = own_share(len(sequences))
    with torch.no_grad(), eval_mode(stream.model), ExitStack() as stack:
        carry = _Carry(stack, (len(share), sequences.shape[1]), buffer)
        for block in parts.blocks:
            with stream.resident(block.name), Hooks((block,), parts, watcher) as hooks, carry.only(block, parts):
                for rows in torch.arange(len(share)).split(batch_size) if len(share) else ():
                    carry.rows = rows
                    hooks.run(share[rows], sequences, mask)
            if progress:
                progress(block.index + 1, len(parts.blocks))
    reduce_sums(watcher)
    return parts


def _pass_on(returns: int) -> Callable[..., Any]:
    """A forward that gives back the hidden states that it gets."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden_states = first_tensor(args, kwargs)
        assert hidden_states is not None
        return _pack(hidden_states, returns)

    return forward


class _Carry:
    """Hidden states of all samples between two layers. The decoder's own forward runs for every layer, with all other
    layers passing on what they get: so masks, positions and rotary embeddings are exactly those that it computes."""

    def __init__(self, stack: ExitStack, shape: tuple[int, int], buffer: Path | None) -> None:
        self.stack, self.shape, self.buffer = stack, shape, buffer
        self.rows = torch.zeros(0, dtype=torch.long)  # of the batch at work, in this process's share
        self.states: Tensor | None = None  # [samples, T, H], none before the first layer has run

    @contextmanager
    def only(self, block: Block, parts: Anatomy) -> Iterator[None]:
        others = [b for b in parts.blocks if b is not block]
        first = block.index == 0
        with ExitStack() as undo:
            for other in others:
                other.module.forward = _pass_on(other.returns)
                undo.callback(other.module.__dict__.pop, "forward")
            if not first:
                before = block.module.register_forward_pre_hook(self.give, with_kwargs=True, prepend=True)
                undo.callback(before.remove)
            undo.callback(block.module.register_forward_hook(self.take).remove)
            yield

    def give(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        assert self.states is not None
        passed = first_tensor(args, kwargs)
        assert passed is not None
        carried = self.states[self.rows].to(passed.device)
        return tuple(carried if a is passed else a for a in args), {
            k: carried if v is passed else v for k, v in kwargs.items()
        }

    def take(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        y, _ = unpack(output)
        assert y is not None
        if self.states is None:
            self.states = self.room((*self.shape, y.shape[-1]), y.dtype)
        self.states[self.rows] = y.to(self.states.device)

    def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.buffer is None:
            return torch.empty(shape, dtype=dtype)
        self.buffer.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(".states", dir=self.buffer)
        os.close(handle)
        self.stack.callback(os.unlink, name)
        return torch.from_file(name, shared=True, size=torch.Size(shape).numel(), dtype=dtype).view(shape)


def map_layers(
    source: str | Path, folder: str | Path, function: Callable[[int, nn.Module], None], *, overwrite: bool = False
) -> Path:
    """Write to `folder` the checkpoint `source` with every decoder layer changed by `function(index, layer)`.

    The function changes the layer's weights in place, keeping names and shapes; one layer is in memory at a time and
    becomes one file. All other tensors, config and tokenizer are copied. `folder` appears whole or not at all.

    Raises `RequestError` if `folder` exists or overlaps the source, or a layer has other names or shapes afterwards.
    """
    stream = LayerStream(source)
    names = stream.lazy[: len(stream.layers)]
    in_layers = {key for name in names for key in stream.keys(name)}
    with atomic_folder(folder, overwrite, stream.folder) as part:
        shards = _Shards(part)
        for index, name in enumerate(names):
            with stream.resident(name) as layer:
                before = {n: t.shape for n, t in layer.state_dict().items()}
                with torch.no_grad():
                    function(index, layer)
                if {n: t.shape for n, t in layer.state_dict().items()} != before:
                    raise RequestError(f"{name} has other weights or shapes after the function; only values may change")
                shards.add(stream.stored(name))
        for file in dict.fromkeys(stream.files.values()):
            rest = [key for key, holder in stream.files.items() if holder == file and key not in in_layers]
            shards.add(stream.read(rest))
        shards.finish()
        for found in stream.folder.iterdir():
            if found.is_file() and not found.name.endswith(NOT_COPIED):
                shutil.copy(found, part / found.name)
    return Path(folder)


class _Shards:
    """Safetensors files written one after another, and the index over them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.size = folder, 0
        self.shards: list[list[str]] = []

    def add(self, tensors: dict[str, Tensor]) -> None:
        from safetensors.torch import save_file

        if not tensors:
            return
        self.shards.append(sorted(tensors))
        self.size += sum(t.nbytes for t in tensors.values())
        save_file(tensors, self.folder / f"{len(self.shards)}.part", metadata={"format": "pt"})

    def finish(self) -> None:
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self.shards, 1):
            file = f"model-{number:05d}-of-{len(self.shards):05d}.safetensors"
            (self.folder / f"{number}.part").rename(self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self.size}, "weight_map": weight_map}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
