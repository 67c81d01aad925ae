"""Router-Tuning and MindSkip: attention layers that decide for each sequence whether to run (arXiv 2410.13184).

attach(model, layers="last:16")                      # untrained routers: the same model, bit for bit
... train them (`mod-router tune`), or load(model, "routers")
model.generate(**inputs)                             # routers close layers, and the KV cache shrinks with them
detach(model)                                        # the very model from before
"""

from typing import TYPE_CHECKING, Any

from model_hooks.lazy import lazy_names
from model_hooks.registration import add_family

if TYPE_CHECKING:
    from .attaching import attach, decide, detach, session
    from .cache import RoutedCache
    from .checkpoint import load, save
    from .config import RouterConfig
    from .context import routing_context
    from .errors import IncompatibleRouterError

__all__ = [
    "IncompatibleRouterError",
    "RoutedCache",
    "RouterConfig",
    "attach",
    "decide",
    "detach",
    "load",
    "routing_context",
    "save",
    "session",
]

if not TYPE_CHECKING:  # mypy would take any name for one that exists
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "IncompatibleRouterError": "errors",
            "RoutedCache": "cache",
            "RouterConfig": "config",
            "attach": "attaching",
            "decide": "attaching",
            "detach": "attaching",
            "load": "checkpoint",
            "routing_context": "context",
            "save": "checkpoint",
            "session": "attaching",
        },
    )


def _make(base_model_type: str) -> Any:
    from .merged import make_routed_classes

    return make_routed_classes(base_model_type)


add_family("routed_", _make)
