"""What `stores` raises: each message says what was expected, what was found, and the remedy."""


class StoreError(ValueError):
    """A store that cannot be used as asked."""


class UnsealedStoreError(StoreError):
    """No manifest: the extraction that writes this store has not finished."""


class DamagedStoreError(StoreError):
    """An object is missing, or its bytes are not the ones that were sealed."""


class FormatError(StoreError):
    """Metadata that is not a store's, or not of a format version that this code reads."""


class PlanMismatchError(StoreError):
    """The folder already holds a store, or the beginning of one, made by another plan."""
