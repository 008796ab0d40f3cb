"""Any folder, or tar, of images, labelled by the folders that the images lie in."""

import logging
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import SourceError
from pipeline.sources.base import Listing, Sample, list_images, make_keys, read_samples

_OTHER_SPLITS = ("test", "val", "valid", "validation")

_log = logging.getLogger(__name__)


class Folder:
    """Images of a folder or an uncompressed tar, at any depth, sorted by name.

    The class of an image is the name of its immediate parent folder, so ``a/cat/1.jpg`` and ``b/cat/1.jpg``
    share one; labels number the class names in sorted order. Images at the top level have no label. A key is
    made from the image's name relative to `path`, so it does not depend on the split.

    Parameters
    ----------
    path
        The folder or the tar.
    split
        If `path` has a folder of this name, only that is read. Otherwise ``"all"`` and ``"train"`` mean
        everything, but ``"train"`` is refused beside a folder named for another split, which it would include.

    Attributes
    ----------
    n_ignored : int
        How many files of the split were passed over, being hidden or of no known image extension.

    Raises
    ------
    SourceError
        There are no images, the split is not there, or the tar cannot be trusted (see `list_images`).
    """

    def __init__(self, path: Path | str, split: str = "train") -> None:
        path = Path(path)
        whole = list_images(path)
        if not whole.images:
            others = f"{len(whole.ignored)} other file(s)" if whole.ignored else "nothing else"
            first = f", the first '{whole.ignored[0]}'" if whole.ignored else ""
            raise SourceError(
                f"Expected images in '{path}', found none and {others}{first}. "
                "Give the folder that holds the images, or the tar itself."
            )
        inside = whole.under(split)
        if not inside.images:
            _require_no_splits(whole, path, split)
        listing = inside if inside.images else whole
        prefix = f"{split}/" if inside.images else ""

        self.classes: tuple[str, ...] = tuple(sorted({image.folder for image in listing.images} - {""}))
        self.n_ignored = len(listing.ignored)
        self._files = listing.images
        index = {name: label for label, name in enumerate(self.classes)}
        self._labels = [index.get(image.folder) for image in listing.images]
        self._keys = make_keys([prefix + image.name for image in listing.images])
        if self.n_ignored:
            _log.info("%s: %d files are not images and are ignored", path, self.n_ignored)

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[Sample]:
        return read_samples(self._files, self._keys, self._labels)


def _require_no_splits(whole: Listing, path: Path, split: str) -> None:
    """Refuse to take everything for `split` unless that is plainly what was meant."""
    folders = whole.top_folders()
    others = [name for name in folders if name in _OTHER_SPLITS]
    if split == "all" or (split == "train" and not others):
        return
    listed = ", ".join(f"'{name}'" for name in (others or folders)[:5]) or "images at the top level only"
    raise SourceError(
        f"Expected a folder '{split}' with images in '{path}', found {listed}. Ask for split 'all' to read everything."
    )
