"""The Zarr v3 arrays of a store: their metadata (zarr-python's own), and the bytes of their shards, decoded.

zarr-python writes the metadata, so that it is what zarr-python writes; it takes no part in the data's way
(docs/decisions/0002-direct-shard-writes.md).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import google_crc32c
import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec
from zarr.storage import MemoryStore

from stores import spec
from stores.errors import DamagedStoreError, FormatError
from stores.layout import Layout
from stores.objects import Objects

_ABSENT = np.iinfo(np.uint64).max
_BFLOAT16_NAN = 0x7FC0


@dataclass(frozen=True)
class StoredArray:
    """One array of a store: a layer, or `sample` or `token` (then `layer` is None).

    Parameters
    ----------
    name
        Its path in the store.
    layer
        What a layer's plan says of it.
    layout
        The store's.
    """

    name: str
    layer: spec.Layer | None
    layout: Layout

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the stored bytes; bfloat16 is kept as uint16."""
        if self.layer is None:
            return np.dtype("<i8" if self.name == spec.SAMPLE_ARRAY else "<i2")
        return np.dtype({"float16": "<f2", "float32": "<f4", "bfloat16": "<u2"}[self.layer.dtype])

    @property
    def fill(self) -> float | int:
        """What an absent chunk would read as: never a value that data have."""
        if self.layer is None:
            return -1 if self.name == spec.SAMPLE_ARRAY else -32768
        return _BFLOAT16_NAN if self.layer.dtype == "bfloat16" else float("nan")

    @property
    def width(self) -> int:
        """Columns; 1 for the one-dimensional arrays."""
        return 1 if self.layer is None else self.layer.width

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return () if self.layer is None else (self.layer.width,)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk's data, without its crc32c."""
        return self.layout.rows_per_chunk * self.width * self.dtype.itemsize

    def shard_key(self, unit: int) -> str:
        """Return the name of a unit's shard."""
        return spec.shard_key(self.name, unit, n_dimensions=1 + len(self.row_shape))

    def shard_bytes(self, unit: int) -> int:
        """Return the size of a unit's shard."""
        n_chunks = -(-len(self.layout.unit_rows(unit)) // self.layout.rows_per_chunk)
        return n_chunks * (self.chunk_bytes + 4) + index_bytes(self.layout)

    def check_metadata(self, metadata: Any) -> None:
        """Raise `FormatError` unless a parsed `zarr.json` makes Zarr's readers see what the plan says."""
        planned = spec.parse_json(self.metadata, self.name)
        for name in ("shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs"):
            found = metadata.get(name) if isinstance(metadata, dict) else metadata
            if found != planned[name]:
                raise FormatError(
                    f"'{spec.array_key(self.name)}': expected {name} {planned[name]} as planned, found {found}: "
                    "another program wrote it; use another folder, or copy the store again"
                )

    def to_float(self, rows: np.ndarray) -> np.ndarray:
        """Return stored rows as floats: bfloat16's bits become float32, others are returned as they are."""
        if self.layer is not None and self.layer.dtype == "bfloat16":
            return (rows.astype(np.uint32) << 16).view(np.float32)
        return rows

    @cached_property
    def metadata(self) -> bytes:
        """The array's `zarr.json`, as zarr-python writes it."""
        objects: dict[str, Any] = {}
        attributes: dict[str, Any] = {}
        if self.layer is not None:
            attributes = {"logical_dtype": self.layer.dtype}
        crc = [BytesCodec(endian="little"), Crc32cCodec()]
        zarr.create_array(
            MemoryStore(objects),
            name=self.name,
            shape=(self.layout.n_rows, *self.row_shape),
            chunks=(self.layout.rows_per_shard, *self.row_shape),
            dtype=self.dtype,
            fill_value=self.fill,
            serializer=ShardingCodec(
                chunk_shape=(self.layout.rows_per_chunk, *self.row_shape), codecs=crc, index_codecs=crc
            ),
            filters=None,
            compressors=None,
            dimension_names=("row", "feature")[: 1 + len(self.row_shape)],
            attributes=attributes,
        )
        return bytes(objects[f"{self.name}/zarr.json"].to_bytes())


def arrays_of(plan: spec.StorePlan) -> tuple[StoredArray, ...]:
    """Return a store's arrays: `sample`, `token`, then the layers."""
    return (
        StoredArray(spec.SAMPLE_ARRAY, None, plan.layout),
        StoredArray(spec.TOKEN_ARRAY, None, plan.layout),
        *(StoredArray(layer.name, layer, plan.layout) for layer in plan.layers),
    )


def root_metadata(plan: spec.StorePlan, *, store_id: str | None, images_root: str) -> bytes:
    """Return the root group's `zarr.json`.

    Its attributes are the format version, the plan's digest, the store's id once sealed, and where the images
    were: the only object that is not covered by the id, since it holds it.
    """
    return spec.canonical_json(
        {
            "zarr_format": 3,
            "node_type": "group",
            "attributes": {
                "softbudget": {
                    "format": spec.FORMAT,
                    "format_version": spec.FORMAT_VERSION,
                    "plan": plan.digest,
                    "id": store_id,
                    "images": images_root,
                }
            },
        }
    )


def check_crc32c(data: np.ndarray, stored: bytes, what: str) -> None:
    """Raise `DamagedStoreError` unless the crc32c of uint8 `data` is the little-endian `stored`."""
    if google_crc32c.value(data) != int.from_bytes(stored, "little"):
        raise DamagedStoreError(f"{what} is damaged: its crc32c differs. Copy this object again")


def parse_index(array: StoredArray, data: np.ndarray, *, shard_bytes: int, n_chunks: int, what: str) -> np.ndarray:
    """Check a shard's index and return its chunks' offsets.

    Parameters
    ----------
    array
        Whose shard it is.
    data
        uint8: the index with its crc32c, the shard's last bytes.
    shard_bytes
        Size of the whole object.
    n_chunks
        Chunks that hold rows: the others must be absent.
    what
        The object's name, for messages.

    Returns
    -------
    numpy.ndarray
        int64 (n_chunks,).

    Raises
    ------
    DamagedStoreError
        If the crc differs, or a chunk is absent, of another size, outside the object or over another one.
    """
    check_crc32c(data[:-4], data[-4:].tobytes(), f"the index of '{what}'")
    index = data[:-4].view("<u8").reshape(-1, 2)
    size = array.chunk_bytes + 4
    limit = shard_bytes - len(data)
    present = index[:n_chunks]
    if (index[n_chunks:] != _ABSENT).any() or (present[:, 1] != size).any():
        raise DamagedStoreError(
            f"the index of '{what}' does not fit the plan: expected {n_chunks} chunks of {size} bytes. "
            "Copy this object again"
        )
    # Compared as unsigned before anything is added: a hostile offset near 2^64 must not wrap around.
    if (present[:, 0] > np.uint64(max(limit - size, 0))).any() or limit < size * n_chunks:
        raise DamagedStoreError(f"the index of '{what}' points outside of the object. Copy this object again")
    offsets = present[:, 0].astype(np.int64)
    if (np.diff(np.sort(offsets)) < size).any():
        raise DamagedStoreError(f"the index of '{what}' has overlapping chunks. Copy this object again")
    return offsets


def index_bytes(layout: Layout) -> int:
    """Return the size of a shard's index with its crc32c."""
    return 16 * layout.chunks_per_shard + 4


def decode_shard(array: StoredArray, data: bytes | bytearray, *, n_rows: int, what: str) -> np.ndarray:
    """Return the rows of a whole shard, every crc32c checked.

    Returns
    -------
    numpy.ndarray
        (n_rows,) or (n_rows, D) of the array's dtype.

    Raises
    ------
    DamagedStoreError
        If anything in it is not as it was written.
    """
    raw = np.frombuffer(data, dtype=np.uint8)
    n_index = index_bytes(array.layout)
    rows_per_chunk = array.layout.rows_per_chunk
    n_chunks = -(-n_rows // rows_per_chunk)
    if len(raw) < n_index:
        raise DamagedStoreError(
            f"'{what}' is truncated: expected at least {n_index} bytes, found {len(raw)}. Copy this object again"
        )
    offsets = parse_index(array, raw[-n_index:], shard_bytes=len(raw), n_chunks=n_chunks, what=what)
    rows = np.empty((n_chunks * rows_per_chunk, *array.row_shape), dtype=array.dtype)
    for chunk, offset in enumerate(offsets):
        body = raw[offset : offset + array.chunk_bytes]
        stored = raw[offset + array.chunk_bytes : offset + array.chunk_bytes + 4].tobytes()
        check_crc32c(body, stored, f"chunk {chunk} of '{what}'")
        rows[chunk * rows_per_chunk : (chunk + 1) * rows_per_chunk] = body.view(array.dtype).reshape(
            rows_per_chunk, *array.row_shape
        )
    return rows[:n_rows]


class ShardChunks:
    """The chunks of one array, read straight from its shards; indexes are read once and kept."""

    def __init__(self, objects: Objects, array: StoredArray) -> None:
        self.objects = objects
        self.array = array
        self._offsets: dict[int, np.ndarray] = {}

    def read(self, chunk: int, out: np.ndarray | None = None) -> np.ndarray:
        """Return the rows of a chunk, its crc32c checked.

        Parameters
        ----------
        chunk
            Number in the whole array.
        out
            uint8 (chunk_bytes + 4,) to read into, else one is made.

        Returns
        -------
        numpy.ndarray
            (rows,) or (rows, D): a view into `out`.
        """
        array, layout = self.array, self.array.layout
        unit, place = layout.chunk_address(chunk)
        key = array.shard_key(unit)
        if unit not in self._offsets:
            self._offsets[unit] = self._read_index(unit, key)
        if out is None:
            out = np.empty(array.chunk_bytes + 4, dtype=np.uint8)
        self.objects.read_into(key, int(self._offsets[unit][place]), memoryview(out))
        check_crc32c(out[:-4], out[-4:].tobytes(), f"chunk {place} of '{key}'")
        rows = out[:-4].view(array.dtype).reshape(layout.rows_per_chunk, *array.row_shape)
        return rows[: len(layout.chunk_rows(chunk))]

    def _read_index(self, unit: int, key: str) -> np.ndarray:
        layout = self.array.layout
        n_index = index_bytes(layout)
        size = self.objects.size(key) or 0
        if size < n_index:
            raise DamagedStoreError(
                f"'{key}' in {self.objects.uri} is missing or truncated: expected at least {n_index} bytes, "
                f"found {size}. Copy the store again"
            )
        data = np.empty(n_index, dtype=np.uint8)
        self.objects.read_into(key, size - n_index, memoryview(data))
        n_chunks = -(-len(layout.unit_rows(unit)) // layout.rows_per_chunk)
        return parse_index(self.array, data, shard_bytes=size, n_chunks=n_chunks, what=key)
