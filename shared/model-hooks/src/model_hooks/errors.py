"""What a user can get wrong. Each error is one line: what was given, what is accepted, what to do."""


class RequestError(ValueError):
    """The request cannot be met as it was put. The command line shows it as one line and exits with 2."""

    exit_code = 2


class UnsupportedArchitectureError(RequestError):
    """A model whose parts were not recognised. Nothing was changed."""


class FingerprintMismatch(RequestError):
    """A file that was made from another model, other data or other settings than those given now."""
