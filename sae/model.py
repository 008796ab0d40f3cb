"""The Top-k sparse autoencoder: normalise, encode, select, decode.

Shapes: N rows, D input width, M latents, k the budget. The decoder is stored as (M, D), a latent a row, so
that decoding a selection gathers k contiguous rows instead of k strided columns; the mathematics' column j is
row j.

A code is kept as a `Selection` of k slots a row and never as a dense (N, M) matrix: at M = 8192 and k = 32
the dense code is 256 times larger.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn import functional as F

from sae.errors import SaeError

Activation = Literal["relu", "identity"]


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """The shape of a Top-k sparse autoencoder.

    Attributes
    ----------
    d_in : int
        D, the width of an activation row.
    n_latents : int
        M, the number of latents in the dictionary.
    k : int
        The budget: at most this many latents are selected for a row; 1 ≤ k ≤ n_latents.
    activation : {"relu", "identity"}
        What turns pre-activations into activations. With "relu" (the paper's) only positive entries can be
        selected; with "identity" the k largest entries are, whatever their sign.

    Raises
    ------
    SaeError
        If a value is out of its range.
    """

    d_in: int
    n_latents: int
    k: int
    activation: Activation = "relu"

    def __post_init__(self) -> None:
        for name in ("d_in", "n_latents", "k"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise SaeError(f"{name} must be an integer ≥ 1, found {value!r}. Correct it in the configuration.")
        if self.k > self.n_latents:
            raise SaeError(
                f"k must be at most n_latents = {self.n_latents}, found k = {self.k}. "
                "Lower k or enlarge the dictionary."
            )
        if self.activation not in get_args(Activation):
            raise SaeError(
                f"activation must be one of {', '.join(get_args(Activation))}, found {self.activation!r}. "
                "Correct it in the configuration."
            )


@dataclass(frozen=True)
class Selection:
    """The selected latents of N rows: a sparse code in k slots a row.

    Attributes
    ----------
    indices : Tensor, int64, (N, k)
        Latent indices, by falling activation, ties by rising index. They are distinct within a row. In a slot
        that is not kept the index is in range and means nothing.
    values : Tensor, (N, k)
        Activations, differentiable; exactly 0 in a slot that is not kept.
    kept : Tensor, bool, (N, k)
        Whether the slot is selected. False where a row has fewer than k positive activations.
    """

    indices: Tensor
    values: Tensor
    kept: Tensor

    def support(self, n_latents: int) -> Tensor:
        """S(i) as a mask, bool, (N, n_latents): True where the latent is selected for the row."""
        mask = torch.zeros(len(self.indices), n_latents, dtype=torch.bool, device=self.indices.device)
        # Indices are distinct within a row, so no slot that is not kept can overwrite one that is.
        return mask.scatter_(1, self.indices, self.kept)

    def dense(self, n_latents: int) -> Tensor:
        """The code z, (N, n_latents), zero outside the selection; differentiable in `values`."""
        return self.values.new_zeros(len(self.indices), n_latents).scatter(1, self.indices, self.values)


def select_top_k(a: Tensor, k: int, *, positive_only: bool) -> Selection:
    """Select the k largest entries of each row, ties to the lower index, the same on every device.

    `torch.topk` promises no order among equal entries. Rows in which a tie reaches the selection are redone
    with a stable sort; there are few, so that the exact order costs little more than `topk` alone.

    Parameters
    ----------
    a : Tensor, (N, M)
        Activations.
    k : int
        The budget, at most M.
    positive_only : bool
        Leave entries ≤ 0 unselected. NaN counts as selected, so that it reaches the loss and is noticed.

    Returns
    -------
    Selection
        With `values` differentiable in `a`.
    """
    with torch.no_grad():
        # One entry more than the budget shows whether the budget ends inside a tie.
        top = torch.topk(a, min(k + 1, a.shape[1]), dim=1)
        tied = top.values[:, 1:] == top.values[:, :-1]
        if positive_only:
            # Ties at zero are common (a row with fewer than k positive entries) and select nothing.
            tied &= top.values[:, 1:] > 0
        indices = top.indices[:, :k].contiguous()
        rows = tied.any(dim=1).nonzero().squeeze(1)
        if len(rows):
            indices[rows] = a[rows].sort(dim=1, descending=True, stable=True).indices[:, :k]
    values = a.gather(1, indices)
    if not positive_only:
        return Selection(indices, values, torch.ones_like(indices, dtype=torch.bool))
    kept = ~(values.detach() <= 0)
    return Selection(indices, torch.where(kept, values, 0), kept)


def weighted_rows(selection: Selection, rows: Tensor) -> Tensor:
    """Σ_slots value · rows[index], (N, D): a decode without bias, differentiable in the values and in `rows`.

    Never materialises the (N, k, D) gather, which is 400 MB at N = 4096, k = 32, D = 768.
    """
    return F.embedding_bag(selection.indices, rows, per_sample_weights=selection.values, mode="sum")


class TopKSAE(nn.Module):
    """A Top-k sparse autoencoder on normalised activations.

    ::

        x̃ = (x − μ_in) / s_in        π = W_e (x̃ − b_d) + b_e        a = relu(π)
        z = the k largest a > 0      x̂ = W_dᵀ z + b_d

    Rows of W_d are random unit vectors at first, W_e = W_d, and both biases are 0.

    Parameters
    ----------
    config : SAEConfig
        The shape.
    generator : torch.Generator
        Where the initial decoder is drawn from. The same state gives the same directions in every dtype.
    dtype : torch.dtype
        Of the parameters and buffers; float32 or float64.

    Attributes
    ----------
    W_e : Parameter, (M, D)
        Encoder; row j belongs to latent j.
    b_e : Parameter, (M,)
        Encoder bias.
    W_d : Parameter, (M, D)
        Decoder; row j is latent j's direction and has unit norm.
    b_d : Parameter, (D,)
        Decoder bias, also subtracted before encoding.
    mu_in : buffer, (D,)
        Mean of the raw activations; 0 until `set_normalisation`.
    s_in : buffer, scalar
        Scale of the raw activations; 1 until `set_normalisation`.

    References
    ----------
    Gao et al., "Scaling and evaluating sparse autoencoders", 2024, arXiv 2406.04093.
    """

    mu_in: Tensor
    s_in: Tensor

    def __init__(self, config: SAEConfig, *, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        m, d = config.n_latents, config.d_in
        # Drawn in float32 whatever the dtype: normal draws of another dtype are other numbers.
        directions = torch.randn(m, d, generator=generator, device=generator.device).to(dtype)
        directions = F.normalize(directions, dim=1)
        self.W_e = nn.Parameter(directions.clone())
        self.b_e = nn.Parameter(directions.new_zeros(m))
        self.W_d = nn.Parameter(directions)
        self.b_d = nn.Parameter(directions.new_zeros(d))
        self.register_buffer("mu_in", directions.new_zeros(d))
        self.register_buffer("s_in", directions.new_ones(()))

    @torch.no_grad()
    def set_normalisation(self, mean: ArrayLike, variance: ArrayLike) -> None:
        """Take the normalisation from a store's statistics, so that E‖x̃‖² = D.

        Parameters
        ----------
        mean, variance : array-like, (D,)
            Mean and (population) variance of each feature of the raw activations.

        Raises
        ------
        SaeError
            If the statistics have another shape, are not finite, or have no variance at all.
        """
        mu, var = (np.array(stat, dtype=np.float64) for stat in (mean, variance))
        d = self.config.d_in
        for name, stat in (("mean", mu), ("variance", var)):
            if stat.shape != (d,):
                raise SaeError(
                    f"The store's {name} must have shape ({d},), found {stat.shape}. "
                    "Use the statistics of the layer that the SAE is trained on."
                )
            if not np.isfinite(stat).all():
                raise SaeError(
                    f"The store's {name} must be finite, found {int((~np.isfinite(stat)).sum())} features "
                    "that are not. Extract the store again: its activations hold NaN or infinity."
                )
        if (var < 0).any() or not var.sum() > 0:
            raise SaeError(
                f"The store's variances must be ≥ 0 with a sum > 0, found a sum of {var.sum():g} and a least "
                f"of {var.min():g}. All rows are equal or the statistics are corrupt: run 'stores verify'."
            )
        self.mu_in.copy_(torch.from_numpy(mu))
        self.s_in.fill_(float(np.sqrt(var.sum() / d)))

    def normalise(self, x: Tensor) -> Tensor:
        """x̃ = (x − μ_in) / s_in, (N, D), from raw activations of any float dtype, in the dtype of the SAE."""
        self._check_width(x)
        return (x.to(self.mu_in.dtype) - self.mu_in) / self.s_in

    def denormalise(self, x_tilde: Tensor) -> Tensor:
        """Return normalised activations, (N, D), to raw units: the inverse of `normalise`."""
        return x_tilde * self.s_in + self.mu_in

    def pre_activations(self, x_tilde: Tensor) -> Tensor:
        """π = W_e (x̃ − b_d) + b_e, (N, M), from normalised activations (N, D)."""
        self._check_width(x_tilde)
        return F.linear(x_tilde - self.b_d, self.W_e, self.b_e)

    def activate(self, pi: Tensor) -> Tensor:
        """a, (N, M), from pre-activations: relu, or the same tensor with activation "identity"."""
        return torch.relu(pi) if self.config.activation == "relu" else pi

    def select(self, a: Tensor) -> Selection:
        """Apply the budget to activations (N, M); see `select_top_k`."""
        return select_top_k(a, self.config.k, positive_only=self.config.activation == "relu")

    def decode(self, selection: Selection) -> Tensor:
        """x̂ = W_dᵀ z + b_d, (N, D), in normalised units."""
        return weighted_rows(selection, self.W_d) + self.b_d

    def encode(self, x: Tensor) -> Selection:
        """Code raw activations (N, D)."""
        return self.select(self.activate(self.pre_activations(self.normalise(x))))

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct raw activations (N, D) in raw units."""
        return self.denormalise(self.decode(self.encode(x)))

    @torch.no_grad()
    def renormalise_decoder_(self) -> None:
        """Give each decoder row unit norm, in place; call it after each step."""
        self.W_d.copy_(F.normalize(self.W_d, dim=1))

    @torch.no_grad()
    def remove_parallel_gradient_(self) -> None:
        """Project the decoder's gradient orthogonal to its rows, in place; call it before each step.

        The parallel part would only change a norm that `renormalise_decoder_` resets, yet Adam would count it
        in its second moment (Bricken et al., "Towards Monosemanticity", 2023).
        """
        if self.W_d.grad is None:
            return
        direction = F.normalize(self.W_d, dim=1)
        parallel = (self.W_d.grad * direction).sum(dim=1, keepdim=True)
        self.W_d.grad.addcmul_(parallel, direction, value=-1)

    def _check_width(self, x: Tensor) -> None:
        if x.ndim != 2 or x.shape[1] != self.config.d_in:
            raise SaeError(
                f"The SAE reads rows of shape (N, {self.config.d_in}), found {tuple(x.shape)}. "
                "Use the layer that it was trained on, one token a row."
            )
