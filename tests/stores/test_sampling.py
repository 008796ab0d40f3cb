import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stores import sampling
from stores.errors import StoreError
from stores.sampling import StreamPlan
from tests.stores.build import arithmetic

stream_plans = st.builds(
    StreamPlan,
    n_chunks=st.integers(1, 500),
    batch_size=st.integers(1, 4096),
    seed=st.integers(0, 2**64),
    chunks_per_pool=st.integers(1, 600),
)


@arithmetic
@given(stream_plans, st.integers(0, 1000))
def test_the_pools_of_an_epoch_hold_every_chunk_once(plan: StreamPlan, epoch: int) -> None:
    chunks = np.concatenate([plan.pool_chunks(epoch, pool) for pool in range(plan.n_pools)])
    assert sorted(chunks) == list(range(plan.n_chunks))


@arithmetic
@given(stream_plans, st.integers(0, 1000))
def test_every_pool_but_the_last_is_full_and_none_is_empty(plan: StreamPlan, epoch: int) -> None:
    sizes = [len(plan.pool_chunks(epoch, pool)) for pool in range(plan.n_pools)]
    assert set(sizes[:-1]) <= {plan.chunks_per_pool}
    assert 1 <= sizes[-1] <= plan.chunks_per_pool


@arithmetic
@given(stream_plans, st.integers(0, 1000), st.integers(0, 50), st.integers(0, 2000))
def test_the_rows_of_a_pool_are_permuted(plan: StreamPlan, epoch: int, pool: int, n_rows: int) -> None:
    assert sorted(plan.row_order(epoch, pool, n_rows)) == list(range(n_rows))


@arithmetic
@given(stream_plans, st.integers(0, 1000))
def test_the_plan_alone_decides_the_order(plan: StreamPlan, epoch: int) -> None:
    twin = StreamPlan(**vars(plan))
    assert np.array_equal(plan.chunk_order(epoch), twin.chunk_order(epoch))
    assert np.array_equal(plan.row_order(epoch, 0, 100), twin.row_order(epoch, 0, 100))


def test_batch_size_and_pool_size_have_no_part_in_the_order_of_chunks() -> None:
    plan = StreamPlan(n_chunks=50, batch_size=10, seed=3, chunks_per_pool=7)
    other = StreamPlan(n_chunks=50, batch_size=99, seed=3, chunks_per_pool=50)
    assert np.array_equal(plan.chunk_order(2), other.chunk_order(2))


def test_orders_of_chunks_differ_by_seed_and_by_epoch() -> None:
    orders = [
        StreamPlan(n_chunks=100, batch_size=1, seed=seed).chunk_order(epoch).tolist()
        for seed in range(4)
        for epoch in range(4)
    ]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_orders_of_rows_differ_by_seed_by_epoch_by_pool_and_from_that_of_chunks() -> None:
    orders: list[list[int]] = []
    for seed in range(3):
        plan = StreamPlan(n_chunks=100, batch_size=1, seed=seed)
        for epoch in range(3):
            orders.append(plan.chunk_order(epoch).tolist())
            orders.extend(plan.row_order(epoch, pool, 100).tolist() for pool in range(3))
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_the_stream_of_this_algorithm_is_pinned() -> None:
    # Checkpoints name the algorithm and go on in the middle of its stream: another order needs another name.
    assert sampling.ALGORITHM == "chunk-pools-1"
    plan = StreamPlan(n_chunks=12, batch_size=4, seed=5, chunks_per_pool=5)
    assert plan.chunk_order(0).tolist() == [2, 9, 11, 7, 1, 6, 3, 0, 4, 8, 5, 10]
    assert plan.chunk_order(1).tolist() == [1, 3, 8, 7, 11, 10, 4, 0, 2, 9, 5, 6]
    assert plan.pool_chunks(1, 2).tolist() == [5, 6]
    assert plan.row_order(1, 2, 8).tolist() == [6, 7, 2, 0, 5, 1, 4, 3]


@pytest.mark.parametrize("name", ["n_chunks", "batch_size", "chunks_per_pool"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_size_below_one_is_refused_by_name(name: str, value: int) -> None:
    sizes = {"n_chunks": 1, "batch_size": 1, "seed": 0, "chunks_per_pool": 1}
    with pytest.raises(StoreError, match=f"expected {name} of at least 1, found {value}"):
        StreamPlan(**{**sizes, name: value})


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(StoreError, match="expected a seed of at least 0, found -1"):
        StreamPlan(n_chunks=1, batch_size=1, seed=-1)
