import numpy as np
import pytest
import scipy.sparse as sp

from sae.errors import SaeError
from sae.metrics.activation_profile import ActivationProfileMeter
from sae.metrics.codes import SparseCodes
from sae.metrics.latents import EffectiveLatentsMeter, LatentUseMeter, effective_latents


def codes(dense):
    return SparseCodes(sp.csr_array(np.asarray(dense, dtype=np.float32)))


def use_of(*parts):
    meter = LatentUseMeter(parts[0].n_latents)
    for part in parts:
        meter.update(part)
    return meter.result()


def test_use_by_hand():
    use = use_of(codes([[1, 0, 0, 2], [3, 0, 0, 0], [0, 0, 0, 0], [1, 0, 5, 0]]))
    assert use.n_rows == 4
    assert use.l0 == 5 / 4
    assert use.frequency.tolist() == [0.75, 0, 0.25, 0.25]
    assert use.n_dead == 1
    assert use.n_dense == 3


@pytest.mark.parametrize("n_rows", [10, 30, 70, 1000])
def test_a_latent_in_exactly_a_tenth_of_the_rows_is_not_dense_and_one_more_row_makes_it_so(n_rows):
    z = np.zeros((n_rows, 2))
    z[: n_rows // 10, 0] = 1
    z[: n_rows // 10 + 1, 1] = 1
    assert use_of(codes(z)).n_dense == 1


def test_streamed_use_equals_one_shot():
    z = np.random.default_rng(0).random((50, 9)) * (np.random.default_rng(1).random((50, 9)) > 0.8)
    whole, streamed = use_of(codes(z)), use_of(codes(z[:13]), codes(z[13:14]), codes(z[14:]))
    np.testing.assert_array_equal(streamed.frequency, whole.frequency)
    assert (streamed.l0, streamed.n_dead, streamed.n_dense) == (whole.l0, whole.n_dead, whole.n_dense)


def test_effective_latents_count_equal_activations_whatever_their_scale():
    a = np.zeros((4, 12))
    a[0, :5], a[1, :5], a[2, 3] = 1e-3, 1e5, 7
    assert effective_latents(a) == pytest.approx([5, 5, 1, 0])


def test_effective_latents_stream():
    a = np.random.default_rng(0).random((40, 6)).astype(np.float32)
    meter = EffectiveLatentsMeter()
    for part in np.split(a, [3, 20]):
        meter.update(part)
    assert meter.result() == pytest.approx(effective_latents(a).mean(), rel=1e-12)
    assert 1 < meter.result() < 6


def test_the_activation_profile_is_the_mean_of_each_rank():
    meter = ActivationProfileMeter(3)
    meter.update(np.array([[1, 5, 2], [4, 0, 0]], dtype=np.float32))
    meter.update(np.array([[0, 0, 3]], dtype=np.float32))
    assert meter.result().tolist() == [4, 2 / 3, 1 / 3]


def test_meters_refuse_other_widths_and_no_rows():
    for meter in (LatentUseMeter(3), EffectiveLatentsMeter(), ActivationProfileMeter(3)):
        with pytest.raises(SaeError, match="at least one row"):
            meter.result()
    with pytest.raises(SaeError, match="3 latents, found 2"):
        LatentUseMeter(3).update(codes([[1, 2]]))
    with pytest.raises(SaeError, match=r"\(n, 3\), found \(1, 2\)"):
        ActivationProfileMeter(3).update(np.ones((1, 2)))
