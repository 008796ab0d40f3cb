"""Verifying a store in full: every object's sha256, every chunk's crc32c, every statistic."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from stores import spec
from stores.errors import FormatError, StoreError
from stores.layout import row_order
from stores.reader import Store
from stores.statistics import Statistics
from stores.zarr_arrays import StoredArray, decode_shard


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify` found.

    Parameters
    ----------
    n_objects, n_bytes
        What was read.
    damages
        One line for each damaged object; empty for a sound store.
    """

    n_objects: int
    n_bytes: int
    damages: tuple[str, ...]


def verify(
    store: Store, *, n_threads: int | None = None, on_progress: Callable[[int], None] | None = None
) -> Verification:
    """Check every byte of a store against its manifest, and its statistics against its bytes.

    Parameters
    ----------
    store
        An opened store.
    n_threads
        Objects checked at once; by default one a core. Each holds one Zarr shard in memory.
    on_progress
        Called with the bytes of each object that was checked.
    """
    shards = {
        array.shard_key(unit): (array, unit) for array in store.arrays.values() for unit in range(store.layout.n_units)
    }
    receipts = {spec.receipt_key(unit): unit for unit in range(store.layout.n_units)}
    statistics = {unit: _sound(lambda unit=unit: _unit_statistics(store, unit)) for unit in receipts.values()}
    ok_samples = _sound(lambda: store.ok_samples)

    def check(record: spec.ObjectRecord) -> str | None:
        try:
            data = store.read_verified(record.key)
            if record.key in shards:
                array, unit = shards[record.key]
                _check_shard(store, array, unit, data, statistics[unit], ok_samples)
            elif record.key in receipts:
                _unit_statistics(store, receipts[record.key])
        except StoreError as error:
            return str(error)
        finally:
            if on_progress is not None:
                on_progress(record.n_bytes)
        return None

    with ThreadPoolExecutor(n_threads or os.cpu_count()) as pool:
        damages = [line for line in pool.map(check, store.manifest.objects) if line is not None]
    if not damages:
        damages = _check_merged(store, [unit for unit in statistics.values() if unit is not None])
    return Verification(
        n_objects=len(store.manifest.objects),
        n_bytes=sum(record.n_bytes for record in store.manifest.objects),
        damages=tuple(damages),
    )


def _unit_statistics(store: Store, unit: int) -> dict[str, Statistics]:
    """Return a unit's statistics by layer, its receipt's sha256 checked."""
    key = spec.receipt_key(unit)
    data = store.read_verified(key)
    try:
        receipt = spec.Receipt.from_json(spec.parse_json(data, key))
    except FormatError as error:
        raise FormatError(f"'{key}' in {store.objects.uri}: {error}. Extract the store again") from None
    return {layer.name: Statistics.of_layer(receipt.statistics, layer, key) for layer in store.plan.layers}


def _sound[T](read: Callable[[], T]) -> T | None:
    """Return what is read, None where it is damaged: that is listed once, for the object itself."""
    try:
        return read()
    except StoreError:
        return None


def _check_shard(
    store: Store,
    array: StoredArray,
    unit: int,
    data: bytes,
    statistics: dict[str, Statistics] | None,
    ok_samples: np.ndarray | None,
) -> None:
    """Check a shard's crc32c, then that it says of the unit what receipts and plan say, where those are sound."""
    key = array.shard_key(unit)
    layout = store.layout
    n_rows = len(layout.unit_rows(unit))
    rows = decode_shard(array, data, n_rows=n_rows, what=key)
    order = row_order(layout, unit, store.plan.seed)
    samples = order // layout.tokens_per_sample + layout.unit_samples(unit).start
    if array.layer is None:
        positions = np.asarray(store.plan.tokens.positions)
        expected = samples if array.name == spec.SAMPLE_ARRAY else positions[order % layout.tokens_per_sample]
        if not np.array_equal(rows, expected):
            raise StoreError(f"'{key}' does not hold the plan's order of rows. Copy this object again")
        return
    if statistics is None or ok_samples is None:
        return
    found = Statistics.of(array.to_float(rows), kept=ok_samples[samples])
    if not _close(found.to_json(), statistics[array.name].to_json()):
        raise StoreError(
            f"'{key}' does not have the statistics that '{spec.receipt_key(unit)}' says. Extract the store again"
        )


def _check_merged(store: Store, units: list[dict[str, Statistics]]) -> list[str]:
    damages: list[str] = []
    for layer in store.plan.layers:
        merged = Statistics.empty(layer.width)
        for unit in units:
            merged = merged.merged(unit[layer.name])
        if not _close(merged.to_json(), store.statistics(layer.name).to_json()):
            damages.append(f"'{spec.STATISTICS_KEY}' is not the sum of the units' for layer {layer.name}")
    return damages


def _close(found: dict[str, object], expected: dict[str, object]) -> bool:
    """Whether statistics agree; sums may differ in their last bits between processors."""
    return found.keys() == expected.keys() and all(
        np.allclose(
            np.asarray(found[name], dtype=np.float64),
            np.asarray(expected[name], dtype=np.float64),
            rtol=1e-9,
            atol=1e-12,
            equal_nan=True,
        )
        for name in found
    )
