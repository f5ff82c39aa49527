"""The observations: values by scipy, sums over all levels, draws, ranges."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from pyro_vae.curvature import output_curvature
from pyro_vae.models import observations
from pyro_vae.models.observations import (
    Bernoulli,
    ContinuousBernoulli,
    ContinuousBernoulliDistribution,
    DiscretizedLogistic,
    DiscretizedLogisticDistribution,
    Gaussian,
    Observation,
)

OBSERVATIONS = {
    "Bernoulli": Bernoulli,
    "ContinuousBernoulli": ContinuousBernoulli,
    "DiscretizedLogistic": DiscretizedLogistic,
    "DiscretizedLogistic-fixed": partial(DiscretizedLogistic, 17, 0.1),
    "DiscretizedLogistic-learned": partial(DiscretizedLogistic, 4, "learned"),
    "Gaussian": Gaussian,
    "Gaussian-learned": partial(Gaussian, "learned"),
    "Gaussian-pixel": partial(Gaussian, "pixel"),
}
EVENTS = {"vector": (6,), "matrix": (2, 3), "image": (3, 2, 2)}


@pytest.fixture(params=OBSERVATIONS)
def observation(request, dtype):
    return OBSERVATIONS[request.param]().to(dtype)


@pytest.fixture(params=EVENTS)
def event(request):
    return EVENTS[request.param]


def params_of(observation: Observation, event: tuple[int, ...], batch=(4,), dtype=torch.float64):
    return torch.randn(*batch, observation.num_params * event[0], *event[1:], dtype=dtype)


def test_every_observation_is_tested():
    found = {
        name
        for name, value in vars(observations).items()
        if isinstance(value, type) and issubclass(value, Observation) and name[0] != "_"
    }
    assert {name.split("-")[0] for name in OBSERVATIONS} == found - {"Observation"}


# --- the contract ---------------------------------------------------------------------------------


def test_shapes_and_types(observation, event, dtype, device):
    observation = observation.to(device)
    params = params_of(observation, event, (2, 4)).to(device, dtype)
    p = observation.dist(params, len(event))
    assert (p.batch_shape, p.event_shape) == ((2, 4), event)
    x = p.sample()
    observation.check(x)
    assert x.shape == (2, 4, *event)
    assert x.dtype == p.log_prob(x).dtype == p.mean.dtype == dtype
    assert p.log_prob(x).shape == (2, 4)
    assert torch.equal(observation.mean(params, len(event)), p.mean)
    assert p.mean.shape == (2, 4, *event)
    assert p.expand((5, 2, 4)).sample().shape == (5, 2, 4, *event)
    torch.testing.assert_close(p.expand((5, 2, 4)).log_prob(x)[3], p.log_prob(x))


def test_elements_are_independent_of_one_another(observation, event):
    """Parameters of an element are those at its own place, stacked in the first dimension."""
    params = params_of(observation, event)
    x = observation.dist(params, len(event)).sample()
    by_element = params.reshape(4, observation.num_params, -1)
    alone = sum(
        observation.dist(by_element[..., i], 1).log_prob(x.flatten(1)[:, i : i + 1])
        for i in range(math.prod(event))
    )
    torch.testing.assert_close(observation.dist(params, len(event)).log_prob(x), alone)


def test_draws_have_the_mean(observation):
    params = 0.5 + 0.2 * params_of(observation, (8,), ())  # no level so rare as to be missed
    p = observation.dist(params, 1)
    draws = p.sample((20_000,))
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - p.mean).abs() < 4.5 * error).all()


def test_gradients_reach_parameters_and_decoder(observation):
    params = params_of(observation, (3, 2, 2)).requires_grad_()
    x = observation.dist(params).sample()
    (observation.dist(params).log_prob(x).sum() + observation.mean(params).sum()).backward()
    for tensor in (params, *observation.parameters()):
        assert tensor.grad.isfinite().all()
        assert (tensor.grad != 0).all()


def test_derivatives_are_those_of_finite_differences(observation):
    """Twice: GRAE differentiates its curvature."""
    params = 2 * params_of(observation, (3, 1, 2)).requires_grad_()
    x = observation.dist(params).sample()
    value = lambda g: observation.dist(g).log_prob(x)  # noqa: E731
    assert torch.autograd.gradcheck(value, params)
    assert torch.autograd.gradgradcheck(value, params)
    assert torch.autograd.gradcheck(observation.mean, params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.0, 1e-8, 30.0, 300.0])
def test_extreme_parameters_stay_finite(observation, size, dtype):
    observation = observation.to(dtype)
    base = torch.tensor([size, -size], dtype=dtype)
    params = base.repeat(observation.num_params).requires_grad_()
    for x in (torch.zeros(2, dtype=dtype), torch.ones(2, dtype=dtype)):
        p = observation.dist(params, 1)
        (grad,) = torch.autograd.grad(p.log_prob(x) + p.mean.sum(), params)
        assert p.log_prob(x).isfinite()
        assert grad.isfinite().all()
    assert p.sample((100,)).isfinite().all()


def test_state_dict_round_trip(observation):
    for param in observation.parameters():
        torch.nn.init.constant_(param, 1.5)
    twin = type(observation)(
        **{k: getattr(observation, k) for k in ("levels", "scale") if hasattr(observation, k)}
    ).double()
    twin.load_state_dict(observation.state_dict())
    params = params_of(observation, (6,))
    x = observation.dist(params, 1).sample()
    assert torch.equal(twin.dist(params, 1).log_prob(x), observation.dist(params, 1).log_prob(x))
    assert repr(twin) == repr(observation)


# --- values ---------------------------------------------------------------------------------------


def test_bernoulli_is_a_cross_entropy_on_grey_values_too():
    logits = torch.randn(5, 7, dtype=torch.float64)
    p = torch.sigmoid(logits)
    for x in (torch.rand_like(p), torch.rand_like(p).round()):
        expected = (x * p.log() + (1 - x) * (1 - p).log()).sum(-1)
        torch.testing.assert_close(Bernoulli().dist(logits, 1).log_prob(x), expected)
    torch.testing.assert_close(Bernoulli().mean(logits, 1), p)


def test_gaussian_by_scipy():
    x, loc, raw = torch.randn(3, 5, 4, dtype=torch.float64)
    gaussian = Gaussian("pixel", min_scale=0.2, init_scale=0.7)
    scale = 0.2 + np.log1p(np.exp(raw.numpy() + math.log(math.expm1(0.5))))
    expected = stats.norm(loc.numpy(), scale).logpdf(x.numpy()).sum(-1)
    found = gaussian.dist(torch.cat([loc, raw], -1), 1).log_prob(x)
    np.testing.assert_allclose(found.numpy(), expected)
    expected = stats.norm(loc.numpy(), 0.3).logpdf(x.numpy()).sum(-1)
    np.testing.assert_allclose(Gaussian(0.3).dist(loc, 1).log_prob(x).numpy(), expected)


@pytest.mark.parametrize("make", [Gaussian, partial(DiscretizedLogistic, 256)])
def test_scales_start_where_asked_and_stay_above_their_floor(make):
    for kind in ("learned", "pixel"):
        observation = make(scale=kind, min_scale=0.02, init_scale=0.4)
        params = torch.zeros(2 if kind == "pixel" else 1)
        assert observation.dist(params, 1).base_dist.scale.item() == pytest.approx(0.4)
        if kind == "learned":
            torch.nn.init.constant_(observation.raw_scale, -1e3)
        else:
            params[1] = -1e3
        assert observation.dist(params, 1).base_dist.scale.item() == pytest.approx(0.02)
    assert list(make(scale=0.5).parameters()) == []


@pytest.mark.parametrize("logit", [-40.0, -3.0, -0.51, -0.49, -1e-4, 0.0, 1e-9, 0.3, 2.0, 40.0])
def test_continuous_bernoulli_by_quadrature(logit):
    """Normalised; mean, variance, entropy and cdf are the integrals that they should be."""
    p = ContinuousBernoulliDistribution(logits=torch.tensor(logit, dtype=torch.float64))

    def log_prob(x: float) -> float:
        return p.log_prob(torch.tensor(x, dtype=torch.float64)).item()

    def integral(function, end=1.0) -> float:
        value, _ = integrate.quad(
            lambda x: function(x) * math.exp(log_prob(x)), 0, end, points=[0.05, 0.95][: int(end)]
        )
        return value

    assert integral(lambda x: 1.0) == pytest.approx(1, rel=1e-9)
    mean = integral(lambda x: x)
    assert p.mean.item() == pytest.approx(mean, rel=1e-9)
    assert p.variance.item() == pytest.approx(integral(lambda x: (x - mean) ** 2), rel=1e-8)
    assert p.entropy().item() == pytest.approx(-integral(log_prob), rel=1e-8, abs=1e-12)
    cdf = p.cdf(torch.tensor(0.3, dtype=torch.float64))
    assert cdf.item() == pytest.approx(integral(lambda x: 1.0, 0.3), rel=1e-8)
    levels = torch.tensor([0.0, 0.01, 0.5, 0.9, 1.0], dtype=torch.float64)
    torch.testing.assert_close(p.cdf(p.icdf(levels)), levels)


def test_continuous_bernoulli_beside_torch():
    """Where torch's is sound: not at the middle, whose series is short, nor beyond 16."""
    logits = torch.tensor([-9.0, -2.0, 0.7, 5.0], dtype=torch.float64)
    ours = ContinuousBernoulliDistribution(logits=logits)
    theirs = torch.distributions.ContinuousBernoulli(logits=logits)
    x = torch.rand(9, 4, dtype=torch.float64)
    for name in ("log_prob", "cdf", "icdf"):
        torch.testing.assert_close(getattr(ours, name)(x), getattr(theirs, name)(x))
    torch.testing.assert_close(ours.mean, theirs.mean)
    torch.testing.assert_close(ours.variance, theirs.variance)
    torch.testing.assert_close(ours.entropy(), theirs.entropy())


def test_continuous_bernoulli_gradient_in_single_precision():
    """x − E x within rounding, at all logits; torch's is off by 1e-3 and more near λ = ½."""
    exact = torch.linspace(-0.6, 0.6, 2001, dtype=torch.float64)
    single = exact.float().requires_grad_()
    x = torch.tensor(0.25)
    ContinuousBernoulliDistribution(logits=single).log_prob(x).sum().backward()
    mean = ContinuousBernoulliDistribution(logits=single.detach().double()).mean
    assert (single.grad - (0.25 - mean)).abs().max() < 2e-6
    theirs = exact.float().requires_grad_()
    torch.distributions.ContinuousBernoulli(logits=theirs).log_prob(x).sum().backward()
    assert (theirs.grad - (0.25 - mean)).abs().max() > 1e-4


def test_continuous_bernoulli_has_the_curvature_that_grae_takes():
    logits = torch.tensor([-3.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    p = ContinuousBernoulliDistribution(logits=logits)
    (grad,) = torch.autograd.grad(p.log_prob(x).sum(), logits, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), logits)
    (curved,) = output_curvature(p, x).curvature(torch.ones_like(logits))
    torch.testing.assert_close(curved, -second)


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("loc", [-0.3, 0.0, 0.52, 1.4])
@pytest.mark.parametrize("scale", [0.002, 0.05, 3.0])
def test_discretized_logistic_by_scipy(levels, loc, scale):
    p = DiscretizedLogisticDistribution(
        torch.tensor(loc, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64), levels
    )
    x = torch.linspace(0, 1, levels, dtype=torch.float64)
    half = 0.5 / (levels - 1)
    edges = np.concatenate([[-np.inf], x.numpy()[1:] - half, [np.inf]])
    logistic = stats.logistic(loc, scale)
    # differences of whichever of the two tails is the smaller number
    expected = np.where(x.numpy() < loc, np.diff(logistic.cdf(edges)), -np.diff(logistic.sf(edges)))
    mass = p.log_prob(x).exp()
    np.testing.assert_allclose(mass.numpy(), expected, rtol=1e-9, atol=1e-300)
    torch.testing.assert_close(mass.sum(), torch.ones_like(mass.sum()))
    torch.testing.assert_close(p.mean, (mass * x).sum())


def test_discretized_logistic_is_stable_in_its_tails():
    """Log mass of a level 1,000 scales away, where both cdfs are equal; by the exponential tail."""
    for dtype in (torch.float32, torch.float64):
        loc, scale = torch.tensor(0.0, dtype=dtype), torch.tensor(5e-4, dtype=dtype)
        loc.requires_grad_()
        p = DiscretizedLogisticDistribution(loc, scale)
        x = torch.tensor(128 / 255, dtype=dtype)
        value = p.log_prob(x)
        expected = -(127.5 / 255) / 5e-4 + math.log(-math.expm1(-1 / 255 / 5e-4))
        assert value.item() == pytest.approx(expected, rel=1e-6)
        (grad,) = torch.autograd.grad(value, loc)
        assert grad.item() == pytest.approx(2000, rel=1e-6)


def test_discretized_logistic_draws_each_level_as_often_as_it_says():
    p = DiscretizedLogisticDistribution(torch.tensor(0.7), torch.tensor(0.2), levels=5)
    draws = p.sample((20_000,))
    x = torch.linspace(0, 1, 5)
    mass = p.log_prob(x).exp()
    found = torch.stack([(draws == level).float().mean() for level in x])
    assert ((found - mass).abs() < 4.5 * (mass * (1 - mass) / 20_000).sqrt()).all()


def test_discretized_logistic_validates():
    one = torch.tensor(1.0)
    with pytest.raises(ValueError, match="scale"):
        DiscretizedLogisticDistribution(one, -one, validate_args=True)
    with pytest.raises(ValueError, match="levels must be at least 2, found 1"):
        DiscretizedLogisticDistribution(one, one, 1)
    p = DiscretizedLogisticDistribution(one, one, 5, validate_args=True)
    with pytest.raises(ValueError, match="support"):
        p.log_prob(torch.tensor(0.4))


# --- bad input ------------------------------------------------------------------------------------


def x_with(value: float, like: float = 0.0) -> Tensor:
    x = torch.full((2, 3), like)
    x[1, 1] = value
    return x


@pytest.mark.parametrize("name", OBSERVATIONS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"found 1 of 6 that are not, such as {value}"):
        OBSERVATIONS[name]().check(x_with(value))


@pytest.mark.parametrize("name", [name for name in OBSERVATIONS if "Gaussian" not in name])
@pytest.mark.parametrize("value", [-0.01, 1.01, 255.0])
def test_values_beyond_the_unit_interval_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"takes numbers in \[0, 1\].*such as {value:.6g}"):
        OBSERVATIONS[name]().check(x_with(value))


def test_ranges_that_are_taken():
    grey = torch.tensor([0.0, 0.3, 1.0])
    Bernoulli().check(grey)
    ContinuousBernoulli().check(grey)
    Gaussian().check(torch.tensor([-7.0, 300.0]))
    for dtype in (torch.float16, torch.float32, torch.float64):
        DiscretizedLogistic().check(torch.arange(256).to(dtype) / 255)
        DiscretizedLogistic(17).check(torch.arange(17).to(dtype) / 16)
    kinds = [OBSERVATIONS[name]().kind for name in ("Bernoulli", "DiscretizedLogistic", "Gaussian")]
    assert kinds == ["unit", "unit", "real"]


def test_values_between_levels_are_refused():
    with pytest.raises(ValueError, match=r"multiples of 1/255 \(levels=256\).*such as 0.166667"):
        DiscretizedLogistic().check(x_with(1 / 6))


def test_integers_are_refused():
    with pytest.raises(ValueError, match=r"Bernoulli takes floating-point numbers, found .*int64"):
        Bernoulli().check(torch.ones(3, dtype=torch.int64))


def test_a_check_under_vmap_passes_by():
    def total(x: Tensor) -> Tensor:
        Bernoulli().check(x)
        return Bernoulli().dist(torch.zeros(3), 1).log_prob(x)

    assert torch.vmap(total)(torch.rand(4, 3)).shape == (4,)


def test_params_of_a_wrong_size():
    with pytest.raises(ValueError, match=r"Gaussian needs 2 numbers.*found params .*\[4, 3\]"):
        Gaussian("pixel").dist(torch.zeros(4, 3), 1)
    with pytest.raises(ValueError, match=r"Bernoulli needs 1 numbers.*found params .*\[4, 3\]"):
        Bernoulli().dist(torch.zeros(4, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 0.0}, "scale must be a positive number, 'learned' or 'pixel', found 0.0"),
        ({"scale": "element"}, "scale must be a positive number.*found 'element'"),
        ({"scale": "pixel", "min_scale": 0.0}, "min_scale must be positive, found 0.0"),
        ({"scale": "pixel", "min_scale": 0.9}, "init_scale must be above min_scale 0.9"),
    ],
)
@pytest.mark.parametrize("make", [Gaussian, DiscretizedLogistic])
def test_bad_scales(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_bad_levels():
    with pytest.raises(ValueError, match="levels must be at least 2, found 1"):
        DiscretizedLogistic(1)
