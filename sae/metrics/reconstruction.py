"""How well the reconstruction keeps the activations: R², FVU, cosine, NMSE, in one pass over the rows.

R² is the mean over features of 1 − SS_res/SS_tot (scikit-learn's `r2_score` with "uniform_average"): each feature
counts alike. FVU pools the features first, so that features of large variance dominate.

R² and FVU are the same in raw and in normalised units. Cosine and NMSE are not, since normalisation moves the
origin: compare them in one kind of unit only.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from sae.errors import SaeError


@dataclass(frozen=True)
class Reconstruction:
    """The result of a `ReconstructionMeter`.

    Attributes
    ----------
    r2 : float
        Mean over the features that vary of 1 − SS_res/SS_tot; NaN where none varies.
    fvu : float
        Σ‖x − x̂‖² / Σ‖x − x̄‖², the fraction of variance unexplained; NaN where no feature varies.
    cosine : float
        Mean over rows of cos(x, x̂); a row with x = 0 or x̂ = 0 counts as 0.
    nmse : float
        Σ‖x − x̂‖² / Σ‖x‖²; NaN where all rows are 0.
    n_rows : int
        Rows seen.
    n_constant_features : int
        Features without variance, which have no R² and are left out of its mean.
    """

    r2: float
    fvu: float
    cosine: float
    nmse: float
    n_rows: int
    n_constant_features: int


class ReconstructionMeter:
    """Accumulates reconstruction errors over batches of rows, in float64.

    SS_tot from Σx² − (Σx)²/N cancels where a feature's mean is large beside its spread, as it is for a few
    features of most vision transformers. Rows are therefore shifted by the first row, and the moments of the
    batches are merged as deviations from their own means (Chan, Golub, LeVeque 1983); a constant feature then has
    SS_tot = 0 exactly, whatever its value.
    """

    def __init__(self) -> None:
        self._n_rows = 0
        self._shift = np.zeros(0)
        self._mean = np.zeros(0)  # of x − shift
        self._ss_tot = np.zeros(0)
        self._ss_res = np.zeros(0)
        self._sum_sq = 0.0
        self._sum_cosine = 0.0

    def update(self, x: ArrayLike, x_hat: ArrayLike) -> None:
        """Add a batch of rows and their reconstructions, both (n, D), in the same units.

        Raises
        ------
        SaeError
            If the shapes differ from each other or from earlier batches.
        """
        x = np.asarray(x, dtype=np.float64)
        x_hat = np.asarray(x_hat, dtype=np.float64)
        if x.ndim != 2 or x.shape != x_hat.shape or (self._n_rows and x.shape[1] != len(self._shift)):
            width = len(self._shift) if self._n_rows else "D"
            raise SaeError(
                f"Rows and reconstructions must both have shape (n, {width}), found {x.shape} and "
                f"{x_hat.shape}. Pass the reconstruction of the same rows."
            )
        n = len(x)
        if n == 0:
            return
        if self._n_rows == 0:
            self._shift = x[0].copy()
            self._mean, self._ss_tot, self._ss_res = (np.zeros(x.shape[1]) for _ in range(3))

        shifted = x - self._shift
        mean = shifted.mean(axis=0)
        between = mean - self._mean
        total = self._n_rows + n
        self._ss_tot += np.square(shifted - mean).sum(axis=0) + between**2 * (self._n_rows * n / total)
        self._mean += between * (n / total)
        self._n_rows = total

        self._ss_res += np.square(x - x_hat).sum(axis=0)
        self._sum_sq += float(np.square(x).sum())
        norms = np.linalg.norm(x, axis=1) * np.linalg.norm(x_hat, axis=1)
        dots = (x * x_hat).sum(axis=1)
        self._sum_cosine += float(np.divide(dots, norms, out=np.zeros(n), where=norms > 0).sum())

    def result(self) -> Reconstruction:
        """Return the metrics of all rows so far.

        Raises
        ------
        SaeError
            If there were none.
        """
        if self._n_rows == 0:
            raise SaeError("Reconstruction metrics need at least one row, found none. Is the split empty?")
        varies = self._ss_tot > 0
        return Reconstruction(
            r2=float((1 - self._ss_res[varies] / self._ss_tot[varies]).mean()) if varies.any() else np.nan,
            fvu=float(self._ss_res.sum() / self._ss_tot.sum()) if varies.any() else np.nan,
            cosine=self._sum_cosine / self._n_rows,
            nmse=float(self._ss_res.sum() / self._sum_sq) if self._sum_sq > 0 else np.nan,
            n_rows=self._n_rows,
            n_constant_features=int((~varies).sum()),
        )
