import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stores import spec
from stores.errors import StoreError
from stores.objects import LocalObjects
from stores.reader import Store
from stores.verify import verify
from stores.writer import StoreWriter
from stores.zarr_arrays import arrays_of
from tests.stores.build import (
    activations_of,
    all_keys,
    edit_json,
    files_in,
    flip_byte,
    forge,
    make_plan,
    on_disk,
    plans,
    samples_of,
    temporary_folder,
    write_store,
)

PLAN = make_plan(n_samples=4, n_tokens=2, samples_per_unit=2, rows_per_chunk=2)
KEYS = all_keys(PLAN)
FOUND_ON_OPENING = {
    spec.ROOT_KEY,
    spec.MANIFEST_KEY,
    spec.STATISTICS_KEY,
    *(spec.array_key(array.name) for array in arrays_of(PLAN)),
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "store"
    write_store(folder, PLAN, failed=(1,))
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "store"))


def test_the_objects_of_a_store_are_those_that_these_tests_damage(original: Path) -> None:
    assert sorted(files_in(original)) == KEYS


@on_disk
@given(plans(), st.sets(st.integers(0, 23), max_size=4))
def test_a_store_of_any_shape_is_sound_when_it_is_written(plan: spec.StorePlan, failed: set[int]) -> None:
    with temporary_folder() as folder:
        assert verify(write_store(folder / "store", plan, failed=tuple(failed))).damages == ()


def test_everything_but_the_root_and_the_manifest_is_counted_and_reported(original: Path) -> None:
    steps: list[int] = []
    result = verify(Store.open(original), on_progress=steps.append)
    files = {key: data for key, data in files_in(original).items() if key not in ("zarr.json", "manifest.json")}
    assert result.n_objects == len(files) == len(steps)
    assert result.n_bytes == sum(map(len, files.values())) == sum(steps)


@pytest.mark.parametrize("n_threads", [1, 2, 8])
def test_the_number_of_threads_changes_nothing(folder: Path, n_threads: int) -> None:
    store = Store.open(folder)
    for key in ("blocks.0/c/0/0", "sample/c/1", "blocks.1/c/1/0"):
        flip_byte(folder / key, 3)
    damages = verify(store, n_threads=n_threads).damages
    assert [key for line in damages for key in KEYS if f"'{key}'" in line] == [
        "blocks.0/c/0/0",
        "blocks.1/c/1/0",
        "sample/c/1",
    ]


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("key", KEYS)
def test_a_flipped_byte_in_any_object_is_found(folder: Path, key: str, place: str) -> None:
    flip_byte(folder / key, {"first": 0, "middle": (folder / key).stat().st_size // 2, "last": -1}[place])
    if key in FOUND_ON_OPENING:
        with pytest.raises(StoreError):
            Store.open(folder)
    else:
        damages = verify(Store.open(folder)).damages
        assert len(damages) == 1
        assert f"'{key}'" in damages[0]


@settings(on_disk, max_examples=40)
@given(key=st.sampled_from(KEYS), at=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_any_change_of_any_byte_is_found(original: Path, key: str, at: float, mask: int) -> None:
    with temporary_folder() as folder:
        copy = Path(shutil.copytree(original, folder / "store"))
        flip_byte(copy / key, int(at * (copy / key).stat().st_size), mask)
        try:
            store = Store.open(copy)
            found = verify(store).damages
        except StoreError:
            return
        if key == spec.ROOT_KEY and store.images_root != "/images":
            return  # where the images were is a hint, outside of the store's identity
        assert any(f"'{key}'" in line for line in found)


@pytest.mark.parametrize("key", [key for key in KEYS if key != spec.MANIFEST_KEY])
@pytest.mark.parametrize("left", [0, 0.5, -1], ids=["emptied", "halved", "cut by one byte"])
def test_truncation_of_any_object_is_found_on_opening(folder: Path, key: str, left: float) -> None:
    size = (folder / key).stat().st_size
    os.truncate(folder / key, size - 1 if left == -1 else int(left * size))
    if key == spec.ROOT_KEY and left == -1:
        return  # the newline after the JSON
    with pytest.raises(StoreError, match=key.replace(".", r"\.")):
        Store.open(folder)


@pytest.mark.parametrize("key", KEYS)
def test_removal_of_any_object_is_found_on_opening(folder: Path, key: str) -> None:
    (folder / key).unlink()
    with pytest.raises(StoreError, match="not sealed" if key == spec.MANIFEST_KEY else key.replace(".", r"\.")):
        Store.open(folder)


@pytest.mark.parametrize("key", [key for key in KEYS if key not in (spec.MANIFEST_KEY, spec.ROOT_KEY)])
def test_an_object_that_vanishes_after_opening_is_listed(folder: Path, key: str) -> None:
    store = Store.open(folder)
    (folder / key).unlink()
    assert [line for line in verify(store).damages if f"'{key}'" in line]


@pytest.mark.parametrize("layer", ["blocks.0", "blocks.1"])
def test_swapped_shards_are_found(folder: Path, layer: str) -> None:
    # Every crc32c is right, and every size: only the sha256 tells.
    first, second = folder / layer / "c/0/0", folder / layer / "c/1/0"
    first_bytes, second_bytes = first.read_bytes(), second.read_bytes()
    first.write_bytes(second_bytes)
    second.write_bytes(first_bytes)
    damages = verify(Store.open(folder)).damages
    assert len(damages) == 2
    assert all(f"'{layer}/c/{i}/0' in {folder} is damaged: expected sha256" in damages[i] for i in (0, 1))


@pytest.mark.parametrize("array", ["sample", "token"])
def test_rows_in_another_order_than_the_plans_are_found_though_every_digest_fits(folder: Path, array: str) -> None:
    source = write_store(
        folder.parent / "other", make_plan(n_samples=4, n_tokens=2, samples_per_unit=2, seed=7, rows_per_chunk=2)
    )
    data = source.objects.read(f"{array}/c/0")
    assert data != (folder / array / "c/0").read_bytes()
    (folder / array / "c/0").write_bytes(data)
    forge(folder)
    damages = verify(Store.open(folder)).damages
    assert any(f"'{array}/c/0' does not hold the plan's order of rows" in line for line in damages)


def test_activations_that_do_not_have_the_receipts_statistics_are_found_though_every_digest_fits(folder: Path) -> None:
    other = StoreWriter.begin(LocalObjects(folder.parent / "other"), PLAN, images_root="/images")
    activations = activations_of(PLAN, 1)
    activations["blocks.1"][0, 0, 0] += 1
    other.commit(1, activations, samples_of(PLAN, 1))
    (folder / "blocks.1/c/1/0").write_bytes(other.objects.read("blocks.1/c/1/0"))
    forge(folder)
    assert any("'blocks.1/c/1/0' does not have the statistics" in line for line in verify(Store.open(folder)).damages)


@pytest.mark.parametrize("field", ["mean", "m2", "min", "max"])
def test_statistics_that_are_not_the_sum_of_the_units_are_found_though_every_digest_fits(
    folder: Path, field: str
) -> None:
    edit_json(folder / spec.STATISTICS_KEY, lambda value: value["blocks.0"].update({field: [0.5] * 5}))
    forge(folder)
    assert verify(Store.open(folder)).damages == ("'statistics.json' is not the sum of the units' for layer blocks.0",)


@pytest.mark.parametrize("nasty", [None, [], {}, "x", {"blocks.0": None}, {"blocks.0": {}}], ids=repr)
def test_receipts_of_another_form_are_listed_though_every_digest_fits(folder: Path, nasty: object) -> None:
    edit_json(folder / spec.receipt_key(1), lambda receipt: receipt.update(statistics=nasty))
    forge(folder)
    assert any("commits/000001.json" in line for line in verify(Store.open(folder)).damages)


def test_activations_with_nan_are_no_damage_where_they_are_allowed(tmp_path: Path) -> None:
    writer = StoreWriter.begin(LocalObjects(tmp_path), PLAN, images_root="/images")
    for unit in range(2):
        activations = activations_of(PLAN, unit)
        activations["blocks.0"][0, 0, :3] = [np.nan, np.inf, -np.inf]
        writer.commit(unit, activations, samples_of(PLAN, unit))
    writer.seal(versions={})
    assert verify(Store.open(tmp_path, allow_nonfinite=True)).damages == ()
