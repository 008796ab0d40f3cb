"""The training objective in plain autograd: short, and the reference that the fused steps are tested against.

::

    L = mse + α·aux + β·off_support + γ·l1_l2

Shapes: N rows, D input width, M latents, S(i) the latents selected for row i, A the batch-active mask. All
terms are means over rows, so that the gradients of equal micro-batches, each given the global mask (and the
residual's global variance), average to the gradient of the whole batch.

Source of the two regularizers: Jacquier, Vakalopoulou, Hosseini, "Beyond the Hard Budget: Sparsity
Regularizers for More Interpretable Top-k Sparse Autoencoders", arXiv 2606.27321. The paper's strength
multiplies a sum over the batch beside a mean of squared errors: λ_paper = λ_ours · D / N.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from sae.errors import SaeError
from sae.model import Selection, TopKSAE, select_top_k, weighted_rows

Mask = Literal["batch_active", "none"]


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The strengths of the terms beside the reconstruction error.

    Attributes
    ----------
    off_support : float
        β, the strength of the off-support penalty; 0 is the plain Top-k SAE.
    l1_l2 : float
        γ, the strength of the l1/l2 penalty. Both penalties may be on together.
    aux : float
        α, the strength of the auxiliary loss; 1/32 is Gao et al.'s.
    k_aux : int or None
        How many dead latents reconstruct the residual; None is D // 2, Gao et al.'s rule.
    epsilon : float
        Added to ‖a‖₂² under the root of l1/l2, so that a row without activations has the value 0 and the
        gradient 0. Normalised rows have ‖x̃‖² ≈ D, beside which 1e-8 is below float32's resolution.
    mask : {"batch_active", "none"}
        The units that the penalties see: those selected somewhere in the batch, or all (the paper's
        ablation).

    Raises
    ------
    SaeError
        If a value is out of its range.
    """

    off_support: float = 0.0
    l1_l2: float = 0.0
    aux: float = 1 / 32
    k_aux: int | None = None
    epsilon: float = 1e-8
    mask: Mask = "batch_active"

    def __post_init__(self) -> None:
        for name in ("off_support", "l1_l2", "aux"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise SaeError(f"{name} must be finite and ≥ 0, found {value!r}. Use 0 to turn the term off.")
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise SaeError(f"epsilon must be finite and > 0, found {self.epsilon!r}. Leave it out for 1e-8.")
        if self.k_aux is not None and self.k_aux < 1:
            raise SaeError(f"k_aux must be ≥ 1, found {self.k_aux!r}. Leave it out for D // 2.")
        if self.mask not in get_args(Mask):
            raise SaeError(
                f"mask must be one of {', '.join(get_args(Mask))}, found {self.mask!r}. "
                "Correct it in the configuration."
            )


@dataclass(frozen=True)
class Terms:
    """What one evaluation of the objective gives.

    Attributes
    ----------
    loss : Tensor, scalar
        The weighted sum; the only one to call `backward` on.
    mse, aux, off_support, l1_l2 : Tensor, scalars
        The terms, unweighted. A term of strength 0 is still measured, without a graph.
    selection : Selection
        S, of the rows given.
    active : Tensor, bool, (M,)
        A: the mask passed in, else the union of S over the rows given.
    x_hat : Tensor, (N, D)
        The reconstruction, in normalised units.
    a : Tensor, (N, M)
        The activations before selection.
    """

    loss: Tensor
    mse: Tensor
    aux: Tensor
    off_support: Tensor
    l1_l2: Tensor
    selection: Selection
    active: Tensor
    x_hat: Tensor
    a: Tensor


def batch_active_mask(parts: Selection | Iterable[Selection | Tensor], n_latents: int) -> Tensor:
    """A = ∪_i S(i): the latents selected for at least one row. A constant in the backward pass.

    Slots that are not kept do not enter: a zero picked because a row has fewer than k positive entries is not
    selected. (A mask of the units with π ≠ 0, a tempting substitute, is nearly all of them, and not the
    method.)

    Parameters
    ----------
    parts : Selection, or iterable of Selection and of bool Tensor (M,)
        The global batch: micro-batches, or masks that other ranks or earlier micro-batches made.
    n_latents : int
        M.

    Returns
    -------
    Tensor, bool, (M,)
    """
    parts = [parts] if isinstance(parts, Selection) else list(parts)
    if not parts:
        raise SaeError("A batch-active mask needs at least one selection, found none. Pass the batch's selections.")
    masks: list[Tensor] = []
    for part in parts:
        if isinstance(part, Selection):
            mask = torch.zeros(n_latents, dtype=torch.bool, device=part.indices.device)
            mask[part.indices[part.kept]] = True
        else:
            mask = part
            _check_mask("A batch-active mask", mask, n_latents)
        masks.append(mask)
    return torch.stack(masks).any(dim=0)


def off_support(a: Tensor, selection: Selection, active: Tensor | None) -> Tensor:
    """mean_i Σ_{j ∈ A − S(i)} |a_ij|: what a row puts on latents that only other rows of the batch selected.

    Parameters
    ----------
    a : Tensor, (N, M)
        Activations before selection.
    selection : Selection
        S, of the same rows.
    active : Tensor, bool, (M,), or None
        A; None is the ablation without a mask: all units.

    Returns
    -------
    Tensor, scalar
    """
    off = ~selection.support(a.shape[1])
    if active is not None:
        off &= active
    return torch.where(off, a.abs(), 0).sum(dim=1).mean()


def l1_l2(a: Tensor, active: Tensor | None, epsilon: float) -> Tensor:
    """mean_i ‖a_i,A‖₁ / sqrt(‖a_i,A‖₂² + ε): the square root of the number of effective latents, scale-free.

    Parameters
    ----------
    a : Tensor, (N, M)
        Activations before selection.
    active : Tensor, bool, (M,), or None
        A; None is the ablation without a mask: all units.
    epsilon : float
        ε > 0.

    Returns
    -------
    Tensor, scalar
    """
    if active is not None:
        a = torch.where(active, a, 0)
    l1 = a.abs().sum(dim=1)
    l2 = (a.square().sum(dim=1) + epsilon).sqrt()
    return (l1 / l2).mean()


def residual_variance(residual: Tensor) -> Tensor:
    """mean_i ‖e_i − ē‖², a scalar, of residuals (N, D): the total variance over the features."""
    return (residual - residual.mean(dim=0)).square().sum(dim=1).mean()


def auxiliary_loss(
    sae: TopKSAE,
    a: Tensor,
    residual: Tensor,
    dead: Tensor,
    k_aux: int,
    variance: Tensor | None = None,
) -> Tensor:
    """mean_i ‖e_i − ê_i‖² / variance(e), with ê from the k_aux largest dead latents of each row.

    The decoder's bias is left out. The residual e is a constant, and only dead latents enter ê: living ones get
    no gradient, while dead ones get it in their encoder and in their decoder (where they are positive: relu
    passes none below zero).

    Parameters
    ----------
    sae : TopKSAE
        Its decoder and activation are used.
    a : Tensor, (N, M)
        Activations before selection.
    residual : Tensor, (N, D)
        x̃ − x̂; detached here.
    dead : Tensor, bool, (M,)
        The latents that count as dead.
    k_aux : int
        The budget of the auxiliary code.
    variance : Tensor, scalar, optional
        The residual's variance over the global batch (`residual_variance`), where these rows are a part of
        it; else that of the rows given.

    Returns
    -------
    Tensor, scalar
        0 without dead latents, and without variance (one row, or a perfect reconstruction).

    References
    ----------
    Gao et al., "Scaling and evaluating sparse autoencoders", 2024, arXiv 2406.04093, section 2.4.
    """
    residual = residual.detach()
    dead_latents = dead.nonzero().squeeze(1)
    if variance is None:
        variance = residual_variance(residual)
    if len(dead_latents) == 0 or not variance > 0:
        # A NaN residual has no variance > 0 either; the reconstruction error carries it to the loss.
        return residual.new_zeros(())
    selection = select_top_k(
        a[:, dead_latents],
        min(k_aux, len(dead_latents)),
        positive_only=sae.config.activation == "relu",
    )
    e_hat = weighted_rows(selection, sae.W_d[dead_latents])
    return (residual - e_hat).square().sum(dim=1).mean() / variance.detach()


def objective(
    sae: TopKSAE,
    x_tilde: Tensor,
    config: ObjectiveConfig,
    dead: Tensor | None,
    active: Tensor | None = None,
    variance: Tensor | None = None,
) -> Terms:
    """Evaluate the objective on a batch.

    Parameters
    ----------
    sae : TopKSAE
        The model; gradients reach its four parameters through `Terms.loss`.
    x_tilde : Tensor, (N, D)
        Normalised activations, N ≥ 1.
    config : ObjectiveConfig
        The strengths.
    dead : Tensor, bool, (M,), or None
        The latents that count as dead; None is none of them.
    active : Tensor, bool, (M,), optional
        The batch-active mask of the global batch, where these rows are a part of it (gradient accumulation,
        several ranks); it must contain these rows' own selections. Without it, the mask of the rows given.
    variance : Tensor, scalar, optional
        The residual's variance over the global batch, likewise; see `auxiliary_loss`.

    Returns
    -------
    Terms

    Raises
    ------
    SaeError
        If an input has another shape or type than said above.
    """
    n_latents = sae.config.n_latents
    if len(x_tilde) == 0:
        raise SaeError("The objective is a mean over rows, found a batch of 0 rows. Pass at least one.")
    for name, mask in (("dead", dead), ("active", active)):
        if mask is not None:
            _check_mask(name, mask, n_latents)

    a = sae.activate(sae.pre_activations(x_tilde))
    selection = sae.select(a)
    x_hat = sae.decode(selection)
    if active is None:
        active = batch_active_mask(selection, n_latents)
    penalised = active if config.mask == "batch_active" else None

    mse = (x_tilde - x_hat).square().mean()
    with _graph_if(config.off_support):
        off_support_term = off_support(a, selection, penalised)
    with _graph_if(config.l1_l2):
        l1_l2_term = l1_l2(a, penalised, config.epsilon)
    with _graph_if(config.aux):
        k_aux = max(1, sae.config.d_in // 2) if config.k_aux is None else config.k_aux
        aux = mse.new_zeros(()) if dead is None else auxiliary_loss(sae, a, x_tilde - x_hat, dead, k_aux, variance)
    loss = mse
    for strength, term in (
        (config.aux, aux),
        (config.off_support, off_support_term),
        (config.l1_l2, l1_l2_term),
    ):
        if strength:
            loss = loss + strength * term
    return Terms(loss, mse, aux, off_support_term, l1_l2_term, selection, active, x_hat, a)


def _graph_if(strength: float) -> torch.set_grad_enabled:
    """Record a graph for a term only where its strength is not 0, and where the caller records one at all."""
    return torch.set_grad_enabled(strength != 0 and torch.is_grad_enabled())


def _check_mask(name: str, mask: Tensor, n_latents: int) -> None:
    if mask.dtype != torch.bool or mask.shape != (n_latents,):
        raise SaeError(
            f"{name} must be a bool tensor of shape ({n_latents},), found {mask.dtype} of shape "
            f"{tuple(mask.shape)}. Pass a mask over the latents."
        )
