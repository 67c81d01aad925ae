"""Slim a checkpoint of any size: one decoder layer in memory at a time, a stopped run goes on.

Layer by layer: its weights are read, the calibration data runs through it, it is slimmed, its file is written and what
it now gives goes on to the next. The work folder beside the output (`NAME.slimming`) holds the finished layers' files,
a manifest with their hashes, and the hidden states; the output folder appears when everything is there and was read
back.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model_hooks.errors import RequestError
from model_hooks.experts import MoeLayer, moe_layers
from model_hooks.files import atomic_folder, atomic_write, refuse_existing, refuse_overlap
from model_hooks.identity import combined, tensor_digest
from model_hooks.layer_stream import LayerStream
from model_hooks.layer_walk import LayerWalk
from model_hooks.layerwise import NOT_COPIED
from model_hooks.structure import Anatomy, Block
from moe_compress import packing
from moe_compress.moments import Moments, matrices_of
from moe_compress.quantising import Grid
from moe_compress.slimming import NEEDS_DATA, Show, Slimming, least_workspace, slim_block

MANIFEST, REPORT = "manifest.json", "slimming.json"
FORMATS = ("compressed-tensors", "dense")


@dataclass(frozen=True)
class Setup:
    """Everything that decides the result of a run."""

    source: str
    how: Slimming
    form: str
    data: str

    @property
    def fingerprint(self) -> str:
        return hashlib.blake2b(json.dumps(asdict(self), sort_keys=True).encode(), digest_size=8).hexdigest()


def slim(
    source: str | Path, folder: str | Path, sequences: Tensor | None, how: Slimming, *,
    form: str = "compressed-tensors", attention_mask: Tensor | None = None, batch_size: int = 4,
    workspace: float = 4e9, overwrite: bool = False, progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Slim the experts of checkpoint `source` into `folder`; returns the report that is kept there as slimming.json.

    Args:
        sequences, attention_mask: calibration token ids and mask, [samples, T]; None for magnitude and rtn.
        form: of quantised weights: "compressed-tensors" (packed) or "dense" (the rounded weights as floats).
        workspace: bytes that moments of inputs and their factors may take at once.

    Raises:
        RequestError: nothing was written: no mixture of experts, quantised already, an output that exists, groups that
            do not divide the inputs, no data, an expert without tokens where the policy is "error".
    """
    folder = Path(folder)
    refuse_existing(folder, overwrite)
    refuse_overlap(folder, source)
    stream = _checked(source, how, form, sequences)
    parts = stream.anatomy()
    mixtures = {layer.block: layer for layer in moe_layers(parts)}
    _check_matrices(parts, mixtures, how, workspace)
    show: Show
    work = _Work(folder, Setup(_identity(stream), how, form, _digest(sequences, attention_mask)), parts)
    if how.method in NEEDS_DATA:
        assert sequences is not None
        walk = LayerWalk(
            stream, sequences, attention_mask=attention_mask, batch_size=batch_size, room=work.room / "states"
        )
        layers, parts, show = walk.layers(), walk.parts, walk.show
        mixtures = {layer.block: layer for layer in moe_layers(parts)}
    else:
        layers, show = _resident(stream, parts, work.done), _nothing_to_show
    for block in layers:
        with _clean_up_on_refusal(work):
            if how.method in NEEDS_DATA and how.propagate == "dense":
                walk.show(Moments([], outer=False, sample_tokens=0), carry=True)
            report, grids = slim_block(
                how, stream.model, block, mixtures.get(block.index), parts.original_index[block.index], show,
                workspace=workspace,
            )  # fmt: skip
        work.write(stream, block, grids if form != "dense" else {}, report)
        if progress:
            progress(block.index + 1, len(parts.blocks))
    return work.finish(stream, overwrite)


def _nothing_to_show(moments: Moments) -> None:
    raise AssertionError("this method needs no data")


def _checked(source: str | Path, how: Slimming, form: str, sequences: Tensor | None) -> LayerStream:
    """The stream of a source that can be slimmed so."""
    from model_hooks.loading import resolve

    if form not in FORMATS:
        raise RequestError(f"format {form!r} is not accepted; give {' or '.join(FORMATS)}")
    if how.method in NEEDS_DATA and (sequences is None or not sequences.numel()):
        raise RequestError(f"{how.method} needs calibration data; there is none")
    where = Path(resolve(source))
    if where.is_dir() and packing.is_packed(where):
        raise RequestError(f"{source} is quantised already; give the model from before (or `export --to dense`)")
    return LayerStream(source)


def _check_matrices(parts: Anatomy, mixtures: dict[int, MoeLayer], how: Slimming, workspace: float) -> None:
    for block in parts.blocks:
        everything = how.scope == "block"
        found = matrices_of(block.module, mixtures.get(block.index), everything=everything, exclude=how.exclude)
        how.check(found)
        if (least := least_workspace(how, found)) > workspace:
            raise RequestError(
                f"a workspace of {workspace / 1e9:.3g} GB is too small: the moments of one expert of {block.name} and "
                f"their factors take {least / 1e9:.3g} GB; give --workspace {least / 1e9:.3g} or more"
            )
        mine = [m for m in found if m.expert is not None]
        layer = mixtures.get(block.index)
        if layer is not None and not how.prunes and 0 < len(mine) < 3 * layer.num_experts:
            raise RequestError(
                f"exclude {list(how.exclude)} leaves out some experts' matrices; quantise all of a layer's or none"
            )


def _resident(stream: LayerStream, parts: Anatomy, start: int) -> Iterator[Block]:
    with torch.no_grad():
        for block in parts.blocks[start:]:
            with stream.resident(block.name):
                yield block


def _identity(stream: LayerStream) -> str:
    """The source as far as its files' names and sizes tell; the weights themselves would have to be read."""
    sizes = {file.name: str(file.stat().st_size) for file in dict.fromkeys(stream.files.values())}
    return combined(stream.model.config, sizes)


def _digest(sequences: Tensor | None, mask: Tensor | None) -> str:
    return "|".join("none" if t is None else tensor_digest(t.long()) for t in (sequences, mask))


@contextmanager
def _clean_up_on_refusal(work: _Work) -> Iterator[None]:
    try:
        yield
    except RequestError:
        shutil.rmtree(work.room, ignore_errors=True)
        raise


class _Work:
    """The work folder of one run."""

    def __init__(self, folder: Path, setup: Setup, parts: Anatomy) -> None:
        self.folder, self.setup, self.parts = folder, setup, parts
        self.room = folder.with_name(f"{folder.name}.slimming")
        self.manifest: dict[str, Any] = {"setup": setup.fingerprint, "layers": []}
        file = self.room / MANIFEST
        if file.is_file():
            found = json.loads(file.read_text())
            if found["setup"] != setup.fingerprint:
                raise RequestError(
                    f"{self.room} holds an unfinished run with other settings; give the same ones to go on or remove it"
                )
            self.manifest = found
        elif self.room.exists():
            raise RequestError(f"{self.room} is in the way: unfinished layers are kept there; move it")

    @property
    def done(self) -> int:
        return len(self.manifest["layers"])

    def write(self, stream: LayerStream, block: Block, grids: dict[str, Grid], report: dict[str, Any]) -> None:
        """Write the files of one layer and enter them into the manifest; a layer that is made again replaces itself."""
        how, state = self.setup.how, block.module.state_dict()
        codes = how.codes_of(self.parts.original_index[block.index])
        writer = _LayerFiles(self.room, block.index, sum(t.nbytes for t in state.values()) // 4)
        quantised = {}
        for parameter, key, rows, tensor in stream.stored_one_by_one(block.name):
            if parameter in grids:
                grid = grids[parameter].rows(rows)
                writer.add({f"{key}{s}": t for s, t in packing.packed(tensor, grid, codes).items()})
                quantised[key.removesuffix(".weight")] = codes.bits
            else:
                writer.add({key: tensor.contiguous().clone()})
        digests = _digests(state)
        layer = {"files": writer.finish(), "quantised": quantised, "digests": digests, "report": _plain(report)}
        self.manifest["layers"] = [*self.manifest["layers"][: block.index], layer]
        atomic_write(self.room / MANIFEST, json.dumps(self.manifest))

    def finish(self, stream: LayerStream, overwrite: bool) -> dict[str, Any]:
        """Put the output together, read it back, and let it appear."""
        from safetensors.torch import save_file

        layers = self.manifest["layers"]
        in_layers = {key for block in self.parts.blocks for key in stream.keys(block.name)}
        quantised = {name: bits for layer in layers for name, bits in layer["quantised"].items()}
        with atomic_folder(self.folder, overwrite, stream.folder) as part:
            names: list[tuple[Path, list[str]]] = []
            for layer in layers:
                for file, keys in layer["files"]:
                    shutil.copyfile(self.room / file, part / file)
                    names.append((part / file, keys))
            for number, source in enumerate(dict.fromkeys(stream.files.values())):
                rest = [key for key, holder in stream.files.items() if holder == source and key not in in_layers]
                if rest:
                    save_file(stream.read(rest), part / f"rest-{number:05d}.safetensors", metadata={"format": "pt"})
                    names.append((part / f"rest-{number:05d}.safetensors", rest))
            _index(part, names)
            for found in stream.folder.iterdir():
                if found.is_file() and not found.name.endswith(NOT_COPIED):
                    shutil.copy(found, part / found.name)
            if quantised:
                _describe(part, stream, quantised, self.setup.how)
            report = self._report(part, quantised)
            atomic_write(part / REPORT, json.dumps(report, indent=1) + "\n")
            _read_back(part, self.parts, layers)
        shutil.rmtree(self.room)
        return report

    def _report(self, part: Path, quantised: dict[str, int]) -> dict[str, Any]:
        layers = {str(self.parts.original_index[i]): layer["report"] for i, layer in enumerate(self.manifest["layers"])}
        return {
            "settings": {**asdict(self.setup.how), "format": self.setup.form},
            "bytes": sum(f.stat().st_size for f in part.glob("*.safetensors")),
            "layers": layers,
            "quantised": quantised,
            "versions": {p: version(p) for p in ("moe-compress", "torch", "transformers", "llmcompressor")},
        }


class _LayerFiles:
    """The files of one layer, each about as large as told: a layer is never in memory a second time."""

    def __init__(self, room: Path, index: int, size: int) -> None:
        room.mkdir(parents=True, exist_ok=True)
        self.room, self.index, self.size = room, index, size
        self.files: list[tuple[str, list[str]]] = []
        self.tensors: dict[str, Tensor] = {}

    def add(self, tensors: dict[str, Tensor]) -> None:
        self.tensors |= tensors
        if sum(t.nbytes for t in self.tensors.values()) >= self.size:
            self._write()

    def finish(self) -> list[tuple[str, list[str]]]:
        """Names of the files, and of the tensors in each."""
        if self.tensors:
            self._write()
        return self.files

    def _write(self) -> None:
        from safetensors.torch import save_file

        name = f"{self.index:05d}-{len(self.files):03d}.safetensors"
        save_file(self.tensors, self.room / name, metadata={"format": "pt"})
        self.files.append((name, sorted(self.tensors)))
        self.tensors = {}


def _index(part: Path, names: list[tuple[Path, list[str]]]) -> None:
    weight_map: dict[str, str] = {}
    size = 0
    for number, (file, keys) in enumerate(names, 1):
        final = f"model-{number:05d}-of-{len(names):05d}.safetensors"
        file.rename(part / final)
        size += (part / final).stat().st_size
        weight_map |= dict.fromkeys(keys, final)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (part / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _describe(part: Path, stream: LayerStream, quantised: dict[str, int], how: Slimming) -> None:
    """Say in config.json what is packed, and which matrices are not: those in the files, and the model's own, since a
    tied output head is in no file."""
    from safetensors import safe_open

    packed = {stream.names.get(key, key) for key in (f"{name}.weight" for name in quantised)}
    dense = {
        name for name, module in stream.model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" not in packed
    }  # fmt: skip
    for file in part.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            dense |= {
                key.removesuffix(".weight") for key in opened.keys()  # noqa: SIM118
                if key.endswith(".weight") and len(opened.get_slice(key).get_shape()) == 2
            }  # fmt: skip
    config = json.loads((part / "config.json").read_text())
    config["quantization_config"] = packing.quantization_config(quantised, dense, how.group, how.symmetric)
    (part / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _read_back(part: Path, parts: Anatomy, layers: list[dict[str, Any]]) -> None:
    """Read the output as transformers does, layer by layer: every tensor must be the one that the slimmed layer had."""
    again = packing.PackedStream(part) if packing.is_packed(part) else LayerStream(part)
    for block, layer in zip(parts.blocks, layers, strict=True):
        with again.resident(block.name) as found:
            read = _digests(found.state_dict())
        if read != layer["digests"]:
            wrong = next(name for name in read | layer["digests"] if read.get(name) != layer["digests"].get(name))
            raise RuntimeError(f"{block.name}.{wrong} reads back otherwise than it was; nothing was kept")


def _digests(state: dict[str, Tensor]) -> dict[str, str]:
    """Of every tensor of a layer; a bank's expert by expert, since a digest takes as much memory as what it is of."""
    return {
        name: "".join(map(tensor_digest, tensor)) if tensor.dim() == 3 else tensor_digest(tensor)
        for name, tensor in state.items()
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if not isinstance(v, set)}
    return value
