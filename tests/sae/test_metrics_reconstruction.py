from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import r2_score
from sklearn.metrics.pairwise import paired_cosine_distances

from sae.errors import SaeError
from sae.metrics.reconstruction import ReconstructionMeter


def case(n=200, d=7, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) * np.arange(1, d + 1) + rng.normal(size=d)
    return x, x + rng.normal(size=(n, d))


def measure(*batches):
    meter = ReconstructionMeter()
    for x, x_hat in batches:
        meter.update(x, x_hat)
    return meter.result()


def test_each_metric_is_its_definition():
    x, x_hat = case()
    got = measure((x, x_hat))
    assert got.r2 == pytest.approx(r2_score(x, x_hat, multioutput="uniform_average"), rel=1e-12)
    assert got.fvu == pytest.approx(((x - x_hat) ** 2).sum() / ((x - x.mean(axis=0)) ** 2).sum(), rel=1e-12)
    assert got.fvu == pytest.approx(1 - r2_score(x, x_hat, multioutput="variance_weighted"), rel=1e-12)
    assert got.cosine == pytest.approx(1 - paired_cosine_distances(x, x_hat).mean(), rel=1e-12)
    assert got.nmse == pytest.approx(((x - x_hat) ** 2).sum() / (x**2).sum(), rel=1e-12)
    assert got.n_rows == 200


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), max_size=6), seed=st.integers(0, 1000))
def test_streaming_in_any_batches_equals_one_shot(cuts, seed):
    x, x_hat = case(60, 4, seed)
    edges = [0, *sorted(cuts), 60]
    streamed = measure(*((x[a:b], x_hat[a:b]) for a, b in pairwise(edges)))
    whole = measure((x, x_hat))
    for name in ("r2", "fvu", "cosine", "nmse"):
        assert getattr(streamed, name) == pytest.approx(getattr(whole, name), rel=1e-11)
    assert streamed.n_rows == 60


@pytest.mark.parametrize("outlier_first", [False, True])
def test_a_mean_ten_million_times_the_spread_costs_no_digits(outlier_first):
    x, x_hat = case(300, 3)
    if outlier_first:
        x[0] += 1e4
    expected = r2_score(x, x_hat)
    got = measure(*((x[i : i + 50] + 1e7, x_hat[i : i + 50] + 1e7) for i in range(0, 300, 50)))
    assert got.r2 == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e9 / 3])
def test_constant_features_are_counted_and_left_out_of_r2(value):
    x, x_hat = case(99, 5)
    wide, wide_hat = (np.column_stack([z, np.full(99, value)]) for z in (x, x_hat))
    wide_hat[:, -1] += 1  # a wrong reconstruction of it would send R² to −∞
    got = measure((wide[:10], wide_hat[:10]), (wide[10:], wide_hat[10:]))
    assert got.n_constant_features == 1
    assert got.r2 == pytest.approx(r2_score(x, x_hat), rel=1e-12)


def test_predicting_the_mean_explains_nothing_and_the_rows_themselves_everything():
    x, _ = case()
    perfect = measure((x, x))
    assert (perfect.r2, perfect.fvu, perfect.nmse) == (1, 0, 0)
    assert perfect.cosine == pytest.approx(1)
    mean = measure((x, np.broadcast_to(x.mean(axis=0), x.shape)))
    assert mean.r2 == pytest.approx(0, abs=1e-12)
    assert mean.fvu == pytest.approx(1)


def test_r2_and_fvu_do_not_depend_on_the_units_of_normalisation():
    x, x_hat = case()
    mu, s = x.mean(axis=0), 3.7
    raw, normalised = measure((x, x_hat)), measure(((x - mu) / s, (x_hat - mu) / s))
    assert normalised.r2 == pytest.approx(raw.r2)
    assert normalised.fvu == pytest.approx(raw.fvu)
    assert normalised.nmse != pytest.approx(raw.nmse)


def test_half_precision_rows_accumulate_in_float64():
    x, x_hat = (z.astype(np.float16) for z in case(5000, 3))
    assert measure((x, x_hat)).r2 == pytest.approx(r2_score(x.astype(float), x_hat.astype(float)), rel=1e-12)


def test_what_is_undefined_is_nan_and_a_zero_row_has_cosine_zero():
    got = measure((np.zeros((2, 3)), np.ones((2, 3))))
    assert np.isnan([got.r2, got.fvu, got.nmse]).all()
    assert got.cosine == 0
    assert got.n_constant_features == 3


def test_rows_that_do_not_correspond_are_refused():
    meter = ReconstructionMeter()
    with pytest.raises(SaeError, match="at least one row"):
        meter.result()
    meter.update(*case(5, 3))
    for shapes in (((5, 3), (4, 3)), ((5, 4), (5, 4)), ((3,), (3,))):
        with pytest.raises(SaeError, match=r"shape \(n, 3\)"):
            meter.update(*(np.zeros(shape) for shape in shapes))
