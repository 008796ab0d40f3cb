"""What a source of images is, and what the sources that read image files share.

A source yields `Sample` objects in a fixed order. Every row of a store is known by its position in that
order, so it must be the same each time and on every machine: images found in a folder or in a tar are sorted by
their name relative to it, by code point. Taking a tar in archive order was rejected: `tar` writes in the order
in which the file system lists a folder, so two machines would cache the same images as two different stores. A
tar whose names are sorted is still read front to back; another costs seeks.

A tar is never extracted. Its headers are scanned once for names and offsets, then each image is read in
place, which is why a compressed tar is refused.
"""

import hashlib
import itertools
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from pipeline.errors import SourceError

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"})

_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]")
_EXTENSION = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True)
class Sample:
    """One image, still encoded.

    Attributes
    ----------
    key
        Unique within its source; ASCII letters, digits, ``_`` and ``-`` only. WebDataset splits member names
        at the first ``.``, and a ``/`` would make folders of a shard that somebody unpacks.
    image
        The file's bytes, as the source holds them.
    extension
        Of the image file, in lower case and without the dot, e.g. ``"jpg"``.
    label
        Index into the source's ``classes``, or None for an unlabelled image.
    """

    key: str
    image: bytes
    extension: str
    label: int | None

    def __post_init__(self) -> None:
        if not _KEY.fullmatch(self.key):
            raise SourceError(
                f"Expected a key of ASCII letters, digits, '_' and '-', found {self.key!r}. Make keys with make_keys()."
            )
        if not _EXTENSION.fullmatch(self.extension):
            raise SourceError(
                f"Expected a lower-case extension without a dot, found {self.extension!r} for the sample "
                f"{self.key!r}. Pass e.g. 'jpg'."
            )


class Source(Protocol):
    """Images in a fixed order: the same each time it is iterated, and on every machine."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by label index; empty when no image has a label."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Sample]: ...


# ---- What the sources made of image files share ----


@dataclass(frozen=True)
class ImageFile:
    """Where one image's bytes lie: a file of its own, or a part of a tar.

    Attributes
    ----------
    name
        Relative to the listed folder or tar, with ``/`` between its parts.
    path
        The file to open.
    offset
        Where in it the image starts, in bytes.
    size
        Its length in bytes; None means up to the end of the file.
    """

    name: str
    path: Path
    offset: int = 0
    size: int | None = None

    @property
    def folder(self) -> str:
        """Name of the immediate parent folder; empty at the top level."""
        return self.name.rpartition("/")[0].rpartition("/")[2]

    @property
    def extension(self) -> str:
        """Lower case, without the dot."""
        return _extension(self.name)


@dataclass(frozen=True)
class Listing:
    """The images of a folder or a tar, sorted by name, and the names of the other files in it."""

    images: tuple[ImageFile, ...]
    ignored: tuple[str, ...]

    def under(self, folder: str) -> "Listing":
        """Return what lies in the top-level `folder`, with names relative to it."""
        prefix = f"{folder}/"
        return Listing(
            tuple(
                replace(image, name=image.name.removeprefix(prefix))
                for image in self.images
                if image.name.startswith(prefix)
            ),
            tuple(name.removeprefix(prefix) for name in self.ignored if name.startswith(prefix)),
        )

    def top_folders(self) -> list[str]:
        """Return the top-level folders that hold images, sorted."""
        return sorted({top for top, slash, _ in (image.name.partition("/") for image in self.images) if slash})


def list_images(path: Path) -> Listing:
    """List the images of a folder, at any depth, or of an uncompressed tar.

    Hidden files and folders, whose names start with a dot, are never images: macOS leaves ``._name.jpg``
    files that hold no picture.

    Parameters
    ----------
    path
        The folder or the tar.

    Returns
    -------
    Listing
        Sorted by name; without images when there are none.

    Raises
    ------
    SourceError
        Nothing is there, it is neither a folder nor a readable tar, links make a folder appear twice, or the
        tar holds a member that is not a plain file inside it.
    """
    if path.is_dir():
        found = list(_walk_folder(path))
    elif path.is_file():
        found = list(_scan_tar(path))
    else:
        raise SourceError(f"Expected a folder or a tar of images at '{path}', found nothing. Check the path.")
    found.sort(key=lambda file: file.name)
    images = [file for file in found if _is_image(file.name)]
    return Listing(tuple(images), tuple(file.name for file in found if not _is_image(file.name)))


def make_keys(names: Sequence[str]) -> list[str]:
    """Turn file names into valid, unique sample keys.

    The extension goes, ``/`` becomes ``-``, and any character but ASCII letters, digits, ``_`` and ``-``
    becomes ``_``. Names that would then share a key (``a.jpg`` and ``a.png``, ``é.jpg`` and ``è.jpg``) each get
    a digest of their full name appended: a counter would depend on which other files were listed before.

    Parameters
    ----------
    names
        Relative file names, with ``/`` between their parts.

    Returns
    -------
    list of str
        One key per name, in the same order.

    Raises
    ------
    SourceError
        Two names are equal, or are so alike that a digest does not part them.
    """
    plain = [_sanitise(name) for name in names]
    n_uses = Counter(plain)
    keys = [f"{key}-{_digest(name)}" if n_uses[key] > 1 else key for key, name in zip(plain, names, strict=True)]
    seen: dict[str, str] = {}
    for key, name in zip(keys, names, strict=True):
        if key in seen:
            raise SourceError(
                f"Expected every image to have its own key, found {key!r} for both {seen[key]!r} and {name!r}. "
                "Rename one of them."
            )
        seen[key] = name
    return keys


def read_samples(files: Sequence[ImageFile], keys: Sequence[str], labels: Sequence[int | None]) -> Iterator[Sample]:
    """Read the files in the order given, one at a time, their bytes untouched.

    Parameters
    ----------
    files, keys, labels
        One of each per sample.

    Yields
    ------
    Sample
        As many as there are files.

    Raises
    ------
    SourceError
        A file is gone, or shorter than when it was listed.
    """
    rows = zip(files, keys, labels, strict=True)
    # Neighbours in one tar share an open file; an image with a file of its own is a group of one.
    for path, group in itertools.groupby(rows, key=lambda row: row[0].path):
        try:
            with path.open("rb") as handle:
                for file, key, label in group:
                    handle.seek(file.offset)
                    image = handle.read(-1 if file.size is None else file.size)
                    if file.size is not None and len(image) != file.size:
                        raise SourceError(
                            f"Expected {file.size} bytes for '{file.name}' in '{path}', found {len(image)}. "
                            "The tar changed since it was opened: start again when it is complete."
                        )
                    yield Sample(key, image, file.extension, label)
        except OSError as error:
            raise SourceError(
                f"Expected to read '{path}', found: {error.strerror}. It was there when the source was "
                "opened: start again when the files are at rest."
            ) from error


def _walk_folder(root: Path) -> Iterator[ImageFile]:
    def fail(error: OSError) -> None:
        raise SourceError(
            f"Expected to list the folder '{error.filename}', found: {error.strerror}. Check its permissions."
        ) from error

    # Links are followed, since a data set is often a folder of links to where the images really are.
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            raise SourceError(
                f"Expected each folder of '{root}' once, found '{folder}' again through a link. Remove the link."
            )
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = Path(folder, name)
            yield ImageFile(path.relative_to(root).as_posix(), path)


def _scan_tar(path: Path) -> Iterator[ImageFile]:
    n_bytes = path.stat().st_size
    end = 0  # where the last member ends, padded
    seen: set[str] = set()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = _member_name(member, path)
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if member.isdir():
                    continue
                if member.offset_data + member.size > n_bytes:
                    raise SourceError(
                        f"Expected {member.size} bytes for '{name}' in '{path}', found the end of the tar. "
                        "The copy was interrupted: copy it again."
                    )
                if name in seen:
                    raise SourceError(
                        f"Expected each member of '{path}' once, found '{name}' twice. Write the tar anew."
                    )
                seen.add(name)
                yield ImageFile(name, path, member.offset_data, member.size)
    except tarfile.TarError as error:
        raise SourceError(
            f"Expected a folder or an uncompressed tar at '{path}', found a file that is not one ({error}). "
            "Decompress a .tar.gz first, or copy the tar again."
        ) from error
    # tarfile takes a cut between two members, or a damaged header, for the end: images would be lost in silence.
    with path.open("rb") as handle:
        handle.seek(end)
        if handle.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise SourceError(
                f"Expected the end mark of the tar '{path}' at byte {end:,}, found the tar cut or damaged there. "
                "The copy was interrupted: copy it again."
            )


def _member_name(member: tarfile.TarInfo, tar_path: Path) -> str:
    """Return the member's name without ``./``; refuse what is not a plain file or folder inside the tar."""
    parts = [part for part in member.name.split("/") if part not in ("", ".")]
    if member.name.startswith("/"):
        found = "an absolute path"
    elif ".." in parts:
        found = "a '..'"
    elif member.issym() or member.islnk():
        found = f"a link to '{member.linkname}'"
    elif member.issparse() or not (member.isdir() or member.isreg()):
        found = "a sparse or special file"
    else:
        return "/".join(parts)
    raise SourceError(
        f"Expected plain files inside '{tar_path}', found {found}: member '{member.name}'. Write the tar anew "
        "from the folder of images (tar --dereference --hard-dereference)."
    )


def _is_image(name: str) -> bool:
    hidden = name.startswith(".") or "/." in name
    return not hidden and _extension(name) in IMAGE_EXTENSIONS


def _extension(name: str) -> str:
    return name.rpartition("/")[2].rpartition(".")[2].lower()


def _sanitise(name: str) -> str:
    folders, slash, file_name = name.rpartition("/")
    stem = file_name.rpartition(".")[0] or file_name
    key = _UNSAFE.sub("_", f"{folders}{slash}{stem}".replace("/", "-"))
    # A member name with a leading dash reads as an option to whoever lists files on a command line.
    return f"_{key[1:]}" if key.startswith("-") else key


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
