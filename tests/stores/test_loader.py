import gc
import hashlib
import itertools
import shutil
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stores import spec
from stores.errors import DamagedStoreError, StoreError
from stores.loader import Batch, Loader
from stores.reader import Store
from tests.stores.build import (
    THREE_DTYPES,
    flip_byte,
    make_plan,
    natural_order,
    on_disk,
    plans,
    temporary_folder,
    write_store,
)

FAILED = (3, 4, 20)
N_ROWS = (37 - len(FAILED)) * 3


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write_store(tmp_path_factory.mktemp("loader") / "store", make_plan(layers=THREE_DTYPES), failed=FAILED)


@pytest.fixture
def folder(store: Store, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(store.objects.uri, tmp_path / "store"))


def loader_of(store: Store, **options: Any) -> Loader:
    return Loader(store, **{"batch_size": 10, "chunks_per_pool": 4, **options})


def rows_of(batches: Iterable[Batch]) -> list[tuple[int, int]]:
    """Each row's sample and token."""
    return [pair for batch in batches for pair in zip(batch.samples.tolist(), batch.tokens.tolist(), strict=True)]


def digest_of(batches: Iterable[Batch]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(len(batch.samples).to_bytes(4, "little"))
        for part in (batch.x.numpy(), batch.samples, batch.tokens):
            digest.update(part.tobytes())
    return digest.hexdigest()


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("loader")]


def no_thread_is_left(seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while loader_threads() and time.monotonic() < deadline:
        time.sleep(0.005)
    return not loader_threads()


# --- what a batch is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [name for name, _, _ in THREE_DTYPES])
@pytest.mark.parametrize("how", ["epoch", "in order"])
def test_every_row_is_the_activation_that_its_sample_and_token_say(store: Store, layer: str, how: str) -> None:
    loader = loader_of(store, layer=layer)
    natural = store.arrays[layer].to_float(natural_order(store.plan, layer)).astype(np.float32)
    for batch in loader.epoch(0) if how == "epoch" else loader.in_order():
        assert batch.x.dtype == torch.float32
        assert (batch.samples.dtype, batch.tokens.dtype) == (np.int64, np.int16)
        assert np.array_equal(batch.x.numpy(), natural[batch.samples, batch.tokens])


def test_the_layer_by_default_is_the_last(store: Store) -> None:
    assert loader_of(store).layer.name == "blocks.2"


def test_every_batch_of_an_epoch_is_full(store: Store) -> None:
    sizes = [len(batch.x) for batch in loader_of(store).epoch(0)]
    assert sizes == [10] * (N_ROWS // 10)
    assert loader_of(store).n_batches == N_ROWS // 10


@pytest.mark.parametrize("batch_size", [N_ROWS, N_ROWS + 1, 10**6])
def test_a_store_smaller_than_a_batch_gives_one_batch_of_all_its_rows(store: Store, batch_size: int) -> None:
    loader = loader_of(store, batch_size=batch_size)
    assert [len(batch.x) for batch in loader.epoch(0)] == [N_ROWS]
    assert loader.n_batches == 1


def test_a_batch_may_be_changed_in_place_without_changing_those_that_follow(store: Store) -> None:
    for layer in store.layer_names:
        expected = [batch.x.clone() for batch in loader_of(store, layer=layer).epoch(0)]
        for batch, whole in zip(loader_of(store, layer=layer).epoch(0), expected, strict=True):
            assert torch.equal(batch.x, whole)
            batch.x.fill_(torch.nan)
            batch.samples.fill(-1)


# --- the stream -----------------------------------------------------------------------------------------------------


@on_disk
@given(
    plans(),
    st.sets(st.integers(0, 23), max_size=4),
    st.integers(1, 40),
    st.integers(1, 12),
    st.integers(0, 2**40),
    st.integers(0, 5),
    st.integers(0, 10**6),
)
def test_streams_of_stores_of_any_shape(
    plan: spec.StorePlan, failed: set[int], batch_size: int, chunks_per_pool: int, seed: int, epoch: int, start: int
) -> None:
    with temporary_folder() as folder:
        store = write_store(folder / "store", plan, failed=tuple(failed))
        if not store.ok_samples.any():
            return
        loader = loader_of(store, batch_size=batch_size, chunks_per_pool=chunks_per_pool, seed=seed)
        batches = list(loader.epoch(epoch))
        rows = rows_of(batches)
        assert len(batches) == loader.n_batches
        assert len(rows) == len(set(rows)) == loader.n_batches * min(batch_size, loader.n_rows)
        assert not {sample for sample, _ in rows} & failed
        # A consumer that was stopped after `start` batches goes on as if it had not been.
        start %= len(batches) + 1
        assert digest_of(loader.epoch(epoch, start=start)) == digest_of(batches[start:])
        kept = rows_of(loader.in_order())
        assert sorted(kept) == [
            (s, t) for s in range(plan.layout.n_samples) if s not in failed for t in plan.tokens.positions
        ]


def test_every_row_of_a_readable_image_is_in_an_epoch_that_batches_divide(store: Store) -> None:
    rows = rows_of(loader_of(store, batch_size=6).epoch(0))
    assert sorted(rows) == [(s, t) for s in range(37) if s not in FAILED for t in range(3)]


def test_the_number_of_threads_has_no_part_in_the_stream(store: Store) -> None:
    assert len({digest_of(loader_of(store, n_threads=n).epoch(1)) for n in (1, 2, 3, 4)}) == 1
    assert len({digest_of(loader_of(store, n_threads=n).in_order()) for n in (1, 2, 3, 4)}) == 1


def test_the_stream_does_not_depend_on_which_reads_end_first(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = digest_of(loader_of(store).epoch(0))
    read, turn = Loader._read, itertools.count()

    def slow_at_times(loader: Loader, chunk: int) -> Any:
        if next(turn) % 3 == 0:
            time.sleep(0.01)
        return read(loader, chunk)

    monkeypatch.setattr(Loader, "_read", slow_at_times)
    assert digest_of(loader_of(store, n_threads=4).epoch(0)) == expected


def test_two_loaders_and_two_runs_give_the_same_stream(store: Store) -> None:
    loader = loader_of(store)
    assert digest_of(loader.epoch(2)) == digest_of(loader.epoch(2)) == digest_of(loader_of(store).epoch(2))


def test_two_epochs_may_be_read_side_by_side(store: Store) -> None:
    loader = loader_of(store)
    first, second = zip(*zip(loader.epoch(0), loader.epoch(1), strict=True), strict=True)
    assert (digest_of(first), digest_of(second)) == (digest_of(loader.epoch(0)), digest_of(loader.epoch(1)))


@pytest.mark.parametrize("different", ["epoch", "seed"])
def test_epochs_and_seeds_differ_in_their_order(store: Store, different: str) -> None:
    streams = [
        rows_of(loader_of(store).epoch(i) if different == "epoch" else loader_of(store, seed=i).epoch(0))
        for i in range(4)
    ]
    assert all(a != b for i, a in enumerate(streams) for b in streams[:i])


def test_rows_that_are_left_out_of_an_epoch_come_in_others(store: Store) -> None:
    loader = loader_of(store, batch_size=40)  # 102 rows: two batches, 22 rows are left out
    seen = {row for epoch in range(12) for row in rows_of(loader.epoch(epoch))}
    assert len(seen) == N_ROWS


@pytest.mark.parametrize("batch_size", [1, 7, 10, 34, 51, 102, 200])
def test_every_start_gives_the_tail_of_the_whole_epoch(store: Store, batch_size: int) -> None:
    loader = loader_of(store, batch_size=batch_size)
    whole = list(loader.epoch(3))
    for start in range(0, len(whole) + 1, max(1, len(whole) // 8)):
        assert digest_of(loader.epoch(3, start=start)) == digest_of(whole[start:])


def test_starting_at_the_end_of_an_epoch_gives_nothing(store: Store) -> None:
    loader = loader_of(store)
    assert list(loader.epoch(0, start=loader.n_batches)) == []


@pytest.mark.timeout(2)
@pytest.mark.parametrize("start", [-1, 11, 10**9])
def test_a_start_outside_of_the_epoch_is_refused(store: Store, start: int) -> None:
    with pytest.raises(StoreError, match=rf"start .*10.*found {start}"):
        list(loader_of(store).epoch(0, start=start))


def test_the_first_batches_are_pinned(store: Store) -> None:
    # Another stream needs another name: stores.sampling.ALGORITHM.
    first = next(iter(loader_of(store, seed=11).epoch(0)))
    assert rows_of([first]) == [(27, 0), (25, 2), (0, 0), (30, 0), (5, 0), (6, 0), (25, 0), (5, 2), (25, 1), (0, 2)]
    assert digest_of(itertools.islice(loader_of(store, seed=11, layer="blocks.0").epoch(0), 3)) == (
        "dc29961f4b18a6b90542c3c91e99724a341ae0c35a0e8ddbead51debfe1c9528"
    )


# --- which rows -----------------------------------------------------------------------------------------------------


def test_failed_images_never_appear(store: Store) -> None:
    for batches in (loader_of(store, batch_size=6).epoch(0), loader_of(store).in_order()):
        for batch in batches:
            assert not np.isin(batch.samples, FAILED).any()
            assert torch.isfinite(batch.x).all()


@pytest.mark.parametrize(
    ("kinds", "positions"),
    [
        (("cls",), {0}),
        (("patch",), {1, 2}),
        (("cls", "patch"), {0, 1, 2}),
        (("patch", "cls"), {0, 1, 2}),
        (None, {0, 1, 2}),
    ],
    ids=str,
)
def test_rows_are_those_of_the_kinds_asked_for_and_all_of_them(
    store: Store, kinds: tuple[str, ...] | None, positions: set[int]
) -> None:
    loader = loader_of(store, token_kinds=kinds, batch_size=17)
    expected = [(s, t) for s in range(37) if s not in FAILED for t in sorted(positions)]
    assert loader.n_rows == len(expected)
    assert sorted(rows_of(loader.in_order())) == expected
    assert sorted(rows_of(loader.epoch(0))) == expected  # 17 divides 34, 68 and 102


@pytest.mark.parametrize("kinds", [("register",), ("mean",), ("CLS",), ()], ids=str)
def test_kinds_that_are_not_in_the_store_are_refused_with_those_that_are(store: Store, kinds: tuple[str, ...]) -> None:
    with pytest.raises(StoreError, match=r"holds tokens of the kinds \['cls', 'patch'\], found none of"):
        loader_of(store, token_kinds=kinds)


def test_a_layer_that_is_not_in_the_store_is_refused_with_those_that_are(store: Store) -> None:
    with pytest.raises(StoreError, match=r"expected one of the layers \['blocks.0', .*found 'blocks.9'"):
        loader_of(store, layer="blocks.9")


def test_a_store_without_a_readable_image_is_refused(tmp_path: Path) -> None:
    plan = make_plan(n_samples=2)
    with pytest.raises(StoreError, match="has no image that could be read"):
        loader_of(write_store(tmp_path / "store", plan, failed=(0, 1)))


@pytest.mark.parametrize("name", ["batch_size", "chunks_per_pool", "n_threads"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_size_below_one_is_refused_by_name(store: Store, name: str, value: int) -> None:
    with pytest.raises(StoreError, match=f"expected {name} of at least 1, found {value}"):
        loader_of(store, **{name: value})


def test_in_order_yields_the_rows_in_the_order_of_storage(store: Store) -> None:
    samples, tokens = (store.rows(name, 0, store.layout.n_rows) for name in ("sample", "token"))
    kept = store.ok_samples[samples]
    expected = list(zip(samples[kept].tolist(), tokens[kept].tolist(), strict=True))
    assert rows_of(loader_of(store).in_order()) == expected
    assert rows_of(loader_of(store, batch_size=1).in_order()) == expected
    assert rows_of(loader_of(store, batch_size=10**6).in_order()) == expected


# --- ends -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_batches", [0, 1, 3])
@pytest.mark.parametrize("how", ["epoch", "in order"])
def test_a_consumer_that_stops_early_leaves_no_thread(store: Store, how: str, n_batches: int) -> None:
    loader = loader_of(store, n_threads=4)
    batches = loader.epoch(0) if how == "epoch" else loader.in_order()
    for _ in itertools.islice(batches, n_batches):
        pass
    batches.close()  # type: ignore[attr-defined]
    assert no_thread_is_left()


def test_a_consumer_that_forgets_its_epoch_leaves_no_thread(store: Store) -> None:
    batches = loader_of(store).epoch(0)
    next(batches)
    del batches
    gc.collect()
    assert no_thread_is_left()


def test_an_epoch_that_ends_leaves_no_thread(store: Store) -> None:
    for _ in loader_of(store, n_threads=4).epoch(0):
        pass
    assert no_thread_is_left()


@pytest.mark.parametrize("n_threads", [1, 4])
@pytest.mark.parametrize("how", ["epoch", "in order"])
@pytest.mark.parametrize("key", ["blocks.2/c/1/0", "sample/c/1", "token/c/1"])
def test_a_damaged_chunk_is_raised_to_the_consumer_by_its_name_and_leaves_no_thread(
    folder: Path, key: str, how: str, n_threads: int
) -> None:
    flip_byte(folder / key, 2)
    loader = loader_of(Store.open(folder), n_threads=n_threads)
    with pytest.raises(DamagedStoreError, match=f"chunk 0 of '{key}' is damaged: its crc32c differs. Copy this object"):
        list(loader.epoch(0) if how == "epoch" else loader.in_order())
    assert no_thread_is_left()


def test_batches_before_a_damaged_pool_are_yielded(folder: Path) -> None:
    loader = loader_of(Store.open(folder), chunks_per_pool=1, batch_size=1)
    last = int(loader.plan.chunk_order(0)[-1])
    unit, place = loader.store.layout.chunk_address(last)
    flip_byte(folder / f"blocks.2/c/{unit}/0", place * (6 * 3 * 2 + 4))
    batches = loader.epoch(0)
    assert len(list(itertools.islice(batches, N_ROWS // 2))) == N_ROWS // 2
    with pytest.raises(DamagedStoreError):
        list(batches)


def test_an_object_that_vanishes_during_an_epoch_is_raised_to_the_consumer_by_its_name(folder: Path) -> None:
    loader = loader_of(Store.open(folder))
    (folder / "blocks.2/c/3/0").unlink()
    with pytest.raises(DamagedStoreError, match=r"'blocks\.2/c/3/0' in .* is missing or truncated"):
        list(loader.epoch(0))
