"""Triton kernels for cheaper language models, each with a plain-torch twin that is its CPU path and its oracle.

An operation is imported when it is first asked for: importing this package imports neither torch nor triton.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from .ops.cosine import CosineAccumulator as CosineAccumulator
    from .ops.cosine import Cosines as Cosines
    from .ops.cosine import cosine_adjacent as cosine_adjacent
    from .ops.cosine import cosine_gram as cosine_gram
    from .ops.cosine import cosine_stream as cosine_stream
    from .ops.linear_ce import TokenLosses as TokenLosses
    from .ops.linear_ce import linear_ce as linear_ce
    from .ops.linear_ce import merge_shards as merge_shards
    from .ops.loki import dense_decode as dense_decode
    from .ops.loki import loki_decode as loki_decode
    from .ops.meo import merged_matmul as merged_matmul
    from .ops.mod import Routing as Routing
    from .ops.mod import route as route
    from .ops.mod import token_gather as token_gather
    from .ops.mod import token_scatter_add as token_scatter_add
    from .ops.sparse24 import Packed24 as Packed24
    from .ops.sparse24 import check_24 as check_24
    from .ops.sparse24 import matmul_24 as matmul_24
    from .ops.sparse24 import pack_24 as pack_24
    from .ops.sparse24 import unpack_24 as unpack_24
    from .ops.sparse_lora import apply_mask_ as apply_mask_
    from .ops.sparse_lora import merge_sparse_lora as merge_sparse_lora
    from .ops.sparse_lora import pack_mask as pack_mask
    from .ops.sparse_lora import sparse_lora_matmul as sparse_lora_matmul
    from .ops.sparse_lora import unpack_mask as unpack_mask

# public name: the module of `ops` that holds it
OPERATIONS = {
    "CosineAccumulator": "cosine",
    "Cosines": "cosine",
    "Packed24": "sparse24",
    "Routing": "mod",
    "TokenLosses": "linear_ce",
    "apply_mask_": "sparse_lora",
    "check_24": "sparse24",
    "cosine_adjacent": "cosine",
    "cosine_gram": "cosine",
    "cosine_stream": "cosine",
    "dense_decode": "loki",
    "linear_ce": "linear_ce",
    "loki_decode": "loki",
    "matmul_24": "sparse24",
    "merge_shards": "linear_ce",
    "merge_sparse_lora": "sparse_lora",
    "merged_matmul": "meo",
    "pack_24": "sparse24",
    "pack_mask": "sparse_lora",
    "route": "mod",
    "sparse_lora_matmul": "sparse_lora",
    "token_gather": "mod",
    "token_scatter_add": "mod",
    "unpack_24": "sparse24",
    "unpack_mask": "sparse_lora",
}

__all__ = sorted([*OPERATIONS, "choose_backend"])


def choose_backend(backend: str, *tensors: Tensor) -> Literal["torch", "triton"]:
    """What runs an operation on these tensors. Raises ValueError, TypeError or RuntimeError where `backend` cannot."""
    from ._rt import choose

    return choose(backend, *tensors)


def __getattr__(name: str) -> Any:
    if name not in OPERATIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".ops.{OPERATIONS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *OPERATIONS])
