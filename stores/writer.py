"""Writing a store: encode Zarr shards, publish them unit by unit, seal.

A shard is encoded here rather than by zarr-python: the bytes are the same (tests/stores/test_writer.py holds them
against each other), but one buffer is filled in place, and what is published is whole by
construction. See docs/decisions/0002-direct-shard-writes.md.

    shard = chunk 0 | crc32c | chunk 1 | crc32c | ... | index: (offset, size) of every chunk | crc32c
"""

import logging
from typing import Any, Self

import google_crc32c
import numpy as np
import pyarrow as pa

from stores import spec
from stores.errors import DamagedStoreError, PlanMismatchError, StoreError, UnsealedStoreError
from stores.layout import row_order
from stores.objects import Objects
from stores.samples import SAMPLES_SCHEMA, read_samples, write_samples
from stores.statistics import Statistics
from stores.zarr_arrays import arrays_of, decode_shard, root_metadata

log = logging.getLogger(__name__)


def encode_shard(
    rows: np.ndarray, order: np.ndarray, *, rows_per_chunk: int, chunks_per_shard: int, fill: Any
) -> bytearray:
    """Encode a Zarr v3 shard of uncompressed chunks, each with its crc32c, and an index at its end.

    Parameters
    ----------
    rows
        (n,) or (n, D), little endian, in natural order; n is at most rows_per_chunk × chunks_per_shard.
    order
        int64 (n,): the shard's row `i` is `rows[order[i]]`.
    rows_per_chunk, chunks_per_shard
        The grid. The last chunk that holds rows is padded with `fill`; those after it are absent, as zarr-python
        leaves them.
    fill
        The array's fill value.

    Returns
    -------
    bytearray
        The object's bytes.
    """
    n_chunks = -(-len(rows) // rows_per_chunk)
    chunk_shape = (rows_per_chunk, *rows.shape[1:])
    chunk_bytes = int(np.prod(chunk_shape)) * rows.itemsize
    stride = chunk_bytes + 4
    shard = bytearray(n_chunks * stride + 16 * chunks_per_shard + 4)
    view = memoryview(shard)
    for chunk in range(n_chunks):
        start = chunk * stride
        data = view[start : start + chunk_bytes]
        out = np.frombuffer(data, dtype=rows.dtype).reshape(chunk_shape)
        picked = order[chunk * rows_per_chunk : (chunk + 1) * rows_per_chunk]
        if len(picked) < rows_per_chunk:
            out[len(picked) :] = fill
            out = out[: len(picked)]
        np.take(rows, picked, axis=0, out=out, mode="clip")  # "clip": "raise" would buffer the output
        view[start + chunk_bytes : start + stride] = _crc32c(data)
    index = np.full((chunks_per_shard, 2), np.iinfo(np.uint64).max, dtype="<u8")
    index[:n_chunks, 0] = np.arange(n_chunks) * stride
    index[:n_chunks, 1] = stride
    view[n_chunks * stride : -4] = index.tobytes()
    view[-4:] = _crc32c(view[n_chunks * stride : -4])
    return shard


def _crc32c(data: memoryview) -> bytes:
    # google_crc32c takes only bytes-like objects of its own choosing: a numpy view is one, a memoryview is not.
    return google_crc32c.value(np.frombuffer(data, dtype=np.uint8)).to_bytes(4, "little")


class StoreWriter:
    """A store that is being made. Any number of writers may work on it, in any order, more than once.

    Use `begin` (makes or resumes) or `attach` (a worker, to what another began).
    """

    def __init__(self, objects: Objects, plan: spec.StorePlan) -> None:
        self.objects = objects
        self.plan = plan
        self.arrays = arrays_of(plan)

    @classmethod
    def begin(cls, objects: Objects, plan: spec.StorePlan, *, images_root: str) -> Self:
        """Begin a store, or go on with one that the same plan began.

        Parameters
        ----------
        objects
            Where.
        plan
            What will be in it.
        images_root
            Folder or URL of the tar shards: a hint for showing images, no part of the store's identity.

        Raises
        ------
        PlanMismatchError
            If something else is there; names what differs.
        """
        writer = cls(objects, plan)
        mine = plan.to_json()
        if not objects.create(spec.PLAN_KEY, spec.canonical_json(mine)):
            theirs = spec.StorePlan.from_json(spec.parse_json(objects.read(spec.PLAN_KEY), spec.PLAN_KEY)).to_json()
            differing = [
                f"{name}: {_brief(theirs[name])} there, {_brief(mine[name])} here"
                for name in mine
                if spec.canonical_json(mine[name]) != spec.canonical_json(theirs[name])
            ]
            if differing:
                raise PlanMismatchError(
                    f"{objects.uri} holds a store of another plan ({'; '.join(differing)}). "
                    "Give the command that began it, or another --out"
                )
        for array in writer.arrays:
            key = spec.array_key(array.name)
            if not objects.create(key, array.metadata):
                array.check_metadata(spec.parse_json(objects.read(key), key))
        if not objects.create(spec.ROOT_KEY, root_metadata(plan, store_id=None, images_root=images_root)):
            root = spec.parse_json(objects.read(spec.ROOT_KEY), spec.ROOT_KEY)
            if not isinstance(root, dict) or "softbudget" not in root.get("attributes", {}):
                raise PlanMismatchError(
                    f"expected nothing or this store at {objects.uri}, found '{spec.ROOT_KEY}' of something else: "
                    "give another --out"
                )
        return writer

    @classmethod
    def attach(cls, objects: Objects) -> Self:
        """Join the writing of a store that `begin` has begun."""
        return cls(objects, spec.StorePlan.from_json(spec.parse_json(objects.read(spec.PLAN_KEY), spec.PLAN_KEY)))

    def committed(self) -> set[int]:
        """Return the units that are whole: the only truth about progress."""
        keys = set(self.objects.keys("commits"))
        return {unit for unit in range(self.plan.layout.n_units) if spec.receipt_key(unit) in keys}

    def receipt(self, unit: int) -> spec.Receipt:
        """Return a committed unit's receipt."""
        key = spec.receipt_key(unit)
        return spec.Receipt.from_json(spec.parse_json(self.objects.read(key), key))

    def commit(self, unit: int, activations: dict[str, np.ndarray], samples: pa.Table) -> spec.Receipt:
        """Publish a unit: its shards and samples, then the receipt that makes it count.

        Doing a unit twice, or in two processes at once, changes nothing: of each object the first one written stays,
        and the statistics are those of the bytes that stayed.

        Parameters
        ----------
        unit
            Which.
        activations
            Layer name to (samples, tokens, D) in the layer's dtype (bfloat16 as uint16), samples in the plan's order.
            Rows of failed images may hold anything: they are written as NaN.
        samples
            The unit's lines of `SAMPLES_SCHEMA`, in the same order.

        Raises
        ------
        StoreError
            If shapes or dtypes are not the plan's, or an object cannot be written.
        """
        layout = self.plan.layout
        unit_samples = layout.unit_samples(unit)
        self._check(unit, activations, samples)
        records = [self._publish(spec.unit_samples_key(unit), write_samples(samples))[0]]
        mine = samples
        samples = read_samples(self.objects.read(spec.unit_samples_key(unit)), spec.unit_samples_key(unit))
        self._check_adopted(unit, mine, samples)
        failed = np.asarray([status != "ok" for status in samples["status"].to_pylist()], dtype=bool)

        order = row_order(layout, unit, self.plan.seed)
        tokens_per_sample = layout.tokens_per_sample
        excluded = np.repeat(failed, tokens_per_sample)[order]
        statistics: dict[str, Any] = {}
        for array in self.arrays:
            if array.name == spec.SAMPLE_ARRAY:
                rows = np.repeat(np.arange(unit_samples.start, unit_samples.stop, dtype="<i8"), tokens_per_sample)
            elif array.name == spec.TOKEN_ARRAY:
                rows = np.tile(np.asarray(self.plan.tokens.positions, dtype="<i2"), len(unit_samples))
            else:
                rows = activations[array.name].reshape(-1, array.width)
                if failed.any():
                    rows = rows.copy()
                    rows[np.repeat(failed, tokens_per_sample)] = array.fill
            shard = encode_shard(
                rows,
                order,
                rows_per_chunk=layout.rows_per_chunk,
                chunks_per_shard=layout.chunks_per_shard,
                fill=array.fill,
            )
            record, published = self._publish(array.shard_key(unit), shard)
            records.append(record)
            stored = decode_shard(array, published, n_rows=len(order), what=record.key)
            if array.layer is None:
                if not np.array_equal(stored, rows[order]):
                    raise DamagedStoreError(
                        f"'{record.key}' in {self.objects.uri}: expected the plan's order of rows, found another: "
                        "it was damaged, or another program wrote it. Delete it and give the same command again"
                    )
            else:
                statistics[array.name] = Statistics.of(array.to_float(stored), kept=~excluded).to_json()
        rows_of_unit = layout.unit_rows(unit)
        receipt = spec.Receipt(
            unit=unit,
            samples=(unit_samples.start, unit_samples.stop),
            rows=(rows_of_unit.start, rows_of_unit.stop),
            n_failed=int(failed.sum()),
            objects=tuple(records),
            statistics=statistics,
        )
        self.objects.create(spec.receipt_key(unit), spec.canonical_json(receipt.to_json()))
        return self.receipt(unit)

    def seal(self, *, versions: dict[str, str]) -> str:
        """Seal the store: merge the units' statistics and samples, then write the manifest, create-only.

        Parameters
        ----------
        versions
            Library versions to record.

        Returns
        -------
        str
            The store's id. Sealing a sealed store returns the id that it has.

        Raises
        ------
        UnsealedStoreError
            If units are missing.
        """
        if self.objects.size(spec.MANIFEST_KEY) is None:
            missing = sorted(set(range(self.plan.layout.n_units)) - self.committed())
            if missing:
                raise UnsealedStoreError(
                    f"{len(missing)} of {self.plan.layout.n_units} units of {self.objects.uri} are missing "
                    f"(first: {missing[0]}): give the command that began the extraction again, it goes on from there"
                )
            self.objects.create(spec.MANIFEST_KEY, spec.canonical_json(self._manifest(versions).to_json()))
        store_id = spec.sha256(self.objects.read(spec.MANIFEST_KEY))
        root = spec.parse_json(self.objects.read(spec.ROOT_KEY), spec.ROOT_KEY)
        images_root = root["attributes"]["softbudget"]["images"]
        self.objects.replace(spec.ROOT_KEY, root_metadata(self.plan, store_id=store_id, images_root=images_root))
        return store_id

    def _manifest(self, versions: dict[str, str]) -> spec.Manifest:
        receipts = [self.receipt(unit) for unit in range(self.plan.layout.n_units)]
        records = [
            self._record(spec.PLAN_KEY),
            *(self._record(spec.array_key(array.name)) for array in self.arrays),
        ]
        records.extend(record for receipt in receipts for record in receipt.objects)
        records.extend(self._record(spec.receipt_key(receipt.unit)) for receipt in receipts)

        merged = {layer.name: Statistics.empty(layer.width) for layer in self.plan.layers}
        for receipt in receipts:
            for layer in self.plan.layers:
                unit = Statistics.of_layer(receipt.statistics, layer, spec.receipt_key(receipt.unit))
                merged[layer.name] = merged[layer.name].merged(unit)
        statistics = {name: value.to_json() for name, value in merged.items()}
        records.append(self._publish(spec.STATISTICS_KEY, spec.canonical_json(statistics))[0])

        keys = [spec.unit_samples_key(receipt.unit) for receipt in receipts]
        parts = [read_samples(self.objects.read(key), key) for key in keys]
        records.append(self._publish(spec.SAMPLES_KEY, write_samples(pa.concat_tables(parts)))[0])
        return spec.Manifest(
            plan=self.plan,
            n_failed=sum(receipt.n_failed for receipt in receipts),
            objects=tuple(sorted(records, key=lambda record: record.key)),
            versions=versions,
        )

    def _publish(self, key: str, data: bytes | bytearray) -> tuple[spec.ObjectRecord, bytes | bytearray]:
        """Create an object, or adopt the one that is there; return its record and the bytes that count."""
        if not self.objects.create(key, data):
            there = self.objects.read(key)
            if there != data:
                log.info("%s was written by another worker first, with other bytes: adopted", key)
            data = there
        return spec.ObjectRecord(key=key, n_bytes=len(data), sha256=spec.sha256(data)), data

    def _record(self, key: str) -> spec.ObjectRecord:
        data = self.objects.read(key)
        return spec.ObjectRecord(key=key, n_bytes=len(data), sha256=spec.sha256(data))

    def _check_adopted(self, unit: int, mine: pa.Table, there: pa.Table) -> None:
        """Refuse rows that could not be read here for an image that another worker said it could read."""
        if len(there) != len(mine):
            raise DamagedStoreError(
                f"'{spec.unit_samples_key(unit)}' in {self.objects.uri}: expected {len(mine)} images, "
                f"found {len(there)}. Delete it and give the same command again"
            )
        columns = (mine["key"], mine["status"], there["status"])
        keys = [
            key
            for key, here, elsewhere in zip(*(column.to_pylist() for column in columns), strict=True)
            if here != "ok" and elsewhere == "ok"
        ]
        if keys:
            raise StoreError(
                f"unit {unit}: {len(keys)} images could be read by another worker, but not here (first: '{keys[0]}'). "
                "Check the tar shards and give the same command again"
            )

    def _check(self, unit: int, activations: dict[str, np.ndarray], samples: pa.Table) -> None:
        n_units = self.plan.layout.n_units
        if not 0 <= unit < n_units:
            raise StoreError(f"expected a unit from 0 to {n_units - 1}, found {unit}")
        n_samples = len(self.plan.layout.unit_samples(unit))
        if not samples.schema.equals(SAMPLES_SCHEMA) or len(samples) != n_samples:
            raise StoreError(
                f"unit {unit}: expected {n_samples} lines of SAMPLES_SCHEMA, found {len(samples)} of "
                f"{', '.join(f'{field.name} {field.type}' for field in samples.schema)}"
            )
        for array in self.arrays:
            if array.layer is None:
                continue
            found = activations.get(array.name)
            expected = (n_samples, self.plan.layout.tokens_per_sample, array.width)
            if found is None or found.shape != expected or found.dtype != array.dtype:
                description = "nothing" if found is None else f"{found.shape} of {found.dtype}"
                raise StoreError(
                    f"unit {unit}, layer {array.name}: expected {expected} of {array.dtype}, found {description}"
                )


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 160 else text[:157] + "..."
