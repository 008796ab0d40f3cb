import json
from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stores.errors import FormatError
from stores.spec import canonical_json
from stores.statistics import Statistics
from tests.stores.build import arithmetic

FIELDS = ("mean", "m2", "min", "max")

float32_rows = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 40), st.integers(1, 5)),
    elements=st.floats(-1e6, 1e6, width=32),
)


def assert_close(found: Statistics, expected: Statistics) -> None:
    scale = max(float(np.abs(expected.max).max()), float(np.abs(expected.min).max()), 1e-300)
    assert (found.count, found.n_nonfinite) == (expected.count, expected.n_nonfinite)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-12, atol=1e-13 * scale)
    np.testing.assert_allclose(found.m2, expected.m2, rtol=1e-12, atol=1e-13 * scale**2)
    np.testing.assert_array_equal(found.min, expected.min)
    np.testing.assert_array_equal(found.max, expected.max)
    assert found.norm == pytest.approx(expected.norm, rel=1e-12, abs=1e-13 * scale)


def by_numpy(rows: np.ndarray) -> Statistics:
    rows = rows.astype(np.float64)
    return Statistics(
        count=len(rows),
        n_nonfinite=int((~np.isfinite(rows)).sum()),
        mean=rows.mean(axis=0),
        m2=((rows - rows.mean(axis=0)) ** 2).sum(axis=0),
        min=rows.min(axis=0),
        max=rows.max(axis=0),
        norm=float(np.linalg.norm(rows, axis=1).mean()),
    )


@arithmetic
@given(float32_rows)
def test_statistics_are_those_of_numpy_in_float64(rows: np.ndarray) -> None:
    assert_close(Statistics.of(rows), by_numpy(rows))


@arithmetic
@given(float32_rows, st.lists(st.integers(0, 40), max_size=6))
def test_merging_the_parts_of_any_split_gives_the_statistics_of_the_whole(rows: np.ndarray, cuts: list[int]) -> None:
    parts = np.split(rows, sorted(min(cut, len(rows)) for cut in cuts))
    merged = reduce(Statistics.merged, map(Statistics.of, parts), Statistics.empty(rows.shape[1]))
    assert_close(merged, by_numpy(rows))


@arithmetic
@given(float32_rows, float32_rows)
def test_merging_does_not_depend_on_the_order(a: np.ndarray, b: np.ndarray) -> None:
    width = min(a.shape[1], b.shape[1])
    first, second = Statistics.of(a[:, :width]), Statistics.of(b[:, :width])
    assert_close(first.merged(second), second.merged(first))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("n", [1, 4095, 4096, 4097, 10_000])
def test_more_rows_than_are_summed_at_once_count_like_any(n: int, dtype: type) -> None:
    rows = np.random.default_rng(n).normal(3.0, 2.0, (n, 3)).astype(dtype)
    assert_close(Statistics.of(rows), by_numpy(rows))


def test_a_tiny_variance_around_a_large_mean_is_not_cancelled() -> None:
    # The sum of squares is near 1e20 here, of which float64 keeps 1e4: the variance of 1e-6 would be lost.
    rows = np.random.default_rng(0).normal(0.0, 1e-3, (9000, 2)) + 1e8
    statistics = reduce(Statistics.merged, map(Statistics.of, np.array_split(rows, 7)))
    np.testing.assert_allclose(statistics.variance, rows.var(axis=0), rtol=1e-4)
    assert (statistics.variance > 0.9e-6).all()


@arithmetic
@given(st.floats(-60_000, 60_000, width=16), st.integers(1, 9000))
def test_a_constant_feature_has_no_variance(value: float, n: int) -> None:
    statistics = Statistics.of(np.full((n, 1), value, dtype=np.float16))
    assert statistics.variance[0] <= (1e-15 * value) ** 2


def test_statistics_of_no_rows_are_the_neutral_element() -> None:
    rows = np.random.default_rng(0).normal(size=(5, 3))
    some, none = Statistics.of(rows), Statistics.of(rows[:0])
    assert none.count == 0
    assert some.merged(none).to_json() == none.merged(some).to_json() == some.to_json()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_nan_and_infinity_are_counted(dtype: type, bad: float) -> None:
    rows = np.ones((5000, 4), dtype=dtype)
    rows[[0, 3, 4999], [1, 1, 2]] = bad
    assert Statistics.of(rows).n_nonfinite == 3


def test_nan_leaves_the_other_features_statistics_as_they_are() -> None:
    rows = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    clean = Statistics.of(rows)
    rows[7, 1] = np.nan
    dirty = Statistics.of(rows)
    for name in FIELDS:
        assert np.isnan(getattr(dirty, name)[1])
        np.testing.assert_array_equal(getattr(dirty, name)[[0, 2]], getattr(clean, name)[[0, 2]])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_parts_with_nan_or_infinity_merge_without_a_warning(bad: float) -> None:
    part = Statistics.of(np.full((2, 3), bad))
    assert part.merged(part).n_nonfinite == 12  # pytest makes a warning an error


def test_the_largest_float32_does_not_overflow() -> None:
    rows = np.full((3, 2), np.finfo(np.float32).max, dtype=np.float32)
    statistics = Statistics.of(rows)
    assert np.isfinite(statistics.norm)
    assert statistics.n_nonfinite == 0


@arithmetic
@given(float32_rows)
def test_statistics_survive_json_to_the_last_bit(rows: np.ndarray) -> None:
    before = Statistics.of(rows)
    after = Statistics.from_json(json.loads(canonical_json(before.to_json())), rows.shape[1])
    assert (after.count, after.n_nonfinite, after.norm) == (before.count, before.n_nonfinite, before.norm)
    for name in FIELDS:
        assert getattr(after, name).tobytes() == getattr(before, name).tobytes()


def test_what_json_has_no_number_for_is_written_as_null_and_read_as_nan() -> None:
    statistics = Statistics.of(np.array([[1.0, np.inf]]))
    text = statistics.to_json()
    assert text["mean"] == [1.0, None]
    assert text["norm"] is None
    after = Statistics.from_json(json.loads(canonical_json(text)), 2)
    assert np.isnan(after.mean[1])
    assert np.isnan(after.norm)


@pytest.mark.parametrize("name", ["count", "n_nonfinite", "norm", *FIELDS])
@pytest.mark.parametrize("value", ["absent", "three", [1.0], [[1.0, 2.0]], {}, float("inf")], ids=repr)
def test_statistics_of_another_form_are_refused(name: str, value: object) -> None:
    text = Statistics.of(np.ones((2, 2))).to_json()
    if value == "absent":
        del text[name]
    else:
        text[name] = value
    if name == "norm" and isinstance(value, float):
        return  # a number like any other
    with pytest.raises(FormatError, match="statistics: expected"):
        Statistics.from_json(text, 2)
