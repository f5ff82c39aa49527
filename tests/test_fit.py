"""The fitting loop, on problems whose every step can be worked out by hand."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import nn
from torch.distributions import constraints

from pyro_vae.fit import NonFiniteError, constant, cosine, fit, has_learned_density, linear
from pyro_vae.guides import AutoFlow, AutoImplicit
from pyro_vae.losses import AVB_ELBO
from pyro_vae.models import gauss
from pyro_vae.ratios import AdaptiveContrast, DensityRatio, ImplicitDistribution

pytestmark = pytest.mark.usefixtures("param_store")

fit = partial(fit, progress=False)
sgd = partial(torch.optim.SGD, lr=0.1)


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def point(*args):
    """A guide that is one number, the parameter ``at``; no randomness is left."""
    pyro.sample("z", dist.Delta(pyro.param("at", number(0.5))))


def energy(f):
    """A model with −log p(z) = f(z)."""

    def model(*args):
        z = pyro.sample("z", dist.Normal(number(0.0), number(1.0)).mask(False))
        pyro.factor("energy", -f(z))

    return model


SLOPE = energy(lambda z: z)  # the gradient is 1 everywhere
BOWL = energy(lambda z: 0.5 * z**2)


def at():
    return pyro.param("at").item()


def unless(threshold, f, otherwise):
    """Take f(z), and ``otherwise(z)`` from where z falls below a threshold on."""
    return energy(lambda z: f(z) if z > threshold else otherwise(z))


def interrupt(z):
    raise KeyboardInterrupt


# --- it fits --------------------------------------------------------------------------------------


def conjugate(x):
    """μ ~ N(0, 1), x_i ~ N(μ, 2), and a second, correlated number."""
    one = x.new_ones(())
    mu = pyro.sample("mu", dist.Normal(0 * one, one))
    nu = pyro.sample("nu", dist.Normal(mu, one))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(nu, 2 * one), obs=x)


def conjugate_posterior(x):
    """Mean and covariance of (μ, ν)."""
    n = len(x)
    precision = torch.tensor([[2.0, -1.0], [-1.0, 1.0 + n / 4]]).to(x)
    covariance = torch.linalg.inv(precision)
    return covariance @ torch.stack([0 * x.sum(), x.sum() / 4]), covariance


@pytest.mark.slow
@pytest.mark.parametrize(
    "make_guide", [AutoMultivariateNormal, AutoFlow], ids=["full rank", "flow"]
)
def test_recovers_a_conjugate_posterior(make_guide, dtype, device):
    """20,000 draws: standard errors of 0.007 sd of a mean and 0.5 % of a sd; 0.05 is the fit's."""
    x = torch.tensor([2.0, 0.5, 3.1, 1.2, -0.4], dtype=dtype, device=device)
    guide = make_guide(conjugate)
    elbo = Trace_ELBO(num_particles=32, vectorize_particles=True, max_plate_nesting=1)
    result = fit(conjugate, guide, elbo, x, num_steps=1500, average=0.99)
    mean, covariance = conjugate_posterior(x)
    with torch.no_grad():
        z = guide.get_posterior(x).sample((20_000,))
    sd = covariance.diagonal().sqrt()
    assert ((z.mean(0) - mean) / sd).abs().max() < 0.05
    assert (z.std(0) / sd - 1).abs().max() < 0.05
    correlation = covariance[0, 1] / sd.prod()
    assert torch.corrcoef(z.T)[0, 1].item() == pytest.approx(correlation.item(), abs=0.04)
    evidence = torch.distributions.MultivariateNormal(
        torch.zeros(5).to(x), 2 * torch.ones(5, 5).to(x) + 4 * torch.eye(5).to(x)
    ).log_prob(x)
    assert -result.losses[-100:].mean().item() == pytest.approx(evidence.item(), abs=0.02)


def test_mean_field_finds_the_conditional_scale():
    """Of a correlated posterior a mean-field guide keeps the means, with scales Λ_ii^(−1/2)."""
    x = torch.tensor([2.0, 0.5, 3.1, 1.2, -0.4])
    guide = AutoNormal(conjugate)
    elbo = TraceMeanField_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=1)
    fit(conjugate, guide, elbo, x, num_steps=500, optim=partial(torch.optim.Adam, lr=0.05))
    mean, _ = conjugate_posterior(x)
    scales = torch.tensor([2.0, 1 + 5 / 4]).rsqrt()
    median = guide.median(x)
    for i, site in enumerate(("mu", "nu")):
        assert median[site].item() == pytest.approx(mean[i].item(), abs=0.1)
        quantiles = guide.quantiles([0.5, 0.8413447], x)[site]
        assert (quantiles[1] - quantiles[0]).item() == pytest.approx(scales[i].item(), rel=0.1)


@pytest.mark.parametrize("make_guide", [AutoNormal, AutoFlow, AutoImplicit])
def test_same_seed_same_result(make_guide):
    results = []
    for seed in (1, 1, 2):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        guide = make_guide(gauss)
        found = fit(gauss, guide, AVB_ELBO(8), num_steps=4, average=0.5)
        results.append((found, guide.state_dict()))
    (a, state), (b, again), (c, _) = results
    assert torch.equal(a.losses, b.losses)
    assert torch.equal(a.adversary_losses.nan_to_num(), b.adversary_losses.nan_to_num())
    assert all(torch.equal(value, again[name]) for name, value in state.items())
    assert not torch.equal(a.losses, c.losses)


def test_a_learned_density_needs_an_adversary():
    guide = AutoImplicit(gauss)
    with pytest.raises(ValueError, match="Trace_ELBO has no adversary"):
        fit(gauss, guide, Trace_ELBO(), num_steps=1)


def test_agrees_with_pyros_svi():
    """The same steps as Pyro's own loop, with Adam at a constant rate."""
    losses, medians = [], []
    for ours in (True, False):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        guide, elbo = AutoNormal(conjugate), Trace_ELBO(max_plate_nesting=1)
        x = torch.tensor([2.0, 0.5])
        guide(x)
        pyro.set_rng_seed(2)
        if ours:
            adam = partial(torch.optim.Adam, lr=0.03)
            found = fit(conjugate, guide, elbo, x, num_steps=20, optim=adam, schedule=constant())
            losses.append(found.losses)
        else:
            guide(x)  # as fit does, to see whether the density is learned
            svi = SVI(conjugate, guide, pyro.optim.Adam({"lr": 0.03}), elbo)
            losses.append(torch.tensor([svi.step(x) for _ in range(20)], dtype=torch.float64))
        medians.append(guide.median(x))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(medians[0], medians[1])


# --- each step by hand ----------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [constant(), cosine(), cosine(0.2), linear(0.1, until=0.5)])
def test_schedule_scales_the_learning_rate(schedule):
    """On a slope of one, the parameter falls by the sum of the learning rates."""
    result = fit(SLOPE, point, Trace_ELBO(), num_steps=10, optim=sgd, schedule=schedule)
    rates = [0.1 * schedule(step / 10) for step in range(10)]
    assert at() == pytest.approx(0.5 - sum(rates), abs=1e-12)
    positions = [0.5 - sum(rates[:step]) for step in range(10)]
    assert result.losses.tolist() == pytest.approx(positions, abs=1e-12)
    assert result.adversary_losses.isnan().all()
    assert result.seconds > 0


def test_the_default_schedule_is_a_cosine():
    fit(SLOPE, point, Trace_ELBO(), num_steps=10, optim=sgd)
    fall = 0.1 * sum(0.5 * (1 + math.cos(math.pi * step / 10)) for step in range(10))
    assert at() == pytest.approx(0.5 - fall, abs=1e-12)


def test_schedule_shapes():
    assert [cosine(0.2)(t) for t in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.6, 0.2])
    assert [linear(0.1, 0.4)(t) for t in (0.0, 0.2, 0.4, 1.0)] == pytest.approx([0.1, 0.55, 1, 1])
    assert [constant()(t) for t in (0.0, 0.3, 1.0)] == [1, 1, 1]


def moving_average(values, average):
    """The first value is where it starts; after step k the decay is at most (1 + k)/(10 + k)."""
    mean = values[0]
    for k, value in enumerate(values[1:], start=1):
        decay = min(average, (1 + k) / (10 + k))
        mean = decay * mean + (1 - decay) * value
    return mean


@pytest.mark.parametrize("average", [0.0, 0.6])
def test_average_is_the_exponential_moving_average(average):
    """Gradient descent in a bowl, z ← 0.9 z."""
    seen = []
    pyro.param("at", number(0.5))
    fit(
        BOWL,
        point,
        Trace_ELBO(),
        num_steps=16,
        optim=sgd,
        schedule=constant(),
        average=average,
        callback=lambda step, loss: seen.append((step, at(), loss)),
        callback_every=5,
    )
    z = [0.5 * 0.9**step for step in range(17)]  # training goes on from z, not from the mean
    assert [step for step, _, _ in seen] == [0, 5, 10, 15, 16]
    for step, value, loss in seen:
        assert value == pytest.approx(moving_average(z[: step + 1], average), rel=1e-12)
        assert math.isnan(loss) if step == 0 else loss == pytest.approx(0.5 * z[step - 1] ** 2)
    assert at() == seen[-1][1]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("where", ["step", "callback"])
def test_an_interruption_leaves_averaged_parameters(failure, where):
    """After three good steps of z ← z − 0.1, wherever the fourth is interrupted."""

    def fail(z):
        raise failure

    def callback(step, loss):
        if step == 3 and where == "callback":
            raise failure

    model = unless(0.25, lambda z: z, fail if where == "step" else lambda z: z)
    with pytest.raises(failure):
        fit(
            model,
            point,
            Trace_ELBO(),
            num_steps=9,
            optim=sgd,
            schedule=constant(),
            average=0.5,
            callback=callback,
            callback_every=1,
        )
    assert at() == pytest.approx(moving_average([0.5, 0.4, 0.3, 0.2], 0.5))


def nan_gradient(z):
    """Finite, with a slope of 0 · ∞."""
    return (z * 0).sqrt()


@pytest.mark.parametrize(
    ("planted", "message"),
    [
        (lambda z: z * math.nan, "the loss is not finite.*'energy'"),
        (lambda z: z * math.inf, "the loss is not finite.*'energy'"),
        (nan_gradient, "a gradient is not finite.*no site in a fresh run"),
    ],
    ids=["nan", "inf", "gradient"],
)
@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize("average", [0.0, 0.5])
def test_a_nonfinite_step_leaves_the_last_good_parameters(planted, message, average):
    """0.5, 0.4, 0.3, and at 0.2 there is no going on; bit for bit what three steps give.

    While validation is on, Pyro itself stops at a NaN, with an error of its own.
    """
    kwargs = {"optim": sgd, "schedule": constant(), "average": average}
    fit(SLOPE, point, Trace_ELBO(), num_steps=3, **kwargs)
    good = at()
    pyro.clear_param_store()
    model = unless(0.25, lambda z: z, planted)
    with pytest.raises(NonFiniteError, match=message), pyro.validation_enabled(False):
        fit(model, point, Trace_ELBO(), num_steps=9, **kwargs)
    assert at() == good
    assert pyro.param("at").grad is None


def test_nonfinite_names_an_observed_site():
    def model(x):
        z = pyro.sample("z", dist.Normal(number(0.0), number(1.0)))
        pyro.sample("fine", dist.Normal(z, number(1.0)), obs=x)
        unit = dist.Uniform(number(0.0), number(1.0), validate_args=False)
        pyro.sample("x", unit, obs=x + 1)

    with pytest.raises(NonFiniteError, match=r"log_prob of model site 'x'") as error:
        fit(model, point, Trace_ELBO(), number(1.0), num_steps=3)
    assert "fine" not in str(error.value)
    assert at() == 0.5


# --- which parameters -----------------------------------------------------------------------------


def shifted(x):
    """p(z) = N(shift, 1) with the model's own parameter, p(x | z) = N(z, 1)."""
    shift = pyro.param("shift", number(0.0))
    z = pyro.sample("z", dist.Normal(shift, number(1.0)))
    pyro.sample("x", dist.Normal(z, number(1.0)), obs=x)


@pytest.mark.parametrize("train_model", [True, False])
def test_train_model(train_model):
    """One step of gradient descent: ∂/∂z = (z − shift) + (z − x), ∂/∂shift = shift − z."""
    fit(
        shifted,
        point,
        Trace_ELBO(),
        number(2.0),
        num_steps=1,
        optim=sgd,
        train_model=train_model,
    )
    assert at() == pytest.approx(0.5 - 0.1 * (0.5 - 1.5))
    assert pyro.param("shift").item() == pytest.approx(0.05 if train_model else 0.0)
    assert pyro.param("shift").grad is None  # nothing left for somebody else's optimiser
    assert pyro.param("at").grad is None


def test_function_guide_with_a_constraint():
    """The optimiser moves the unconstrained value: N(3, 2) is found by a normal guide."""

    def model():
        pyro.sample("z", dist.Normal(number(3.0), number(2.0)))

    def guide():
        loc = pyro.param("loc", number(0.0))
        scale = pyro.param("scale", number(1.0), constraint=constraints.positive)
        pyro.sample("z", dist.Normal(loc, scale))

    fit(
        model,
        guide,
        TraceMeanField_ELBO(),
        num_steps=300,
        optim=partial(torch.optim.Adam, lr=0.1),
    )
    assert pyro.param("loc").item() == pytest.approx(3.0, abs=0.02)
    assert pyro.param("scale").item() == pytest.approx(2.0, abs=0.02)


def test_guide_with_a_torch_module():
    """pyro.module: z is N(w · 2 + b, ·), whose best mean is 3."""
    net = nn.Linear(1, 1).double()

    def guide():
        pyro.module("net", net)
        pyro.sample("z", dist.Normal(net(number([2.0]))[0], number(1.0)))

    def model():
        pyro.sample("z", dist.Normal(number(3.0), number(1.0)))

    before = [param.clone() for param in net.parameters()]
    fit(model, guide, TraceMeanField_ELBO(), num_steps=200, optim=sgd)
    assert net(number([2.0])).item() == pytest.approx(3.0, abs=1e-3)
    assert all(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_a_parameter_that_appears_late():
    """From the fourth step on a second parameter is in the guide: it joins the optimiser."""

    def guide():
        z = pyro.param("at", number(0.5))
        if z < 0.25:
            z = z + pyro.param("late", number(0.0))
        pyro.sample("z", dist.Delta(z))

    fit(SLOPE, guide, Trace_ELBO(), num_steps=9, optim=sgd, schedule=linear(0.5, until=1.0))
    rates = [0.1 * (0.5 + 0.5 * step / 9) for step in range(9)]
    early, late = 0.5, 0.0
    for rate in rates:
        late -= rate if early < 0.25 else 0.0
        early -= rate
    assert late < 0
    assert at() == pytest.approx(early)
    assert pyro.param("late").item() == pytest.approx(late)


def test_likelihood_weight_scales_observed_sites_alone():
    """z = 0.5 is fixed: the loss is −log p(z) − w log p(x | z) − w · factor."""

    def model(x):
        z = pyro.sample("z", dist.Normal(number(0.0), number(1.0)))
        with pyro.plate("data", len(x)), pyro.poutine.scale(scale=2.0):
            pyro.sample("x", dist.Normal(z, number(1.0)), obs=x)
        pyro.factor("factor", 3 * z)

    x = number([1.0, -2.0])
    weight = linear(0.1, until=0.5)
    still = partial(torch.optim.SGD, lr=0.0)
    kwargs = {"num_steps": 5, "optim": still}
    found = fit(model, point, Trace_ELBO(), x, likelihood_weight=weight, **kwargs).losses
    prior = dist.Normal(0.0, 1.0).log_prob(number(0.5))
    likelihood = 2 * dist.Normal(0.5, 1.0).log_prob(x).sum() + 1.5
    for step in range(5):
        expected = -prior - weight(step / 5) * likelihood
        assert found[step].item() == pytest.approx(expected.item())
    plain = fit(model, point, Trace_ELBO(), x, **kwargs).losses
    assert plain[0].item() == pytest.approx((-prior - likelihood).item())
    assert Trace_ELBO().loss(model, point, x) == pytest.approx(plain[0].item())  # unscaled again


def test_arguments_reach_model_and_guide():
    def model(x, *, scale):
        z = pyro.sample("z", dist.Normal(number(0.0), scale))
        pyro.sample("x", dist.Normal(z, scale), obs=x)

    def guide(x, *, scale):
        pyro.sample("z", dist.Delta(pyro.param("at", x + scale)))

    fit(model, guide, Trace_ELBO(), number(1.0), scale=number(2.0), num_steps=1, optim=sgd)
    assert at() == pytest.approx(3.0 - 0.1 * (3 / 4 + 2 / 4))


# --- the adversary --------------------------------------------------------------------------------


class Counting(AVB_ELBO):
    def __init__(self):
        super().__init__(num_particles=4, max_plate_nesting=1)
        self.calls = []

    def differentiable_loss(self, *args, **kwargs):
        self.calls.append("guide")
        return super().differentiable_loss(*args, **kwargs)

    def adversary(self, *args, **kwargs):
        self.calls.append("adversary")
        return super().adversary(*args, **kwargs)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_adversary_goes_first_and_so_many_times(steps):
    elbo = Counting()
    guide = AutoImplicit(gauss)
    result = fit(gauss, guide, elbo, num_steps=2, num_adversary_steps=steps)
    assert elbo.calls == (["adversary"] * steps + ["guide"]) * 2
    assert result.adversary_losses.isfinite().all()


def test_no_adversary_for_a_known_density():
    elbo = Counting()
    result = fit(gauss, AutoNormal(gauss), elbo, num_steps=2)
    assert elbo.calls == ["guide"] * 2
    assert result.adversary_losses.isnan().all()


def test_an_adversary_for_a_wrapped_density():
    """Independent copies of an implicit distribution under ``to_event``."""
    contrast = AdaptiveContrast(torch.zeros(2), torch.ones(2))
    ratio = DensityRatio(nn.Sequential(nn.Linear(2, 1), nn.Flatten(-2)), contrast)
    scale = nn.Parameter(torch.ones(2))
    q = ImplicitDistribution(lambda shape: scale * torch.randn(*shape, 2), ratio, 2)

    def guide():
        pyro.sample("z", q.expand((3,)).to_event(1))

    assert has_learned_density(guide)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1, found 0"),
        ({"num_adversary_steps": 0}, "num_adversary_steps must be at least 1, found 0"),
        ({"callback_every": 0}, "callback_every must be at least 1, found 0"),
        ({"average": 1.0}, r"average must be in \[0, 1\), found 1.0"),
        ({"average": -0.1}, r"average must be in \[0, 1\), found -0.1"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        fit(SLOPE, point, Trace_ELBO(), **{"num_steps": 2, **kwargs})


@pytest.mark.parametrize("model", [SLOPE, shifted], ids=["no parameter", "held fixed"])
def test_nothing_to_fit(model):
    def guide(*args):
        pyro.sample("z", dist.Delta(number(0.5)))

    with pytest.raises(ValueError, match="nothing to fit"):
        fit(model, guide, Trace_ELBO(), number(1.0), num_steps=2, train_model=False)


def test_takes_pyros_optimisers():
    losses = []
    for optim in (pyro.optim.Adam({"lr": 0.05}), partial(torch.optim.Adam, lr=0.05)):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        guide = AutoNormal(gauss)
        losses.append(fit(gauss, guide, Trace_ELBO(), num_steps=5, optim=optim).losses)
    assert torch.equal(*losses)


def test_a_pyro_optimiser_with_a_scheduler_is_refused():
    scheduler = pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.9}
    )
    with pytest.raises(ValueError, match="optim: found a Pyro optimiser with a scheduler"):
        fit(gauss, AutoNormal(gauss), Trace_ELBO(), num_steps=1, optim=scheduler)
