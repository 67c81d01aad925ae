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
        for_keys: [Hkv, D, D], float32; a key becomes `k @ for_keys`.
        for_queries: its inverse transposed; the same tensor where the basis is orthogonal.
    """

    for_keys: Tensor
    for_queries: Tensor
    _moved: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, basis: Basis, layer: int) -> Turn:
        row = basis.row(layer)
        queries = basis.components if basis.query_components is None else basis.query_components
        return cls(basis.components[row].float(), queries[row].float())

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Both matrices on `device`, moved there once."""
        if device not in self._moved:
            self._moved[device] = (self.for_keys.to(device), self.for_queries.to(device))
        return self._moved[device]

    def queries(self, q: Tensor) -> Tensor:
        """[B, Hq, Q, D] turned; query head i goes with KV head i // G."""
        b, heads, queries, width = q.shape
        kv_heads = len(self.for_keys)
        grouped = q.reshape(b, kv_heads, heads // kv_heads * queries, width)
        return (grouped.float() @ self.on(q.device)[1]).to(q.dtype).view(b, heads, queries, width)

    def keys(self, k: Tensor) -> Tensor:
        """[B, Hkv, T, D] turned."""
        matrix = self.on(k.device)[0]
        if k.shape[2] <= CHUNK:
            return (k.float() @ matrix).to(k.dtype)
        out = torch.empty_like(k)
        for part, into in zip(k.split(CHUNK, dim=2), out.split(CHUNK, dim=2), strict=True):
            into.copy_(part.float() @ matrix)
        return out

    def back(self, k: Tensor) -> Tensor:
        """Turned keys as they were."""
        return (k.float() @ self.on(k.device)[1].transpose(-1, -2)).to(k.dtype)
