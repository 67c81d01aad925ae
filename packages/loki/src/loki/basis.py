"""The directions in which keys vary most, per layer and KV head: fitted, ranked, saved and checked.

They are the principal components of the keys (section 4.1): orthogonal, so that rotated keys can be cached in place of
the keys and give the same scores.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model_hooks.errors import FingerprintMismatch, RequestError

FORMAT = "1"
TENSORS = ("components", "eigenvalues", "mean")  # of a file
TOLERANCE = 1e-3  # how far P Pᵀ of a file may be from the identity


@dataclass(frozen=True)
class Provenance:
    """Where a basis comes from.

    Attributes:
        model: name of the model, as it was given.
        structure: hash of what must agree between the model calibrated on and the model run (see `structure`).
        rotary: "post" or "pre": the keys were taken after or before the rotary embedding.
        text: name of the calibration text.
        tokens: number of tokens that were seen.
        version: of this package.
    """

    model: str = ""
    structure: str = ""
    rotary: str = "post"
    text: str = ""
    tokens: int = 0
    version: str = "0.1.0"


@dataclass(frozen=True)
class Basis:
    """Directions for the keys of L layers, Hkv heads each, of width D, float32 on the CPU.

    Attributes:
        components: [L, Hkv, D, D]; column i is direction i. A cached key is `k @ components`.
        eigenvalues: [L, Hkv, D], not increasing: the variance along each direction.
        mean: [L, Hkv, D] of the keys. Used in the fit alone: at run time it would add a constant to all scores.
        layers: which of the model's layers the rows are about.
    """

    components: Tensor
    eigenvalues: Tensor
    mean: Tensor
    layers: tuple[int, ...]
    about: Provenance = field(default_factory=Provenance)

    @property
    def head_dim(self) -> int:
        return self.components.shape[-1]

    @property
    def num_key_value_heads(self) -> int:
        return self.components.shape[1]

    @property
    def explained(self) -> Tensor:
        """Share of the variance that the first 1, 2, .. D directions hold, [L, Hkv, D] float64."""
        values = self.eigenvalues.double()
        share = values.cumsum(-1) / values.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        share[..., -1] = 1.0
        return share

    def rank(self, variance: float = 0.9) -> Tensor:
        """How many directions it takes to hold at least the share `variance` of the variance, [L, Hkv] (Figure 1).

        The direction that crosses the target counts. Raises `RequestError` for a share outside of (0, 1].
        """
        if isinstance(variance, bool) or not 0 < variance <= 1:
            raise RequestError(f"variance {variance!r}: a share of the variance lies in (0, 1]")
        return (self.explained < variance).sum(-1) + 1

    def row(self, layer: int) -> int:
        """The row of `components` that is about layer `layer` of the model."""
        if layer not in self.layers:
            raise RequestError(f"layer {layer} is not in the basis, which has layers {list(self.layers)}")
        return self.layers.index(layer)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, as a whole or not at all."""
        from safetensors.torch import save

        from model_hooks.files import atomic_write

        tensors = {name: getattr(self, name).float().contiguous() for name in TENSORS}
        about = {f.name: str(getattr(self.about, f.name)) for f in fields(Provenance)}
        about |= {"format": FORMAT, "layers": json.dumps(self.layers)}
        atomic_write(path, save(tensors, metadata=about))

    @classmethod
    def load(cls, path: str | Path) -> Basis:
        """Read a file that `save` wrote.

        Raises FileNotFoundError where there is none, and `RequestError` for a file that is damaged, is not a basis, or
        whose directions are not orthogonal.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no basis {path}; `loki calibrate MODEL -o {path.name}` makes one")
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise RequestError(f"{path} is not a safetensors file ({error}); calibrate again") from None
        if about.get("format") != FORMAT or not {*TENSORS} <= tensors.keys():
            raise RequestError(f"{path} is not a basis of format {FORMAT}; calibrate again")
        if others := sorted(tensors.keys() - {*TENSORS}):
            raise RequestError(f"{path} holds {', '.join(others)}, which a basis does not have; calibrate again")
        known = {f.name: about[f.name] for f in fields(Provenance) if f.name in about}
        try:
            provenance = Provenance(**{**known, "tokens": int(known.get("tokens", 0))})
            basis = cls(layers=tuple(json.loads(about["layers"])), about=provenance, **tensors)
        except (TypeError, ValueError, KeyError) as error:
            raise RequestError(f"{path} is not a basis ({error}); calibrate again") from None
        basis.validate(str(path))
        return basis

    def validate(self, name: str = "the basis") -> None:
        """Raise `RequestError` unless shapes agree, numbers are finite and ordered, and directions orthogonal."""
        shape = tuple(self.components.shape)
        if len(shape) != 4 or shape[2] != shape[3] or shape[0] != len(self.layers):
            raise RequestError(f"{name}: components have shape {shape}; [{len(self.layers)}, heads, D, D] is needed")
        for what, tensor in (("eigenvalues", self.eigenvalues), ("mean", self.mean)):
            if tuple(tensor.shape) != shape[:3]:
                raise RequestError(f"{name}: {what} have shape {tuple(tensor.shape)}; {shape[:3]} is needed")
        if not all(bool(t.isfinite().all()) for t in (self.components, self.eigenvalues, self.mean)):
            raise RequestError(f"{name} holds numbers that are not finite; calibrate again")
        if bool((self.eigenvalues < 0).any()) or bool((self.eigenvalues.diff(dim=-1) > 0).any()):
            raise RequestError(f"{name}: eigenvalues must not be negative nor increase; calibrate again")
        turns = self.components.double()
        error = float((turns @ turns.transpose(-1, -2) - torch.eye(shape[-1], dtype=torch.float64)).abs().max())
        if error > TOLERANCE:
            raise RequestError(f"{name}: its directions are not orthogonal (error {error:.1e}); calibrate again")

    def check(self, model: Any, allow_mismatch: bool = False) -> None:
        """Raise `RequestError` unless this basis fits `model` in shape and, unless `allow_mismatch`, in structure."""
        layers, heads, width = shape_of(model)
        mine = (self.num_key_value_heads, self.head_dim)
        if mine != (heads, width) or max(self.layers) >= layers:
            raise RequestError(
                f"the basis is for [layers, KV heads, head width] [{max(self.layers) + 1}, {mine[0]}, {mine[1]}], "
                f"{type(model).__name__} has [{layers}, {heads}, {width}]; calibrate on this model"
            )
        theirs = structure(model)
        if self.about.structure and self.about.structure != theirs and not allow_mismatch:
            raise FingerprintMismatch(
                f"the basis was made on a model of structure {self.about.structure} ({self.about.model or 'unnamed'}), "
                f"this one has {theirs}; calibrate on this model, or pass allow_mismatch=True"
            )

    def truncated(self, row: int, d: int) -> Tensor:
        """The projection onto the first `d` directions, [Hkv, D, D]: (q @ it)·k = q̂·k̂ there."""
        leading = self.components[row, :, :, :d]
        return leading @ leading.transpose(-1, -2)

    def named(self, **about: Any) -> Basis:
        """This basis with other provenance."""
        return replace(self, about=replace(self.about, **about))


def shape_of(model: Any) -> tuple[int, int, int]:
    """Layers, KV heads and head width of a model, as its config says."""
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return config.num_hidden_layers, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def structure(model: Any) -> str:
    """Hash of what decides how keys are made: layers, heads, width and the rotary embedding."""
    config = model.config.get_text_config(decoder=True)
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    partial = getattr(config, "partial_rotary_factor", None)
    said = json.dumps([config.model_type, *shape_of(model), rotary, partial], sort_keys=True, default=str)
    return hashlib.blake2b(said.encode(), digest_size=8).hexdigest()


def principal_components(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors (columns) and eigenvalues of [.., D, D], float64, by decreasing eigenvalue."""
    values, vectors = torch.linalg.eigh(covariance.double())
    return vectors.flip(-1), values.flip(-1).clamp_min(0)
