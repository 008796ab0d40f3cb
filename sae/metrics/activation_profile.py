"""Activation profile: the mean of the r-th largest activation of a row, before selection.

It shows what a hard budget hides: whether the activations beyond the k-th fade or go on (arXiv 2606.27321).
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sae.errors import SaeError


class ActivationProfileMeter:
    """Averages sorted activations over batches of rows, in float64.

    Parameters
    ----------
    n_latents : int
        M.
    """

    def __init__(self, n_latents: int) -> None:
        self._sum = np.zeros(n_latents)
        self._n_rows = 0

    def update(self, a: ArrayLike) -> None:
        """Add a batch of activations before selection, (n, M)."""
        a = np.asarray(a)
        if a.ndim != 2 or a.shape[1] != len(self._sum):
            raise SaeError(
                f"Activations must have shape (n, {len(self._sum)}), found {a.shape}. "
                "Pass them before selection, a latent a column."
            )
        self._sum += np.sort(a, axis=1)[:, ::-1].sum(axis=0, dtype=np.float64)
        self._n_rows += len(a)

    def result(self) -> NDArray[np.float64]:
        """Return the profile, (M,), from the largest rank down; raises SaeError if there were no rows."""
        if self._n_rows == 0:
            raise SaeError("An activation profile needs at least one row, found none. Is the split empty?")
        return self._sum / self._n_rows
