"""Named byte objects: what a store is made of, and the one place where they are published.

Publishing is create-only and atomic: an object is absent or whole, and the first writer of a name wins. Neither
zarr-python's, zarrs' nor obstore's local store promises that (none syncs to disk, zarrs writes in place), hence these
lines.
"""

import contextlib
import os
import re
import stat
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Protocol

from stores.errors import DamagedStoreError, FormatError, StoreError

_SAFE_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_TEMPORARY = ".partial-"


def check_key(key: str) -> str:
    """Return `key` if it is a relative path that cannot leave the store.

    Raises
    ------
    FormatError
        For absolute paths, `..`, empty or hidden parts, and characters outside letters, digits, `_.-`.
    """
    if not all(_SAFE_PART.fullmatch(part) for part in key.split("/")):
        raise FormatError(
            f"expected an object name of letters, digits and '_.-' inside the store, found {key!r}: "
            "this store's metadata was not written by softbudget; do not use it"
        )
    return key


class Objects(Protocol):
    """Where a store's objects are."""

    @property
    def uri(self) -> str:
        """Where the objects are, as a user would write it."""
        ...

    def size(self, key: str) -> int | None:
        """Return an object's size in bytes, None where there is none."""
        ...

    def read(self, key: str) -> bytes:
        """Return a whole object; `DamagedStoreError` where there is none."""
        ...

    def read_into(self, key: str, offset: int, out: memoryview) -> None:
        """Fill `out` with an object's bytes from `offset` on; `DamagedStoreError` if there are fewer."""
        ...

    def create(self, key: str, data: bytes | bytearray | memoryview) -> bool:
        """Publish an object, whole and durable; False, and nothing changed, where the name is taken."""
        ...

    def replace(self, key: str, data: bytes) -> None:
        """Publish an object in place of another; only the root `zarr.json` is ever replaced."""
        ...

    def keys(self, prefix: str) -> Iterator[str]:
        """Yield the names under a folder, in order, without temporary files."""
        ...


class LocalObjects:
    """Objects in a local or network folder.

    Parameters
    ----------
    root
        The store's folder; made by the first `create`.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    @property
    def uri(self) -> str:
        """The folder."""
        return str(self.root)

    def path(self, key: str) -> Path:
        """Return the file of an object."""
        return self.root / check_key(key)

    def size(self, key: str) -> int | None:
        """Return a file's size in bytes, None where there is none."""
        try:
            status = self.path(key).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def read(self, key: str) -> bytes:
        """Return a whole file."""
        try:
            return self.path(key).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise _missing(self, key) from None

    def read_into(self, key: str, offset: int, out: memoryview) -> None:
        """Fill `out` from a file (preadv: no copy between)."""
        try:
            file = os.open(self.path(key), os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            raise _missing(self, key) from None
        try:
            done = 0
            while done < len(out):
                n = os.preadv(file, [out[done:]], offset + done)
                if n == 0:
                    raise DamagedStoreError(
                        f"'{key}' in {self.uri} is truncated: expected {len(out)} bytes at {offset}, found {done}. "
                        "Copy the store again, or extract it again"
                    )
                done += n
        finally:
            os.close(file)

    def create(self, key: str, data: bytes | bytearray | memoryview) -> bool:
        """Publish a file: temporary name, fsync, hard link to its name (the first writer wins), folder fsync."""
        path = self.path(key)
        if path.exists():
            return False
        with _explained(path, len(data)), self._temporary(path, data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            _sync_folder(path.parent)
        return True

    def replace(self, key: str, data: bytes) -> None:
        """Publish a file in place of another."""
        path = self.path(key)
        with _explained(path, len(data)), self._temporary(path, data) as temporary:
            temporary.replace(path)
            _sync_folder(path.parent)

    def keys(self, prefix: str) -> Iterator[str]:
        """Yield the files' names under a folder, in order."""
        folder = self.path(prefix)
        if folder.is_dir():
            for path in sorted(folder.rglob("*")):
                if path.is_file() and not path.name.startswith(_TEMPORARY):
                    yield path.relative_to(self.root).as_posix()

    @contextlib.contextmanager
    def _temporary(self, path: Path, data: bytes | bytearray | memoryview) -> Generator[Path]:
        """Write a synced file beside `path`; it is gone in the end, unless it was renamed."""
        _make_folder(path.parent)
        temporary = path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}")
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _explained(path: Path, n_bytes: int) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"could not write '{path}' ({n_bytes} bytes): {error.strerror or error}. "
            "What was committed before is safe: make room or mend the disk and give the same command again"
        ) from error


def open_objects(uri: str | os.PathLike[str]) -> Objects:
    """Return the objects at a path."""
    return LocalObjects(uri)


def _missing(objects: Objects, key: str) -> DamagedStoreError:
    return DamagedStoreError(
        f"'{key}' is missing from {objects.uri}: the store was copied without it or the copy was interrupted. "
        "Copy the store again"
    )


def _make_folder(folder: Path) -> None:
    """Make a folder and its parents, each synced into its parent: a power cut must not take it with what it holds."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
