"""CIFAR-10 from class folders of image files, loose or in tars."""

from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import SourceError
from pipeline.sources.base import ImageFile, Listing, Sample, list_images, make_keys, read_samples

_SPLITS = {"train": ("train",), "test": ("test",), "all": ("train", "test")}


class Cifar10:
    """CIFAR-10, labelled in the official order of its classes.

    Samples are sorted by name within a split, that is by class; ``"all"`` is train, then test. Keys read
    ``train-airplane-0000``: split, class, file name. The bytes of the images pass through untouched.

    Parameters
    ----------
    path
        A folder with ``train.tar`` and ``test.tar``, or with ``train/`` and ``test/`` (where a split has both,
        the tar is read), or one such tar. Each split holds one folder per class.
    split
        ``"train"``, ``"test"`` or ``"all"``.

    Raises
    ------
    SourceError
        The split is not there, or an image lies outside the ten class folders.
    """

    # Sorted by name, as it happens, but written out: these labels must agree with other tools' labels.
    classes: tuple[str, ...] = (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    )  # fmt: skip

    def __init__(self, path: Path | str, split: str = "train") -> None:
        if split not in _SPLITS:
            raise SourceError(
                f"Expected split 'train', 'test' or 'all' of cifar10, found {split!r}. Pass one of the three."
            )
        path = Path(path)
        self._files: list[ImageFile] = []
        self._labels: list[int] = []
        names: list[str] = []
        for part, listing in _list_parts(path, _SPLITS[split]):
            for image in listing.images:
                self._files.append(image)
                self._labels.append(self._label(image, part, path))
                names.append(f"{part}/{image.name}")
        self._keys = make_keys(names)

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[Sample]:
        return read_samples(self._files, self._keys, self._labels)

    def _label(self, image: ImageFile, part: str, path: Path) -> int:
        if image.name.count("/") != 1 or image.folder not in self.classes:
            raise SourceError(
                f"Expected images of '{part}' in '{path}' as CLASS/NAME with CLASS one of "
                f"{', '.join(self.classes)}, found '{image.name}'. Read other data with the source 'folder'."
            )
        return self.classes.index(image.folder)


def _list_parts(path: Path, parts: tuple[str, ...]) -> Iterator[tuple[str, Listing]]:
    """Yield each wanted split with its images, named relative to the split."""
    whole = None if path.is_dir() else list_images(path)
    for part in parts:
        tar_path = path / f"{part}.tar"
        if whole is not None:
            listing = _inside_tar(whole, part, path)
        elif tar_path.is_file():
            listing = _inside_tar(list_images(tar_path), part, tar_path)
        elif (path / part).is_dir():
            listing = list_images(path / part)
        else:
            raise SourceError(
                f"Expected '{part}.tar' or '{part}/' in '{path}', found {_contents(path)}. "
                "Point the path at the folder that holds the splits, or ask for another split."
            )
        if not listing.images:
            raise SourceError(
                f"Expected images of split '{part}' in '{path}', found none. Check the path, or ask for another split."
            )
        yield part, listing


def _inside_tar(whole: Listing, part: str, tar_path: Path) -> Listing:
    """Return what lies under ``part/``, or, in a tar named for the split, all of it."""
    inside = whole.under(part)
    return whole if not inside.images and tar_path.stem == part else inside


def _contents(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    return ", ".join(f"'{name}'" for name in names[:5]) + (", …" if len(names) > 5 else "") or "an empty folder"
