"""Loki: low-rank keys for sparse decode attention (NeurIPS 2024, arXiv 2406.02542).

basis = calibrate(model, sequences)                  # principal components of the keys; or Basis.load(file)
with session(model, basis, k=0.25, d=0.25):          # or enable(model, basis, ...) and disable(model)
    model.generate(**inputs)                         # reads a quarter of the cached tokens, all else as ever
"""

from typing import TYPE_CHECKING

from model_hooks.lazy import lazy_names

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

if not TYPE_CHECKING:  # mypy would take any name for one that exists
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
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
        },
    )
