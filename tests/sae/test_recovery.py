"""Training with the plain objective finds a dictionary that is known, with each regularizer."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F

from sae.metrics.reconstruction import ReconstructionMeter
from sae.model import SAEConfig, TopKSAE
from sae.objectives import ObjectiveConfig, objective

D, N_TRUE, M, K = 32, 40, 64, 3
N_STEPS, BATCH, LEARNING_RATE = 400, 256, 1e-2
DEAD_AFTER = 20 * BATCH


@pytest.fixture(autouse=True)
def _one_thread():
    """Steps are too small to share: two threads on busy cores spend their time waiting for each other."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def sample(dictionary, n, g):
    """Rows of exactly K true directions each, at amplitudes in [0.5, 1.5], off the origin."""
    chosen = torch.rand(n, N_TRUE, generator=g).topk(K, dim=1).indices
    amplitudes = 0.5 + torch.rand(n, K, generator=g)
    return torch.zeros(n, N_TRUE).scatter_(1, chosen, amplitudes) @ dictionary + 10


def matched_cosine(sae, dictionary):
    """Mean cosine of the true directions with the decoder rows that match them best, each row used once."""
    cosines = (dictionary @ sae.W_d.detach().T).numpy()
    return cosines[linear_sum_assignment(-cosines)].mean()


def train(sae, x, config, g):
    x_tilde = sae.normalise(x)
    optimiser = torch.optim.Adam(sae.parameters(), lr=LEARNING_RATE)
    rows_since_selected = torch.zeros(M)
    for step in range(N_STEPS):
        optimiser.param_groups[0]["lr"] = LEARNING_RATE * min(1, 4 * (1 - step / N_STEPS))
        batch = x_tilde[torch.randint(len(x), (BATCH,), generator=g)]
        terms = objective(sae, batch, config, rows_since_selected >= DEAD_AFTER)
        optimiser.zero_grad()
        terms.loss.backward()
        sae.remove_parallel_gradient_()
        optimiser.step()
        sae.renormalise_decoder_()
        rows_since_selected = torch.where(terms.active, 0, rows_since_selected + BATCH)


@pytest.mark.parametrize(
    "strengths",
    [{}, {"off_support": 0.005}, {"l1_l2": 0.02}, {"off_support": 0.0025, "l1_l2": 0.01}],
    ids=["none", "off_support", "l1_l2", "both"],
)
def test_training_recovers_the_dictionary_that_made_the_rows(strengths):
    g = torch.Generator().manual_seed(0)
    dictionary = F.normalize(torch.randn(N_TRUE, D, generator=g), dim=1)
    x, held_out = sample(dictionary, 20_000, g), sample(dictionary, 2_000, g)
    sae = TopKSAE(SAEConfig(d_in=D, n_latents=M, k=K), generator=g)
    sae.set_normalisation(x.mean(dim=0).numpy(), x.var(dim=0, correction=0).numpy())
    assert matched_cosine(sae, dictionary) < 0.6

    train(sae, x, ObjectiveConfig(**strengths), g)

    assert matched_cosine(sae, dictionary) >= 0.95
    meter = ReconstructionMeter()
    meter.update(held_out.numpy(), sae(held_out).detach().numpy())
    assert meter.result().r2 >= 0.95
