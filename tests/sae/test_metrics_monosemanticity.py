import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

import sae.metrics.monosemanticity as module
from sae.errors import SaeError
from sae.metrics.codes import SparseCodes
from sae.metrics.monosemanticity import monosemanticity


def codes(dense):
    return SparseCodes(sp.csr_array(dense))


def brute_force(dense, embeddings):
    """The definition with its N×N matrices: min-max scaling, then the weighted mean cosine over pairs i ≠ j."""
    e = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    cosines = e @ e.T
    scores = np.full(dense.shape[1], np.nan)
    for j, a in enumerate(dense.T):
        spread = a.max() - a.min()
        if spread == 0:
            continue
        scaled = (a - a.min()) / spread
        weight = np.outer(scaled, scaled)
        np.fill_diagonal(weight, 0)
        if weight.sum() > 0:
            scores[j] = (weight * cosines).sum() / weight.sum()
    return scores


def case(n=40, m=12, d=5, seed=0, density=0.3):
    rng = np.random.default_rng(seed)
    dense = rng.random((n, m)) * (rng.random((n, m)) < density)
    return dense, rng.normal(size=(n, d))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(2, 25),
    m=st.integers(1, 8),
    d=st.integers(1, 6),
    seed=st.integers(0, 10_000),
    density=st.floats(0, 1),
)
def test_the_score_is_the_definition(n, m, d, seed, density):
    dense, embeddings = case(n, m, d, seed, density)
    np.testing.assert_allclose(
        monosemanticity(codes(dense), embeddings).scores, brute_force(dense, embeddings), rtol=1e-9, atol=1e-11
    )


def test_the_score_is_the_definition_where_a_latents_minimum_is_not_zero():
    dense, embeddings = case()
    dense[:, 3] = 5 + dense[:, 3]  # fires on every image
    dense[:, 4] = -dense[:, 4]  # as with activation identity
    dense[:, 5] -= 2
    got = monosemanticity(codes(dense), embeddings).scores
    np.testing.assert_allclose(got, brute_force(dense, embeddings), rtol=1e-9)
    # The minimum matters: latent 3 scores otherwise than it would if it were left on (an extra silent image).
    left_on = brute_force(np.append(dense[:, 3], 0)[:, None], np.vstack([embeddings, np.ones(5)]))
    assert abs(got[3] - left_on[0]) > 1e-3


def test_the_scale_of_a_latents_activations_cancels():
    dense, embeddings = case()
    scaled = dense * np.logspace(-6, 6, 12)
    np.testing.assert_allclose(
        monosemanticity(codes(scaled), embeddings).scores, monosemanticity(codes(dense), embeddings).scores, rtol=1e-9
    )


def test_the_length_of_the_embeddings_cancels():
    dense, embeddings = case()
    longer = embeddings * np.linspace(0.1, 50, 40)[:, None]
    np.testing.assert_allclose(
        monosemanticity(codes(dense), longer).scores, monosemanticity(codes(dense), embeddings).scores, rtol=1e-9
    )


def test_latents_on_fewer_than_two_images_have_no_score_and_are_counted():
    dense = np.zeros((4, 5))
    dense[1, 1] = 3  # one image
    dense[[0, 2], 2] = 1  # two
    dense[:, 3] = 0.1  # on all alike: nothing above its minimum
    dense[:, 4] = [0.1, 0.1, 0.7, 0.1]  # above it on one only
    embeddings = np.array([[1.0, 0], [0, 1], [1, 1], [3, 4]])
    got = monosemanticity(codes(dense), embeddings)
    assert got.n_without_score == 4
    assert got.scores[2] == pytest.approx(0.5**0.5)
    assert np.isnan(got.scores[[0, 1, 3, 4]]).all()
    assert got.mean == got.median == got.scores[2]


def test_images_that_do_not_fire_are_above_a_negative_minimum():
    dense, embeddings = np.zeros((5, 1)), case(5)[1]
    dense[2] = -1  # as with activation identity: scaled to 0, and the other four to 1
    got = monosemanticity(codes(dense), embeddings)
    np.testing.assert_allclose(got.scores, brute_force(dense, embeddings), rtol=1e-12)
    assert got.n_without_score == 0


def test_a_latent_whose_weight_is_on_one_image_to_within_rounding_has_no_score_made_of_noise():
    got = monosemanticity(codes(np.array([[1.0], [1e-15], [0]])), np.eye(3))
    assert np.isnan(got.scores[0])
    assert got.n_without_score == 1


def test_without_any_score_mean_and_median_are_nan():
    got = monosemanticity(codes(np.zeros((3, 2))), np.eye(3))
    assert np.isnan([got.mean, got.median]).all()
    assert got.n_without_score == 2


def test_mean_and_median_are_over_scored_latents():
    dense, embeddings = case()
    dense[:, 0] = 0
    got = monosemanticity(codes(dense), embeddings)
    expected = brute_force(dense, embeddings)
    assert got.mean == pytest.approx(np.nanmean(expected))
    assert got.median == pytest.approx(np.nanmedian(expected))


def test_the_floor_is_the_mean_cosine_over_pairs():
    dense, embeddings = case()
    e = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    pairs = (e @ e.T)[~np.eye(40, dtype=bool)]
    assert monosemanticity(codes(dense), embeddings).floor == pytest.approx(pairs.mean())


def test_a_latent_that_fires_on_one_concept_scores_high_and_one_that_fires_at_random_near_the_floor():
    rng = np.random.default_rng(0)
    concept = rng.integers(0, 4, 400)
    embeddings = np.eye(4)[concept] + 0.1 * rng.normal(size=(400, 4))
    dense = np.column_stack([concept == 2, rng.random(400) < 0.25]).astype(np.float32)
    got = monosemanticity(codes(dense), embeddings)
    assert got.scores[0] > 0.95
    assert got.scores[1] == pytest.approx(got.floor, abs=0.05)


def test_blocks_of_rows_and_of_latents_change_nothing(monkeypatch):
    dense, embeddings = case()
    whole = monosemanticity(codes(dense), embeddings)
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 7)
    blocked = monosemanticity(codes(dense), embeddings, max_sum_bytes=5 * 8 * 5)
    np.testing.assert_allclose(blocked.scores, whole.scores, rtol=1e-12)
    assert blocked.floor == pytest.approx(whole.floor)


def test_half_precision_inputs_are_accumulated_in_float64():
    dense, embeddings = case(3000, 3, 4)
    dense, embeddings = dense.astype(np.float32), embeddings.astype(np.float16)
    expected = monosemanticity(codes(dense.astype(float)), embeddings.astype(float)).scores
    np.testing.assert_allclose(monosemanticity(codes(dense), embeddings).scores, expected, rtol=1e-12)


@pytest.mark.parametrize("bad", [0, np.nan, np.inf], ids=str)
def test_an_embedding_without_a_direction_is_refused_by_its_row(bad):
    dense, embeddings = case()
    embeddings[17] = bad
    with pytest.raises(SaeError, match="in row 17"):
        monosemanticity(codes(dense), embeddings)


def test_embeddings_of_other_images_are_refused():
    dense, embeddings = case()
    with pytest.raises(SaeError, match=r"\(40, D\).*found \(39, 5\)"):
        monosemanticity(codes(dense), embeddings[1:])
