"""What can go wrong with routers beside a wrong setting."""

from model_hooks.errors import RequestError


class IncompatibleRouterError(RequestError):
    """Routers that were trained on another model than the one given. The model was left as it was."""
