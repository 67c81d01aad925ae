"""Watch and change models that are larger than memory: the weights of one decoder layer are resident at a time.

`watch_layerwise` carries the hidden states of all samples from layer to layer, so that each layer is read from disk
once (and once more to learn the anatomy). They take samples * length * hidden_size numbers of the model's precision: in
RAM, which is fast, or in a memory-mapped file (`buffer`), which costs a write and a read of that size per layer.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import RequestError
from .files import atomic_folder
from .layer_stream import LayerStream
from .layer_walk import LayerWalk
from .structure import Anatomy
from .watch import Progress, ResidualWatcher, reduce_sums

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
        buffer: folder for the two files of hidden states; without it they stay in RAM.
        progress: called with (layers done, layers).

    Raises `RequestError` also for a watcher with `whole_batches`: blocks come one by one, each with all batches.
    """
    if watcher.whole_batches:
        raise RequestError(f"this {type(watcher).__name__} compares blocks with each other (gaps); turn that off here")
    stream = source if isinstance(source, LayerStream) else LayerStream(source)
    with _folder_of_states(buffer) as room:
        walk = LayerWalk(stream, sequences, attention_mask=attention_mask, batch_size=batch_size, room=room)
        for block in walk.layers():
            walk.show(watcher, carry=True)
            if progress:
                progress(block.index + 1, len(walk.parts.blocks))
    reduce_sums(watcher)
    return walk.parts


@contextmanager
def _folder_of_states(buffer: Path | None) -> Iterator[Path | None]:
    if buffer is None:
        yield None
        return
    buffer.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(suffix=".states", dir=buffer) as room:
        yield Path(room)


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
