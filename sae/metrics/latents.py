"""How latents are used on a split: L0, firing frequencies, dead and dense latents, effective latents."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sae.errors import SaeError
from sae.metrics.codes import SparseCodes

DENSE_FREQUENCY = 0.1  # a latent selected in more than this share of rows is dense


@dataclass(frozen=True)
class LatentUse:
    """The result of a `LatentUseMeter`.

    Attributes
    ----------
    n_rows : int
        Rows seen.
    l0 : float
        Mean number of selected latents a row; below k where rows have fewer than k positive activations.
    frequency : ndarray, float64, (M,)
        Share of rows that select each latent.
    n_dead : int
        Latents that no row of the split selects.
    n_dense : int
        Latents that more than 10 % of rows select.
    """

    n_rows: int
    l0: float
    frequency: NDArray[np.float64]
    n_dead: int
    n_dense: int


class LatentUseMeter:
    """Counts over batches of codes which latents are selected.

    Parameters
    ----------
    n_latents : int
        M.
    """

    def __init__(self, n_latents: int) -> None:
        self._n_firings = np.zeros(n_latents, dtype=np.int64)
        self._n_rows = 0

    def update(self, codes: SparseCodes) -> None:
        """Add a batch of rows."""
        if codes.n_latents != len(self._n_firings):
            raise SaeError(
                f"Codes must have {len(self._n_firings)} latents, found {codes.n_latents}. "
                "Use one meter for each dictionary."
            )
        self._n_firings += codes.n_firings()
        self._n_rows += codes.n_rows

    def result(self) -> LatentUse:
        """Return the counts over all rows so far; raises SaeError if there were none."""
        if self._n_rows == 0:
            raise SaeError("Latent use needs at least one row, found none. Is the split empty?")
        frequency = self._n_firings / self._n_rows
        return LatentUse(
            n_rows=self._n_rows,
            l0=float(self._n_firings.sum() / self._n_rows),
            frequency=frequency,
            n_dead=int((self._n_firings == 0).sum()),
            n_dense=int((frequency > DENSE_FREQUENCY).sum()),
        )


def effective_latents(a: ArrayLike) -> NDArray[np.float64]:
    """(‖a‖₁/‖a‖₂)² of each row of activations before selection (N, M): (N,), between 1 and M.

    n equal activations give n. A row without activations uses no latent and gives 0. It is the square of the
    quantity that the l1/l2 penalty minimises.
    """
    a = np.asarray(a, dtype=np.float64)
    l1_sq = np.abs(a).sum(axis=1) ** 2
    l2_sq = np.square(a).sum(axis=1)
    return np.divide(l1_sq, l2_sq, out=np.zeros(len(a)), where=l2_sq > 0)


class EffectiveLatentsMeter:
    """The mean of `effective_latents` over batches of rows."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._n_rows = 0

    def update(self, a: ArrayLike) -> None:
        """Add a batch of activations before selection, (n, M)."""
        per_row = effective_latents(a)
        self._sum += float(per_row.sum())
        self._n_rows += len(per_row)

    def result(self) -> float:
        """Return the mean over all rows so far; raises SaeError if there were none."""
        if self._n_rows == 0:
            raise SaeError("Effective latents need at least one row, found none. Is the split empty?")
        return self._sum / self._n_rows
