"""What `sae` raises: each message says what was expected, what was found, and the remedy."""


class SaeError(ValueError):
    """A run, a configuration or an input that cannot be used."""


class RunMismatchError(SaeError):
    """The folder holds a run made with another configuration or another store."""


class DivergedError(SaeError):
    """Training produced NaN or infinity."""
