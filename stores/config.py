"""The options of `stores`' commands."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """Options of `stores info`.

    Parameters
    ----------
    store
        The store's folder.
    """

    store: str


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Options of `stores verify`.

    Parameters
    ----------
    store
        The store's folder.
    """

    store: str
