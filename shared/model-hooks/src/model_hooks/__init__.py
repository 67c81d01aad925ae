"""Find the parts of any transformers model, watch them, change them, save and load the result.

Importing this package teaches transformers the model types that its checkpoints may carry (`lean_llama` and so on).
"""

from .anatomy import Anatomy, Block, Sublayer, anatomy
from .checkpoint import Card, save
from .errors import FingerprintMismatch, RequestError, UnsupportedArchitectureError
from .fingerprint import fingerprint
from .lean import register
from .loading import load
from .surgery import drop

register()

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
