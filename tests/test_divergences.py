"""The nearest-neighbour estimate against closed forms, brute force and planted defects."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from pyro_vae.divergences import knn_kl


def brute_force(x, y, k):
    """The formula of the docstring, from all pairwise distances."""
    (n, d), m = x.shape, len(y)
    within = (x[:, None] - x).square().sum(-1).sqrt().fill_diagonal_(math.inf)
    rho = within.sort(1).values[:, k - 1]
    nu = (x[:, None] - y).square().sum(-1).sqrt().sort(1).values[:, k - 1]
    return (d / n * (nu / rho).log().sum() + math.log(m / (n - 1))).item()


def normal_1d(loc, scale):
    return MultivariateNormal(
        torch.tensor([loc], dtype=torch.float64), torch.tensor([[scale**2]], dtype=torch.float64)
    )


def normal_2d(loc, scale, correlation):
    off = correlation * scale
    return MultivariateNormal(
        torch.full((2,), loc, dtype=torch.float64),
        torch.tensor([[1.0, off], [off, scale**2]], dtype=torch.float64),
    )


PAIRS = {
    "1-d, shifted": (normal_1d(0.7, 1.0), normal_1d(0.0, 1.0)),
    "1-d, narrower": (normal_1d(0.0, 0.5), normal_1d(0.0, 1.0)),
    "1-d, wider": (normal_1d(0.0, 1.6), normal_1d(0.0, 1.0)),
    "2-d, correlated": (normal_2d(0.0, 1.0, 0.8), normal_2d(0.5, 1.0, 0.0)),
    "2-d, equal": (normal_2d(0.0, 1.0, 0.5), normal_2d(0.0, 1.0, 0.5)),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("m", [8000, 16000])
def test_closed_form_within_four_standard_errors(name, m):
    """m ≠ n shows a missing log(m/(n-1)); n is large enough for the bias to be under one SE."""
    q, p = PAIRS[name]
    estimate = knn_kl(q.sample((8000,)), p.sample((m,)))
    truth = kl_divergence(q, p).item()
    assert abs(estimate.value - truth) < 4 * estimate.standard_error
    assert estimate.standard_error < 0.04  # so that four of them can fail


def test_direction_matters():
    """KL(q ‖ p) = 0.32 and KL(p ‖ q) = 0.81 are more than ten standard errors apart."""
    q, p = PAIRS["1-d, narrower"]
    estimate = knn_kl(q.sample((8000,)), p.sample((8000,)))
    wrong = kl_divergence(p, q).item()
    assert abs(estimate.value - wrong) > 10 * estimate.standard_error


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("d", [1, 2, 5])
def test_agrees_with_brute_force(k, d):
    x, y = torch.randn(150, d, dtype=torch.float64), 0.3 + torch.randn(210, d, dtype=torch.float64)
    assert knn_kl(x, y, k=k).value == pytest.approx(brute_force(x, y, k), rel=1e-10, abs=1e-10)


def test_bias_vanishes_with_more_samples():
    q, p = (
        MultivariateNormal(torch.ones(3), torch.eye(3)),
        MultivariateNormal(torch.zeros(3), 1.5 * torch.eye(3)),
    )
    truth = kl_divergence(q, p).item()

    def bias(n, repeats):
        values = [knn_kl(q.sample((n,)), p.sample((n,))).value - truth for _ in range(repeats)]
        return abs(np.mean(values)), np.std(values, ddof=1) / math.sqrt(repeats)

    (few, few_se), (many, many_se) = bias(50, 200), bias(5000, 10)
    assert few > 4 * few_se  # there is a bias to vanish
    assert many + 2 * many_se < few


@pytest.mark.parametrize("name", ["1-d, shifted", "2-d, correlated", "2-d, equal"])
def test_standard_error_is_calibrated(name):
    """Over 40 replicates; their standard deviation is itself known to 11 %."""
    q, p = PAIRS[name]
    estimates = [knn_kl(q.sample((1000,)), p.sample((1000,))) for _ in range(40)]
    values, errors = np.array(estimates).T
    ratio = errors.mean() / values.std(ddof=1)
    assert 0.75 < ratio < 1.8


def test_standard_error_sees_serial_correlation():
    """An autoregressive chain's estimate varies more; the blocks must show it."""

    def chain(n, rho):
        noise = np.random.default_rng(len(estimates)).standard_normal(n)
        x = np.zeros(n)
        for i in range(1, n):
            x[i] = rho * x[i - 1] + math.sqrt(1 - rho**2) * noise[i]
        return x[:, None]

    errors = {}
    for rho in (0.0, 0.9):
        estimates = []
        for _ in range(40):
            p = np.random.default_rng(1000 + len(estimates)).standard_normal((2000, 1))
            estimates.append(knn_kl(0.7 + chain(2000, rho), p))
        values, reported = np.array(estimates).T
        errors[rho] = values.std(ddof=1)
        assert 0.65 < reported.mean() / errors[rho] < 1.8
    assert errors[0.9] > 1.5 * errors[0.0]


def test_invariances():
    x, y = torch.randn(500, 2, dtype=torch.float64), 2 * torch.randn(700, 2, dtype=torch.float64)
    value = knn_kl(x, y).value
    turn = torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64)).Q
    shift = torch.tensor([3.0, -5.0], dtype=torch.float64)
    assert knn_kl(x + shift, y + shift).value == pytest.approx(value, abs=1e-9)
    assert knn_kl(x @ turn, y @ turn).value == pytest.approx(value, abs=1e-9)
    assert knn_kl(1e3 * x, 1e3 * y).value == pytest.approx(value, abs=1e-9)
    assert knn_kl(x[torch.randperm(500)], y[torch.randperm(700)]).value == pytest.approx(value)
    assert knn_kl(x, 3 * y).value != pytest.approx(value, abs=0.1)


def test_takes_arrays_and_tensors(dtype, device):
    x, y = torch.randn(100, 2, dtype=dtype, device=device), torch.randn(100, 2, dtype=dtype)
    x.requires_grad_()
    found = knn_kl(x, y)
    assert found == knn_kl(x.detach().cpu().numpy(), y.numpy())
    assert all(isinstance(number, float) for number in found)


def test_atoms_are_infinitely_far_from_a_density():
    y = torch.randn(1000, 2)
    assert knn_kl(torch.zeros(1000, 2), y).value == math.inf
    stuck = torch.randn(1000, 2)
    assert math.isfinite(knn_kl(stuck, y).value)
    stuck[:4] = stuck[0]  # more than k = 3 copies
    assert knn_kl(stuck, y).value == math.inf
    assert math.isnan(knn_kl(stuck, y).standard_error)


def test_collapsed_and_under_dispersed_samples_rank():
    """A sampler that shrinks is told by a growing number."""
    y = torch.randn(2000, 2)
    values = [knn_kl(scale * torch.randn(2000, 2), y).value for scale in (1.0, 0.5, 0.1, 1e-3)]
    assert values == sorted(values)
    truth = kl_divergence(Normal(0.0, 0.1), Normal(0.0, 1.0)).item() * 2
    assert values[2] == pytest.approx(truth, rel=0.1)


def test_too_few_samples_for_a_standard_error():
    few = knn_kl(torch.randn(79, 1), torch.randn(1000, 1))
    assert math.isfinite(few.value)
    assert math.isnan(few.standard_error)
    assert math.isfinite(knn_kl(torch.randn(80, 1), torch.randn(1000, 1)).standard_error)


GOOD = torch.randn(50, 2)


@pytest.mark.parametrize(
    ("x", "y", "k", "message"),
    [
        (GOOD[:, 0], GOOD, 3, r"x must have the shape \[n, d\], found \[50\]"),
        (GOOD, GOOD[None], 3, r"y must have the shape \[n, d\], found \[1, 50, 2\]"),
        (GOOD, GOOD[:, :1], 3, r"x \[50, 2\], y \[50, 1\]"),
        (GOOD[:3], GOOD, 3, "k must be .* the 3 samples x: 3"),
        (GOOD, GOOD[:3], 3, "k must be .* the 3 samples y: 3"),
        (GOOD, GOOD, 0, "k must be at least 1"),
        (GOOD.index_fill(0, torch.tensor([4, 7]), math.nan), GOOD, 3, "x must be finite: 2 of"),
        (GOOD, GOOD.index_fill(0, torch.tensor([4]), math.inf), 3, "y must be finite: 1 of its 50"),
    ],
)
def test_bad_samples_are_named(x, y, k, message):
    with pytest.raises(ValueError, match=message):
        knn_kl(x, y, k=k)
