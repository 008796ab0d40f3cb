import numpy as np
import pytest
import torch

from sae.errors import SaeError
from sae.metrics.codes import SparseCodes
from sae.model import select_top_k


def activations(n=20, m=30, seed=0):
    return torch.relu(torch.randn(n, m, generator=torch.Generator().manual_seed(seed)) - 1)


def test_codes_of_batches_are_the_dense_codes():
    a = activations()
    selections = [select_top_k(part, 4, positive_only=True) for part in a.split(7)]
    codes = SparseCodes.from_selections(iter(selections), 30)
    dense = select_top_k(a, 4, positive_only=True).dense(30).numpy()
    np.testing.assert_array_equal(codes.matrix.toarray(), dense)
    assert (codes.n_rows, codes.n_latents) == (20, 30)
    assert codes.matrix.has_sorted_indices
    np.testing.assert_array_equal(codes.n_firings(), (dense > 0).sum(axis=0))


def test_slots_that_are_not_kept_are_not_stored():
    a = torch.tensor([[0.0, 2, 0], [0, 0, 0]])
    codes = SparseCodes.from_selections([select_top_k(a, 3, positive_only=True)], 3)
    assert codes.matrix.nnz == 1
    assert codes.n_firings().tolist() == [0, 1, 0]


def test_a_selected_zero_of_an_identity_sae_counts_as_a_firing():
    codes = SparseCodes.from_selections([select_top_k(torch.tensor([[0.0, -1]]), 1, positive_only=False)], 2)
    assert codes.n_firings().tolist() == [1, 0]


def test_codes_need_a_batch():
    with pytest.raises(SaeError, match="found none"):
        SparseCodes.from_selections([], 3)
