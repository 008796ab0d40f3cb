import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.errors import SaeError
from sae.metrics.codes import SparseCodes
from sae.metrics.purity import purity


def codes(dense):
    return SparseCodes(sp.csr_array(np.asarray(dense, dtype=np.float64)))


#         latent: 0  1  2  3       label
BY_HAND = np.array([
    [1, 0, 0, 1],  # 5
    [1, 9, 0, 1],  # 5
    [2, 1, 0, 0],  # 7
    [0, 0, 0, 1],  # 7
    [8, 1, 4, 0],  # none
])  # fmt: skip
LABELS = [5, 5, 7, 7, -1]


def test_purity_by_hand():
    got = purity(codes(BY_HAND), LABELS)
    # Latent 0 fires on 5, 5, 7 with 1, 1, 2: most often on 5, though 7 has as much activation.
    # Latent 1 fires once on 5 and once on 7: a tie, which goes to 5. Latent 2 fires on no labelled row.
    assert got.label.tolist() == [5, 5, -1, 5]
    np.testing.assert_allclose(got.binary, [2 / 3, 1 / 2, np.nan, 2 / 3])
    np.testing.assert_allclose(got.weighted, [2 / 4, 9 / 10, np.nan, 2 / 3])
    assert got.mean_binary == pytest.approx((2 / 3 + 1 / 2 + 2 / 3) / 3)
    assert got.mean_weighted == pytest.approx((1 / 2 + 9 / 10 + 2 / 3) / 3)
    assert (got.n_active, got.n_labelled) == (3, 4)


def test_the_weighted_label_is_the_most_frequent_and_not_the_heaviest():
    got = purity(codes([[1], [1], [100]]), [0, 0, 1])
    assert got.label.tolist() == [0]
    assert got.weighted[0] == pytest.approx(2 / 102)


def test_none_and_minus_one_both_mean_unlabelled():
    with_none = purity(codes(BY_HAND), [5, 5, 7, 7, None])
    assert with_none.mean_weighted == purity(codes(BY_HAND), np.array(LABELS)).mean_weighted


def test_unlabelled_rows_change_nothing():
    got, without = purity(codes(BY_HAND), LABELS), purity(codes(BY_HAND[:4]), LABELS[:4])
    np.testing.assert_array_equal(got.binary, without.binary)
    np.testing.assert_array_equal(got.weighted, without.weighted)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 30), m=st.integers(1, 6), n_classes=st.integers(1, 5), seed=st.integers(0, 10_000))
def test_purity_is_the_written_out_count(n, m, n_classes, seed):
    rng = np.random.default_rng(seed)
    dense = rng.random((n, m)) * (rng.random((n, m)) < 0.4)
    labels = rng.integers(0, n_classes, n)
    got = purity(codes(dense), labels)
    for j in range(m):
        fires = dense[:, j] > 0
        if not fires.any():
            assert got.label[j] == -1
            continue
        best = int(np.bincount(labels[fires]).argmax())
        assert got.label[j] == best
        assert got.binary[j] == pytest.approx((labels[fires] == best).mean())
        assert got.weighted[j] == pytest.approx(dense[labels == best, j].sum() / dense[:, j].sum())


def test_a_dictionary_that_never_fires_has_no_purity():
    got = purity(codes(np.zeros((3, 2))), [0, 1, 2])
    assert np.isnan([got.mean_binary, got.mean_weighted]).all()
    assert got.n_active == 0


def test_what_has_no_purity_is_refused():
    with pytest.raises(SaeError, match="each of 5 rows"):
        purity(codes(BY_HAND), LABELS[:4])
    with pytest.raises(SaeError, match="found none"):
        purity(codes(BY_HAND), [-1] * 5)
    with pytest.raises(SaeError, match="activations > 0, found -1"):
        purity(codes(-BY_HAND[:, 3:]), LABELS)
