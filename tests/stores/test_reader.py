import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from stores import spec
from stores.errors import DamagedStoreError, FormatError, StoreError, UnsealedStoreError
from stores.loader import Loader
from stores.objects import LocalObjects
from stores.reader import Store
from stores.writer import StoreWriter
from tests.stores.build import (
    THREE_DTYPES,
    activations_of,
    edit_json,
    files_in,
    flip_byte,
    forge,
    make_plan,
    natural_order,
    on_disk,
    plans,
    samples_of,
    temporary_folder,
    write_store,
)

CHUNK_BYTES = 6 * 5 * 2  # of 'blocks.0' in `make_plan()`


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reader") / "store"
    write_store(folder, make_plan(layers=THREE_DTYPES), failed=(3,))
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "store"))


def directly(store: Store, name: str) -> np.ndarray:
    chunks = store.chunks(name)
    return np.concatenate([chunks.read(chunk) for chunk in range(store.layout.n_chunks)])


def by_tensorstore(folder: Path, name: str) -> np.ndarray:
    tensorstore = pytest.importorskip("tensorstore")
    kvstore = {"driver": "file", "path": str(folder / name)}
    return tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result().read().result()


def by_zarrs(folder: Path, name: str) -> np.ndarray:
    pytest.importorskip("zarrs")
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        return np.asarray(zarr.open_array(folder, path=name, mode="r")[...])


# --- the same bits by every reader ----------------------------------------------------------------------------------


@on_disk
@given(plans(), st.sets(st.integers(0, 23), max_size=3))
def test_every_reader_sees_the_same_bits(plan: spec.StorePlan, failed: set[int]) -> None:
    with temporary_folder() as folder:
        store = write_store(folder / "store", plan, failed=tuple(failed))
        for name, array in store.arrays.items():
            plainly = store.rows(name, 0, store.layout.n_rows)
            for rows in (
                directly(store, name),
                by_tensorstore(folder / "store", name),
                by_zarrs(folder / "store", name),
            ):
                assert rows.dtype == plainly.dtype == array.dtype
                assert rows.shape == plainly.shape == (store.layout.n_rows, *array.row_shape)
                assert rows.tobytes() == plainly.tobytes()


@on_disk
@given(plans())
def test_the_natural_order_is_recovered_through_sample_and_token(plan: spec.StorePlan) -> None:
    with temporary_folder() as folder:
        store = write_store(folder / "store", plan)
        samples, tokens = directly(store, "sample"), directly(store, "token")
        for layer in store.layer_names:
            natural = np.empty_like(natural_order(plan, layer))
            natural[samples, np.searchsorted(plan.tokens.positions, tokens)] = directly(store, layer)
            assert natural.tobytes() == natural_order(plan, layer).tobytes()


@on_disk
@given(plans())
def test_every_pair_of_sample_and_token_is_there_once(plan: spec.StorePlan) -> None:
    with temporary_folder() as folder:
        store = write_store(folder / "store", plan)
        pairs = set(zip(directly(store, "sample").tolist(), directly(store, "token").tolist(), strict=True))
        assert pairs == {(s, t) for s in range(plan.layout.n_samples) for t in plan.tokens.positions}


def test_the_whole_store_is_one_zarr_group(original: Path) -> None:
    group = zarr.open_group(original, mode="r")
    assert dict(group.attrs)["softbudget"]["format"] == "softbudget-activations"
    assert group["blocks.1"].shape == (111, 4)


def test_bfloat16_is_stored_as_uint16_and_says_so(original: Path) -> None:
    array = zarr.open_array(original, path="blocks.2", mode="r")
    assert (array.dtype, array.attrs["logical_dtype"]) == (np.uint16, "bfloat16")


def test_rows_may_be_read_from_any_start_to_any_stop(original: Path) -> None:
    store = Store.open(original)
    whole = directly(store, "blocks.1")
    for start, stop in [(0, 0), (0, 1), (5, 7), (20, 60), (110, 111), (111, 111)]:
        assert store.rows("blocks.1", start, stop).tobytes() == whole[start:stop].tobytes()


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (5, 4), (0, 112)])
def test_rows_outside_of_the_store_are_refused(original: Path, start: int, stop: int) -> None:
    with pytest.raises(StoreError, match=rf"expected rows within \[0, 111\), found \[{start}, {stop}\)"):
        Store.open(original).rows("blocks.0", start, stop)


@pytest.mark.parametrize("read", ["rows", "chunks", "layer"])
def test_an_array_that_is_not_there_is_refused_with_those_that_are(original: Path, read: str) -> None:
    store = Store.open(original)
    with pytest.raises(StoreError, match=r"blocks\.0.*found 'blocks\.9'"):
        store.rows("blocks.9", 0, 1) if read == "rows" else getattr(store, read)("blocks.9")


def test_a_chunk_is_read_into_the_buffer_that_is_given(original: Path) -> None:
    chunks = Store.open(original).chunks("blocks.0")
    buffer = np.zeros(CHUNK_BYTES + 4, dtype=np.uint8)
    rows = chunks.read(2, buffer)
    assert np.shares_memory(rows, buffer)
    assert rows.tobytes() == chunks.read(2).tobytes()


@pytest.mark.parametrize("chunk", [-1, 19, 10**12])
def test_a_chunk_that_is_not_there_is_refused(original: Path, chunk: int) -> None:
    with pytest.raises((StoreError, IndexError)):
        Store.open(original).chunks("blocks.0").read(chunk)


# --- what a store says of itself ------------------------------------------------------------------------------------


def test_the_id_is_the_sha256_of_the_manifest(original: Path) -> None:
    assert Store.open(original).id == spec.sha256((original / "manifest.json").read_bytes())


def test_a_copy_elsewhere_is_the_same_store(original: Path, folder: Path) -> None:
    assert Store.open(folder).id == Store.open(original).id


def test_labels_classes_and_status_are_those_that_were_written(original: Path) -> None:
    store = Store.open(original)
    assert store.classes == ["even", "odd"]
    assert store.labels.tolist() == [-1 if i % 7 == 6 else i % 2 for i in range(37)]
    assert np.flatnonzero(~store.ok_samples).tolist() == [3]


def test_the_layer_by_default_is_the_last(original: Path) -> None:
    assert Store.open(original).layer(None).name == "blocks.2"


def test_a_store_that_was_stopped_before_the_last_step_of_sealing_opens(folder: Path) -> None:
    store_id = Store.open(folder).id
    edit_json(folder / "zarr.json", lambda root: root["attributes"]["softbudget"].update(id=None))
    assert Store.open(folder).id == store_id


def test_opening_writes_nothing(folder: Path) -> None:
    before = files_in(folder)
    Store.open(folder).rows("blocks.0", 0, 10)
    assert files_in(folder) == before


def test_opening_reads_no_activations(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    whole, part = LocalObjects.read, LocalObjects.read_into
    monkeypatch.setattr(LocalObjects, "read", lambda self, key: (read.append(key), whole(self, key))[1])
    monkeypatch.setattr(LocalObjects, "read_into", lambda self, key, *rest: (read.append(key), part(self, key, *rest)))
    Store.open(folder)
    assert read
    assert not [key for key in read if "/c/" in key]


# --- the images -----------------------------------------------------------------------------------------------------


def store_with_images(path: Path, *, tar: str = "a.tar") -> list[bytes]:
    """Write a store beside a "tar" of eight images of 10 to 17 bytes; return them."""
    images = [bytes([i]) * (10 + i) for i in range(8)]
    offsets = np.cumsum([512] + [512 * 2] * 7).tolist()
    data = bytearray(512 * 20)
    for image, offset in zip(images, offsets, strict=True):
        data[offset : offset + len(image)] = image
    (path / "images").mkdir()
    (path / "images" / tar).write_bytes(data)
    plan = make_plan(n_samples=8)
    writer = StoreWriter.begin(LocalObjects(path / "store"), plan, images_root=str(path / "images"))
    columns = {
        "tar": [tar] * 8,
        "offset": offsets,
        "size": list(map(len, images)),
        "sha256": list(map(spec.sha256, images)),
    }
    samples = samples_of(plan, 0)
    for name, values in columns.items():
        field = samples.schema.field(name)
        samples = samples.set_column(samples.schema.get_field_index(name), field, pa.array(values, field.type))
    writer.commit(0, activations_of(plan, 0), samples)
    writer.seal(versions={})
    return images


def test_an_images_bytes_are_read_from_its_tar(tmp_path: Path) -> None:
    images = store_with_images(tmp_path)
    store = Store.open(tmp_path / "store")
    assert [store.image_bytes(i) for i in range(8)] == images


def test_images_are_found_where_their_tars_are_now(tmp_path: Path) -> None:
    images = store_with_images(tmp_path)
    (tmp_path / "images").rename(tmp_path / "moved")
    store = Store.open(tmp_path / "store")
    with pytest.raises(
        StoreError, match=r"expected the tar shard .*images/a\.tar' with image 'image-00002', found none"
    ):
        store.image_bytes(2)
    assert store.image_bytes(2, tmp_path / "moved") == images[2]


def test_an_image_whose_bytes_are_others_is_refused(tmp_path: Path) -> None:
    store_with_images(tmp_path)
    flip_byte(tmp_path / "images/a.tar", 512)
    store = Store.open(tmp_path / "store")
    with pytest.raises(StoreError, match=r"expected image 'image-00000' at 512 of .*, found other bytes"):
        store.image_bytes(0)
    assert len(store.image_bytes(1)) == 11


@pytest.mark.parametrize("tar", ["../a.tar", "/a.tar"])
def test_a_tar_outside_of_the_images_folder_is_refused(tmp_path: Path, tar: str) -> None:
    store_with_images(tmp_path, tar="../a.tar")
    if tar.startswith("/"):
        table = pq.read_table(tmp_path / "store/samples.parquet")
        table = table.set_column(2, table.schema.field(2), pa.array([str(tmp_path / "a.tar")] * 8))
        pq.write_table(table, tmp_path / "store/samples.parquet")
        forge(tmp_path / "store")
    with pytest.raises(StoreError, match="tar"):
        Store.open(tmp_path / "store").image_bytes(0)


@pytest.mark.parametrize("sample", [-1, 8, 10**6])
def test_an_image_that_is_not_there_is_refused(tmp_path: Path, sample: int) -> None:
    store_with_images(tmp_path)
    with pytest.raises((StoreError, IndexError)):
        Store.open(tmp_path / "store").image_bytes(sample)


# --- what is refused on opening -------------------------------------------------------------------------------------


def test_a_store_that_is_not_sealed_is_refused_with_its_progress(tmp_path: Path) -> None:
    writer = StoreWriter.begin(LocalObjects(tmp_path), make_plan(), images_root="/images")
    for unit in (0, 3):
        writer.commit(unit, activations_of(writer.plan, unit), samples_of(writer.plan, unit))
    with pytest.raises(UnsealedStoreError, match=r"is not sealed: 2 of 5 units are there\. Give the command"):
        Store.open(tmp_path)


@pytest.mark.parametrize("what", ["nothing", "an empty folder", "a file", "another zarr group"])
def test_what_is_no_store_is_refused_as_such(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x"
    if what == "a file":
        path.write_bytes(b"x")
    elif what == "an empty folder":
        path.mkdir()
    elif what == "another zarr group":
        zarr.create_group(path)
    with pytest.raises(FormatError, match=r"expected an activation store at .*x, found no plan\.json there: give"):
        Store.open(path)


@pytest.mark.parametrize("where", ["zarr.json", "manifest", "plan"])
def test_an_unknown_format_version_is_refused(folder: Path, where: str) -> None:
    if where == "zarr.json":
        edit_json(folder / "zarr.json", lambda root: root["attributes"]["softbudget"].update(format_version=2))
    elif where == "manifest":
        forge(folder, lambda manifest: manifest.update(format_version=2))
    else:
        forge(folder, lambda manifest: manifest["plan"].update(format_version=2))
    with pytest.raises(FormatError, match="expected store format version 1, found 2: read it with the version of"):
        Store.open(folder)


@pytest.mark.parametrize("key", ["blocks.0/c/2/0", "sample/c/0", "token/zarr.json", "commits/000001.json"])
def test_a_missing_object_is_refused_by_its_name(folder: Path, key: str) -> None:
    (folder / key).unlink()
    with pytest.raises(DamagedStoreError, match=rf"1 of \d+ objects of .* \(first: {key} is missing\).*Copy it again"):
        Store.open(folder)


@pytest.mark.parametrize("key", ["blocks.0/c/2/0", "sample/c/0", "plan.json", "commits/000001.parquet"])
@pytest.mark.parametrize("size", ["truncated", "zero length", "extended"])
def test_an_object_of_another_size_is_refused_by_its_name(folder: Path, key: str, size: str) -> None:
    n = (folder / key).stat().st_size
    os.truncate(folder / key, {"truncated": n - 1, "zero length": 0, "extended": n + 1}[size])
    with pytest.raises(DamagedStoreError, match=rf"\(first: {key} has \d+ bytes instead of {n}\)"):
        Store.open(folder)


def test_the_number_of_wrong_objects_is_said(folder: Path) -> None:
    shutil.rmtree(folder / "blocks.1" / "c")
    with pytest.raises(DamagedStoreError, match=r"5 of \d+ objects .*first: blocks\.1/c/0/0 is missing"):
        Store.open(folder)


@pytest.mark.parametrize("key", ["statistics.json", "blocks.0/zarr.json"])
def test_changed_metadata_are_refused(folder: Path, key: str) -> None:
    flip_byte(folder / key, 20)
    with pytest.raises(DamagedStoreError, match=f"'{key}' in .* is damaged: expected sha256 .*Copy this object again"):
        Store.open(folder)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda manifest: manifest["plan"].update(seed=5), id="plan"),
        pytest.param(lambda manifest: manifest.update(n_failed=0), id="n_failed"),
        pytest.param(lambda manifest: manifest["objects"].pop(), id="objects"),
        pytest.param(lambda manifest: manifest["versions"].update(softbudget="other"), id="versions"),
    ],
)
def test_an_edited_manifest_is_refused(folder: Path, change: Callable[[Any], None]) -> None:
    edit_json(folder / "manifest.json", change)
    with pytest.raises(DamagedStoreError, match=r"'manifest\.json' of .* was changed after sealing: expected sha256"):
        Store.open(folder)


def test_an_edited_plan_in_the_manifest_is_refused_even_where_the_root_has_no_id(folder: Path) -> None:
    edit_json(folder / "manifest.json", lambda manifest: manifest["plan"].update(seed=5))
    edit_json(folder / "zarr.json", lambda root: root["attributes"]["softbudget"].update(id=None))
    with pytest.raises(FormatError, match="manifest: expected a plan of sha256"):
        Store.open(folder)


def test_a_manifest_that_tells_another_plan_than_the_plans_own_file_is_refused(folder: Path) -> None:
    forge(folder, lambda manifest: manifest["plan"].update(seed=5))
    with pytest.raises(StoreError, match=r"plan\.json"):
        Store.open(folder)


@pytest.mark.parametrize("key", ["../../etc/passwd", "/etc/passwd", "blocks.0/../../x", "", ".", "a\\b", ".hidden"])
def test_a_manifest_with_a_name_that_leaves_the_store_is_refused(folder: Path, key: str) -> None:
    forge(folder, lambda manifest: manifest["objects"].append({"key": key, "n_bytes": 1, "sha256": "0" * 64}))
    with pytest.raises(FormatError, match=r"expected an object name .* inside the store, found .* do not use it"):
        Store.open(folder)


@pytest.mark.parametrize("key", ["blocks.0/c/3/0", "token/zarr.json", "sample/c/4"])
def test_a_manifest_that_leaves_out_an_array_or_a_shard_is_refused(folder: Path, key: str) -> None:
    def leave_out(manifest: dict[str, Any]) -> None:
        manifest["objects"] = [record for record in manifest["objects"] if record["key"] != key]

    forge(folder, leave_out)
    with pytest.raises(FormatError, match=f"does not name '{key}'"):
        Store.open(folder)


@pytest.mark.parametrize("key", ["statistics.json", "samples.parquet", "plan.json", "commits/000002.json"])
def test_a_manifest_that_leaves_out_other_objects_is_refused(folder: Path, key: str) -> None:
    def leave_out(manifest: dict[str, Any]) -> None:
        manifest["objects"] = [record for record in manifest["objects"] if record["key"] != key]

    forge(folder, leave_out)
    with pytest.raises(FormatError, match=f"does not name '{key}'"):
        Store.open(folder, allow_nonfinite=True)


@pytest.mark.parametrize("shape", [[112, 5], [111, 6], [111], [10**15, 5], None], ids=str)
def test_an_array_of_another_shape_than_the_manifests_is_refused(folder: Path, shape: object) -> None:
    edit_json(folder / "blocks.0/zarr.json", lambda metadata: metadata.update(shape=shape))
    forge(folder)
    with pytest.raises(StoreError, match=r"'blocks\.0/zarr\.json': expected shape \[111, 5\] as planned, found"):
        Store.open(folder)


@pytest.mark.parametrize(
    ("field", "value"), [("data_type", "int16"), ("fill_value", 0.0), ("codecs", []), ("chunk_grid", {})]
)
def test_an_array_of_other_metadata_than_planned_is_refused(folder: Path, field: str, value: object) -> None:
    # zarr-python, tensorstore and zarrs go by the array's metadata, the direct path goes by the plan.
    edit_json(folder / "blocks.0/zarr.json", lambda metadata: metadata.update({field: value}))
    forge(folder)
    with pytest.raises(StoreError, match=r"blocks\.0/zarr\.json"):
        Store.open(folder)


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"{", b"\xff", b'{"attributes": []}'], ids=repr)
@pytest.mark.parametrize("key", ["zarr.json", "manifest.json"])
def test_metadata_that_are_no_json_object_are_refused_by_their_name(folder: Path, key: str, text: bytes) -> None:
    (folder / key).write_bytes(text)
    if key == "manifest.json":
        edit_json(folder / "zarr.json", lambda root: root["attributes"]["softbudget"].update(id=None))
    with pytest.raises(FormatError, match=key if key == "zarr.json" or text in (b"", b"{", b"\xff") else "expected"):
        Store.open(folder)


@pytest.mark.parametrize("statistics", [[], {}, {"blocks.0": {}}, {"blocks.0": []}], ids=str)
def test_statistics_of_another_form_are_refused(folder: Path, statistics: object) -> None:
    (folder / "statistics.json").write_bytes(spec.canonical_json(statistics))
    forge(folder)
    with pytest.raises(FormatError, match="statistics"):
        Store.open(folder)


def test_a_samples_table_of_fewer_images_than_planned_is_refused(folder: Path) -> None:
    table = pq.read_table(folder / "samples.parquet")
    pq.write_table(table[:-1], folder / "samples.parquet")
    forge(folder)
    with pytest.raises(StoreError, match=r"samples\.parquet.*37.*36"):
        Store.open(folder).ok_samples  # noqa: B018


def test_a_samples_table_that_is_no_parquet_is_refused(folder: Path) -> None:
    (folder / "samples.parquet").write_bytes(b"PAR1 or not")
    forge(folder)
    with pytest.raises(StoreError, match=r"samples"):
        Store.open(folder).samples  # noqa: B018


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
def test_activations_with_nan_or_infinity_are_refused_unless_allowed(tmp_path: Path, bad: float) -> None:
    plan = make_plan(n_samples=8)
    writer = StoreWriter.begin(LocalObjects(tmp_path), plan, images_root="/images")
    activations = activations_of(plan, 0)
    activations["blocks.0"][2, 1, [0, 4]] = bad
    writer.commit(0, activations, samples_of(plan, 0))
    writer.seal(versions={})
    with pytest.raises(StoreError, match=r"layer 'blocks.0' of .* has 2 NaN or infinite entries.*allow_nonfinite=True"):
        Store.open(tmp_path)
    assert Store.open(tmp_path, allow_nonfinite=True).statistics("blocks.0").n_nonfinite == 2


# --- what is refused on reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 1, 2, 3])
@pytest.mark.parametrize("within", ["first byte", "last byte", "crc32c"])
def test_a_flipped_bit_in_a_chunk_or_in_its_crc_is_found_by_the_direct_read(
    folder: Path, place: int, within: str
) -> None:
    offset = place * (CHUNK_BYTES + 4) + {"first byte": 0, "last byte": CHUNK_BYTES - 1, "crc32c": CHUNK_BYTES}[within]
    flip_byte(folder / "blocks.0/c/1/0", offset, mask=1)
    chunks = Store.open(folder).chunks("blocks.0")
    with pytest.raises(DamagedStoreError, match=rf"chunk {place} of 'blocks\.0/c/1/0' is damaged: its crc32c differs"):
        chunks.read(4 + place)
    for other in set(range(19)) - {4 + place}:
        chunks.read(other)


def test_a_flipped_bit_anywhere_in_an_index_is_found_by_the_direct_read(folder: Path) -> None:
    file, store = folder / "blocks.0/c/1/0", Store.open(folder)
    for from_end in range(1, 4 * 16 + 4 + 1):
        flip_byte(file, -from_end, mask=1)
        with pytest.raises(DamagedStoreError, match=r"the index of 'blocks\.0/c/1/0' is damaged: its crc32c differs"):
            store.chunks("blocks.0").read(4)
        flip_byte(file, -from_end, mask=1)


def forge_index(file: Path, change: Callable[[np.ndarray], None]) -> None:
    """Change a shard's index and make its crc32c fit."""
    import google_crc32c

    data = bytearray(file.read_bytes())
    index = np.frombuffer(data[-68:-4], dtype="<u8").reshape(4, 2).copy()
    change(index)
    data[-68:-4] = index.tobytes()
    data[-4:] = google_crc32c.value(index.tobytes()).to_bytes(4, "little")
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("cell", "value", "says"),
    [
        pytest.param((1, 0), 10**6, "points outside", id="past the end"),
        pytest.param((1, 0), 2**64 - 1, "points outside", id="offset -1"),
        pytest.param((1, 0), 2**64 - 70, "points outside", id="offset that wraps around"),
        pytest.param((1, 0), 2**63, "points outside", id="offset of the sign bit"),
        pytest.param((3, 0), 3 * (CHUNK_BYTES + 4) + 1, "points outside", id="into the index"),
        pytest.param((1, 0), 0, "overlapping", id="on another chunk"),
        pytest.param((1, 0), 65, "overlapping", id="beside its chunk"),
        pytest.param((1, 1), CHUNK_BYTES, "does not fit the plan", id="too small"),
        pytest.param((1, 1), 2**40, "does not fit the plan", id="gigantic"),
        pytest.param((1, slice(None)), 2**64 - 1, "does not fit the plan", id="absent"),
    ],
)
def test_an_index_that_does_not_fit_the_plan_is_refused(folder: Path, cell: Any, value: int, says: str) -> None:
    def change(index: np.ndarray) -> None:
        index[cell] = value

    forge_index(folder / "blocks.0/c/1/0", change)
    with pytest.raises(DamagedStoreError, match=rf"the index of 'blocks\.0/c/1/0' .*{says}"):
        Store.open(folder).chunks("blocks.0").read(4)


def test_an_index_with_a_chunk_after_the_last_row_is_refused(folder: Path) -> None:
    def change(index: np.ndarray) -> None:
        index[3] = index[0]

    forge_index(folder / "blocks.0/c/4/0", change)
    with pytest.raises(DamagedStoreError, match=r"'blocks\.0/c/4/0' does not fit the plan"):
        Store.open(folder).chunks("blocks.0").read(16)


def test_chunks_may_lie_in_any_order_in_a_shard(folder: Path) -> None:
    # As zarr-python or another writer could lay them: the index says where each is.
    file = folder / "blocks.0/c/1/0"
    expected = directly(Store.open(folder), "blocks.0")
    data, size = file.read_bytes(), CHUNK_BYTES + 4
    file.write_bytes(b"".join(data[i * size : (i + 1) * size] for i in (2, 0, 3, 1)) + data[4 * size :])
    forge_index(file, lambda index: index.__setitem__((slice(None), 0), np.array([1, 3, 0, 2]) * size))
    assert directly(Store.open(folder), "blocks.0").tobytes() == expected.tobytes()


def test_an_object_that_is_removed_after_opening_is_refused_by_its_name(folder: Path) -> None:
    store = Store.open(folder)
    (folder / "blocks.0/c/1/0").unlink()
    with pytest.raises(DamagedStoreError, match=r"'blocks\.0/c/1/0' in .* is missing or truncated"):
        store.chunks("blocks.0").read(4)


@pytest.mark.parametrize("n_left", [0, 1, 67, 68, 200])
def test_an_object_that_is_truncated_after_opening_is_refused_by_its_name(folder: Path, n_left: int) -> None:
    store = Store.open(folder)
    os.truncate(folder / "blocks.0/c/1/0", n_left)
    with pytest.raises(DamagedStoreError, match=r"'blocks\.0/c/1/0'"):
        store.chunks("blocks.0").read(4)


# --- gigantic declarations ------------------------------------------------------------------------------------------


def scale_rows(rows_per_chunk: int) -> Callable[[dict[str, Any]], None]:
    """Declare 2^40 times as many images."""

    def change(manifest: dict[str, Any]) -> None:
        layout = manifest["plan"]["layout"]
        layout.update(
            n_samples=layout["n_samples"] << 40,
            samples_per_unit=layout["samples_per_unit"] << 40,
            rows_per_chunk=rows_per_chunk,
        )

    return change


def scale_width(manifest: dict[str, Any]) -> None:
    for layer in manifest["plan"]["layers"]:
        layer["width"] = 1 << 20


def scale_units(manifest: dict[str, Any]) -> None:
    manifest["plan"]["layout"].update(n_samples=1 << 60)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(scale_rows(6), id="2^40 times the rows, in chunks of 6"),
        pytest.param(scale_rows(6 << 40), id="2^40 times the rows, in chunks of 2^40 times the rows"),
        pytest.param(scale_width, id="2^20 wide"),
        pytest.param(scale_units, id="2^60 images"),
    ],
)
def test_gigantic_declared_shapes_are_refused_on_opening_and_allocate_nothing(
    folder: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    forge(folder, change)
    plan = json.loads((folder / "manifest.json").read_bytes())["plan"]
    (folder / "plan.json").write_bytes(spec.canonical_json(plan))
    n_rows = plan["layout"]["n_samples"] * 3
    widths = {"sample": [], "token": [], **{layer["name"]: [layer["width"]] for layer in plan["layers"]}}
    for name, width in widths.items():
        edit_json(folder / name / "zarr.json", lambda metadata, width=width: metadata.update(shape=[n_rows, *width]))
    forge(folder)
    tracemalloc.start()
    try:
        with pytest.raises(StoreError):
            Store.open(folder, allow_nonfinite=True)
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


def test_an_edited_sample_array_that_names_images_that_are_not_there_is_refused_by_the_loader(folder: Path) -> None:
    import google_crc32c

    file = folder / "sample/c/0"
    data = bytearray(file.read_bytes())
    data[:8] = (10**9).to_bytes(8, "little")
    data[48:52] = google_crc32c.value(bytes(data[:48])).to_bytes(4, "little")
    file.write_bytes(data)
    forge(folder)
    with pytest.raises(StoreError, match="sample"):
        list(Loader(Store.open(folder), batch_size=10).epoch(0))
