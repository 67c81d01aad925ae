"""Queries and keys expressed in the directions of a basis, and back: the lemma q·k = q̂·k̂ at work."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .basis import Basis

CHUNK = 4096  # tokens that are turned at a time, so that the float32 copy of a long prompt stays small


@dataclass
class Turn:
    """The basis of one layer. Products are in float32 and rounded once to the dtype of what was given.

    Attributes:
        matrix: [Hkv, D, D], float32, orthogonal; a key becomes `k @ matrix`, a query that reads it `q @ matrix`.
    """

    matrix: Tensor
    _moved: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, basis: Basis, layer: int) -> Turn:
        return cls(basis.components[basis.row(layer)].float())

    def on(self, device: torch.device) -> Tensor:
        """The matrix on `device`, moved there once."""
        if device not in self._moved:
            self._moved[device] = self.matrix.to(device)
        return self._moved[device]

    def queries(self, q: Tensor) -> Tensor:
        """[B, Hq, Q, D] turned; query head i goes with KV head i // G."""
        b, heads, queries, width = q.shape
        kv_heads = len(self.matrix)
        grouped = q.reshape(b, kv_heads, heads // kv_heads * queries, width)
        return (grouped.float() @ self.on(q.device)).to(q.dtype).view(b, heads, queries, width)

    def keys(self, k: Tensor) -> Tensor:
        """[B, Hkv, T, D] turned."""
        matrix = self.on(k.device)
        if k.shape[2] <= CHUNK:
            return (k.float() @ matrix).to(k.dtype)
        out = torch.empty_like(k)
        for part, into in zip(k.split(CHUNK, dim=2), out.split(CHUNK, dim=2), strict=True):
            into.copy_(part.float() @ matrix)
        return out

    def back(self, k: Tensor) -> Tensor:
        """Turned keys as they were."""
        return (k.float() @ self.on(k.device).transpose(-1, -2)).to(k.dtype)
