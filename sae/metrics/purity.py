"""Purity: the share of a latent's firing images that have the label which fires it most often.

From the evaluation of "Beyond the Hard Budget" (arXiv 2606.27321). It needs labels, which monosemanticity does not,
and rewards latents no coarser than a class: a pure latent for "wheel" scores low on ImageNet's labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from sae.errors import SaeError
from sae.metrics.codes import SparseCodes

UNLABELLED = -1


@dataclass(frozen=True)
class Purity:
    """The result of `purity`.

    Attributes
    ----------
    label : ndarray, int64, (M,)
        c*, the label on most of the images that fire a latent, the lowest of them in a tie; −1 if it is not active.
    binary : ndarray, float64, (M,)
        Share of a latent's firing images that have the label c*; NaN if it is not active.
    weighted : ndarray, float64, (M,)
        Share of its total activation that lies on images of the label c*; NaN if it is not active.
    mean_binary, mean_weighted : float
        Over active latents; NaN without any.
    n_active : int
        Latents that at least one labelled image fires.
    n_labelled : int
        Rows with a label; the others are left out of everything above.
    """

    label: NDArray[np.int64]
    binary: NDArray[np.float64]
    weighted: NDArray[np.float64]
    mean_binary: float
    mean_weighted: float
    n_active: int
    n_labelled: int


def purity(codes: SparseCodes, labels: NDArray[np.integer] | Sequence[int | None]) -> Purity:
    """Compute the purity of each latent, binary and weighted by activation.

    Parameters
    ----------
    codes : SparseCodes, (N, M)
        One row an image, of activation "relu": an activation below zero has no share.
    labels : int array or sequence of int or None, (N,)
        −1 or None: no label.

    Returns
    -------
    Purity

    Raises
    ------
    SaeError
        If labels and rows do not correspond, no row has a label, or a stored activation is not > 0.
    """
    label = np.asarray([UNLABELLED if c is None else c for c in labels], dtype=np.int64)
    if label.shape != (codes.n_rows,):
        raise SaeError(
            f"Purity needs one label for each of {codes.n_rows} rows, found {label.shape}. "
            "Pass the labels in the order of the codes, −1 where there is none."
        )
    labelled = label != UNLABELLED
    if not labelled.any():
        raise SaeError("Purity needs labelled rows, found none. Evaluate on a split with labels, or leave it out.")
    weight = codes.matrix[labelled].astype(np.float64)
    if (weight.data <= 0).any():
        raise SaeError(
            f"Purity weighs images by activations > 0, found {weight.data.min():g}. "
            "It is defined for SAEs with activation relu only."
        )
    classes, class_of_row = np.unique(label[labelled], return_inverse=True)
    firing = sp.csr_array((np.ones_like(weight.data), weight.indices, weight.indptr), shape=weight.shape)
    one_hot = sp.csr_array(
        (np.ones(len(class_of_row)), class_of_row, np.arange(len(class_of_row) + 1)),
        shape=(len(class_of_row), len(classes)),
    )

    # (M, classes), sparse: most latents meet few classes.
    firings_by_class = (firing.T @ one_hot).tocsr()
    n_firings = firings_by_class.sum(axis=1)
    best = np.asarray(firings_by_class.argmax(axis=1)).ravel()
    on_best = np.asarray(firings_by_class.max(axis=1).toarray()).ravel()
    total_weight = weight.sum(axis=0)
    entry_is_best = np.repeat(class_of_row, np.diff(weight.indptr)) == best[weight.indices]
    weight_on_best = np.bincount(weight.indices[entry_is_best], weight.data[entry_is_best], minlength=codes.n_latents)

    active = n_firings > 0
    binary, weighted = (np.full(codes.n_latents, np.nan) for _ in range(2))
    np.divide(on_best, n_firings, out=binary, where=active)
    np.divide(weight_on_best, total_weight, out=weighted, where=active)
    return Purity(
        label=np.where(active, classes[best], UNLABELLED),
        binary=binary,
        weighted=weighted,
        mean_binary=float(binary[active].mean()) if active.any() else np.nan,
        mean_weighted=float(weighted[active].mean()) if active.any() else np.nan,
        n_active=int(active.sum()),
        n_labelled=int(labelled.sum()),
    )
