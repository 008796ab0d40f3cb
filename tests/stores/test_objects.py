import errno
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stores.errors import DamagedStoreError, FormatError, StoreError
from stores.objects import LocalObjects, check_key
from tests.stores.build import arithmetic, files_in

HOSTILE = {
    "parent": "../../x",
    "parent inside": "a/../../x",
    "parent at the end": "a/..",
    "here": ".",
    "here inside": "a/./b",
    "absolute": "/etc/passwd",
    "empty": "",
    "empty part": "a//b",
    "trailing slash": "a/",
    "hidden": ".ssh/id",
    "hidden inside": "a/.partial-0",
    "backslash": "a\\..\\x",
    "drive": "C:x",
    "home": "~/x",
    "wildcard": "a/*",
    "space": "a b",
    "newline": "a\n",
    "NUL": "a\0b",
    "option": "-rf",
    "unicode letter": "é",
    "unicode digit": "a/１",
    "unicode dots": "‥/x",
    "url": "s3://bucket/x",
    "percent": "%2e%2e/x",
}


@pytest.fixture
def objects(tmp_path: Path) -> LocalObjects:
    return LocalObjects(tmp_path / "store")


def test_what_was_created_is_read_back(objects: LocalObjects) -> None:
    assert objects.create("a/b/c", b"12345")
    assert objects.read("a/b/c") == b"12345"
    assert objects.size("a/b/c") == 5


@pytest.mark.parametrize("data", [b"123", bytearray(b"123"), memoryview(b"123")], ids=lambda data: type(data).__name__)
def test_any_bytes_like_object_can_be_created(objects: LocalObjects, data: bytes) -> None:
    objects.create("a", data)
    assert objects.read("a") == b"123"


def test_creating_a_second_time_changes_nothing_and_says_so(objects: LocalObjects) -> None:
    objects.create("a/b", b"first")
    assert not objects.create("a/b", b"second")
    assert objects.read("a/b") == b"first"


def test_of_many_that_create_at_once_one_wins_and_its_bytes_stay_whole(objects: LocalObjects) -> None:
    n = 8
    barrier = threading.Barrier(n)
    won: list[int] = []

    def create(i: int) -> None:
        barrier.wait()
        if objects.create("a/b", bytes([i]) * 100_000):
            won.append(i)

    threads = [threading.Thread(target=create, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert files_in(objects.root) == {"a/b": bytes(won) * 100_000}


def test_the_name_appears_only_once_the_bytes_are_synced(
    objects: LocalObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects.create("b", b"")  # so that the folder is there
    seen: list[int | None] = []
    fsync = os.fsync

    def watch(descriptor: int) -> None:
        seen.append(objects.size("a"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    objects.create("a", b"12345")
    assert seen == [None, 5]  # the file before its name is there, the folder after


def test_every_folder_that_gained_a_name_is_synced(objects: LocalObjects, monkeypatch: pytest.MonkeyPatch) -> None:
    # A new folder is a name in its parent: unsynced, a power cut can take the folder with the object in it.
    synced: set[str] = set()
    fsync = os.fsync

    def watch(descriptor: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    objects.create("a/c/0/0", b"1")
    root = objects.root
    assert synced >= {str(folder) for folder in (root.parent, root, root / "a", root / "a/c", root / "a/c/0")}


def test_creating_leaves_no_temporary_file(objects: LocalObjects) -> None:
    objects.create("a", b"1")
    objects.create("a", b"2")
    objects.replace("a", b"3")
    assert files_in(objects.root) == {"a": b"3"}


@pytest.mark.parametrize("call", ["mkdir", "open", "fsync", "link"])
def test_a_full_disk_leaves_nothing_and_gives_one_clear_error(
    objects: LocalObjects, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if call == "open":
        monkeypatch.setattr(Path, "open", full)
    else:
        monkeypatch.setattr(os, call, full)
    with pytest.raises(StoreError, match=r"could not write .*: No space left on device.*make room"):
        objects.create("a/b", b"12345")
    assert files_in(objects.root) == {}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_what_was_to_be_replaced(
    objects: LocalObjects, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    objects.create("a", b"before")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), full)
    with pytest.raises(StoreError, match="No space left on device"):
        objects.replace("a", b"after")
    assert files_in(objects.root) == {"a": b"before"}


def test_a_part_of_an_object_is_read_into_a_buffer(objects: LocalObjects) -> None:
    objects.create("a", bytes(range(100)))
    out = bytearray(10)
    objects.read_into("a", 30, memoryview(out))
    assert out == bytes(range(30, 40))


@pytest.mark.parametrize("offset", [91, 100, 2**40])
def test_reading_past_an_objects_end_is_refused(objects: LocalObjects, offset: int) -> None:
    objects.create("a", bytes(100))
    with pytest.raises(DamagedStoreError, match=f"'a' in .* is truncated: expected 10 bytes at {offset}, found"):
        objects.read_into("a", offset, memoryview(bytearray(10)))


@pytest.mark.parametrize("key", ["b", "a/b", "c/d"])
def test_an_object_that_is_not_there_has_no_size_and_reads_as_missing(objects: LocalObjects, key: str) -> None:
    objects.create("a", b"1")
    assert objects.size(key) is None
    with pytest.raises(DamagedStoreError, match=f"'{key}' is missing from .*Copy the store again"):
        objects.read(key)
    with pytest.raises(DamagedStoreError, match=f"'{key}' is missing from .*Copy the store again"):
        objects.read_into(key, 0, memoryview(bytearray(1)))


def test_a_folder_is_no_object(objects: LocalObjects) -> None:
    objects.create("a/b", b"1")
    assert objects.size("a") is None
    with pytest.raises(DamagedStoreError, match="'a' is missing"):
        objects.read("a")


def test_keys_are_the_names_under_a_folder_in_order(objects: LocalObjects) -> None:
    for key in ("c/2", "c/10", "c/1/0", "d/1", "ca"):
        objects.create(key, b"1")
    assert list(objects.keys("c")) == ["c/1/0", "c/10", "c/2"]
    assert list(objects.keys("nothing")) == []


def test_keys_are_without_the_temporary_files_that_a_killed_writer_left(objects: LocalObjects) -> None:
    objects.create("c/1", b"1")
    (objects.root / "c/.partial-0123").write_bytes(b"half")
    assert list(objects.keys("c")) == ["c/1"]


@pytest.mark.parametrize("key", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_name_that_could_leave_the_store_is_refused_by_every_operation(objects: LocalObjects, key: str) -> None:
    for operation in (
        check_key,
        objects.size,
        objects.read,
        lambda key: objects.read_into(key, 0, memoryview(bytearray(1))),
        lambda key: objects.create(key, b"1"),
        lambda key: objects.replace(key, b"1"),
        lambda key: list(objects.keys(key)),
    ):
        with pytest.raises(FormatError, match="expected an object name of letters, digits"):
            operation(key)
    assert not objects.root.exists()


@arithmetic
@given(st.text())
def test_a_name_that_is_accepted_stays_inside(key: str) -> None:
    try:
        path = LocalObjects("/store").path(key)
    except FormatError:
        return
    assert os.path.normpath(path) == str(path)
    assert os.path.commonpath(["/store", path]) == "/store"
    assert path != Path("/store")


@pytest.mark.parametrize("key", ["zarr.json", "blocks.11/c/0/0", "commits/000000.json", "a_b-c.d", "_", "0"])
def test_the_names_that_stores_have_are_accepted(key: str) -> None:
    assert check_key(key) == key
