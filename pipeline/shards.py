"""WebDataset tar shards: writing them, and the index that says where in them each image is.

    DIR/NAME-000000.tar                 KEY.jpg KEY.cls KEY.jpg ...
    DIR/NAME-000000.index.parquet       key, label, extension, offset and size of each image in the tar

The index is what lets any worker read its own byte range of any tar. `pipeline shards` writes it; for tars from
elsewhere it is made once, by one sequential read, and kept beside them or, where their folder is read-only, in the
user's cache.
"""

import glob
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from webdataset.writer import TarWriter

from pipeline.errors import ShardError
from pipeline.sources.base import IMAGE_EXTENSIONS, Sample, Source

INDEX_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.int64()),
        pa.field("extension", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
    ]
)
_VERSION = "1"


@dataclass(frozen=True)
class TarIndex:
    """What is in a tar shard.

    Parameters
    ----------
    path
        The tar.
    n_bytes
        Its size, which the index was made for.
    table
        `INDEX_SCHEMA`, in the order of the tar.
    classes
        Names of the classes by label; empty when unknown.
    """

    path: Path
    n_bytes: int
    table: pa.Table
    classes: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Digest of what the index says: keys, labels and addresses."""
        digest = hashlib.sha256()
        for row in self.table.to_pylist():
            digest.update(json.dumps(list(row.values())).encode() + b"\n")
        return digest.hexdigest()


def write_shards(
    source: Source,
    out: Path,
    *,
    name: str,
    samples_per_shard: int,
    on_sample: Callable[[], None] | None = None,
) -> list[Path]:
    """Write a source as WebDataset tar shards, each with its index.

    The same source gives the same bytes: members carry no times, users or groups.

    Parameters
    ----------
    source
        Images in their order.
    out
        Folder; made if missing.
    name
        Shards are `NAME-000000.tar`, ….
    samples_per_shard
        Images a tar.
    on_sample
        Called after each image.

    Returns
    -------
    list of Path
        The tars.

    Raises
    ------
    ShardError
        If shards of another number of images are there already.
    """
    n_shards = -(-len(source) // samples_per_shard)
    paths = [out / f"{name}-{number:06d}.tar" for number in range(n_shards)]
    out.mkdir(parents=True, exist_ok=True)
    strangers = sorted(set(out.glob(f"{name}-*.tar")) - set(paths))
    if strangers:
        raise ShardError(
            f"expected only {n_shards} shards '{name}-*.tar' in '{out}', found others (first: {strangers[0].name}): "
            "choose another --out, or remove them"
        )
    samples = iter(source)
    for number, path in enumerate(paths):
        n_here = min(samples_per_shard, len(source) - number * samples_per_shard)
        temporary = path.with_suffix(".tar.partial")
        with temporary.open("wb") as file, TarWriter(file, user="", group="", mtime=0.0) as tar:
            for _, sample in zip(range(n_here), samples, strict=False):
                tar.write(_members(sample))
                if on_sample is not None:
                    on_sample()
        temporary.replace(path)
        _write_index(_beside(path), _scan(path, classes=source.classes))
    return paths


def _members(sample: Sample) -> dict[str, Any]:
    members: dict[str, Any] = {"__key__": sample.key, sample.extension: sample.image}
    if sample.label is not None:
        members["cls"] = str(sample.label).encode()
    return members


def find_shards(pattern: str) -> list[Path]:
    """Return the tars that a glob matches, sorted by path.

    Raises
    ------
    ShardError
        If there are none.
    """
    paths = sorted(Path(match) for match in glob.glob(pattern))
    if not paths:
        raise ShardError(f"expected tar shards at '{pattern}', found none: check --shards (quote the pattern)")
    for path in paths:
        if not path.is_file():
            raise ShardError(f"expected tar files at '{pattern}', found the folder '{path}': give e.g. '{path}/*.tar'")
    return paths


def index_of(path: Path) -> TarIndex:
    """Return a tar's index: the one kept beside it or in the cache if it is the tar's, else made and kept.

    Raises
    ------
    ShardError
        If the tar is damaged, holds unsafe members, or no images.
    """
    for place in (_beside(path), _cached(path)):
        index = _read_index(place, path)
        if index is not None:
            return index
    index = _scan(path, classes=())
    if not len(index.table):
        raise ShardError(f"expected images in '{path}', found none: are these WebDataset shards?")
    try:
        _write_index(_beside(path), index)
    except OSError:  # a read-only data set
        _write_index(_cached(path), index)
    return index


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name.removesuffix('.tar')}.index.parquet")


def _cached(path: Path) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "softbudget" / "indexes"
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    return root / f"{path.stem}-{place}.index.parquet"


def _read_index(place: Path, tar: Path) -> TarIndex | None:
    """Return the index at a place if it is of this version and of the tar as it is now."""
    try:
        table = pq.read_table(place)
    except (FileNotFoundError, NotADirectoryError, PermissionError, pa.ArrowException):
        return None
    metadata: dict[bytes, bytes] = table.schema.metadata or {}
    if metadata.get(b"version") != _VERSION.encode() or metadata.get(b"tar") != _fingerprint(tar).encode():
        return None
    return TarIndex(
        path=tar,
        n_bytes=tar.stat().st_size,
        table=table.replace_schema_metadata(None),
        classes=tuple(json.loads(metadata[b"classes"])),
    )


def _write_index(place: Path, index: TarIndex) -> None:
    metadata = {
        "version": _VERSION,
        "tar": _fingerprint(index.path),
        "classes": json.dumps(list(index.classes)),
    }
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f"{place.name}.{os.getpid()}.partial")
    pq.write_table(index.table.replace_schema_metadata(metadata), temporary, compression="zstd")
    temporary.replace(place)


def _fingerprint(tar: Path) -> str:
    """What tells a changed tar at no cost: size, and a digest of both ends (times do not survive copying)."""
    n_bytes = tar.stat().st_size
    with tar.open("rb") as file:
        digest = hashlib.sha256(file.read(1 << 16))
        file.seek(max(0, n_bytes - (1 << 16)))
        digest.update(file.read())
    return f"{n_bytes} {digest.hexdigest()[:32]}"


def _scan(path: Path, *, classes: tuple[str, ...]) -> TarIndex:
    """Read a tar's headers and labels, front to back."""
    images: dict[str, dict[str, Any]] = {}
    labels: dict[str, int] = {}
    n_bytes = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                _refuse_unsafe(member, path)
                if member.offset_data + member.size > n_bytes:
                    raise ShardError(f"'{path}' is truncated in member '{member.name}': copy it again")
                key, extension = _split(member.name)
                if not member.isreg() or key is None:
                    continue
                if extension.lower() in IMAGE_EXTENSIONS:
                    if key in images:
                        raise ShardError(f"expected one image a sample in '{path}', found more for key '{key}'")
                    images[key] = {"extension": extension, "offset": member.offset_data, "size": member.size}
                elif extension == "cls":
                    labels[key] = _label(tar, member, path)
    except tarfile.TarError as error:
        raise ShardError(f"expected a tar at '{path}', found something else or a damaged one ({error})") from None
    rows = [{"key": key, "label": labels.get(key), **image} for key, image in images.items()]
    return TarIndex(path=path, n_bytes=n_bytes, table=pa.Table.from_pylist(rows, schema=INDEX_SCHEMA), classes=classes)


def _refuse_unsafe(member: tarfile.TarInfo, path: Path) -> None:
    if member.name.startswith("/") or ".." in member.name.split("/") or member.issym() or member.islnk():
        raise ShardError(
            f"expected plain members inside '{path}', found '{member.name}' (absolute, '..' or a link): "
            "do not use this tar"
        )


def _split(name: str) -> tuple[str | None, str]:
    """Split a member's name as WebDataset does: at the first dot of its last part."""
    match = re.fullmatch(r"((?:.*/)?[^/.]+)\.([^/]+)", name.removeprefix("./"))
    return (match[1], match[2]) if match else (None, "")


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> int:
    file = tar.extractfile(member)
    text = file.read(32) if file is not None else b""
    try:
        return int(text)
    except ValueError:
        raise ShardError(f"expected an integer label in '{member.name}' of '{path}', found {text!r}") from None


def merged_classes(indexes: Iterable[TarIndex]) -> tuple[str, ...]:
    """Return the classes that the shards agree on; empty when none names any.

    Raises
    ------
    ShardError
        If two shards name them differently: their labels do not mean the same.
    """
    named = {index.classes: index.path for index in indexes if index.classes}
    if len(named) > 1:
        first, second = list(named.values())[:2]
        raise ShardError(f"expected shards with the same classes, found '{first}' and '{second}' to differ")
    return next(iter(named), ())
