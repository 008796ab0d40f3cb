import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stores.errors import FormatError
from stores.layout import Layout, choose_layout, hashed_order, row_order
from tests.stores.build import arithmetic

MIB = 1 << 20


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    n_tokens = draw(st.integers(1, 12))
    samples_per_unit = draw(st.integers(1, 20))
    rows = n_tokens * samples_per_unit
    return Layout(
        n_samples=draw(st.integers(1, 100)),
        tokens_per_sample=n_tokens,
        samples_per_unit=samples_per_unit,
        rows_per_chunk=draw(st.sampled_from([n for n in range(1, rows + 1) if rows % n == 0])),
    )


@st.composite
def chosen(draw: st.DrawFn) -> tuple[Layout, int]:
    """A layout chosen for a store, and the bytes of a row of its widest layer."""
    n_samples = draw(st.one_of(st.integers(1, 100), st.integers(1, 20_000_000)))
    n_tokens = draw(st.one_of(st.integers(1, 20), st.integers(1, 131_072)))
    row_bytes = draw(st.one_of(st.integers(2, 16_384), st.integers(2, 4 * MIB)))
    return choose_layout(n_samples=n_samples, tokens_per_sample=n_tokens, max_row_bytes=row_bytes), row_bytes


@arithmetic
@given(layouts())
def test_units_hold_every_image_once_in_order(layout: Layout) -> None:
    assert [s for unit in range(layout.n_units) for s in layout.unit_samples(unit)] == list(range(layout.n_samples))


@arithmetic
@given(layouts())
def test_units_hold_every_row_once_in_order(layout: Layout) -> None:
    assert [r for unit in range(layout.n_units) for r in layout.unit_rows(unit)] == list(range(layout.n_rows))


@arithmetic
@given(layouts())
def test_chunks_hold_every_row_once_in_order(layout: Layout) -> None:
    assert [r for chunk in range(layout.n_chunks) for r in layout.chunk_rows(chunk)] == list(range(layout.n_rows))


@arithmetic
@given(layouts())
def test_no_unit_and_no_chunk_is_empty(layout: Layout) -> None:
    assert all(len(layout.unit_rows(unit)) > 0 for unit in range(layout.n_units))
    assert all(len(layout.chunk_rows(chunk)) > 0 for chunk in range(layout.n_chunks))


@arithmetic
@given(layouts())
def test_a_chunk_lies_within_the_unit_and_at_the_place_that_its_address_says(layout: Layout) -> None:
    for chunk in range(layout.n_chunks):
        unit, place = layout.chunk_address(chunk)
        rows, of_unit = layout.chunk_rows(chunk), layout.unit_rows(unit)
        assert of_unit.start <= rows.start
        assert rows.stop <= of_unit.stop
        assert rows.start - of_unit.start == place * layout.rows_per_chunk
        assert place < layout.chunks_per_shard


@pytest.mark.parametrize("name", ["n_samples", "tokens_per_sample", "samples_per_unit", "rows_per_chunk"])
@pytest.mark.parametrize("value", [0, -1, 1.0, True, "1", None], ids=repr)
def test_a_size_that_is_no_positive_integer_is_refused_by_name(name: str, value: object) -> None:
    sizes = {"n_samples": 1, "tokens_per_sample": 1, "samples_per_unit": 1, "rows_per_chunk": 1}
    with pytest.raises(FormatError, match=f"expected {name} to be a positive integer, found {value!r}"):
        Layout(**{**sizes, name: value})


def test_chunks_that_would_straddle_units_are_refused() -> None:
    with pytest.raises(FormatError, match="divide the 12 rows of a unit, found 5"):
        Layout(n_samples=10, tokens_per_sample=3, samples_per_unit=4, rows_per_chunk=5)


@arithmetic
@given(chosen())
def test_a_chosen_unit_is_at_most_131072_rows_and_16384_images(case: tuple[Layout, int]) -> None:
    layout, _ = case
    assert layout.rows_per_shard <= 131_072
    assert layout.samples_per_unit <= 16_384


def test_an_image_of_more_rows_than_a_unit_may_have_is_a_unit_of_its_own() -> None:
    layout = choose_layout(n_samples=3, tokens_per_sample=200_000, max_row_bytes=2)
    assert layout.samples_per_unit == 1


@arithmetic
@given(chosen())
def test_a_chosen_chunk_is_at_most_4_mib_in_the_widest_layer(case: tuple[Layout, int]) -> None:
    layout, row_bytes = case
    assert layout.rows_per_chunk * row_bytes <= 4 * MIB


def test_a_row_of_more_than_4_mib_is_a_chunk_of_its_own() -> None:
    assert choose_layout(n_samples=100, tokens_per_sample=1, max_row_bytes=5 * MIB).rows_per_chunk == 1


@arithmetic
@given(chosen())
def test_a_store_of_16_rows_or_more_has_at_least_16_chunks(case: tuple[Layout, int]) -> None:
    layout, _ = case
    assert layout.n_chunks >= min(16, layout.n_rows)


@arithmetic
@given(chosen())
def test_a_store_of_4_images_or_more_has_at_least_4_units(case: tuple[Layout, int]) -> None:
    layout, _ = case
    assert layout.n_units >= min(4, layout.n_samples)


@pytest.mark.parametrize("width", [384, 768, 1024, 1536])
@pytest.mark.parametrize("n_tokens", [1, 49, 50, 196, 197, 201, 256, 257, 261, 577, 1370])
def test_chunks_of_the_usual_encoders_on_imagenet_are_2_to_4_mib(n_tokens: int, width: int) -> None:
    layout = choose_layout(n_samples=1_281_167, tokens_per_sample=n_tokens, max_row_bytes=2 * width)
    assert 2 * MIB <= layout.rows_per_chunk * 2 * width <= 4 * MIB


@pytest.mark.parametrize(
    ("n_samples", "n_tokens", "row_bytes", "samples_per_unit", "rows_per_chunk"),
    [
        pytest.param(1_281_167, 1, 1536, 16_384, 2048, id="ImageNet, cls, D=768"),
        pytest.param(1_281_167, 197, 1536, 640, 1970, id="ImageNet, ViT-B/16, D=768"),
        pytest.param(1_281_167, 257, 2048, 448, 1799, id="ImageNet, ViT-L/14, D=1024"),
        pytest.param(50_000, 257, 1536, 448, 2056, id="CIFAR-10, ViT-B/14, D=768"),
        pytest.param(1797, 65, 384, 448, 7280, id="digits, 65 tokens, D=192"),
        pytest.param(1, 1, 2, 1, 1, id="one row"),
    ],
)
def test_the_chosen_layout_is_pinned(
    n_samples: int, n_tokens: int, row_bytes: int, samples_per_unit: int, rows_per_chunk: int
) -> None:
    layout = choose_layout(n_samples=n_samples, tokens_per_sample=n_tokens, max_row_bytes=row_bytes)
    assert (layout.samples_per_unit, layout.rows_per_chunk) == (samples_per_unit, rows_per_chunk)


def test_cls_tokens_of_imagenet_are_shared_out_in_79_units() -> None:
    assert choose_layout(n_samples=1_281_167, tokens_per_sample=1, max_row_bytes=1536).n_units == 79


@arithmetic
@given(st.integers(0, 3000), st.lists(st.integers(-(2**70), 2**70), max_size=4))
def test_a_hashed_order_is_a_permutation(n: int, key: list[int]) -> None:
    order = hashed_order(n, *key)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n))


@arithmetic
@given(st.lists(st.integers(0, 2**32), min_size=1, max_size=3), st.integers(0, 2), st.integers(1, 2**32))
def test_a_hashed_order_differs_when_any_part_of_its_key_does(key: list[int], place: int, change: int) -> None:
    other = list(key)
    other[place % len(key)] += change
    assert not np.array_equal(hashed_order(200, *key), hashed_order(200, *other))


def test_a_hashed_order_differs_when_its_key_is_reordered_or_extended() -> None:
    orders = [hashed_order(200, *key).tolist() for key in [(), (0,), (0, 0), (1,), (1, 2), (2, 1), (1, 2, 0)]]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


@pytest.mark.parametrize(
    ("n", "key", "order"),
    [
        (0, (1,), []),
        (1, (1,), [0]),
        (10, (), [9, 0, 5, 8, 6, 3, 2, 4, 1, 7]),
        (10, (0,), [8, 4, 0, 7, 3, 1, 2, 9, 5, 6]),
        (10, (1,), [8, 9, 5, 0, 2, 3, 7, 4, 1, 6]),
        (10, (1, 2), [0, 3, 6, 7, 1, 8, 5, 2, 4, 9]),
    ],
)
def test_hashed_orders_are_pinned(n: int, key: tuple[int, ...], order: list[int]) -> None:
    assert hashed_order(n, *key).tolist() == order


def test_a_hashed_order_is_splitmix64_as_published() -> None:
    # The first outputs of splitmix64 seeded with 0 (Steele, Lea and Flood 2014; prng.di.unimi.it/splitmix64.c).
    def splitmix64(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    assert splitmix64(0) == 0xE220A8397B1DCDAF
    state = 0x9E3779B97F4A7C15
    for part in (7, 11):
        state = splitmix64(state ^ part)
    assert hashed_order(500, 7, 11).tolist() == sorted(range(500), key=lambda i: splitmix64(i ^ state))


@arithmetic
@given(layouts(), st.integers(0, 2**64))
def test_a_units_rows_are_stored_in_a_permuted_order(layout: Layout, seed: int) -> None:
    for unit in range(layout.n_units):
        assert sorted(row_order(layout, unit, seed)) == list(range(len(layout.unit_rows(unit))))


def test_row_orders_differ_by_unit_and_by_seed() -> None:
    layout = Layout(n_samples=100, tokens_per_sample=2, samples_per_unit=50, rows_per_chunk=10)
    orders = [row_order(layout, unit, seed).tolist() for unit in (0, 1) for seed in (0, 1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
