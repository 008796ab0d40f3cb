import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.errors import SaeError
from sae.model import SAEConfig, TopKSAE, select_top_k
from sae.objectives import (
    ObjectiveConfig,
    auxiliary_loss,
    batch_active_mask,
    l1_l2,
    objective,
    off_support,
    residual_variance,
)

D, M, K, N = 5, 24, 3, 4
F64 = torch.float64
PARAMETERS = ("W_e", "b_e", "W_d", "b_d")


def generic_sae(activation="relu", seed=0, d_in=D, n_latents=M, k=K, dtype=F64):
    """An SAE with W_e ≠ W_d and biases ≠ 0, so that no gradient is right by symmetry."""
    g = torch.Generator().manual_seed(seed)
    config = SAEConfig(d_in=d_in, n_latents=n_latents, k=k, activation=activation)
    sae = TopKSAE(config, generator=g, dtype=dtype)
    with torch.no_grad():
        for name in ("W_e", "b_e", "b_d"):
            parameter = getattr(sae, name)
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=g, dtype=dtype))
    return sae


def batch(n=N, d=D, seed=1, dtype=F64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def forward(sae, x):
    a = sae.activate(sae.pre_activations(x))
    return a, sae.select(a)


def away_from_kinks(sae, x, margin=1e-3):
    """No pre-activation near 0 and no tie near the budget's boundary, so that finite differences mean something."""
    pi = sae.pre_activations(x)
    top = sae.activate(pi).sort(dim=1, descending=True).values
    return bool((pi.abs() > margin).all() and ((top[:, K - 1] - top[:, K]).abs() > margin).all())


def smooth_case(activation):
    """The first seeded case away from kinks in which some unit is batch-active and some is not."""
    for seed in range(100):
        sae, x = generic_sae(activation, seed), batch(seed=seed + 1000)
        a, selection = forward(sae, x)
        active = batch_active_mask(selection, M)
        positive = (a > 0).any(dim=0)
        if away_from_kinks(sae, x) and 0 < active.sum() < M and (positive & ~active).any():
            return sae, x
    raise AssertionError("no smooth case among the seeds")


def autograd(sae, value):
    grads = torch.autograd.grad(value, [getattr(sae, name) for name in PARAMETERS], allow_unused=True)
    return {
        name: torch.zeros_like(getattr(sae, name)) if grad is None else grad
        for name, grad in zip(PARAMETERS, grads, strict=True)
    }


def assert_agrees_with_finite_differences(sae, grads, function, h=1e-5, n_directions=6):
    """Compare derivatives of each parameter along random unit directions: a wrong entry shows in all of them."""
    g = torch.Generator().manual_seed(7)
    for name in PARAMETERS:
        parameter = getattr(sae, name)
        for _ in range(n_directions):
            step = torch.randn(parameter.shape, generator=g, dtype=F64)
            step *= h / step.norm()
            start = parameter.detach().clone()
            with torch.no_grad():
                parameter.copy_(start + step)
                above = function()
                parameter.copy_(start - step)
                below = function()
                parameter.copy_(start)
            expected = ((above - below) / (2 * h)).item()
            assert (grads[name] * step / h).sum().item() == pytest.approx(expected, abs=1e-8, rel=1e-6), name


def assert_gradients_close(got, expected, **tolerance):
    for name in PARAMETERS:
        torch.testing.assert_close(got[name], expected[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}")


NO_DEAD = torch.zeros(M, dtype=torch.bool)


def dead_mask(sae, x):
    """Call dead half of what this batch does not select, and one latent that it does."""
    _, selection = forward(sae, x)
    active = batch_active_mask(selection, M)
    dead = ~active & (torch.arange(M) % 2 == 0)
    dead[selection.indices[0, 0]] = True
    return dead


# --- the batch-active mask -------------------------------------------------------------------------------------------


def test_the_mask_is_the_union_of_the_rows_selections():
    a = torch.tensor([[5.0, 4, 1, 0.5, 0], [0.1, 3, 0.2, 0.3, 0]])
    selection = select_top_k(a, 2, positive_only=True)
    assert batch_active_mask(selection, 5).tolist() == [True, True, False, True, False]


def test_a_zero_picked_by_top_k_never_enters_the_mask():
    a = torch.tensor([[0.0, 2, 0, 0], [0, 0, 0, 0]])
    for k in range(1, 5):
        assert batch_active_mask(select_top_k(a, k, positive_only=True), 4).tolist() == [False, True, False, False]


def test_the_mask_is_not_the_units_with_nonzero_pre_activations():
    a, selection = forward(generic_sae(), batch())
    active = batch_active_mask(selection, M)
    assert active.sum() <= N * K < (a > 0).any(dim=0).sum()


def test_masks_of_parts_and_of_other_ranks_are_ored():
    sae, x = generic_sae(), batch(8)
    parts = [forward(sae, x[i : i + 2])[1] for i in range(0, 8, 2)]
    whole = batch_active_mask(forward(sae, x)[1], M)
    assert torch.equal(batch_active_mask(parts, M), whole)
    rank_mask = batch_active_mask(parts[2:], M)
    assert torch.equal(batch_active_mask([*parts[:2], rank_mask], M), whole)
    assert not torch.equal(batch_active_mask(parts[0], M), whole)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 12), m=st.integers(1, 30), seed=st.integers(0, 2**31), data=st.data())
def test_the_mask_is_any_of_the_supports_for_all_shapes(n, m, seed, data):
    k = data.draw(st.integers(1, m))
    a = torch.relu(torch.randn(n, m, generator=torch.Generator().manual_seed(seed)) - 0.5)
    selection = select_top_k(a, k, positive_only=True)
    assert torch.equal(batch_active_mask(selection, m), (selection.dense(m) > 0).any(dim=0))


@pytest.mark.parametrize(
    "parts",
    [[], [torch.zeros(M)], [torch.zeros(M + 1, dtype=torch.bool)]],
    ids=["none", "float", "long"],
)
def test_what_is_no_mask_is_refused(parts):
    with pytest.raises(SaeError, match="batch-active mask"):
        batch_active_mask(parts, M)


# --- the penalties' values -------------------------------------------------------------------------------------------


def naive_off_support(a, selected, active):
    per_row = [sum(abs(a[i][j]) for j in range(len(a[0])) if active[j] and j not in selected[i]) for i in range(len(a))]
    return sum(per_row) / len(a)


def naive_l1_l2(a, active, epsilon):
    ratios = []
    for row in a:
        on = [v for v, is_active in zip(row, active, strict=True) if is_active]
        ratios.append(sum(map(abs, on)) / (sum(v * v for v in on) + epsilon) ** 0.5)
    return sum(ratios) / len(a)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 6),
    m=st.integers(1, 15),
    relu=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_the_penalties_are_the_written_out_sums(n, m, relu, masked, seed, data):
    k = data.draw(st.integers(1, m))
    a = torch.randn(n, m, generator=torch.Generator().manual_seed(seed), dtype=F64)
    a = torch.relu(a) if relu else a
    selection = select_top_k(a, k, positive_only=relu)
    active = batch_active_mask(selection, m) if masked else None
    selected = [set(i[kept].tolist()) for i, kept in zip(selection.indices, selection.kept, strict=True)]
    on = active.tolist() if masked else [True] * m
    assert off_support(a, selection, active).item() == pytest.approx(
        naive_off_support(a.tolist(), selected, on), rel=1e-12, abs=1e-15
    )
    assert l1_l2(a, active, 1e-3).item() == pytest.approx(naive_l1_l2(a.tolist(), on, 1e-3), rel=1e-12)


def test_penalties_by_hand():
    a = torch.tensor([[3.0, 4, 1, 2], [0, 5, 0, 12]], dtype=F64)
    selection = select_top_k(a, 1, positive_only=True)  # latents 1 and 3
    active = batch_active_mask(selection, 4)
    assert off_support(a, selection, active).item() == (2 + 5) / 2
    assert off_support(a, selection, None).item() == (6 + 5) / 2
    expected = (6 / 20**0.5 + 17 / 13) / 2
    assert l1_l2(a, active, 1e-12).item() == pytest.approx(expected, rel=1e-10)


def test_l1_l2_is_the_root_of_the_number_of_equal_activations_whatever_their_scale():
    for scale in (1e-2, 1, 1e4):
        a = torch.zeros(1, M, dtype=F64)
        a[0, :9] = scale
        assert l1_l2(a, None, 1e-12).item() == pytest.approx(3, rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_a_row_without_activations_costs_nothing_and_has_no_gradient(dtype):
    a = torch.zeros(2, M, dtype=dtype, requires_grad=True)
    value = l1_l2(a, None, ObjectiveConfig().epsilon) + off_support(a, select_top_k(a, K, positive_only=True), None)
    value.backward()
    assert value.item() == 0
    assert not a.grad.any()


def test_the_default_epsilon_is_invisible_beside_normalised_rows():
    a, selection = forward(generic_sae(dtype=torch.float32), batch(dtype=torch.float32))
    active = batch_active_mask(selection, M)
    assert l1_l2(a, active, ObjectiveConfig().epsilon) == l1_l2(a, active, 1e-30)


# --- the penalties' gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["batch_active", "none"])
@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("penalty", ["off_support", "l1_l2"])
def test_each_penalty_agrees_with_finite_differences(penalty, activation, mask):
    sae, x = smooth_case(activation)

    def value():
        a, selection = forward(sae, x)
        active = batch_active_mask(selection, M) if mask == "batch_active" else None
        return off_support(a, selection, active) if penalty == "off_support" else l1_l2(a, active, 1e-8)

    got = autograd(sae, value())
    assert got["W_e"].abs().max() > 1e-3
    assert not got["W_d"].any()
    assert_agrees_with_finite_differences(sae, got, value)


@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_the_gradient_in_a_is_the_closed_form_for_the_fused_steps(activation):
    sae, x = smooth_case(activation)
    beta, gamma, epsilon = 0.7, 0.3, 1e-8
    a, selection = forward(sae, x)
    active = batch_active_mask(selection, M)
    leaf = a.detach().requires_grad_()
    value = beta * off_support(leaf, sae.select(leaf), active) + gamma * l1_l2(leaf, active, epsilon)
    (got,) = torch.autograd.grad(value, leaf)

    a = a.detach()
    on = a * active
    l1 = on.abs().sum(dim=1, keepdim=True)
    l2 = (on.square().sum(dim=1, keepdim=True) + epsilon).sqrt()
    c1 = beta / N + gamma / (N * l2)
    c2 = gamma * l1 / (N * l2**3)
    expected = active * (c1 * a.sign() - c2 * a) - beta / N * a.sign() * selection.support(M)
    torch.testing.assert_close(got, expected, atol=1e-14, rtol=1e-12)


def test_l1_l2_has_no_gradient_along_the_activations():
    # Scale invariance: Σ_j a_j ∂(l1/l2)/∂a_j = 0, for each row, as ε → 0.
    a, selection = forward(*smooth_case("identity"))
    leaf = a.detach().requires_grad_()
    (grad,) = torch.autograd.grad(l1_l2(leaf, batch_active_mask(selection, M), 1e-14), leaf)
    assert grad.abs().max() > 1e-2
    torch.testing.assert_close((leaf * grad).sum(dim=1), torch.zeros(N, dtype=F64), atol=1e-13, rtol=0)


@pytest.mark.parametrize(
    "strengths", [{"off_support": 0.5}, {"l1_l2": 0.5}, {"off_support": 0.5, "l1_l2": 0.5}], ids=str
)
def test_units_outside_the_mask_get_exactly_zero_gradient_from_the_penalties(strengths):
    sae, x = smooth_case("relu")
    terms = objective(sae, x, ObjectiveConfig(**strengths), None)
    silent = ~terms.active
    assert (terms.a[:, silent] > 0).any()  # else the mask would have nothing to hold back
    grads = autograd(sae, terms.loss - terms.mse)
    assert not grads["W_e"][silent].any()
    assert not grads["b_e"][silent].any()
    assert grads["W_e"][terms.active].any()


def test_without_the_mask_units_that_no_row_selects_are_pushed_down():
    sae, x = smooth_case("relu")
    terms = objective(sae, x, ObjectiveConfig(off_support=0.5, mask="none"), None)
    pushed = ~terms.active & (terms.a > 0).any(dim=0)
    assert (autograd(sae, terms.off_support)["b_e"][pushed] > 0).all()


def test_the_mask_itself_has_no_gradient():
    sae, x = smooth_case("relu")
    terms = objective(sae, x, ObjectiveConfig(off_support=1), None)
    assert terms.active.dtype == torch.bool
    fixed = objective(sae, x, ObjectiveConfig(off_support=1), None, active=terms.active.clone())
    assert_gradients_close(autograd(sae, terms.loss), autograd(sae, fixed.loss), atol=0, rtol=0)


# --- the whole loss --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["batch_active", "none"])
@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_the_whole_loss_agrees_with_finite_differences(activation, mask):
    sae, x = smooth_case(activation)
    dead = dead_mask(sae, x)
    config = ObjectiveConfig(off_support=0.2, l1_l2=0.1, aux=0.5, k_aux=2, mask=mask)
    residual = (x - objective(sae, x, config, dead).x_hat).detach()

    def value():
        # The objective with the auxiliary loss's residual held still, as its definition says.
        terms = objective(sae, x, dataclasses.replace(config, aux=0), None)
        return terms.loss + config.aux * auxiliary_loss(sae, terms.a, residual, dead, 2)

    got = autograd(sae, objective(sae, x, config, dead).loss)
    assert all(grad.abs().max() > 1e-3 for grad in got.values())
    assert_agrees_with_finite_differences(sae, got, value)


def test_the_loss_is_the_weighted_sum_of_its_terms():
    sae, x = smooth_case("relu")
    config = ObjectiveConfig(off_support=0.2, l1_l2=0.1, aux=0.5, k_aux=2)
    terms = objective(sae, x, config, dead_mask(sae, x))
    for term in (terms.mse, terms.aux, terms.off_support, terms.l1_l2):
        assert term > 0
    expected = terms.mse + 0.5 * terms.aux + 0.2 * terms.off_support + 0.1 * terms.l1_l2
    torch.testing.assert_close(terms.loss, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(terms.mse, (x - terms.x_hat).square().sum(dim=1).mean() / D, rtol=1e-14, atol=0)


def test_a_term_of_strength_zero_is_measured_and_has_no_graph():
    sae, x = smooth_case("relu")
    dead = dead_mask(sae, x)
    on = objective(sae, x, ObjectiveConfig(off_support=1, l1_l2=1, aux=1), dead)
    off = objective(sae, x, ObjectiveConfig(aux=0), dead)
    for name in ("off_support", "l1_l2", "aux"):
        assert torch.equal(getattr(off, name), getattr(on, name))
        assert not getattr(off, name).requires_grad
    assert torch.equal(off.loss, off.mse)


def test_nothing_records_a_graph_under_no_grad():
    sae, x = smooth_case("relu")
    with torch.no_grad():
        terms = objective(sae, x, ObjectiveConfig(off_support=1, l1_l2=1), dead_mask(sae, x))
    assert not terms.loss.requires_grad
    assert not terms.off_support.requires_grad


def test_float32_agrees_with_float64():
    config = ObjectiveConfig(off_support=0.2, l1_l2=0.1)
    wide_sae, x = smooth_case("relu")
    narrow_sae = generic_sae(dtype=torch.float32)
    narrow_sae.load_state_dict(wide_sae.state_dict())
    dead = dead_mask(wide_sae, x)
    wide, narrow = objective(wide_sae, x, config, dead), objective(narrow_sae, x.float(), config, dead)
    assert narrow.loss.dtype == torch.float32
    torch.testing.assert_close(narrow.loss.double(), wide.loss, rtol=1e-5, atol=0)
    narrow_grads = {name: grad.double() for name, grad in autograd(narrow_sae, narrow.loss).items()}
    assert_gradients_close(narrow_grads, autograd(wide_sae, wide.loss), rtol=1e-4, atol=1e-6)


def accumulated(sae, parts, config, dead, **of_the_global_batch):
    losses = [objective(sae, part, config, dead, **of_the_global_batch).loss for part in parts]
    return autograd(sae, sum(losses) / len(losses))


def test_micro_batches_with_the_global_mask_accumulate_to_the_gradient_of_the_batch():
    sae, x = generic_sae(), batch(12)
    dead = dead_mask(sae, x)
    config = ObjectiveConfig(off_support=0.4, l1_l2=0.3, aux=0.5)
    whole = objective(sae, x, config, dead)
    expected = autograd(sae, whole.loss)
    parts = x.split(4)

    active = batch_active_mask([forward(sae, part)[1] for part in parts], M)
    variance = residual_variance(x - whole.x_hat)
    got = accumulated(sae, parts, config, dead, active=active, variance=variance)
    assert_gradients_close(got, expected, atol=1e-14, rtol=1e-12)

    # Both globals matter: with the micro-batches' own, the gradient is another.
    for own in ({"variance": variance}, {"active": active}):
        other = accumulated(sae, parts, config, dead, **own)
        assert not torch.allclose(other["W_e"], expected["W_e"], rtol=1e-3)


@settings(max_examples=30, deadline=None)
@given(
    d=st.integers(1, 7),
    m=st.integers(1, 16),
    n=st.integers(1, 6),
    relu=st.booleans(),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_loss_and_gradients_are_finite_for_all_shapes(d, m, n, relu, seed, data):
    k = data.draw(st.integers(1, m))
    sae = generic_sae("relu" if relu else "identity", seed, d, m, k)
    dead = torch.rand(m, generator=torch.Generator().manual_seed(seed)) < 0.4
    terms = objective(sae, batch(n, d, seed), ObjectiveConfig(off_support=0.1, l1_l2=0.1), dead)
    assert terms.loss.isfinite()
    assert all(grad.isfinite().all() for grad in autograd(sae, terms.loss).values())
    assert terms.x_hat.shape == (n, d)
    assert terms.a.shape == (n, m)


# --- the auxiliary loss ----------------------------------------------------------------------------------------------


def aux_case():
    sae, x = smooth_case("relu")
    dead = dead_mask(sae, x)
    terms = objective(sae, x, ObjectiveConfig(aux=1, k_aux=3), dead)
    return sae, x, dead, terms


def test_the_auxiliary_loss_is_the_error_over_the_residuals_variance():
    sae, x, dead, terms = aux_case()
    residual = (x - terms.x_hat).detach()
    z = torch.zeros(N, M, dtype=F64)
    for i in range(N):
        largest = sorted(dead.nonzero().squeeze(1).tolist(), key=lambda j: -terms.a[i, j].item())[:3]
        z[i, largest] = terms.a[i, largest].detach()
    error = residual - z @ sae.W_d.detach()  # no bias
    variance = residual.var(dim=0, correction=0).sum()
    torch.testing.assert_close(terms.aux.detach(), error.square().sum(dim=1).mean() / variance, rtol=1e-12, atol=0)


def test_the_auxiliary_loss_trains_encoder_and_decoder_of_dead_latents_and_no_others():
    sae, _, dead, terms = aux_case()
    grads = autograd(sae, terms.aux)
    used = dead & (terms.a > 0).any(dim=0)
    assert used.sum() >= 2
    for name in ("W_e", "b_e", "W_d"):
        assert not grads[name][~dead].any()
    chosen = torch.zeros(M, dtype=torch.bool)
    dead_latents = dead.nonzero().squeeze(1)
    chosen[dead_latents] = batch_active_mask(select_top_k(terms.a[:, dead], 3, positive_only=True), len(dead_latents))
    assert grads["W_e"][chosen].abs().sum(dim=1).min() > 0
    assert grads["W_d"][chosen].abs().sum(dim=1).min() > 0


def test_the_residual_is_detached():
    # Were it not, the auxiliary loss would reach the living decoder rows, and b_d through x̂.
    sae, x, dead, terms = aux_case()
    a, selection = forward(sae, x)
    residual = x - sae.decode(selection)
    assert residual.requires_grad
    attached = autograd(sae, auxiliary_loss(sae, a, residual, dead, 3))
    held_still = autograd(sae, auxiliary_loss(sae, forward(sae, x)[0], residual.detach(), dead, 3))
    assert_gradients_close(attached, held_still, atol=0, rtol=0)
    assert_gradients_close(autograd(sae, terms.aux), held_still, atol=0, rtol=0)


def test_the_auxiliary_loss_does_not_depend_on_the_scale_of_the_residual_and_its_code():
    sae, x, dead, terms = aux_case()
    residual = (x - terms.x_hat).detach()
    value, scaled = (auxiliary_loss(sae, s * terms.a, s * residual, dead, 3) for s in (1, 100))
    torch.testing.assert_close(scaled, value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dead", [None, NO_DEAD], ids=["none", "empty-mask"])
def test_without_dead_latents_the_auxiliary_loss_is_zero(dead):
    sae, x = smooth_case("relu")
    terms = objective(sae, x, ObjectiveConfig(aux=1), dead)
    assert terms.aux == 0
    plain = objective(sae, x, ObjectiveConfig(aux=0), None)
    assert_gradients_close(autograd(sae, terms.loss), autograd(sae, plain.loss), atol=0, rtol=0)


def test_one_row_has_no_variance_and_no_auxiliary_loss():
    sae, x = smooth_case("relu")
    terms = objective(sae, x[:1], ObjectiveConfig(aux=1), dead_mask(sae, x))
    assert terms.aux == 0
    assert terms.loss.isfinite()


def test_k_aux_is_half_the_input_width_unless_set():
    sae, x, dead, _ = aux_case()
    assert dead.sum() > D // 2
    default, set_to_2, set_to_1 = (
        objective(sae, x, ObjectiveConfig(aux=1, k_aux=k_aux), dead).aux for k_aux in (None, D // 2, 1)
    )
    assert default == set_to_2
    assert default != set_to_1


def test_a_nan_in_the_batch_reaches_the_loss():
    sae, x = smooth_case("relu")
    x[0, 0] = torch.nan
    assert objective(sae, x, ObjectiveConfig(), dead_mask(sae, batch())).loss.isnan()


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"off_support": -0.1},
        {"l1_l2": float("nan")},
        {"aux": float("inf")},
        {"epsilon": 0.0},
        {"k_aux": 0},
        {"mask": "batch"},
    ],
    ids=str,
)
def test_a_bad_configuration_is_refused_by_name(change):
    (name,) = change
    with pytest.raises(SaeError, match=f"^{name} must .*found"):
        ObjectiveConfig(**change)


def test_inputs_of_another_shape_are_refused():
    sae, x = smooth_case("relu")
    with pytest.raises(SaeError, match="0 rows"):
        objective(sae, x[:0], ObjectiveConfig(), None)
    with pytest.raises(SaeError, match="dead must be a bool tensor"):
        objective(sae, x, ObjectiveConfig(), torch.zeros(M))
    with pytest.raises(SaeError, match="active must be a bool tensor"):
        objective(sae, x, ObjectiveConfig(), None, active=torch.zeros(3, dtype=torch.bool))
