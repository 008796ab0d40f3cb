import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.errors import SaeError
from sae.model import SAEConfig, Selection, TopKSAE, select_top_k, weighted_rows

DTYPES = [torch.float32, torch.float64]


def make_sae(d_in=6, n_latents=20, k=4, activation="relu", seed=0, dtype=torch.float64):
    config = SAEConfig(d_in=d_in, n_latents=n_latents, k=k, activation=activation)
    return TopKSAE(config, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rows(n, d, seed=1, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [{"d_in": 0}, {"n_latents": -1}, {"k": 0}, {"k": 21}, {"k": 2.5}, {"k": True}, {"activation": "gelu"}],
    ids=str,
)
def test_a_bad_configuration_is_refused_by_name(change):
    (name,) = change
    with pytest.raises(SaeError, match=f"^{name} must .*found") as caught:
        SAEConfig(**{"d_in": 6, "n_latents": 20, "k": 4, **change})
    assert "\n" not in str(caught.value)


def test_the_budget_may_be_the_whole_dictionary():
    sae = make_sae(n_latents=5, k=5)
    assert sae.encode(rows(3, 6)).indices.shape == (3, 5)


# --- initialisation --------------------------------------------------------------------------------------------------


def test_the_decoder_starts_as_unit_rows_and_the_encoder_as_its_copy():
    sae = make_sae()
    torch.testing.assert_close(sae.W_d.norm(dim=1), torch.ones(20, dtype=torch.float64))
    assert torch.equal(sae.W_e, sae.W_d)
    assert sae.W_e.data_ptr() != sae.W_d.data_ptr()
    assert not sae.b_e.any()
    assert not sae.b_d.any()


def test_the_generator_alone_decides_the_initialisation():
    torch.manual_seed(1)
    first = make_sae(seed=3)
    torch.manual_seed(2)
    assert torch.equal(first.W_d, make_sae(seed=3).W_d)
    assert not torch.equal(first.W_d, make_sae(seed=4).W_d)


def test_float32_and_float64_start_from_the_same_directions():
    torch.testing.assert_close(make_sae(dtype=torch.float32).W_d.double(), make_sae().W_d, atol=1e-6, rtol=0)


def test_the_state_dict_carries_the_normalisation():
    sae = make_sae()
    sae.set_normalisation(np.arange(6.0), np.ones(6))
    other = make_sae(seed=9)
    other.load_state_dict(sae.state_dict())
    assert torch.equal(other(rows(3, 6)), sae(rows(3, 6)))
    assert torch.equal(other.mu_in, torch.arange(6, dtype=torch.float64))


# --- normalisation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalised_rows_have_mean_zero_and_mean_square_norm_d(dtype):
    x = rows(500, 6) * torch.arange(1.0, 7.0) * 40 + 1000
    sae = make_sae(dtype=dtype)
    sae.set_normalisation(x.mean(dim=0).numpy(), x.var(dim=0, correction=0).numpy())
    x_tilde = sae.normalise(x)
    assert x_tilde.dtype == dtype
    torch.testing.assert_close(x_tilde.mean(dim=0), torch.zeros(6, dtype=dtype), atol=1e-4, rtol=0)
    torch.testing.assert_close(x_tilde.square().sum(dim=1).mean(), torch.tensor(6, dtype=dtype), rtol=1e-4, atol=0)
    torch.testing.assert_close(sae.denormalise(x_tilde), x.to(dtype), rtol=1e-5, atol=0)


def test_half_precision_rows_are_normalised_in_the_precision_of_the_sae():
    x = (rows(10, 6) + 100).half()
    sae = make_sae(dtype=torch.float32)
    sae.set_normalisation(np.full(6, 100.0), np.ones(6))
    torch.testing.assert_close(sae.normalise(x), x.float() - 100, rtol=0, atol=0)


def test_read_only_statistics_are_accepted():
    mean = np.zeros(6)
    mean.flags.writeable = False
    make_sae().set_normalisation(mean, np.ones(6))


@pytest.mark.parametrize(
    ("mean", "variance", "says"),
    [
        (np.zeros(5), np.ones(6), r"mean must have shape \(6,\), found \(5,\)"),
        (np.zeros(6), np.ones((6, 6)), "variance must have shape"),
        (np.full(6, np.nan), np.ones(6), "mean must be finite, found 6"),
        (np.zeros(6), np.zeros(6), "sum > 0"),
        (np.zeros(6), np.array([2.0, -1, 1, 1, 1, 1]), "a least of -1"),
    ],
    ids=["short", "covariance", "nan", "no-variance", "negative"],
)
def test_statistics_that_cannot_normalise_are_refused_and_change_nothing(mean, variance, says):
    sae = make_sae()
    with pytest.raises(SaeError, match=says):
        sae.set_normalisation(mean, variance)
    assert sae.s_in == 1
    assert not sae.mu_in.any()


def test_rows_of_another_width_are_refused():
    with pytest.raises(SaeError, match=r"\(N, 6\), found \(3, 7\)"):
        make_sae().encode(rows(3, 7))


# --- selection -------------------------------------------------------------------------------------------------------


def stable_top_k(a, k, positive_only):
    """The definition: Python's stable sort by falling value, then the sign rule."""
    picked = []
    for row in a.tolist():
        order = sorted(range(len(row)), key=lambda j: -row[j])[:k]
        picked.append([j for j in order if not positive_only or row[j] > 0])
    return picked


def kept_indices(selection):
    return [i[m].tolist() for i, m in zip(selection.indices, selection.kept, strict=True)]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_selection_is_the_stable_top_k_even_where_nearly_all_entries_are_equal(data):
    n, m = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 40))
    k = data.draw(st.integers(1, m))
    levels = data.draw(st.integers(1, 4))
    positive_only = data.draw(st.booleans())
    seed = data.draw(st.integers(0, 2**31))
    a = torch.randint(-1, levels, (n, m), generator=torch.Generator().manual_seed(seed)).float()
    selection = select_top_k(a, k, positive_only=positive_only)
    assert kept_indices(selection) == stable_top_k(a, k, positive_only)
    assert torch.equal(selection.values, torch.where(selection.kept, a.gather(1, selection.indices), 0))
    assert all(len(set(row)) == k for row in selection.indices.tolist())


def test_ties_in_a_wide_row_go_to_the_lowest_indices():
    a = torch.ones(8, 4096)
    a[:, 4000] = 2
    selection = select_top_k(a, 32, positive_only=True)
    assert kept_indices(selection) == [[4000, *range(31)]] * 8


def test_zeros_picked_for_want_of_positives_are_not_selected():
    a = torch.tensor([[0.0, 3, 0, 0], [0, 0, 0, 0]])
    selection = select_top_k(a, 2, positive_only=True)
    assert kept_indices(selection) == [[1], []]
    assert torch.equal(selection.support(4), a > 0)
    assert torch.equal(selection.dense(4), a)


def test_relu_never_selects_a_negative_and_identity_fills_the_budget():
    x = rows(50, 6)
    relu, identity = (make_sae(k=16, activation=name) for name in ("relu", "identity"))
    assert (relu.encode(x).values >= 0).all()
    assert not relu.encode(x).kept.all()
    selected = identity.encode(x)
    assert selected.kept.all()
    assert (selected.values < 0).any()


def test_identity_takes_the_largest_and_not_the_largest_in_magnitude():
    selection = select_top_k(torch.tensor([[-9.0, 1, -0.5]]), 2, positive_only=False)
    assert kept_indices(selection) == [[1, 2]]


@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_a_nan_reaches_the_reconstruction(activation):
    sae = make_sae(activation=activation)
    with torch.no_grad():
        sae.b_e[3] = torch.nan
    assert sae(rows(2, 6)).isnan().all()


def test_the_gradient_of_a_slot_that_is_not_kept_goes_nowhere():
    a = torch.tensor([[0.0, 3, 0, 0]], requires_grad=True)
    select_top_k(a, 3, positive_only=True).values.sum().backward()
    assert torch.equal(a.grad, torch.tensor([[0.0, 1, 0, 0]]))


# --- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_the_sparse_decode_is_the_dense_one(activation, dtype):
    sae = make_sae(k=12, activation=activation, dtype=dtype)
    with torch.no_grad():
        sae.b_d.copy_(rows(1, 6, dtype=dtype)[0])
    x = rows(9, 6, dtype=dtype)
    selection = sae.select(sae.activate(sae.pre_activations(x)))
    torch.testing.assert_close(sae.decode(selection), selection.dense(20) @ sae.W_d + sae.b_d)


def test_decode_is_differentiable_in_values_directions_and_bias():
    sae = make_sae()
    selection = sae.encode(rows(5, 6))

    def decode(values, directions, bias):
        return weighted_rows(Selection(selection.indices, values, selection.kept), directions) + bias

    inputs = [t.detach().clone().requires_grad_() for t in (selection.values, sae.W_d, sae.b_d)]
    assert torch.autograd.gradcheck(decode, inputs)


def test_forward_is_the_formula_in_raw_units():
    sae = make_sae()
    mean, variance = rows(1, 6)[0].numpy(), np.arange(1.0, 7.0)
    sae.set_normalisation(mean, variance)
    with torch.no_grad():
        sae.b_e.fill_(0.1)
        sae.b_d.fill_(-0.2)
    x = rows(7, 6, seed=2) * 3
    s = np.sqrt(variance.mean())
    w_e, w_d = sae.W_e.detach().numpy(), sae.W_d.detach().numpy()
    a = np.maximum(((x.numpy() - mean) / s + 0.2) @ w_e.T + 0.1, 0)
    z = np.where(a >= np.sort(a, axis=1)[:, -4:-3], a, 0)
    np.testing.assert_allclose(sae(x).detach().numpy(), (z @ w_d - 0.2) * s + mean, rtol=1e-12)


# --- the decoder's norm ----------------------------------------------------------------------------------------------


def test_renormalising_keeps_directions_and_restores_unit_norm():
    sae = make_sae()
    before = sae.W_d.detach().clone()
    with torch.no_grad():
        sae.W_d.mul_(torch.linspace(0.1, 5, 20)[:, None])
    sae.renormalise_decoder_()
    torch.testing.assert_close(sae.W_d.detach(), before)


def test_the_projected_gradient_is_orthogonal_to_each_row_and_otherwise_untouched():
    sae = make_sae()
    sae(rows(30, 6)).square().sum().backward()
    full = sae.W_d.grad.clone()
    sae.remove_parallel_gradient_()
    removed = full - sae.W_d.grad
    assert removed.abs().max() > 0.1
    torch.testing.assert_close((sae.W_d.grad * sae.W_d).sum(dim=1), torch.zeros(20, dtype=torch.float64))
    # What went is parallel to the row: its part orthogonal to the row is nothing.
    along = (removed * sae.W_d).sum(dim=1, keepdim=True) * sae.W_d
    torch.testing.assert_close(removed, along.detach())


def test_projecting_without_a_gradient_does_nothing():
    sae = make_sae()
    sae.remove_parallel_gradient_()
    assert sae.W_d.grad is None
