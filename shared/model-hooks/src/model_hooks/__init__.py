"""Find the parts of any transformers model, watch them, change them, save and load the result.

Importing this package teaches transformers the model types that its checkpoints may carry (`lean_llama` and so on).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import FingerprintMismatch, RequestError, UnsupportedArchitectureError
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

_LAZY = {  # public name: its module, imported when the name is first used, so that commands start fast
    "Anatomy": "structure",
    "Block": "structure",
    "Card": "checkpoint",
    "Sublayer": "structure",
    "anatomy": "structure",
    "drop": "surgery",
    "fingerprint": "identity",
    "load": "loading",
    "save": "checkpoint",
}

if not TYPE_CHECKING:  # mypy would take any name for one that exists

    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


register_when_needed()
