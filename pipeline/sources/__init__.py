"""Where images come from: each source yields samples (key, image bytes, label) in a fixed order."""

from pathlib import Path

from pipeline.errors import SourceError
from pipeline.sources.base import Sample, Source
from pipeline.sources.cifar10 import Cifar10
from pipeline.sources.digits import Digits
from pipeline.sources.folder import Folder

__all__ = ["SOURCES", "Cifar10", "Digits", "Folder", "Sample", "Source", "open_source"]

SOURCES = ("digits", "cifar10", "folder")


def open_source(name: str, path: Path | str | None = None, split: str = "train") -> Source:
    """Open a source by its name.

    Parameters
    ----------
    name
        One of `SOURCES`.
    path
        The folder or tar to read; None for ``digits``, which come with scikit-learn.
    split
        ``"train"``, ``"test"``, ``"all"``, or for ``folder`` the name of any subfolder.

    Returns
    -------
    Source
        Ready to iterate, its images listed but not read.

    Raises
    ------
    SourceError
        The name is unknown, a path is missing or not wanted, or the source refuses what it finds there.
    """
    if name not in SOURCES:
        raise SourceError(f"Expected one of {', '.join(SOURCES)}, found source {name!r}. Use one of these names.")
    if name == "digits":
        if path is not None:
            raise SourceError(
                f"Expected no path for digits, found '{path}'. Leave it out: they come with scikit-learn."
            )
        return Digits(split)
    if path is None:
        raise SourceError(f"Expected the folder or tar to read for {name}, found no path. Pass one.")
    return Cifar10(path, split) if name == "cifar10" else Folder(path, split)
