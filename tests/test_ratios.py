"""Learned log density ratios: where the losses have their minimum, and whom a gradient reaches."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from scipy import integrate
from torch import nn
from torch.distributions import Normal, kl_divergence

from pyro_vae.nn import ResidualDiscriminator
from pyro_vae.ratios import (
    AdaptiveContrast,
    DensityRatio,
    ImplicitDistribution,
    NormalContrast,
    f_divergence_loss,
    implicit_distributions,
    logistic_loss,
    show_parameters,
)

OBJECTIVES = [logistic_loss, f_divergence_loss]

# Equally weighted quantiles stand for the two expectations.
Q, R = Normal(0.5, 0.7), Normal(0.0, 1.0)
LEVELS = (torch.arange(40_000, dtype=torch.float64) + 0.5) / 40_000
Z_Q, Z_R = Q.icdf(LEVELS), R.icdf(LEVELS)
DIRECTIONS = {
    "1": torch.ones_like,
    "z": lambda z: z,
    "z²": torch.square,
    "sin 3z": lambda z: (3 * z).sin(),
}


def optimum(z, sign=1.0):
    return sign * (Q.log_prob(z) - R.log_prob(z))


@pytest.mark.parametrize("loss", OBJECTIVES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_minimum_is_at_the_log_ratio(loss, direction):
    """In every direction the slope is zero at T* = log q − log r, and the loss rises both ways."""
    along = DIRECTIONS[direction]

    def value(a, sign=1.0):
        return loss(*(optimum(z, sign) + a * along(z) for z in (Z_Q, Z_R)))

    a = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(value(a), a)
    assert abs(slope) < 1e-3
    assert value(0.2) > value(0.0) + 1e-3
    assert value(-0.2) > value(0.0) + 1e-3


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_slope_shows_a_wrong_sign(loss):
    """At −T*, or with the two samples exchanged, the slope along z is far from zero."""
    a = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for sign, samples in ((-1.0, (Z_Q, Z_R)), (1.0, (Z_R, Z_Q))):
        (slope,) = torch.autograd.grad(loss(*(optimum(z, sign) + a * z for z in samples)), a)
        assert abs(slope) > 0.1


def test_values_at_the_optimum():
    """2 log 2 − 2 JS(q, r), and 1 − KL(q ‖ r)."""

    def js_integrand(z):
        q, r = (d.log_prob(torch.tensor(z, dtype=torch.float64)).exp().item() for d in (Q, R))
        m = (q + r) / 2
        return (q * math.log(q / m) + r * math.log(r / m)) / 2

    js, _ = integrate.quad(js_integrand, -8, 8)
    t_q, t_r = optimum(Z_Q), optimum(Z_R)
    assert logistic_loss(t_q, t_r).item() == pytest.approx(2 * math.log(2) - 2 * js, abs=1e-4)
    kl = kl_divergence(Q, R).item()
    assert f_divergence_loss(t_q, t_r).item() == pytest.approx(1 - kl, abs=1e-3)


def test_logistic_loss_stays_finite():
    large = torch.tensor([1e4, -1e4])
    assert logistic_loss(large, large).isfinite()


# --- the adaptive contrast ------------------------------------------------------------------------


@pytest.fixture
def contrast(dtype, device):
    loc = torch.tensor([1.0, -2.0, 0.5], dtype=dtype, device=device)
    return AdaptiveContrast(loc, torch.tensor([0.5, 3.0, 1.0], dtype=dtype, device=device))


def test_contrast_is_torchs_normal(contrast):
    normal = torch.distributions.Independent(Normal(contrast.loc, contrast.scale), 1)
    z = torch.randn(4, 5, 3).to(contrast.loc)
    torch.testing.assert_close(contrast.log_prob(z), normal.log_prob(z))
    torch.testing.assert_close(
        contrast.log_prob(z),
        -0.5 * contrast.standardize(z).square().sum(-1)
        - contrast.scale.log().sum()
        - 1.5 * math.log(2 * math.pi),
    )


def test_contrast_samples_have_its_moments(contrast):
    n = 20_000
    z = contrast.standardize(contrast.sample(torch.Size((n // 10, 10)))).reshape(n, 3)
    assert z.dtype == contrast.loc.dtype
    assert (z.mean(0) * math.sqrt(n)).abs().max() < 4
    assert ((z.std(0) - 1) * math.sqrt(2 * n)).abs().max() < 4
    assert (torch.corrcoef(z.T) - torch.eye(3).to(z)).abs().max() < 4 / math.sqrt(n)


@pytest.mark.parametrize("decay", [0.0, 0.7])
def test_contrast_follows_the_moments(decay, dtype, device):
    """Moving averages of mean and variance, written out for two batches."""
    contrast = AdaptiveContrast(torch.zeros(2), torch.ones(2), decay).to(device, dtype)
    loc, variance = torch.zeros(2).to(contrast.loc), torch.ones(2).to(contrast.loc)
    for shift in (3.0, 5.0):
        z = shift + 2 * torch.randn(50, 2, dtype=dtype, device=device)
        contrast.adapt(z)
        loc = decay * loc + (1 - decay) * z.mean(0)
        variance = decay * variance + (1 - decay) * z.var(0)
        torch.testing.assert_close(contrast.loc, loc)
        torch.testing.assert_close(contrast.scale, variance.sqrt())


def test_one_sample_says_nothing_about_moments(contrast):
    before = {name: value.clone() for name, value in contrast.state_dict().items()}
    contrast.adapt(torch.full((1, 3), 9.0).to(contrast.loc))
    assert all(torch.equal(value, before[name]) for name, value in contrast.state_dict().items())


def test_no_gradient_through_the_moments(contrast):
    z = torch.randn(9, 3).to(contrast.loc).requires_grad_()
    contrast.adapt(z)
    assert list(contrast.parameters()) == []
    assert not contrast.loc.requires_grad
    assert not contrast.scale.requires_grad
    contrast.log_prob(z).sum().backward()
    torch.testing.assert_close(z.grad, -(z.detach() - contrast.loc) / contrast.scale**2)


def test_contrast_saves_its_moments(contrast):
    other = AdaptiveContrast(torch.zeros(3), torch.ones(3)).to(contrast.loc)
    other.load_state_dict(contrast.state_dict())
    z = torch.randn(4, 3).to(contrast.loc)
    assert torch.equal(other.log_prob(z), contrast.log_prob(z))


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_bad_decay(decay):
    with pytest.raises(ValueError, match=f"decay .* found {decay}"):
        AdaptiveContrast(torch.zeros(2), torch.ones(2), decay)


# --- the ratio and the implicit distribution ------------------------------------------------------


@pytest.fixture
def ratio(contrast):
    """A ratio with a discriminator that is not zero."""
    network = ResidualDiscriminator(3, hidden_dim=8, num_blocks=1).to(contrast.loc)
    nn.init.normal_(network.output.weight)
    return DensityRatio(network, contrast)


class Affine(nn.Module):
    """A secretly Gaussian sampler, z = b + A ε."""

    def __init__(self, matrix, shift):
        super().__init__()
        self.matrix = nn.Parameter(matrix)
        self.shift = nn.Parameter(shift)

    def forward(self, shape):
        return self.shift + torch.randn(*shape, self.shift.numel()).to(self.shift) @ self.matrix.T


@pytest.fixture
def implicit(ratio, dtype, device):
    sampler = Affine(torch.randn(3, 3, dtype=dtype, device=device), ratio.contrast.loc.clone())
    return ImplicitDistribution(sampler, ratio, dim=3)


def test_the_network_sees_standardised_samples(ratio):
    z = ratio.contrast.sample(torch.Size((6,)))
    expected = ratio.network((z - ratio.contrast.loc) / ratio.contrast.scale)
    torch.testing.assert_close(ratio(z), expected)
    torch.testing.assert_close(ratio.frozen(z), expected)


def test_frozen_weights_get_no_gradient(ratio):
    z = ratio.contrast.sample(torch.Size((6,))).requires_grad_()
    ratio(z).sum().backward()
    slope, z.grad = z.grad, None
    assert all(weight.grad.abs().sum() > 0 for weight in ratio.parameters())
    ratio.zero_grad()
    ratio.frozen(z).sum().backward()
    torch.testing.assert_close(z.grad, slope)
    assert all(weight.grad is None for weight in ratio.parameters())


def test_log_prob_is_ratio_plus_contrast(implicit):
    z = implicit.rsample((5,))
    expected = implicit.ratio(z) + implicit.ratio.contrast.log_prob(z)
    torch.testing.assert_close(implicit.log_prob(z), expected)
    slope = torch.autograd.grad(expected.sum(), z, retain_graph=True)[0]
    implicit.log_prob(z).sum().backward()
    torch.testing.assert_close(implicit.sampler.shift.grad, slope.sum(0))  # it came through z
    assert all(weight.grad is None for weight in implicit.ratio.parameters())


@pytest.mark.parametrize("sample_shape", [(), (5,), (2, 5)])
@pytest.mark.parametrize("batch_shape", [(), (4,), (3, 1)])
def test_shapes(implicit, sample_shape, batch_shape):
    q = implicit.expand(batch_shape)
    assert q.batch_shape == batch_shape
    assert q.event_shape == (3,)
    z = q.rsample(sample_shape)
    assert z.shape == sample_shape + batch_shape + (3,)
    assert q.log_prob(z).shape == sample_shape + batch_shape
    assert not q.sample(sample_shape).requires_grad
    assert len(z.reshape(-1, 3).unique(dim=0)) == z.numel() // 3  # independent copies


def test_samples_are_the_samplers(implicit):
    torch.manual_seed(1)
    z = implicit.rsample((4,))
    torch.manual_seed(1)
    assert torch.equal(z, implicit.sampler(torch.Size((4,))))
    assert implicit.has_rsample
    assert implicit.learned_density


@pytest.mark.parametrize("batch_shape", [(), (4,)])
def test_discriminate_trains_the_network_alone(implicit, batch_shape):
    before = implicit.ratio.contrast.loc.clone()
    t_q, t_r = implicit.expand(batch_shape).discriminate(7)
    assert t_q.shape == t_r.shape == (7, *batch_shape)
    assert not torch.equal(implicit.ratio.contrast.loc, before)
    logistic_loss(t_q, t_r).backward()
    assert all(param.grad is None for param in implicit.sampler.parameters())
    assert all(weight.grad.abs().sum() > 0 for weight in implicit.ratio.network.parameters())


def test_discriminate_puts_q_before_r(ratio):
    """With T = z₁, the means of the two tell which is which."""
    ratio.network = nn.Sequential(nn.Linear(3, 1, bias=False), nn.Flatten(-2)).to(
        ratio.contrast.loc
    )
    nn.init.constant_(ratio.network[0].weight, 1.0)

    ratio.contrast = NormalContrast(ratio.contrast.loc, ratio.contrast.scale)
    far = ratio.contrast.loc + 100
    q = ImplicitDistribution(lambda shape: far.expand(*shape, 3), ratio, 3)
    t_q, t_r = q.discriminate(10)
    assert t_q.min() > t_r.max() + 10


def test_both_losses_in_one_backward(implicit):
    """The adversary moves the contrast, which the graph of the guide's loss still holds."""
    z = implicit.rsample((20,))
    guide_loss = implicit.log_prob(z).mean()
    loc, scale = implicit.ratio.contrast.loc, implicit.ratio.contrast.scale
    z_bar = (z.detach() - loc) / scale
    (guide_loss + logistic_loss(*implicit.discriminate(20))).backward()
    t_slope = torch.func.grad(lambda x: implicit.ratio.network(x).sum())(z_bar)
    expected = ((t_slope - z_bar) / scale).mean(0)
    torch.testing.assert_close(implicit.sampler.shift.grad, expected)


WRAPPED = {
    "as it is": lambda q: q,
    "to_event": lambda q: q.expand((4,)).to_event(1),
    "masked": lambda q: q.mask(torch.tensor(True)),
    "transformed": lambda q: dist.TransformedDistribution(q, dist.transforms.ExpTransform()),
}


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_implicit_distributions_are_found(implicit, wrapping):
    def guide():
        pyro.sample("known", dist.Normal(0.0, 1.0))
        pyro.sample("z", WRAPPED[wrapping](implicit))

    trace = poutine.trace(guide).get_trace()
    (found,) = implicit_distributions(trace)
    assert found.ratio is implicit.ratio
    trace.log_prob_sum()
    known = poutine.trace(poutine.block(guide, hide=["z"])).get_trace()
    assert list(implicit_distributions(known)) == []


# --- a density learned of samples that are secretly Gaussian --------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("loss", OBJECTIVES)
@pytest.mark.parametrize("kind", [AdaptiveContrast, NormalContrast])
def test_learns_the_log_density_of_a_correlated_gaussian(loss, kind, device):
    """Correlation 0.9, so that neither contrast has q's shape.

    Over q's draws the error of log q has a mean and standard deviation below 0.1 nats. Untrained,
    log q is the contrast's, and its mean is off by KL(q ‖ r) ≥ −½ log(1 − 0.9²) = 0.83.
    """
    matrix = torch.tensor([[0.8, 0.0], [0.72, 0.8 * math.sqrt(0.19)]], device=device)
    shift = torch.tensor([0.5, -0.3], device=device)
    truth = torch.distributions.MultivariateNormal(shift, matrix @ matrix.T)
    network = ResidualDiscriminator(2).to(device)
    ratio = DensityRatio(network, kind(torch.zeros(2), torch.ones(2)).to(device))
    q = ImplicitDistribution(Affine(matrix, shift), ratio, dim=2)
    q.discriminate(4096)  # moments
    z = q.sample((20_000,))

    def error():
        with torch.no_grad():
            return q.log_prob(z) - truth.log_prob(z)

    assert error().mean() < -0.7
    steps = 3000
    optim = torch.optim.Adam(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optim, steps)
    for _ in range(steps):
        optim.zero_grad()
        loss(*q.discriminate(512)).backward()
        optim.step()
        schedule.step()
    assert error().mean().abs() < 0.1
    assert error().std() < 0.1


def test_a_contrast_stays_a_density():
    """After samples that are not finite, and after a guide that collapses to a point."""
    contrast = AdaptiveContrast(torch.zeros(2), torch.ones(2))
    contrast.adapt(torch.tensor([[1.0, math.nan], [2.0, 1.0], [3.0, 1.0]]))
    assert contrast.loc[0] != 0
    assert contrast.loc[1] == 0
    assert contrast.scale[1] == 1
    for _ in range(500):
        contrast.adapt(torch.ones(10, 2))
    assert (contrast.scale > 0).all()
    assert contrast.log_prob(torch.ones(2)).isfinite()


# --- given x --------------------------------------------------------------------------------------


@pytest.fixture
def conditional(dtype, device):
    """q(z|x) and r(z|x) for four rows of x, with a discriminator that is not zero."""
    x = torch.randn(4, 2, 3, dtype=dtype, device=device, requires_grad=True)
    loc = torch.randn(4, 3, dtype=dtype, device=device, requires_grad=True)
    contrast = NormalContrast(loc, loc.exp())
    network = ResidualDiscriminator(3, hidden_dim=8, num_blocks=1, x_dim=6).to(loc)
    nn.init.normal_(network.output.weight)
    return x, loc, DensityRatio(network, contrast, context=(x,))


def test_conditional_ratio_is_its_formula(conditional):
    x, loc, ratio = conditional
    z = torch.randn(5, 4, 3).to(loc).requires_grad_()
    expected = ratio.network(x, (z - loc) / loc.exp())
    torch.testing.assert_close(ratio(z), expected)
    torch.testing.assert_close(ratio.frozen(z), expected)
    normal = torch.distributions.Independent(Normal(loc, loc.exp()), 1)
    torch.testing.assert_close(ratio.contrast.log_prob(z), normal.log_prob(z))
    (ratio.frozen(z) + ratio.contrast.log_prob(z)).sum().backward()
    assert z.grad.abs().sum() > 0
    assert x.grad is None
    assert loc.grad is None
    assert all(weight.grad is None for weight in ratio.network.parameters())
    ratio(z).sum().backward()
    assert x.grad is None
    assert loc.grad is None
    assert all(weight.grad.abs().sum() > 0 for weight in ratio.network.parameters())


def test_conditional_samples_have_the_moments_of_each_row(conditional):
    _, loc, ratio = conditional
    n = 20_000
    z = ratio.contrast.sample(torch.Size((n, 4)))
    assert z.shape == (n, 4, 3)
    assert z.dtype == loc.dtype
    z_bar = (z - loc.detach()) / loc.detach().exp()
    assert (z_bar.mean(0) * math.sqrt(n)).abs().max() < 4.5
    assert ((z_bar.std(0) - 1) * math.sqrt(2 * n)).abs().max() < 4.5
    before = ratio.contrast.loc.clone()
    ratio.contrast.adapt(z.reshape(-1, 3))
    assert torch.equal(ratio.contrast.loc, before)


# --- parameters without the store -----------------------------------------------------------------


def test_parameters_are_shown_but_another_players():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    with poutine.trace(param_only=True) as capture:
        show_parameters(module, without=module[1])
    seen = {node["value"].unconstrained() for node in capture.trace.nodes.values()}
    assert seen == set(module[0].parameters())
    assert not list(pyro.get_param_store().keys())
