"""Find the parts of any transformers model, watch them, change them, save and load the result.

Importing this package teaches transformers the model types that its checkpoints may carry (`lean_llama` and so on).
"""

from typing import TYPE_CHECKING

from .errors import FingerprintMismatch, RequestError, UnsupportedArchitectureError
from .lazy import lazy_names
from .registration import register_when_needed

if TYPE_CHECKING:
    from .checkpoint import Card, save
    from .identity import fingerprint
    from .loading import load
    from .structure import Anatomy, Block, Sublayer, anatomy
    from .surgery import drop

__all__ = [
    "Anatomy",
    "Block",
    "Card",
    "FingerprintMismatch",
    "RequestError",
    "Sublayer",
    "UnsupportedArchitectureError",
    "anatomy",
    "drop",
    "fingerprint",
    "load",
    "save",
]

if not TYPE_CHECKING:  # mypy would take any name for one that exists
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "Anatomy": "structure",
            "Block": "structure",
            "Card": "checkpoint",
            "Sublayer": "structure",
            "anatomy": "structure",
            "drop": "surgery",
            "fingerprint": "identity",
            "load": "loading",
            "save": "checkpoint",
        },
    )


register_when_needed()
