"""Loki: low-rank keys for sparse decode attention (NeurIPS 2024, arXiv 2406.02542).

basis = calibrate(model, sequences)                  # principal components of the keys; or Basis.load(file)
with session(model, basis, k=0.25, d=0.25):          # or enable(model, basis, ...) and disable(model)
    model.generate(**inputs)                         # reads a quarter of the cached tokens, all else as ever
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .basis import Basis
    from .beyond import layer_budgets
    from .cache import LokiCache
    from .calibration import calibrate
    from .config import LokiConfig, Variance
    from .sessions import disable, enable, session
    from .telemetry import stats

__all__ = [
    "Basis",
    "LokiCache",
    "LokiConfig",
    "Variance",
    "calibrate",
    "disable",
    "enable",
    "layer_budgets",
    "session",
    "stats",
]

_LAZY = {  # public name: its module, imported when the name is first used, so that commands start fast
    "Basis": "basis",
    "LokiCache": "cache",
    "LokiConfig": "config",
    "Variance": "config",
    "calibrate": "calibration",
    "disable": "sessions",
    "enable": "sessions",
    "layer_budgets": "beyond",
    "session": "sessions",
    "stats": "telemetry",
}


if not TYPE_CHECKING:  # mypy would take any name for one that exists

    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
