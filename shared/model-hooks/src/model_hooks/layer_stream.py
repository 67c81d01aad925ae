"""A checkpoint as a model whose weights are read from disk, one decoder layer at a time.

Which tensors belong to which layer, and how stored tensors become parameters (experts that are stored singly and held
fused, renamed prefixes), is answered by transformers' own loading code, so what loads there loads here.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import RequestError
from .identity import combined, tensor_digest
from .loading import _auto_class, quiet, resolve
from .structure import Anatomy, _name_of, _stack, anatomy

OTHER_FORMATS = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "consolidated*", "original/*"]  # of weights
M_MMAP_THRESHOLD = -3  # of malloc.h


class LayerStream:
    """A checkpoint as a model on the meta device, whose layers get their weights from disk while they are used.

    What the decoder holds beside its layers (embeddings, final norm) is resident. The layers and an output head of its
    own are loaded one at a time. Nothing else (a vision tower, say) is loaded at all.

    Args:
        source: checkpoint folder, `zoo:NAME`, or hub id (whose files are downloaded first).
        device: where the weights go.
        dtype: of the weights; by default what the config says.
    """

    def __init__(self, source: str | Path, *, device: str = "cpu", dtype: torch.dtype | None = None) -> None:
        from accelerate import init_empty_weights
        from transformers import AutoConfig
        from transformers.conversion_mapping import get_model_conversion_mapping

        self.folder, self.device = checkpoint_folder(source), device
        _glibc()
        self.files = self.find_files()  # tensor name -> file
        config = AutoConfig.from_pretrained(self.folder)
        dtype = dtype or getattr(config.get_text_config(decoder=True), "dtype", None) or torch.float32
        with init_empty_weights(include_buffers=False), quiet():  # buffers such as rotary frequencies are in no file
            model = _auto_class(str(self.folder), {}).from_config(config, dtype=dtype)
        self.model: Any = model.eval().requires_grad_(False)
        for module in self.model.modules():
            module._buffers.update({n: b.to(device) for n, b in module._buffers.items() if b is not None})
        self.conversions = get_model_conversion_mapping(self.model)
        self.names = self._names()
        stack, self.layers = _stack(self.model)
        self.lazy = [f"{stack}.{i}" for i in range(len(self.layers))]
        decoder = stack.rpartition(".")[0]
        self._load([k for k, n in self.names.items() if n.startswith(f"{decoder}.") and not n.startswith(f"{stack}.")])
        self.model.tie_weights()
        head = self.model.get_output_embeddings()
        if head is not None and head.weight is not self.model.get_input_embeddings().weight:
            self.lazy.append(_name_of(self.model, head) or "")

    def find_files(self) -> dict[str, Path]:
        """Tensor name -> the file that holds it. With `read`, what a subclass for other files has to change."""
        return checkpoint_files(self.folder)

    def whole(self) -> Any:
        """The model with all of its weights resident, as ordinary as any."""
        self._load(list(self.names))
        self.model.tie_weights()
        return self.model

    def keys(self, module: str) -> list[str]:
        """Names, in the files, of the tensors that make up `module`."""
        return [key for key, name in self.names.items() if name.startswith(f"{module}.")]

    @contextmanager
    def resident(self, module: str) -> Iterator[nn.Module]:
        """`module` (its path in the model) with its weights, for as long as the block lasts."""
        found: nn.Module = self.model.get_submodule(module)
        try:
            self._fill_banks(module)
            filled = {f"{module}.{name}" for name, p in found.named_parameters() if p.device.type != "meta"}
            self._load([key for key in self.keys(module) if self.names[key] not in filled])
            missing = [name for name, p in found.named_parameters() if p.device.type == "meta"]
            if missing:
                raise RequestError(f"{self.folder} has no weights for {module}.{missing[0]}; config and weights differ")
            yield found
        finally:
            _unload(found)

    def anatomy(self) -> Anatomy:
        """The model's anatomy, from one forward pass in which every layer is loaded when it runs."""
        with ExitStack() as hooks:
            for name in self.lazy:
                hooks.enter_context(self._loaded_when_it_runs(name))
            return anatomy(self.model)

    def fingerprint(self) -> str:
        """The model's `model_hooks.fingerprint`, one layer in memory at a time, and one module of what is no layer."""
        digests: dict[str, str] = {}
        for module in (*self.lazy, *self._with_own_weights_on_disk()):
            if any(name.startswith(f"{module}.") for name in digests):
                continue
            with self.resident(module) as found:
                digests |= {f"{module}.{name}": tensor_digest(t) for name, t in found.state_dict().items()}
        rest = {name: tensor for name, tensor in self.model.state_dict().items() if name not in digests}
        return combined(self.model.config, digests | {name: tensor_digest(tensor) for name, tensor in rest.items()})

    def _with_own_weights_on_disk(self) -> list[str]:
        """Modules that hold parameters themselves (not in their children alone) which are on the meta device."""
        return [n for n, m in self.model.named_modules() if any(p.is_meta for p in m.parameters(recurse=False))]

    @contextmanager
    def _loaded_when_it_runs(self, name: str) -> Iterator[None]:
        module = self.model.get_submodule(name)
        with ExitStack() as loaded, ExitStack() as hooks:

            def load(*_: object) -> None:
                loaded.enter_context(self.resident(name))

            def unload(*_: object) -> None:
                loaded.close()

            hooks.callback(module.register_forward_pre_hook(load).remove)
            hooks.callback(module.register_forward_hook(unload).remove)
            yield

    def stored(self, module: str) -> dict[str, Tensor]:
        """The weights of a resident module under the names, and in the layout and dtype, in which files hold them."""
        tensors = {f"{module}.{n}": t for n, t in self.model.get_submodule(module).state_dict().items()}
        return {name: _alone(tensor.to(self._stored_dtype(name))) for name, tensor in self.as_stored(tensors).items()}

    def stored_one_by_one(self, module: str) -> Iterator[tuple[str, str, slice, Tensor]]:
        """As `stored`, one tensor at a time, so that the layer is not in memory twice.

        Yields (parameter of the module, name in files, rows, tensor): of a fused bank [E, n, d] the tensor is a view
        of `rows` of its [E * n, d] rows.
        """
        for name, tensor in self.model.get_submodule(module).state_dict().items():
            if tensor.dim() < 3:
                for key, value in self.as_stored({f"{module}.{name}": tensor}).items():
                    yield name, key, slice(None), _alone(value.to(self._stored_dtype(key)))
                continue
            numbers = torch.arange(tensor.shape[0] * tensor.shape[1]).view(tensor.shape[:2])
            for key, found in self.as_stored({f"{module}.{name}": numbers}).items():
                rows = slice(int(found.min()), int(found.max()) + 1)
                if found.dim() > 1 or found.numel() != rows.stop - rows.start:
                    raise RequestError(f"{self.folder} does not store {module}.{name} by rows; it cannot be streamed")
                yield name, key, rows, tensor.flatten(0, 1)[rows].to(self._stored_dtype(key))

    def _fill_banks(self, module: str) -> None:
        """Read the fused weights of experts a matrix at a time into their places: transformers' own way would hold
        what it reads beside what it makes of it. What is not stored by rows is left to that."""
        found = self.model.get_submodule(module)
        for name, parameter in found.named_parameters():
            if parameter.dim() != 3:
                continue
            numbers = torch.arange(parameter.shape[0] * parameter.shape[1]).view(parameter.shape[:2])
            parts = self.as_stored({f"{module}.{name}": numbers})
            if any(key not in self.files or rows.dim() > 1 for key, rows in parts.items()):
                continue
            bank = torch.empty(parameter.shape, dtype=parameter.dtype, device=self.device)
            for key, rows in parts.items():
                matrix = self.read([key])[key]
                if matrix.shape != (len(rows), parameter.shape[2]):
                    raise RequestError(f"{self.folder}: {key} has shape {tuple(matrix.shape)}, unlike what config says")
                bank.flatten(0, 1)[int(rows[0]) : int(rows[-1]) + 1] = matrix
            owner, _, leaf = name.rpartition(".")
            found.get_submodule(owner)._parameters[leaf] = nn.Parameter(bank, requires_grad=False)

    def as_stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors that are parameters of the model, named and laid out as in files."""
        from transformers.core_model_loading import revert_weight_conversion

        reverted: dict[str, Tensor] = revert_weight_conversion(self.model, tensors)
        return reverted

    def _stored_dtype(self, key: str) -> torch.dtype:
        """The dtype of a tensor in its file: transformers holds some weights (routers) in a wider one."""
        from safetensors import safe_open

        with safe_open(self.files[key], framework="pt") as opened:
            part = opened.get_slice(key)
            return (part[:0] if part.get_shape() else opened.get_tensor(key)).dtype  # type: ignore[no-any-return]

    def read(self, keys: list[str]) -> dict[str, Tensor]:
        """Tensors as the files hold them."""
        from safetensors import safe_open

        found: dict[str, Tensor] = {}
        for file in dict.fromkeys(self.files[key] for key in keys):
            with safe_open(file, framework="pt") as opened:
                found |= {key: opened.get_tensor(key) for key in keys if self.files[key] == file}
        return found

    def _names(self) -> dict[str, str]:
        """Tensor in the files -> parameter of the model that it is, or is a part of (an expert in a fused bank)."""
        from transformers.core_model_loading import WeightConverter, rename_source_key

        converters = [c for c in self.conversions if isinstance(c, WeightConverter)]
        renamings = [c for c in self.conversions if not isinstance(c, WeightConverter)]
        here, prefix = self.model.state_dict(), self.model.base_model_prefix
        return {key: rename_source_key(key, renamings, converters, prefix, here)[0] for key in self.files}

    def _load(self, keys: list[str]) -> None:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        how = LoadStateDictConfig(device_map={"": self.device}, weight_mapping=self.conversions)
        with quiet():
            info, _ = convert_and_load_state_dict_in_model(self.model, self.read(keys), how, None)
        if wrong := [*info.mismatched_keys, *info.conversion_errors]:
            raise RequestError(f"{self.folder}: config and weights do not match at {wrong[0]}; nothing was done")


def checkpoint_folder(source: str | Path) -> Path:
    """The local folder of `source`; a hub id is downloaded into the hub's cache."""
    where = Path(resolve(source))
    if where.is_dir():
        return where
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), ignore_patterns=OTHER_FORMATS))
    except (OSError, ValueError) as error:
        raise RequestError(
            f"cannot load {source}: {str(error).splitlines()[0]}; give a local folder or zoo:NAME"
        ) from error


def checkpoint_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {key: folder / name for key, name in json.loads(index.read_text())["weight_map"].items()}
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= dict.fromkeys(opened.keys(), file)
    if not found:
        raise RequestError(f"{folder} holds no *.safetensors; only those are read layer by layer: convert it first")
    return found


def _unload(module: nn.Module) -> None:
    for owner in module.modules():
        for name, p in owner._parameters.items():
            if p is not None:
                owner._parameters[name] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
    if libc := _glibc():
        libc.malloc_trim(0)  # else the heap keeps what a layer left, and grows from layer to layer


@cache
def _glibc() -> ctypes.CDLL | None:
    """glibc, told to give large tensors back to the system when they are freed: by itself it learns from the first one
    of up to 32 MiB to keep the next ones in the heap, whose holes a layer's memory then ends in."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt"):
        return None
    libc.mallopt(M_MMAP_THRESHOLD, 4 << 20)
    return libc


def _alone(tensor: Tensor) -> Tensor:
    """`tensor` in storage of its own, as safetensors wants it."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
