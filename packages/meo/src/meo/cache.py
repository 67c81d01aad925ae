"""A KV cache that keeps the gates' sums beside the keys, row by row."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from model_hooks.errors import RequestError


class _Gated:
    """What any cache class gets. `meo`: bank -> name -> sums, [B, D]."""

    meo: dict[str, dict[str, Tensor]]

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.meo = {bank: {k: change(v) for k, v in sums.items()} for bank, sums in self.meo.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._rows(lambda t: t[indices.to(t.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._rows(lambda t: torch.repeat_interleave(t, repeats, dim=0))

    def crop(self, tokens: int) -> None:
        if any("total" in sums for sums in self.meo.values()):
            raise RequestError("running sums cannot take tokens back (assisted generation); use level prefix or task")
        super().crop(tokens)  # type: ignore[misc]


@cache
def _gated(kind: Any) -> Any:
    return type(f"Gated{kind.__name__}", (_Gated, kind), {})


def adopt(store: Any) -> Any:
    """`store`, able to keep the gates' sums; None stays None."""
    if store is not None and not isinstance(store, _Gated):
        kind: Any = type(store)
        store.__class__ = _gated(kind)
        store.meo = {}
    return store
