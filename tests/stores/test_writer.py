import errno
import io
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from hypothesis import example, given, settings
from hypothesis import strategies as st
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from stores import spec
from stores.errors import DamagedStoreError, FormatError, PlanMismatchError, StoreError, UnsealedStoreError
from stores.layout import row_order
from stores.objects import LocalObjects
from stores.reader import Store
from stores.statistics import Statistics
from stores.verify import verify
from stores.writer import SAMPLES_SCHEMA, StoreWriter, encode_shard
from stores.zarr_arrays import StoredArray, arrays_of, decode_shard
from tests.stores import killed_writer
from tests.stores.build import (
    THREE_DTYPES,
    MemoryObjects,
    activations_of,
    arithmetic,
    commit_all,
    edit_json,
    files_in,
    make_plan,
    on_disk,
    plans,
    samples_of,
    temporary_folder,
    write_into,
    write_store,
)

VERSIONS = {"softbudget": "test"}
SPECIAL_FLOATS = [np.nan, np.inf, -np.inf, -0.0, 0.0, 6e-8, -6e-8, 1e-45, 65504.0, 1e-40]


def begin(objects: Any = None, plan: spec.StorePlan | None = None) -> StoreWriter:
    return StoreWriter.begin(objects or MemoryObjects(), plan or make_plan(), images_root="/images")


def commit(writer: StoreWriter, unit: int, *, failed: tuple[int, ...] = ()) -> spec.Receipt:
    return writer.commit(unit, activations_of(writer.plan, unit), samples_of(writer.plan, unit, failed))


# --- the bytes of a shard -------------------------------------------------------------------------------------------


def by_zarr(array: StoredArray, rows: np.ndarray) -> dict[str, bytes]:
    """What zarr-python writes for an array's own metadata: its shards by their names."""
    objects: dict[str, Any] = {
        spec.array_key(array.name): default_buffer_prototype().buffer.from_bytes(array.metadata),
    }
    # A chunk that holds nothing but the fill value is data like any other: docs/format.md.
    with zarr.config.set({"array.write_empty_chunks": True}):
        zarr.open_array(MemoryStore(objects), path=array.name, mode="r+")[...] = rows
    return {key: value.to_bytes() for key, value in objects.items() if key != spec.array_key(array.name)}


def by_encode_shard(array: StoredArray, rows: np.ndarray) -> dict[str, bytes]:
    layout = array.layout
    return {
        array.shard_key(unit): bytes(
            encode_shard(
                rows[layout.unit_rows(unit).start : layout.unit_rows(unit).stop],
                np.arange(len(layout.unit_rows(unit))),
                rows_per_chunk=layout.rows_per_chunk,
                chunks_per_shard=layout.chunks_per_shard,
                fill=array.fill,
            )
        )
        for unit in range(layout.n_units)
    }


@settings(arithmetic, max_examples=30)
@given(plans(max_samples=12), st.data())
@example(make_plan(n_samples=4, n_tokens=2, samples_per_unit=4, rows_per_chunk=2, layers=THREE_DTYPES), None)
def test_a_shard_is_what_zarr_python_writes_byte_for_byte(plan: spec.StorePlan, data: st.DataObject | None) -> None:
    for array in arrays_of(plan):
        shape = (plan.layout.n_rows, *array.row_shape)
        if data is None:  # nothing but the fill value
            rows = np.full(shape, array.fill, dtype=array.dtype)
        else:  # any bits: ordinary numbers, NaN of any payload, infinities, subnormals; then the special ones for sure
            rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
            rows = (
                np.frombuffer(rng.bytes(int(np.prod(shape)) * array.dtype.itemsize), array.dtype).reshape(shape).copy()
            )
            for value in data.draw(st.lists(st.sampled_from(SPECIAL_FLOATS), max_size=4)) if array.layer else []:
                with np.errstate(over="ignore"):
                    special = np.float32(value)
                stored = special.view(np.uint32) >> 16 if array.dtype == np.dtype("<u2") else special
                rows[rng.integers(len(rows))] = np.asarray(stored).astype(array.dtype)
        assert by_encode_shard(array, rows) == by_zarr(array, rows)


@pytest.mark.parametrize("width", [1, 3, 768])
@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("n_samples", [1, 7, 8, 9], ids=lambda n: f"{n} images")
def test_a_shard_of_any_dtype_width_and_tail_is_what_zarr_python_writes(
    dtype: spec.Dtype, width: int, n_samples: int
) -> None:
    plan = make_plan(n_samples=n_samples, layers=(("x", dtype, width),))
    objects = MemoryObjects()
    commit_all(begin(objects, plan))
    for array in arrays_of(plan):
        stored = np.concatenate(
            [
                decode_shard(
                    array, objects.read(array.shard_key(unit)), n_rows=len(plan.layout.unit_rows(unit)), what=array.name
                )
                for unit in range(plan.layout.n_units)
            ]
        )
        for key, data in by_zarr(array, stored).items():
            assert objects.read(key) == data, key


@arithmetic
@given(plans())
def test_a_shard_decodes_to_the_rows_in_the_order_that_it_was_given(plan: spec.StorePlan) -> None:
    for array in arrays_of(plan)[2:]:
        rows = activations_of(plan, 0)[array.name].reshape(-1, array.width)
        order = row_order(plan.layout, 0, plan.seed)
        shard = encode_shard(
            rows,
            order,
            rows_per_chunk=plan.layout.rows_per_chunk,
            chunks_per_shard=plan.layout.chunks_per_shard,
            fill=array.fill,
        )
        assert np.array_equal(decode_shard(array, shard, n_rows=len(rows), what="x"), rows[order])


def test_a_tail_is_padded_with_the_fill_value_and_the_chunks_after_it_are_absent() -> None:
    rows = np.ones((3, 1), dtype="<f2")
    shard = encode_shard(rows, np.arange(3), rows_per_chunk=2, chunks_per_shard=4, fill=np.nan)
    assert np.isnan(np.frombuffer(shard[8:12], dtype="<f2")).tolist() == [False, True]
    index = np.frombuffer(shard[16:-4], dtype="<u8").reshape(4, 2).tolist()
    assert index == [[0, 8], [8, 8], [2**64 - 1] * 2, [2**64 - 1] * 2]


# --- a unit ---------------------------------------------------------------------------------------------------------


def test_committing_a_unit_twice_changes_nothing() -> None:
    objects = MemoryObjects()
    writer = begin(objects)
    receipt = commit(writer, 1)
    before = dict(objects.data)
    assert commit(writer, 1) == receipt
    assert objects.data == before


def test_committing_to_a_sealed_store_changes_nothing() -> None:
    objects = MemoryObjects()
    write_into(objects)
    before = dict(objects.data)
    commit(StoreWriter.attach(objects), 0)
    assert objects.data == before


def test_a_unit_counts_once_its_receipt_is_there() -> None:
    writer = begin()
    assert writer.committed() == set()
    commit(writer, 3)
    assert writer.committed() == {3}


def test_units_may_be_committed_in_any_order_by_any_writer() -> None:
    plan, objects = make_plan(), MemoryObjects()
    begin(objects, plan)
    for unit in (4, 0, 3, 1, 2):
        commit(StoreWriter.attach(objects), unit)
    assert StoreWriter.attach(objects).seal(versions=VERSIONS) == write_into(MemoryObjects(), plan)


def test_a_receipt_says_what_the_unit_is() -> None:
    objects = MemoryObjects()
    receipt = commit(begin(objects), 4, failed=(33,))
    assert (receipt.unit, receipt.samples, receipt.rows, receipt.n_failed) == (4, (32, 37), (96, 111), 1)
    assert {record.key for record in receipt.objects} == {
        "commits/000004.parquet",
        "sample/c/4",
        "token/c/4",
        "blocks.0/c/4/0",
        "blocks.1/c/4/0",
    }
    for record in receipt.objects:
        data = objects.read(record.key)
        assert (record.n_bytes, record.sha256) == (len(data), spec.sha256(data))


def with_other_last_bits(activations: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        name: (rows.view(f"<u{rows.itemsize}") ^ 1).astype(f"<u{rows.itemsize}").view(rows.dtype)
        for name, rows in activations.items()
    }


def test_of_two_writers_with_other_last_bits_the_first_ones_bytes_stay_and_the_statistics_fit_them() -> None:
    objects = MemoryObjects()
    first, second = begin(objects), begin(objects)
    plan = first.plan
    # The first publishes one layer and dies; the second computes all of the unit, with other last bits.
    of_first, of_second = activations_of(plan, 0), with_other_last_bits(activations_of(plan, 0))
    alone = MemoryObjects()
    begin(alone, plan).commit(0, of_first, samples_of(plan, 0))
    objects.create("blocks.0/c/0/0", alone.read("blocks.0/c/0/0"))
    receipt = second.commit(0, of_second, samples_of(plan, 0))

    assert objects.read("blocks.0/c/0/0") == alone.read("blocks.0/c/0/0")
    for name, stayed in (("blocks.0", of_first), ("blocks.1", of_second)):
        array = next(array for array in first.arrays if array.name == name)
        rows = stayed[name].reshape(-1, array.width)[row_order(plan.layout, 0, plan.seed)]
        assert receipt.statistics[name] == Statistics.of(rows).to_json()


def test_two_threads_that_commit_the_same_units_at_once_make_one_sound_store(tmp_path: Path) -> None:
    writer = begin(LocalObjects(tmp_path / "store"))
    barrier = threading.Barrier(2)

    def work(last_bits: int) -> None:
        for unit in range(writer.plan.layout.n_units):
            activations = activations_of(writer.plan, unit)
            barrier.wait()
            writer.commit(
                unit, with_other_last_bits(activations) if last_bits else activations, samples_of(writer.plan, unit)
            )

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.seal(versions=VERSIONS)
    assert verify(Store.open(tmp_path / "store")).damages == ()


@pytest.mark.parametrize(
    ("array", "there"),
    [
        *itertools.product(["sample/c/0", "token/c/0", "blocks.0/c/0/0", "commits/000000.parquet"], [b"", b"half"]),
        # Activations do not tell their unit, nor do samples; these do.
        ("sample/c/0", "another unit's"),
        ("token/c/0", "another unit's"),
    ],
)
def test_an_object_that_is_there_but_damaged_is_not_adopted(array: str, there: bytes | str) -> None:
    objects = MemoryObjects()
    writer = begin(objects)
    if isinstance(there, str):
        commit(writer, 1)
        there = objects.read(array.replace("c/0", "c/1"))
    objects.data[array] = there
    with pytest.raises(DamagedStoreError):
        commit(writer, 0)
    assert 0 not in writer.committed()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        pytest.param(lambda x: x[:, :, :-1], r"found \(8, 3, 4\) of float16", id="width"),
        pytest.param(lambda x: x[:-1], r"found \(7, 3, 5\) of float16", id="too few images"),
        pytest.param(lambda x: x[:, :-1], r"found \(8, 2, 5\) of float16", id="too few tokens"),
        pytest.param(lambda x: x.reshape(24, 5), r"found \(24, 5\) of float16", id="flat"),
        pytest.param(lambda x: x.astype(np.float32), "found .* of float32", id="dtype"),
        pytest.param(lambda x: x.astype(">f2"), "found .* of >f2", id="big endian"),
        pytest.param(lambda x: None, "found nothing", id="absent"),
    ],
)
def test_activations_of_another_shape_or_dtype_are_refused_before_anything_is_written(change: Any, found: str) -> None:
    objects = MemoryObjects()
    writer = begin(objects)
    before = dict(objects.data)
    activations = activations_of(writer.plan, 0)
    activations["blocks.0"] = change(activations["blocks.0"])
    expected = r"unit 0, layer blocks.0: expected \(8, 3, 5\) of float16, "
    with pytest.raises(StoreError, match=expected + found):
        writer.commit(0, activations, samples_of(writer.plan, 0))
    assert objects.data == before


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda table: table[:-1], id="too few lines"),
        pytest.param(lambda table: table.drop_columns("label"), id="no labels"),
        pytest.param(
            lambda table: table.cast(table.schema.set(1, table.schema.field(1).with_type(pa.int32()))), id="int32"
        ),
    ],
)
def test_samples_of_another_form_are_refused(change: Any) -> None:
    writer = begin()
    with pytest.raises(StoreError, match="unit 0: expected 8 lines of SAMPLES_SCHEMA"):
        writer.commit(0, activations_of(writer.plan, 0), change(samples_of(writer.plan, 0)))


@pytest.mark.parametrize("unit", [-1, 5, 6, 10**9])
def test_a_unit_that_the_plan_does_not_have_is_refused_by_its_number(unit: int) -> None:
    objects = MemoryObjects()
    writer = begin(objects)
    before = dict(objects.data)
    n = len(writer.plan.layout.unit_samples(unit))
    activations = {name: rows[:n] for name, rows in activations_of(writer.plan, 0).items()}
    samples = samples_of(writer.plan, 0)[:n]
    with pytest.raises(StoreError, match=f"expected a unit .*found {unit}"):
        writer.commit(unit, activations, samples)
    assert objects.data == before


def test_rows_may_come_in_any_memory_order() -> None:
    writer, other = begin(), begin()
    activations = {name: np.asfortranarray(rows) for name, rows in activations_of(writer.plan, 0).items()}
    assert writer.commit(0, activations, samples_of(writer.plan, 0)) == commit(other, 0)


# --- images that could not be read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [name for name, _, _ in THREE_DTYPES])
def test_failed_images_are_rows_of_nan_and_no_part_of_the_statistics(layer: str) -> None:
    objects = MemoryObjects()
    writer = begin(objects, make_plan(layers=THREE_DTYPES))
    array = next(array for array in writer.arrays if array.name == layer)
    given_rows = activations_of(writer.plan, 0)
    receipt = writer.commit(0, given_rows, samples_of(writer.plan, 0, failed=(2, 5)))

    stored = decode_shard(array, objects.read(array.shard_key(0)), n_rows=24, what=layer)
    order = row_order(writer.plan.layout, 0, writer.plan.seed)
    natural = np.empty_like(stored)
    natural[order] = stored
    images = array.to_float(natural).reshape(8, 3, -1)
    ok = [0, 1, 3, 4, 6, 7]
    assert np.isnan(images[[2, 5]]).all()
    assert np.array_equal(images[ok], array.to_float(given_rows[layer])[ok])
    assert receipt.n_failed == 2
    found = Statistics.from_json(receipt.statistics[layer], array.width)
    assert (found.count, found.n_nonfinite) == (18, 0)
    np.testing.assert_allclose(found.mean, images[ok].reshape(18, -1).astype(np.float64).mean(axis=0), rtol=1e-12)


def test_the_callers_activations_are_left_as_they_are() -> None:
    writer = begin()
    activations = activations_of(writer.plan, 0)
    writer.commit(0, activations, samples_of(writer.plan, 0, failed=(2,)))
    assert all(np.array_equal(activations[name], rows) for name, rows in activations_of(writer.plan, 0).items())


def test_a_unit_of_failed_images_alone_can_be_committed_and_sealed(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", failed=tuple(range(8, 16)))
    assert store.manifest.n_failed == 8
    assert store.statistics("blocks.0").count == 29 * 3
    assert verify(store).damages == ()


def test_a_store_of_failed_images_alone_can_be_sealed_and_verified(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", failed=tuple(range(37)))
    assert store.statistics("blocks.0").count == 0
    assert verify(store).damages == ()


def test_what_another_worker_could_not_read_stays_failed() -> None:
    objects, alone = MemoryObjects(), MemoryObjects()
    commit(begin(alone), 0, failed=(2,))
    writer = begin(objects)
    objects.create("commits/000000.parquet", alone.read("commits/000000.parquet"))
    assert commit(writer, 0) == begin(alone).receipt(0)


def test_rows_that_could_not_be_read_never_pass_for_an_image_that_another_worker_could_read() -> None:
    # The first worker could read all images, published the samples and died; the second could not read image 2,
    # and its rows "may hold anything".
    objects, alone = MemoryObjects(), MemoryObjects()
    commit(begin(alone), 0)
    writer = begin(objects)
    objects.create("commits/000000.parquet", alone.read("commits/000000.parquet"))
    with pytest.raises(StoreError, match="image-00002"):
        commit(writer, 0, failed=(2,))
    assert writer.committed() == set()


# --- beginning ------------------------------------------------------------------------------------------------------


def test_beginning_twice_changes_nothing() -> None:
    objects = MemoryObjects()
    begin(objects)
    before = dict(objects.data)
    begin(objects)
    assert objects.data == before


def test_beginning_again_writes_what_a_killed_beginning_left_out() -> None:
    whole, cut = MemoryObjects(), MemoryObjects()
    begin(whole)
    cut.create(spec.PLAN_KEY, whole.read(spec.PLAN_KEY))
    begin(cut)
    assert cut.data == whole.data


@pytest.mark.parametrize(
    ("other", "named"),
    [
        pytest.param({"seed": 3}, r"\(seed: 0 there, 3 here\)", id="seed"),
        pytest.param({"n_samples": 38}, "layout: .*37.* there, .*38.* here", id="layout"),
        pytest.param({"layers": THREE_DTYPES}, "layers: .* there, .*here", id="layers"),
        pytest.param(
            {"n_tokens": 6, "samples_per_unit": 4}, "tokens: .* there, .* here; layout: .* there", id="two things"
        ),
    ],
)
def test_beginning_another_plan_is_refused_and_names_what_differs(other: dict[str, Any], named: str) -> None:
    objects = MemoryObjects()
    begin(objects)
    before = dict(objects.data)
    with pytest.raises(PlanMismatchError, match=rf"memory holds a store of another plan .*{named}.*another --out"):
        begin(objects, make_plan(**other))
    assert objects.data == before


@pytest.mark.parametrize("name", ["zarr.json", "blocks.0/zarr.json"])
def test_a_folder_that_holds_something_else_is_refused(name: str) -> None:
    objects = MemoryObjects()
    objects.create(name, b'{"zarr_format": 3, "node_type": "group"}\n')
    with pytest.raises(StoreError, match=name):
        begin(objects)


def test_attaching_to_nothing_is_refused() -> None:
    with pytest.raises(DamagedStoreError, match=r"plan\.json"):
        StoreWriter.attach(MemoryObjects())


# --- sealing --------------------------------------------------------------------------------------------------------


def test_sealing_without_all_units_is_refused_and_names_the_first_that_is_missing() -> None:
    objects = MemoryObjects()
    writer = begin(objects)
    for unit in (0, 2, 4):
        commit(writer, unit)
    before = dict(objects.data)
    with pytest.raises(UnsealedStoreError, match=r"2 of 5 units of memory are missing \(first: 1\): give the command"):
        writer.seal(versions=VERSIONS)
    assert objects.data == before


def test_sealing_twice_gives_the_same_id_and_changes_nothing() -> None:
    objects = MemoryObjects()
    store_id = write_into(objects)
    before = dict(objects.data)
    assert StoreWriter.attach(objects).seal(versions={"softbudget": "another"}) == store_id
    assert objects.data == before


def test_sealing_goes_on_where_it_was_stopped_before_its_last_step() -> None:
    objects, undisturbed = MemoryObjects(), MemoryObjects()
    assert write_into(objects) == write_into(undisturbed)
    fresh = MemoryObjects()
    begin(fresh)
    objects.replace(spec.ROOT_KEY, fresh.read(spec.ROOT_KEY))
    StoreWriter.attach(objects).seal(versions=VERSIONS)
    assert objects.data == undisturbed.data


def test_the_same_plan_and_data_in_two_folders_have_the_same_id_and_bytes(tmp_path: Path) -> None:
    first, second = write_store(tmp_path / "a", failed=(3,)), write_store(tmp_path / "elsewhere" / "b", failed=(3,))
    assert first.id == second.id
    assert files_in(tmp_path / "a") == files_in(tmp_path / "elsewhere" / "b")


def test_where_the_images_are_is_no_part_of_the_id() -> None:
    here, there = MemoryObjects(), MemoryObjects()
    writer = StoreWriter.begin(there, make_plan(), images_root="s3://elsewhere")
    commit_all(writer)
    assert writer.seal(versions=VERSIONS) == write_into(here)


def test_one_bit_of_the_activations_changes_the_id() -> None:
    writer = begin()
    for unit in range(5):
        activations = activations_of(writer.plan, unit)
        if unit == 3:
            activations["blocks.1"].view(np.uint32)[0, 0, 0] ^= 1
        writer.commit(unit, activations, samples_of(writer.plan, unit))
    assert writer.seal(versions=VERSIONS) != write_into(MemoryObjects())


@on_disk
@given(plans(), st.sets(st.integers(0, 23)))
def test_the_sealed_statistics_are_those_of_all_rows_together(plan: spec.StorePlan, failed: set[int]) -> None:
    objects = MemoryObjects()
    write_into(objects, plan, failed=tuple(failed))
    sealed = spec.parse_json(objects.read(spec.STATISTICS_KEY), "statistics")
    ok = [i for i in range(plan.layout.n_samples) if i not in failed]
    for array in arrays_of(plan)[2:]:
        rows = np.concatenate([activations_of(plan, unit)[array.name] for unit in range(plan.layout.n_units)])[ok]
        expected = Statistics.of(array.to_float(rows).reshape(-1, array.width))
        found = Statistics.from_json(sealed[array.name], array.width)
        assert (found.count, found.n_nonfinite) == (expected.count, 0)
        if found.count:
            np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-9)
            np.testing.assert_allclose(found.m2, expected.m2, rtol=1e-9, atol=1e-9)
            np.testing.assert_array_equal([found.min, found.max], [expected.min, expected.max])
            assert found.norm == pytest.approx(expected.norm, rel=1e-9)


def test_the_sealed_samples_are_those_of_all_units_in_order() -> None:
    objects = MemoryObjects()
    write_into(objects, failed=(3,))
    table = pq.read_table(io.BytesIO(objects.read(spec.SAMPLES_KEY)))
    assert table.schema.equals(SAMPLES_SCHEMA)
    assert table["key"].to_pylist() == [f"image-{i:05d}" for i in range(37)]
    assert [i for i, status in enumerate(table["status"].to_pylist()) if status != "ok"] == [3]


def test_the_manifest_names_every_object_but_itself_and_the_root() -> None:
    objects = MemoryObjects()
    write_into(objects)
    manifest = spec.Manifest.from_json(spec.parse_json(objects.read(spec.MANIFEST_KEY), "manifest"))
    assert [record.key for record in manifest.objects] == sorted(set(objects.data) - {"zarr.json", "manifest.json"})
    for record in manifest.objects:
        assert (record.n_bytes, record.sha256) == (
            len(objects.read(record.key)),
            spec.sha256(objects.read(record.key)),
        )


def test_a_damaged_receipt_is_not_sealed(tmp_path: Path) -> None:
    writer = begin(LocalObjects(tmp_path / "store"))
    commit_all(writer)
    edit_json(tmp_path / "store" / spec.receipt_key(2), lambda receipt: receipt["statistics"].pop("blocks.1"))
    with pytest.raises(FormatError, match=r"blocks\.1"):
        writer.seal(versions=VERSIONS)
    assert not (tmp_path / "store" / spec.MANIFEST_KEY).exists()


# --- writers that are stopped ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_synced", [0, 1, 2, 7, 20, 33, 38])
def test_a_disk_that_fills_up_at_any_moment_leaves_a_store_that_the_same_command_completes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_synced: int
) -> None:
    folder, fsync, left = tmp_path / "store", os.fsync, n_synced

    def full(descriptor: int) -> None:
        nonlocal left
        if left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left -= 1
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match=r"could not write .*No space left on device.*make room"):
            write_into(LocalObjects(folder), killed_writer.PLAN)
    assert not [name for name in files_in(folder) if ".partial-" in name]
    assert write_into(LocalObjects(folder), killed_writer.PLAN) == write_into(MemoryObjects(), killed_writer.PLAN)


def python(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.stores.killed_writer", *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        **options,
    )


# An object takes four or five calls, so that steps of 7 meet every kind of call at some object.
@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_writer_killed_at_any_of_its_calls_to_the_disk_leaves_a_store_that_resumes_to_the_same_id(step: int) -> None:
    expected = write_into(MemoryObjects(), killed_writer.PLAN)
    with temporary_folder() as folder:
        with python("crash-points", folder, str(step), env={**os.environ, "OPENBLAS_NUM_THREADS": "1"}) as process:
            assert process.stdout is not None
            resumed = dict(line.split(maxsplit=1) for line in process.stdout.read().splitlines())
        assert process.returncode == 0
        assert len(resumed) > 50 // step
        assert {n: store_id for n, store_id in resumed.items() if store_id != expected} == {}
        for n in resumed:
            assert verify(Store.open(folder / n)).damages == ()


@pytest.mark.parametrize("seed", range(2))
def test_a_writer_killed_from_outside_at_any_moment_leaves_a_store_that_resumes_to_the_same_id(
    tmp_path: Path, seed: int
) -> None:
    folder = tmp_path / "store"
    with python("commit", folder) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(random.Random(seed).uniform(0, 0.3))  # any moment: the claim holds for each, the last one included
        os.kill(process.pid, signal.SIGKILL)
    assert write_into(LocalObjects(folder), killed_writer.PLAN) == write_into(MemoryObjects(), killed_writer.PLAN)
    assert verify(Store.open(folder)).damages == ()


def test_a_store_opens_beside_what_a_killed_writer_left(tmp_path: Path) -> None:
    write_store(tmp_path / "store")
    for folder in ("", "commits/", "blocks.0/c/0/"):
        (tmp_path / "store" / f"{folder}.partial-0123").write_bytes(b"half")
    assert verify(Store.open(tmp_path / "store")).damages == ()
