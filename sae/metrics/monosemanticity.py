"""Monosemanticity: how alike the images are that fire a latent, exactly, without an N×N matrix.

Pach et al., "Sparse Autoencoders Learn Monosemantic Features in Vision-Language Models", 2025 (arXiv 2504.02821),
define the score of a latent as the mean cosine e_i·e_j over pairs of images i ≠ j, weighted by the product of
the latent's min-max-scaled activations. With u = Σa_i, v = Σa_i² and w = Σa_i e_i it is

    MS = (‖w‖² − v) / (u² − v)

which costs O(N·k·D) on sparse codes. The scale of the activations cancels, so that only their minimum m has to be
taken off: w −= mΣe, v −= 2mu − Nm², u −= Nm. It is 0 unless a latent fires on every image or, with activation
"identity", below zero.
"""

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from sae.errors import SaeError
from sae.metrics.codes import SparseCodes

ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class Monosemanticity:
    """The result of `monosemanticity`.

    Attributes
    ----------
    scores : ndarray, float64, (M,)
        MS of each latent, between −1 and 1; NaN where it has none.
    n_without_score : int
        Latents that are above their minimum on fewer than 2 images (the dead are among them), or whose weight
        lies on one image to within float64's rounding.
    mean, median : float
        Over the latents that have a score; NaN if none has.
    floor : float
        Mean cosine over all pairs of images: what a latent that fires at random would score. NaN for one image.
    """

    scores: NDArray[np.float64]
    n_without_score: int
    mean: float
    median: float
    floor: float


def monosemanticity(codes: SparseCodes, embeddings: NDArray, *, max_sum_bytes: int = 256 * 1024**2) -> Monosemanticity:
    """Score each latent by the mean activation-weighted cosine of the images that fire it.

    Parameters
    ----------
    codes : SparseCodes, (N, M)
        One row an image.
    embeddings : ndarray, (N, D)
        Of the same images in the same order, from any encoder; scaled to unit norm here. May be a memory map: it
        is read in blocks of rows.
    max_sum_bytes : int
        Bound on the float64 sums w, (M, D); where they would exceed it, latents are done in turns, each of which
        reads the embeddings again.

    Returns
    -------
    Monosemanticity

    Raises
    ------
    SaeError
        If the rows do not correspond, or an embedding is zero or not finite.
    """
    n, m = codes.n_rows, codes.n_latents
    if embeddings.ndim != 2 or len(embeddings) != n or n == 0:
        raise SaeError(
            f"Embeddings must have shape ({n}, D) with at least one row, found {embeddings.shape}. "
            "Pass one embedding for each row of the codes, in their order."
        )
    a = sp.csr_array(codes.matrix, dtype=np.float64)
    u = a.sum(axis=0)
    v = a.power(2).sum(axis=0)
    least = a.min(axis=0).toarray().ravel()  # over all rows: an entry that is not stored is a 0

    sum_e = np.zeros(embeddings.shape[1])
    norm_w_sq = np.empty(m)
    step = max(1, max_sum_bytes // (8 * embeddings.shape[1]))
    for lo in range(0, m, step):
        w, sum_e = _embedding_sums(a[:, lo : lo + step], least[lo : lo + step], embeddings)
        norm_w_sq[lo : lo + step] = np.square(w).sum(axis=1)
    v += least * (n * least - 2 * u)
    u -= n * least

    # u² − v is the weight of all pairs. Where it is lost in rounding, one image holds all of the weight.
    has_score = (_n_above(a, least) >= 2) & (u**2 - v > 1e-12 * u**2)
    scores = np.full(m, np.nan)
    np.divide(norm_w_sq - v, u**2 - v, out=scores, where=has_score)
    scored = scores[has_score]
    return Monosemanticity(
        scores=scores,
        n_without_score=m - len(scored),
        mean=float(scored.mean()) if len(scored) else np.nan,
        median=float(np.median(scored)) if len(scored) else np.nan,
        floor=float((sum_e @ sum_e - n) / (n**2 - n)) if n > 1 else np.nan,
    )


def _embedding_sums(
    a: sp.csr_array, least: NDArray[np.float64], embeddings: NDArray
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """w_j = Σ_i (a_ij − m_j) e_i, a latent a row, and Σ_i e_i, over embeddings scaled to unit norm."""
    w = np.zeros((len(least), embeddings.shape[1]))
    sum_e = np.zeros(embeddings.shape[1])
    for lo in range(0, len(embeddings), ROWS_AT_ONCE):
        e = np.asarray(embeddings[lo : lo + ROWS_AT_ONCE], dtype=np.float64)
        norms = np.linalg.norm(e, axis=1, keepdims=True)
        usable = (np.isfinite(norms) & (norms > 0)).ravel()
        if not usable.all():
            row = int(np.argmin(usable))
            raise SaeError(
                f"Embeddings must be finite and not zero, found norm {norms[row, 0]:g} in row {lo + row}. "
                "Extract the embeddings again or leave the image out."
            )
        e = e / norms
        w += a[lo : lo + ROWS_AT_ONCE].T @ e
        sum_e += e.sum(axis=0)
    return w - least[:, None] * sum_e, sum_e


def _n_above(a: sp.csr_array, least: NDArray[np.float64]) -> NDArray[np.int64]:
    """Count the images on which each latent is above its minimum.

    Counted on the activations, since u and v, once the minimum is off, are rounding noise for a constant latent.
    """
    n_rows, n_latents = len(a.indptr) - 1, len(least)
    n_stored = np.bincount(a.indices, minlength=n_latents)
    n_above = np.bincount(a.indices[a.data > least[a.indices]], minlength=n_latents)
    return n_above + np.where(least < 0, n_rows - n_stored, 0)
