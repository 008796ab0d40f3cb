"""Reading a sealed store: a validated open, plain reads through zarr-python, and the direct path.

`Store.open` checks everything that costs no reading of activations: seal, versions, digests of the metadata, presence
and size of every object. The activations' own crc32c are checked by each read; `stores verify` checks all of it.
"""

import os
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import zarr

from stores import spec
from stores.errors import DamagedStoreError, FormatError, StoreError, UnsealedStoreError
from stores.layout import Layout
from stores.objects import Objects, open_objects
from stores.samples import read_samples
from stores.statistics import Statistics
from stores.zarr_arrays import ShardChunks, StoredArray, arrays_of, root_metadata


class Store:
    """A sealed store. Make one with `Store.open`.

    Attributes
    ----------
    objects
        Where it is.
    manifest
        What it is.
    id
        sha256 of the manifest: the store's identity, wherever a copy of it is.
    """

    def __init__(self, objects: Objects, manifest: spec.Manifest, store_id: str, images_root: str) -> None:
        self.objects = objects
        self.manifest = manifest
        self.id = store_id
        self.images_root = images_root
        self.arrays: dict[str, StoredArray] = {array.name: array for array in arrays_of(manifest.plan)}

    @classmethod
    def open(cls, uri: str | os.PathLike[str], *, allow_nonfinite: bool = False) -> Self:
        """Open a store after checking its seal.

        Parameters
        ----------
        uri
            The store's folder.
        allow_nonfinite
            Accept NaN or infinity among the activations.

        Raises
        ------
        UnsealedStoreError
            If its extraction has not finished.
        DamagedStoreError
            If an object is missing, of another size, or (metadata) of other bytes.
        FormatError
            If it is no store, or one of an unknown version.
        """
        objects = open_objects(uri)
        manifest, store_id, images_root = _read_seal(objects)
        store = cls(objects, manifest, store_id, images_root)
        store._check_objects()
        if not allow_nonfinite:
            for name in store.layer_names:
                n_bad = store.statistics(name).n_nonfinite
                if n_bad:
                    raise StoreError(
                        f"layer '{name}' of {objects.uri} has {n_bad} NaN or infinite entries; expected none. "
                        "Extract it again in float32, or allow them explicitly (allow_nonfinite=True)"
                    )
        return store

    @property
    def plan(self) -> spec.StorePlan:
        """The plan that the store was made by."""
        return self.manifest.plan

    @property
    def layout(self) -> Layout:
        """Sizes of units and chunks."""
        return self.plan.layout

    @property
    def layer_names(self) -> list[str]:
        """Names of the layers, in the plan's order."""
        return [layer.name for layer in self.plan.layers]

    @property
    def classes(self) -> list[str]:
        """Names of the classes by label; empty when the images have none."""
        return list(self.plan.source.get("classes", []))

    def layer(self, name: str | None) -> spec.Layer:
        """Return a layer by name; None means the only one, or the last.

        Raises
        ------
        StoreError
            If there is none of that name.
        """
        return self.plan.layers[-1] if name is None else self.plan.layer(name)

    def statistics(self, layer: str) -> Statistics:
        """Return the statistics of a layer's rows (failed images excluded)."""
        return Statistics.of_layer(self._statistics, self.plan.layer(layer), spec.STATISTICS_KEY)

    @cached_property
    def _statistics(self) -> dict[str, Any]:
        return spec.parse_json(self.read_verified(spec.STATISTICS_KEY), spec.STATISTICS_KEY)

    @cached_property
    def samples(self) -> pa.Table:
        """One line an image: key, label, tar, offset, size, sha256, status (see docs/format.md)."""
        table = read_samples(self.read_verified(spec.SAMPLES_KEY), spec.SAMPLES_KEY)
        if len(table) != self.layout.n_samples:
            raise FormatError(
                f"'{spec.SAMPLES_KEY}' in {self.objects.uri}: expected {self.layout.n_samples} images as planned, "
                f"found {len(table)}: it was not written by softbudget; do not use it"
            )
        return table

    @cached_property
    def ok_samples(self) -> np.ndarray:
        """Bool (n_samples,): whether an image could be read."""
        return np.asarray([status == "ok" for status in self.samples["status"].to_pylist()], dtype=bool)

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 (n_samples,): labels, -1 where an image has none."""
        return self.samples["label"].fill_null(-1).to_numpy()

    def image_bytes(self, sample: int, root: str | os.PathLike[str] | None = None) -> bytes:
        """Return the file of an image, read from its tar shard and checked against the store's sha256.

        Parameters
        ----------
        sample
            Its line in `samples`.
        root
            Folder of the tar shards; None takes the one that the extraction read.

        Raises
        ------
        StoreError
            If the tar is not there any more, or holds other bytes.
        """
        line = self.samples.slice(sample, 1).to_pylist()[0]
        path = Path(root if root is not None else self.images_root) / line["tar"]
        if line["tar"].startswith("/") or ".." in line["tar"].split("/"):
            raise StoreError(
                f"expected a tar shard inside the images' folder, found {line['tar']!r}: "
                "this store was not written by softbudget; do not use it"
            )
        try:
            with path.open("rb") as file:
                file.seek(line["offset"])
                data = file.read(line["size"])
        except OSError as error:
            raise StoreError(
                f"expected the tar shard '{path}' with image '{line['key']}', found none ({error.strerror}): "
                "give the folder in which the shards are now"
            ) from None
        if spec.sha256(data) != line["sha256"]:
            raise StoreError(
                f"expected image '{line['key']}' at {line['offset']} of '{path}', found other bytes: "
                "these are not the shards that the store was made from"
            )
        return data

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return rows as they are stored, read by zarr-python: the plain way, which the direct one must equal.

        Parameters
        ----------
        name
            A layer, or `sample` or `token`.
        start, stop
            Rows.

        Returns
        -------
        numpy.ndarray
            (stop - start, D), or (stop - start,) for `sample` and `token`; bfloat16 as uint16.
        """
        if name not in self.arrays:
            raise StoreError(f"expected one of {list(self.arrays)}, found {name!r}")
        if not 0 <= start <= stop <= self.layout.n_rows:
            raise StoreError(f"expected rows within [0, {self.layout.n_rows}), found [{start}, {stop})")
        array = zarr.open_array(self.objects.uri, path=name, mode="r")
        return np.asarray(array[start:stop])

    def chunks(self, name: str) -> ShardChunks:
        """Return the direct way to the chunks of a layer, or of `sample` or `token`."""
        if name not in self.arrays:
            raise StoreError(f"expected one of {list(self.arrays)}, found {name!r}")
        return ShardChunks(self.objects, self.arrays[name])

    def record(self, key: str) -> spec.ObjectRecord:
        """Return what the manifest says of an object."""
        try:
            return self._records[key]
        except KeyError:
            raise FormatError(f"the manifest of {self.objects.uri} does not name '{key}', which format 1 has") from None

    @cached_property
    def _records(self) -> dict[str, spec.ObjectRecord]:
        return {record.key: record for record in self.manifest.objects}

    def read_verified(self, key: str) -> bytes:
        """Return a whole object after checking its sha256."""
        data = self.objects.read(key)
        expected = self.record(key).sha256
        if spec.sha256(data) != expected:
            raise DamagedStoreError(
                f"'{key}' in {self.objects.uri} is damaged: expected sha256 {expected[:16]}…, found "
                f"{spec.sha256(data)[:16]}…. Copy this object again"
            )
        return data

    def _check_objects(self) -> None:
        wrong: list[str] = []
        # Counted before anything is listed: a hostile plan may declare any number of units.
        n_expected = len(self.arrays) * (1 + self.layout.n_units)
        if n_expected > len(self.manifest.objects):
            raise FormatError(
                f"expected at least {n_expected} objects in the manifest of {self.objects.uri}, as its plan says, "
                f"found {len(self.manifest.objects)}: it was not written by softbudget; do not use it"
            )
        for key in (spec.PLAN_KEY, spec.STATISTICS_KEY, spec.SAMPLES_KEY):
            self.record(key)
        if self.record(spec.PLAN_KEY).sha256 != self.plan.digest:
            raise FormatError(
                f"expected '{spec.PLAN_KEY}' of {self.objects.uri} to be the manifest's plan, found another. "
                "Copy the store again"
            )
        for array in self.arrays.values():
            self.record(spec.array_key(array.name))
        for unit in range(self.layout.n_units):
            self.record(spec.receipt_key(unit))
            self.record(spec.unit_samples_key(unit))
            for array in self.arrays.values():
                record, n_bytes = self.record(array.shard_key(unit)), array.shard_bytes(unit)
                if record.n_bytes != n_bytes:
                    raise FormatError(
                        f"'{record.key}' of {self.objects.uri}: expected {n_bytes} bytes as planned, found "
                        f"{record.n_bytes} in the manifest: it was not written by softbudget; do not use it"
                    )
        for record in self.manifest.objects:
            size = self.objects.size(record.key)
            if size is None:
                wrong.append(f"{record.key} is missing")
            elif size != record.n_bytes:
                wrong.append(f"{record.key} has {size} bytes instead of {record.n_bytes}")
        if wrong:
            raise DamagedStoreError(
                f"{len(wrong)} of {len(self.manifest.objects)} objects of {self.objects.uri} are not as sealed "
                f"(first: {wrong[0]}). The store was copied without them or the copy was interrupted. "
                "Copy it again"
            )
        for array in self.arrays.values():
            key = spec.array_key(array.name)
            metadata = spec.parse_json(self.read_verified(key), key)
            array.check_metadata(metadata)


def _read_seal(objects: Objects) -> tuple[spec.Manifest, str, str]:
    """Return manifest, id and images root of a sealed store."""
    if objects.size(spec.MANIFEST_KEY) is None:
        if objects.size(spec.PLAN_KEY) is None:
            raise FormatError(
                f"expected an activation store at {objects.uri}, found no {spec.PLAN_KEY} there: "
                "give the folder that 'pipeline extract --out' made"
            )
        plan = spec.StorePlan.from_json(spec.parse_json(objects.read(spec.PLAN_KEY), spec.PLAN_KEY))
        n_done = sum(key.endswith(".json") for key in objects.keys("commits"))
        raise UnsealedStoreError(
            f"{objects.uri} is not sealed: {n_done} of {plan.layout.n_units} units are there. "
            "Give the command that began its extraction again: it goes on from there and seals the store"
        )
    data = objects.read(spec.MANIFEST_KEY)
    store_id = spec.sha256(data)
    root_data = objects.read(spec.ROOT_KEY)
    root = spec.parse_json(root_data, spec.ROOT_KEY)
    try:
        attributes = root["attributes"]["softbudget"]
        recorded, images_root = attributes["id"], str(attributes["images"])
    except (KeyError, TypeError):
        raise FormatError(
            f"'{spec.ROOT_KEY}' of {objects.uri} is not a store's: attribute 'softbudget' is missing"
        ) from None
    spec.check_version(attributes)
    # None: sealing was stopped between its last two steps; the manifest alone decides.
    if recorded is not None and recorded != store_id:
        raise DamagedStoreError(
            f"'{spec.MANIFEST_KEY}' of {objects.uri} was changed after sealing: expected sha256 {recorded}, "
            f"found {store_id}. Copy the store again"
        )
    manifest = spec.Manifest.from_json(spec.parse_json(data, spec.MANIFEST_KEY))
    if root_data != root_metadata(manifest.plan, store_id=recorded, images_root=images_root):
        raise DamagedStoreError(
            f"'{spec.ROOT_KEY}' of {objects.uri} is damaged: it does not fit the manifest. Copy this object again"
        )
    return manifest, store_id, images_root
