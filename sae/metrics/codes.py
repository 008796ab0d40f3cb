"""Sparse codes of a split: what most metrics read, held as one CSR matrix.

ImageNet's validation split at k = 32 is 1.6 million numbers in this form and 410 million as a dense matrix with
8192 latents.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self, cast

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from sae.errors import SaeError
from sae.model import Selection


@dataclass(frozen=True)
class SparseCodes:
    """The codes z of N rows over M latents.

    What is stored is what was selected: a stored 0 (possible with activation "identity") is a selected latent, and
    an entry that is not stored is none.

    Attributes
    ----------
    matrix : scipy.sparse.csr_array, (N, M)
        The activations of the selected latents, indices sorted within a row and without duplicates.
    """

    matrix: sp.csr_array

    @classmethod
    def from_selections(cls, selections: Iterable[Selection], n_latents: int) -> Self:
        """Gather the selections of consecutive batches of rows; slots that are not kept are left out."""
        values: list[NDArray] = []
        latents: list[NDArray] = []
        n_selected: list[NDArray] = [np.zeros(1, dtype=np.int64)]
        for selection in selections:
            kept = selection.kept.cpu().numpy()
            values.append(selection.values.detach().cpu().numpy()[kept])
            latents.append(selection.indices.cpu().numpy()[kept])
            n_selected.append(kept.sum(axis=1))
        if not values:
            raise SaeError("Codes need at least one batch of selections, found none. Is the split empty?")
        row_ends = np.concatenate(n_selected).cumsum()
        matrix = sp.csr_array(
            (np.concatenate(values), np.concatenate(latents), row_ends), shape=(len(row_ends) - 1, n_latents)
        )
        matrix.sort_indices()
        return cls(matrix)

    @property
    def n_rows(self) -> int:
        """N."""
        return cast(tuple[int, int], self.matrix.shape)[0]

    @property
    def n_latents(self) -> int:
        """M."""
        return cast(tuple[int, int], self.matrix.shape)[1]

    def n_firings(self) -> NDArray[np.int64]:
        """How many rows selected each latent, (M,)."""
        return np.bincount(self.matrix.indices, minlength=self.n_latents)
