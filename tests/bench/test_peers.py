"""Every peer finds what NumPy's SVD of all rows finds, to what its method promises."""

import numpy as np
import pytest
import torch

from peers import OURS, PEERS, centred_rows, leading_eigenvalues, variance_missed
from rows import power_law
from support.bounds import captured_by, gamma, product_rounding

K = 8
EXACT = ("gram", "full product + eigh")


@pytest.fixture(scope="module")
def batches():
    return [power_law(96, 64, seed=i) for i in range(5)]


@pytest.fixture(scope="module")
def exact(batches):
    x = np.concatenate([batch.double().numpy() for batch in batches])
    x -= x.mean(0)
    return x, np.linalg.svd(x, full_matrices=False)[1] ** 2


@pytest.mark.parametrize("name", [*OURS, *PEERS])
def test_every_method_captures_the_variance(batches, exact, name):
    x, values = exact
    components = {**OURS, **PEERS}[name](batches, K)[:K].double().numpy()
    q = np.linalg.qr(components.T)[0]
    missed = 1 - ((x @ q) ** 2).sum() / values[:K].sum()
    if name in EXACT:  # where the whole width is decomposed, to the rounding of float32 sums
        allowed = 1 - captured_by(torch.from_numpy(x.T @ x), K, product_rounding("reference", *x.shape))
    else:  # a truncated summary, or one with a random start, has to lose less than all batches but one would
        one = np.linalg.svd(batches[0].double().numpy() - batches[0].double().numpy().mean(0), full_matrices=False)[2]
        allowed = 1 - ((x @ one[:K].T) ** 2).sum() / values[:K].sum()
    assert -gamma(len(x), torch.float64) < missed < allowed
    shuffled = np.linalg.qr(np.random.default_rng(0).normal(size=(64, K)))[0]
    assert 1 - ((x @ shuffled) ** 2).sum() / values[:K].sum() > 0.3  # what an A without data misses


def test_leading_eigenvalues_are_those_of_the_svd(batches, exact):
    rounding = 16 * gamma(5 * 96 + 64, torch.float64)  # of both decompositions, which are backward stable
    found = leading_eigenvalues(centred_rows(batches), K).numpy()
    np.testing.assert_allclose(found, exact[1][:K], rtol=0, atol=rounding * exact[1].sum())
    tall = [batch[:10] for batch in batches]  # fewer rows than columns
    x = centred_rows(tall).numpy()
    values = np.linalg.svd(x, compute_uv=False)[:K] ** 2
    found = leading_eigenvalues(centred_rows(tall), K).numpy()
    np.testing.assert_allclose(found, values, rtol=0, atol=rounding * (x**2).sum())


def test_variance_missed():
    values = torch.tensor([4.0, 2.0, 1.0])
    assert variance_missed(torch.tensor([4.0, 2.0]), values, 2) == 0
    assert variance_missed(torch.tensor([4.0, 1.0]), values, 2) == pytest.approx(1 / 6)


def test_rows_of_a_stream_share_their_mean_and_spectrum():
    one, other = (power_law(4000, 32, seed=i).double() for i in range(2))
    assert torch.linalg.norm(one.mean(0) - other.mean(0)) < 0.1 * torch.linalg.norm(one.mean(0))
    values = torch.linalg.eigvalsh(torch.cov(one.T)).flip(0)
    # Sample covariances stretch by (1 ± (√(d / n) + t / √n))², but with probability 2 exp(−t² / 2).
    np.testing.assert_allclose(values.numpy(), 1 / np.arange(1, 33), rtol=(1 + (32**0.5 + 3) / 4000**0.5) ** 2 - 1)
