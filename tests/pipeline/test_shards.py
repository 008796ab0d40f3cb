import gc
import hashlib
import io
import json
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from webdataset import WebDataset

from pipeline.errors import ShardError
from pipeline.shards import find_shards, index_of, write_shards
from pipeline.sources import open_source
from tests.conftest import SHARED


def _tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_the_index_addresses_every_image_in_the_tar(digits_shards: Path) -> None:
    samples = {sample.key: sample for sample in open_source("digits", None, "test")}
    seen = 0
    for path in find_shards(f"{digits_shards}/*.tar"):
        data = path.read_bytes()
        for row in index_of(path).table.to_pylist():
            assert data[row["offset"] : row["offset"] + row["size"]] == samples[row["key"]].image
            assert row["label"] == samples[row["key"]].label
            seen += 1
    assert seen == len(samples)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_shards(digits_shards: Path) -> None:
    paths = [str(path) for path in find_shards(f"{digits_shards}/*.tar")]
    keys = [sample["__key__"] for sample in WebDataset(paths, shardshuffle=False)]
    assert keys == [sample.key for sample in open_source("digits", None, "test")]
    gc.collect()  # webdataset leaves its files to the collector, whose warnings belong to this test


def test_the_same_source_gives_the_same_bytes(digits_shards: Path, tmp_path: Path) -> None:
    write_shards(open_source("digits", None, "test"), tmp_path, name="digits-test", samples_per_shard=100)

    def digests(folder: Path) -> list[str]:
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.tar"))]

    assert digests(tmp_path) == digests(digits_shards)


def test_shards_of_another_size_are_not_mixed_with_those_that_are_there(tmp_path: Path) -> None:
    source = open_source("digits", None, "test")
    write_shards(source, tmp_path, name="digits-test", samples_per_shard=100)
    with pytest.raises(ShardError, match="expected only 1 shards"):
        write_shards(source, tmp_path, name="digits-test", samples_per_shard=1000)


def test_a_tar_from_elsewhere_is_indexed_once_and_its_index_kept_beside_it(tmp_path: Path) -> None:
    path = _tar(tmp_path / "a.tar", [("x/1.jpg", b"one"), ("x/1.cls", b"3"), ("x/2.PNG", b"two"), ("x/2.json", b"{}")])
    rows = index_of(path).table.to_pylist()
    assert [(row["key"], row["label"], row["size"]) for row in rows] == [("x/1", 3, 3), ("x/2", None, 3)]
    assert (tmp_path / "a.index.parquet").exists()
    assert index_of(path).table.to_pylist() == rows


def test_the_index_of_a_tar_in_a_read_only_folder_goes_to_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    path = _tar(tmp_path / "data" / "a.tar", [("1.jpg", b"one")])
    real = pq.write_table

    def refuse(table: object, where: Path, **options: object) -> None:
        if where.parent == path.parent:
            raise PermissionError(13, "Permission denied")
        real(table, where, **options)

    monkeypatch.setattr("pipeline.shards.pq.write_table", refuse)
    assert len(index_of(path).table) == 1
    assert not (tmp_path / "data" / "a.index.parquet").exists()
    assert len(list((tmp_path / "cache").rglob("*.index.parquet"))) == 1


def test_a_changed_tar_of_the_same_size_is_indexed_again(tmp_path: Path) -> None:
    path = _tar(tmp_path / "a.tar", [("1.jpg", b"one"), ("1.cls", b"1")])
    assert index_of(path).table.to_pylist()[0]["label"] == 1
    _tar(path, [("1.jpg", b"one"), ("1.cls", b"2")])
    assert index_of(path).table.to_pylist()[0]["label"] == 2


@pytest.mark.parametrize("name", ["../1.jpg", "/1.jpg", "a/../../1.jpg"])
def test_members_that_would_escape_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ShardError, match="do not use this tar"):
        index_of(_tar(tmp_path / "a.tar", [(name, b"one")]))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("1.txt", b"x")], "expected images"),
        ([("1.jpg", b"x"), ("1.png", b"y")], "one image a sample"),
        ([("1.jpg", b"x"), ("1.cls", b"cat")], "integer label"),
    ],
)
def test_a_tar_that_is_no_dataset_is_refused(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    with pytest.raises(ShardError, match=message):
        index_of(_tar(tmp_path / "a.tar", members))


def test_a_truncated_tar_is_refused(tmp_path: Path) -> None:
    path = _tar(tmp_path / "a.tar", [("1.jpg", b"x" * 5000)])
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ShardError, match=r"truncated|damaged"):
        index_of(path)


def test_no_shards_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="check --shards"):
        find_shards(str(tmp_path / "*.tar"))


def test_class_names_travel_with_the_index(digits_shards: Path) -> None:
    index = index_of(find_shards(f"{digits_shards}/*.tar")[0])
    assert index.classes == tuple(str(i) for i in range(10))
    metadata = pq.read_schema(digits_shards / "digits-test-000000.index.parquet").metadata
    assert json.loads(metadata[b"classes"]) == list(index.classes)


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")
def test_the_real_imagenet_sample_can_be_extracted_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert len(index_of(SHARED / "data" / "imagenet-sample" / "images.tar").table) == 500
