"""Divergences against closed forms, quadrature, brute force and planted defects."""

import copy
import math
import pickle
from functools import partial

import numpy as np
import pyro.poutine as poutine
import pytest
import torch
from scipy.integrate import quad
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from pyro_vae.capture import capture
from pyro_vae.divergences import MMD, Adversarial, Divergence, Stein, knn_kl
from pyro_vae.nn import ResidualDiscriminator


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


@pytest.mark.parametrize(
    "name",
    [
        "1-d, shifted",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("2-d, correlated", "2-d, equal")),
    ],
)
def test_standard_error_is_calibrated(name):
    """Over 40 replicates; their standard deviation is itself known to 11 %."""
    q, p = PAIRS[name]
    estimates = [knn_kl(q.sample((1000,)), p.sample((1000,))) for _ in range(40)]
    values, errors = np.array(estimates).T
    ratio = errors.mean() / values.std(ddof=1)
    assert 0.75 < ratio < 1.8


@pytest.mark.slow
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


# -- divergences that train -----------------------------------------------------------------------


def mean_and_error(values):
    values = torch.stack(values)
    return values.mean(0), values.std(0) / math.sqrt(len(values))


def expected_rbf(delta, variance, b):
    """E exp(−‖u‖²/2b) of u ~ N(delta, diag variance)."""
    shrink = (1 + variance / b).rsqrt().prod()
    return (shrink * torch.exp(-(delta.square() / (b + variance)).sum() / 2)).item()


def expected_imq(delta, variance, b):
    """E b/(b + ‖u‖²) as a mixture of RBF kernels: 1/(1 + s) = ∫ exp(−t (1 + s)) dt."""
    return quad(lambda t: math.exp(-t) * expected_rbf(delta, variance, b / (2 * t)), 0, math.inf)[0]


EXPECTED = {"rbf": expected_rbf, "imq": expected_imq}
LOC = torch.tensor([0.6, -0.3], dtype=torch.float64)
SCALE = torch.tensor([1.3, 0.5], dtype=torch.float64)


def terms(kernel, b):
    """E k under q × q, q × p and p × p, for q = N(LOC, diag SCALE²) and p = N(0, I)."""
    expected, zero, one = EXPECTED[kernel], torch.zeros_like(LOC), torch.ones_like(LOC)
    return (
        expected(zero, 2 * SCALE**2, b),
        expected(LOC, SCALE**2 + one, b),
        expected(zero, 2 * one, b),
    )


def draws(m, n):
    return LOC + SCALE * torch.randn(m, 2).double(), torch.randn(n, 2).double()


@pytest.mark.parametrize("kernel", ["rbf", "imq"])
@pytest.mark.parametrize("b", [None, 0.7])
def test_mmd_is_unbiased_and_the_bias_is_known(kernel, b):
    """Over 2000 replicates of 12 samples against 9; the error is small enough to see the bias."""
    qq, qp, pp = terms(kernel, b or {"rbf": 2, "imq": 4}[kernel])  # d and 2d, with d = 2
    truth = qq - 2 * qp + pp
    bias = (1 - qq) / 12 + (1 - pp) / 9
    pairs = [draws(12, 9) for _ in range(2000)]
    unbiased, error = mean_and_error([MMD(kernel, b)(*pair) for pair in pairs])
    biased, _ = mean_and_error([MMD(kernel, b, unbiased=False)(*pair) for pair in pairs])
    assert abs(unbiased - truth) < 4 * error
    assert abs(biased - truth - bias) < 4 * error
    assert bias > 20 * error  # a diagonal left in, or one of the two left out, would be seen


def test_mmd_tells_a_wrong_bandwidth_and_a_lost_factor_of_two():
    qq, qp, pp = terms("rbf", 0.25)
    value, error = mean_and_error([MMD(bandwidths=0.25)(*draws(200, 200)) for _ in range(100)])
    assert abs(value - (qq - 2 * qp + pp)) < 4 * error
    assert abs(value - (qq - qp + pp)) > 40 * error
    for wrong in (0.125, 0.5):  # ℓ² taken for 2ℓ², and the other way round
        qq, qp, pp = terms("rbf", wrong)
        assert abs(value - (qq - 2 * qp + pp)) > 10 * error


def test_biased_mmd_is_never_negative_and_zero_for_one_sample_set():
    for _ in range(50):
        z = torch.randn(5, 3, dtype=torch.float64)
        other = torch.randn(7, 3, dtype=torch.float64)
        for kernel in ("rbf", "imq"):
            mmd = MMD(kernel, unbiased=False)
            assert mmd(z, other) >= 0
            assert mmd(z, z[torch.randperm(5)]).item() == pytest.approx(0, abs=1e-15)
    assert min(MMD()(*torch.randn(2, 10, 2)) for _ in range(50)) < 0


LOOPS = {
    "rbf": lambda s, b: math.exp(-s / (2 * b)),
    "imq": lambda s, b: b / (b + s),
}


@pytest.mark.parametrize("kernel", LOOPS)
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("bandwidths", [None, 0.5, (0.5, 2.0, 8.0)])
def test_mmd_agrees_with_loops(kernel, unbiased, bandwidths):
    z, y = torch.randn(6, 3).double() + 1, torch.randn(4, 3).double()
    widths = {"rbf": (3,), "imq": (6,)}[kernel] if bandwidths is None else bandwidths
    widths = (widths,) if isinstance(widths, float) else widths

    def mean(a, b, skip):
        values = [
            sum(LOOPS[kernel]((v - w).square().sum().item(), width) for width in widths)
            for i, v in enumerate(a)
            for j, w in enumerate(b)
            if not (skip and i == j)
        ]
        return sum(values) / len(values)

    expected = mean(z, z, unbiased) - 2 * mean(z, y, False) + mean(y, y, unbiased)
    found = MMD(kernel, bandwidths, unbiased)(z, y).item()
    assert found == pytest.approx(expected, rel=1e-12)


def test_several_bandwidths_are_added():
    z, y = torch.randn(2, 10, 3).double()
    parts = [MMD("imq", b)(z, y) for b in (0.5, 3.0, 20.0)]
    torch.testing.assert_close(MMD("imq", [0.5, 3.0, 20.0])(z, y), sum(parts))


def test_any_kernel_of_the_squared_distance():
    z, y = torch.randn(2, 10, 3).double()
    torch.testing.assert_close(MMD(lambda s: torch.exp(-s / 2), bandwidths=3.0)(z, y), MMD()(z, y))
    # k = −‖z − z'‖²/2 sees the mean alone: the biased estimator is ‖mean z − mean y‖².
    found = MMD(lambda s: -s / 2, unbiased=False)(z, y)
    torch.testing.assert_close(found, (z.mean(0) - y.mean(0)).square().sum())


class RationalQuadratic(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_power = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, s):
        return (1 + s) ** -self.log_power.exp()


def test_a_kernel_can_be_a_module():
    z, y = torch.randn(2, 10, 3).double()
    mmd = MMD(RationalQuadratic(), bandwidths=6.0)
    torch.testing.assert_close(mmd(z, y), MMD("imq")(z, y))
    mmd(z, y).backward()
    assert mmd.kernel.log_power.grad.abs() > 0
    assert list(mmd.state_dict()) == ["kernel.log_power"]


def test_mmd_keeps_its_digits_in_float32():
    """Close together and far from the origin, where ‖x‖² + ‖y‖² − 2xᵀy has none left."""
    z, y = (1000 + 0.1 * torch.randn(2, 30, 4)).unbind()
    mmd = MMD(bandwidths=0.04)

    def gram(x, y):
        return torch.exp(-(x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T) / 0.08)

    exact = mmd.kernel_matrix(z.double(), y.double())
    assert (mmd.kernel_matrix(z, y) - exact).abs().max() < 1e-5
    assert (gram(z, y) - exact).abs().max() > 0.1
    assert mmd(z, y).item() == pytest.approx(mmd(z.double(), y.double()).item(), abs=1e-6)


@pytest.mark.parametrize("make", [MMD, partial(MMD, "imq"), partial(MMD, unbiased=False), Stein])
def test_gradient_is_finite_where_points_coincide(make, dtype):
    z = torch.randn(6, 2, dtype=dtype)
    z[1] = z[0]
    y = torch.cat([z[:3], torch.randn(2, 2, dtype=dtype)])
    for points in (z, torch.zeros_like(z)):
        points = points.clone().requires_grad_()
        make()(points, y).backward()
        assert points.grad.isfinite().all()
        torch.testing.assert_close(points.grad[0], points.grad[1])


@pytest.mark.parametrize("kernel", ["rbf", "imq"])
@pytest.mark.parametrize("unbiased", [True, False])
def test_mmd_gradient(kernel, unbiased):
    z = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(MMD(kernel, (1.0, 5.0), unbiased), (z, y))


def test_mmd_draws_a_normal_to_the_prior():
    loc = torch.full((2,), 2.0, dtype=torch.float64, requires_grad=True)
    log_scale = torch.full((2,), -1.0, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([loc, log_scale], 0.05)
    path = []
    for _ in range(400):
        adam.zero_grad()
        z = loc + log_scale.exp() * torch.randn(128, 2).double()
        MMD()(z, torch.randn(128, 2).double()).backward()
        adam.step()
        path.append(torch.cat([loc, log_scale]).detach().clone())
    # Unbiased, so the average over the path's end is at 0; blocks of 20 steps are nearly
    # independent (5 standard errors, for four coordinates).
    mean, error = mean_and_error([*torch.stack(path[200:]).reshape(10, 20, 4).mean(1)])
    assert (mean.abs() < 5 * error + 0.01).all()
    assert (error < 0.02).all()


# -- Stein ----------------------------------------------------------------------------------------


def stein_loops(z, score, b):
    """φ* by the formula of the docstring, for the RBF kernel."""
    phi = torch.zeros_like(z)
    for i in range(len(z)):
        for j in range(len(z)):
            k = torch.exp(-(z[j] - z[i]).square().sum() / (2 * b))
            phi[i] += k * score[j] - k * (z[j] - z[i]) / b
    return phi / len(z)


def test_stein_gradient_is_minus_the_direction_of_the_formula():
    z, y = torch.randn(2, 7, 3).double()
    z.requires_grad_()
    Stein()(z, y).backward()
    torch.testing.assert_close(z.grad, -stein_loops(z.detach(), -z.detach(), 3.0) / 7)


def test_stein_takes_a_score():
    """p = N(3, diag(4, ¼)), for instance."""
    loc, variance = torch.tensor([3.0, 3.0]).double(), torch.tensor([4.0, 0.25]).double()
    z = torch.randn(7, 2).double()
    stein = Stein(bandwidths=1.5, score=lambda z: (loc - z) / variance)
    torch.testing.assert_close(stein.direction(z), stein_loops(z, (loc - z) / variance, 1.5))
    assert Stein().score is None


@pytest.mark.parametrize("kernel", ["rbf", "imq"])
def test_stein_reports_the_mmd_and_no_gradient_to_the_draws(kernel):
    z, y = torch.randn(2, 20, 2).double() + 1
    z.requires_grad_()
    y.requires_grad_()
    value = Stein(kernel)(z, y)
    assert value.item() == MMD(kernel)(z, y).item()
    value.backward()
    assert y.grad is None
    assert z.grad.abs().sum() > 0


def test_stein_gradient_in_expectation():
    """For z = m + s ε in one dimension the expected gradient in m and log s is known.

    With c = (1 + 2s²/b)^−½ the mean of k, and t² = 2s²b/(b + 2s²) the mean of u²k over c, where
    u = z − z': c m in m; c (s²/2 − t²/4 − t²/2b) in log s, at m = 0, which vanishes at s = 1. The
    n pairs i = j of the n² add m/n and s²/n.
    """
    n, b, runs = 20, 0.8, 2000

    def value(loc_and_log_scale, noise, draws):
        loc, log_scale = loc_and_log_scale
        return Stein(bandwidths=b)(loc + log_scale.exp() * noise, draws)

    gradient = torch.func.vmap(torch.func.grad(value), in_dims=(None, 0, 0))
    for m, s in [(1.5, 1.0), (0.0, 0.6), (0.0, 1.7), (0.0, 1.0)]:
        noise, draws = torch.randn(runs, n, 1).double(), torch.randn(runs, 2, 1).double()
        gradients = gradient(torch.tensor([m, math.log(s)], dtype=torch.float64), noise, draws)
        mean, error = mean_and_error(list(gradients))
        c, t2 = (1 + 2 * s**2 / b) ** -0.5, 2 * s**2 * b / (b + 2 * s**2)
        in_loc = (n - 1) / n * c * m + m / n
        assert abs(mean[0] - in_loc) < 4 * error[0]
        if m == 0:
            in_log_scale = (n - 1) / n * c * (s**2 / 2 - t2 / 4 - t2 / (2 * b)) + s**2 / n
            assert abs(mean[1] - in_log_scale) < 4 * error[1]
        else:
            assert abs(mean[0] + in_loc) > 40 * error[0]  # the sign printed in the paper


class WrongSign(Stein):
    """The surrogate as the paper prints it."""

    def direction(self, z):
        return -super().direction(z)


def descend_particles(stein, num_particles=150, num_steps=300):
    z = (2 + torch.randn(num_particles, 2).double()).requires_grad_()
    adam = torch.optim.Adam([z], 0.05)
    for _ in range(num_steps):
        adam.zero_grad()
        stein(z, torch.randn(num_particles, 2).double()).backward()
        adam.step()
    return z.detach()


@pytest.mark.parametrize("kernel", ["rbf", pytest.param("imq", marks=pytest.mark.slow)])
def test_stein_moves_particles_to_the_prior(kernel):
    """N(2, I) to N(0, I); as much of it as 150 independent draws could show."""
    z = descend_particles(Stein(kernel))
    assert (z.mean(0).abs() < 1 / math.sqrt(150)).all()
    assert ((z.T.cov() - torch.eye(2)).abs() < math.sqrt(2 / 150)).all()
    draws = torch.randn(5000, 2).double()
    start = MMD()(torch.randn(150, 2).double() + 2, draws)
    assert MMD()(z, draws) < 0.01 * start


def test_the_opposite_sign_moves_particles_away():
    z = descend_particles(WrongSign())
    assert (z.mean(0).abs() > 4).all()


@pytest.mark.parametrize(
    ("make", "converges"), [(Stein, True), pytest.param(WrongSign, False, marks=pytest.mark.slow)]
)
def test_stein_moves_a_reparameterised_normal_to_the_prior(make, converges):
    """The pairs i = j pull log s down by about 1/n; n = 256, so by less than 0.03."""
    loc = torch.full((2,), 2.0, dtype=torch.float64, requires_grad=True)
    log_scale = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([loc, log_scale], 0.05)
    path = []
    for _ in range(400):
        adam.zero_grad()
        z = loc + log_scale.exp() * torch.randn(256, 2).double()
        make()(z, torch.randn(256, 2).double()).backward()
        adam.step()
        path.append(torch.cat([loc, log_scale]).detach().clone())
    mean, error = mean_and_error([*torch.stack(path[200:]).reshape(10, 20, 4).mean(1)])
    near = (mean[:2].abs() < 5 * error[:2]).all() and (mean[2:].abs() < 0.03 + 5 * error[2:]).all()
    assert bool(near and (error < 0.01).all()) == converges


# -- Adversarial ----------------------------------------------------------------------------------

Q, P = Normal(0.8, 0.6), Normal(0.0, 1.0)


def quadrature(loc=0.8, scale=0.6):
    """What the three objectives estimate, by quadrature, for q = N(loc, scale²) and p = N(0, 1)."""

    def log_density(x, loc, scale):
        return -0.5 * ((x - loc) / scale) ** 2 - math.log(scale * math.sqrt(2 * math.pi))

    def kl(f, g):
        return quad(lambda x: math.exp(f(x)) * (f(x) - g(x)), -12, 12, epsabs=1e-12, limit=200)[0]

    def q(x):
        return log_density(x, loc, scale)

    def p(x):
        return log_density(x, 0.0, 1.0)

    def m(x):
        return np.logaddexp(q(x), p(x)) - math.log(2)

    js = (kl(q, m) + kl(p, m)) / 2
    return {"density-ratio": kl(q, p), "saturating": js, "non-saturating": kl(q, p) - kl(q, m)}


class Optimal(nn.Module):
    """T* = log q − log p, times a weight that is one."""

    def __init__(self, weight=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def forward(self, z):
        return self.weight * (Q.log_prob(z) - P.log_prob(z)).squeeze(-1)


def test_quadrature_agrees_with_the_closed_form():
    assert quadrature()["density-ratio"] == pytest.approx(kl_divergence(Q, P).item(), rel=1e-6)


@pytest.mark.parametrize("objective", ["non-saturating", "saturating", "density-ratio"])
def test_adversarial_at_the_optimal_discriminator(objective):
    """The known value, and for a location the derivative of the known value."""
    divergence = Adversarial(Optimal(), objective)
    reports = []
    for _ in range(200):
        loc = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
        value = divergence(loc + 0.6 * torch.randn(2000, 1).double(), torch.randn(2000, 1).double())
        value.backward()
        reports.append(torch.stack([value.detach(), loc.grad]))
    assert divergence.discriminator.weight.grad is None
    mean, error = mean_and_error(reports)
    truth = quadrature()
    assert abs(mean[0] - truth[objective]) < 4 * error[0]
    assert truth[objective] > 40 * error[0]  # T with the labels exchanged would be seen
    above, below = quadrature(loc=0.8 + 1e-3), quadrature(loc=0.8 - 1e-3)
    slope = {name: (above[name] - below[name]) / 2e-3 for name in truth}
    # With T held fixed the first has the gradient of KL − 2 JS, not that of its own value.
    slope["non-saturating"] = slope["density-ratio"] - 2 * slope["saturating"]
    assert abs(mean[1] - slope[objective]) < 4 * error[1]
    assert error[1] < 0.05 * slope[objective]


def test_only_the_saturating_gradient_vanishes_where_the_discriminator_is_sure():
    norms = {}
    for objective in ("non-saturating", "saturating", "density-ratio"):
        z = torch.full((10, 1), 12.0, dtype=torch.float64, requires_grad=True)
        far = nn.Sequential(nn.Linear(1, 1, dtype=torch.float64), nn.Flatten(0))
        nn.init.ones_(far[0].weight)
        nn.init.zeros_(far[0].bias)
        Adversarial(far, objective)(z, torch.zeros(10, 1).double()).backward()
        norms[objective] = z.grad.sum().item()
    assert norms["saturating"] == pytest.approx(0, abs=1e-5)
    assert norms["non-saturating"] == pytest.approx(1, abs=1e-5)
    assert norms["density-ratio"] == pytest.approx(1)


def test_adversary_learns_the_log_density_ratio():
    """N(1, 1) against N(0, 1): T* = z − ½ is linear."""
    z, y = 1 + torch.randn(20000, 1).double(), torch.randn(20000, 1).double()
    linear = nn.Linear(1, 1, dtype=torch.float64)
    divergence = Adversarial(nn.Sequential(linear, nn.Flatten(0)))
    lbfgs = torch.optim.LBFGS(divergence.parameters(), line_search_fn="strong_wolfe")

    def closure():
        lbfgs.zero_grad()
        loss = divergence.adversary(z, y)
        loss.backward()
        return loss

    lbfgs.step(closure)
    # The standard errors of logistic regression with 40,000 points are about 0.015.
    assert linear.weight.item() == pytest.approx(1.0, abs=0.06)
    assert linear.bias.item() == pytest.approx(-0.5, abs=0.06)


@pytest.mark.parametrize("objective", ["non-saturating", "saturating", "density-ratio"])
def test_each_player_moves_its_own_alone(objective):
    divergence = Adversarial(ResidualDiscriminator(2).double(), objective)
    for parameter in divergence.parameters():
        nn.init.normal_(parameter, std=0.3)
    z, y = torch.randn(2, 8, 2).double()
    z.requires_grad_()
    divergence(z, y).backward()
    assert z.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in divergence.parameters())
    z.grad = None
    divergence.adversary(z, y).backward()
    assert z.grad is None
    assert all(parameter.grad.abs().sum() > 0 for parameter in divergence.parameters())


def test_the_discriminator_is_shown_by_the_adversary_alone():
    divergence = Adversarial(ResidualDiscriminator(2))
    z, y = torch.randn(2, 8, 2)
    shown = {}
    for name in ("forward", "adversary"):
        with poutine.trace(param_only=True) as tracer:
            getattr(divergence, name)(z, y)
        sites = tracer.trace.nodes.values()
        shown[name] = {site["value"].unconstrained() for site in sites}
    assert shown == {"forward": set(), "adversary": set(divergence.parameters())}


# -- the contract of all three --------------------------------------------------------------------

DIVERGENCES = {
    "mmd": MMD,
    "mmd, imq, several bandwidths": partial(MMD, "imq", bandwidths=[1.0, 3.0]),
    "stein": Stein,
    "non-saturating": lambda: Adversarial(ResidualDiscriminator(3, 8, 1)),
    "saturating": lambda: Adversarial(ResidualDiscriminator(3, 8, 1), "saturating"),
    "density-ratio": lambda: Adversarial(ResidualDiscriminator(3, 8, 1), "density-ratio"),
}


@pytest.fixture(params=DIVERGENCES)
def divergence(request, dtype, device):
    divergence = DIVERGENCES[request.param]().to(device, dtype)
    for parameter in divergence.parameters():
        nn.init.normal_(parameter, std=0.3)
    return divergence


@pytest.fixture
def samples(dtype, device):
    z, y = torch.randn(10, 3, dtype=dtype), torch.randn(8, 3, dtype=dtype)
    return z.to(device).requires_grad_(), y.to(device)


def test_scalar_of_the_samples_dtype_with_a_gradient(divergence, samples, dtype):
    assert isinstance(divergence, Divergence)
    value = divergence(*samples)
    assert (value.shape, value.dtype) == ((), dtype)
    value.backward()
    assert samples[0].grad.isfinite().all()
    assert samples[0].grad.abs().sum() > 0
    assert not samples[1].requires_grad


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda divergence: pickle.loads(pickle.dumps(divergence))]
)
def test_copies_are_alike_and_apart(divergence, samples, clone):
    other = clone(divergence)
    assert repr(other) == repr(divergence)
    torch.testing.assert_close(other(*samples), divergence(*samples), rtol=0, atol=0)
    assert not set(other.parameters()) & set(divergence.parameters())
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    other.load_state_dict(divergence.state_dict())
    torch.testing.assert_close(other(*samples), divergence(*samples), rtol=0, atol=0)


def test_float32_agrees_with_float64(divergence, samples):
    z, y = (x.detach().float() for x in samples)
    low = divergence.float()(z, y).item()
    assert low == pytest.approx(divergence.double()(z.double(), y.double()).item(), abs=1e-5)


def test_gradient_can_be_captured_as_a_graph(divergence, samples):
    """No value is looked at on the way: under make_fx there is none."""
    z, y = (x.detach() for x in samples)
    graph = capture(torch.func.grad_and_value(divergence), z, y, compile=False)  # or it warns
    z, y = torch.randn_like(z), torch.randn_like(y)
    gradient, value = graph(z, y)
    z.requires_grad_()
    expected = divergence(z, y)
    expected.backward()
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, z.grad)


def test_repr_names_what_was_chosen():
    assert "'imq', bandwidths=(2.0,), unbiased=False" in repr(MMD("imq", 2, False))
    assert "score=standard normal" in repr(Stein())
    assert "objective='saturating'" in repr(Adversarial(nn.Identity(), "saturating"))


NAN = GOOD.index_fill(0, torch.tensor([4, 7]), math.nan)


@pytest.mark.parametrize("make", [MMD, Stein, lambda: Adversarial(ResidualDiscriminator(2))])
@pytest.mark.parametrize(
    ("z", "prior_draws", "message"),
    [
        (GOOD[:, 0], GOOD, r"z must have the shape \[n, d\], found \[50\]"),
        (GOOD, GOOD[None], r"prior_draws must have the shape \[n, d\], found \[1, 50, 2\]"),
        (GOOD, GOOD[:, :1], r"z \[50, 2\] torch.float32, prior_draws \[50, 1\]"),
        (GOOD, GOOD.double(), r"torch.float32, prior_draws \[50, 2\] torch.float64"),
        (NAN, GOOD, "z must be finite: 2 of its 50"),
        (GOOD, NAN, "prior_draws must be finite: 2 of its 50"),
        (GOOD[:0], GOOD, "z must hold at least . samples, found 0"),
    ],
)
def test_bad_input_is_named(make, z, prior_draws, message):
    with pytest.raises(ValueError, match=message):
        make()(z, prior_draws)


def test_a_batch_of_one():
    for divergence in (MMD(), Stein()):
        with pytest.raises(ValueError, match="z must hold at least 2 samples, found 1: a batch"):
            divergence(GOOD[:1], GOOD)
        with pytest.raises(ValueError, match="prior_draws must hold at least 2 samples, found 1"):
            divergence(GOOD, GOOD[:1])
    assert MMD(unbiased=False)(GOOD[:1], GOOD[:1]).isfinite()
    assert Adversarial(ResidualDiscriminator(2))(GOOD[:1], GOOD[:1]).isfinite()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MMD("laplace"), r"kernel must be one of \['imq', 'rbf'\] .* found 'laplace'"),
        (lambda: MMD(bandwidths=0), "bandwidths must be positive and finite, found 0"),
        (lambda: MMD(bandwidths=[1.0, -2.0]), "bandwidths must be positive"),
        (lambda: MMD(bandwidths=[]), "bandwidths must be positive"),
        (lambda: Stein(bandwidths=math.inf), "bandwidths must be positive"),
        (lambda: MMD(lambda s: s.sum())(GOOD, GOOD), r"kernel .* found \[\], expected \[50, 50\]"),
        (
            lambda: Stein(score=lambda z: z.sum(1))(GOOD, GOOD),
            r"score .* \[50\], expected \[50, 2\]",
        ),
        (lambda: Adversarial(nn.Identity(), "wasserstein"), "objective must be one of"),
        (lambda: Adversarial(torch.sum), "discriminator must be a torch.nn.Module"),
        (lambda: Adversarial(nn.Linear(2, 1))(GOOD, GOOD), r"found \[50, 1\], expected \[50\]"),
        (lambda: Adversarial(nn.Linear(2, 1)).adversary(GOOD, GOOD), r"expected \[50\]"),
    ],
)
def test_bad_choices_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
