"""The two players of adversarial variational Bayes."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import nn

from pyro_vae import fit
from pyro_vae.guides import AutoFlow, AutoImplicit
from pyro_vae.losses import AVB_ELBO

pytestmark = pytest.mark.usefixtures("param_store")


def positive(x):
    """A rate with a log-normal prior: the constrained support's Jacobian counts."""
    one = x.new_ones(())
    rate = pyro.sample("rate", dist.LogNormal(0 * one, one))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Exponential(rate), obs=x)


def hierarchical(x):
    one = x.new_ones(())
    mu = pyro.sample("mu", dist.Normal(0 * one, one))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, one))
        pyro.sample("x", dist.Normal(z, 0.5 * one), obs=x)


def trainable(x):
    """z ~ N(shift, 1) with a parameter of the model's own."""
    shift = pyro.param("shift", x.new_zeros(()))
    z = pyro.sample("z", dist.Normal(shift, x.new_ones(())))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, x.new_tensor(0.5)), obs=x)


@pytest.fixture
def x(dtype, device):
    return torch.tensor([0.5, 1.5, 0.8], dtype=dtype, device=device)


def implicit(model, x, **kwargs):
    """An implicit guide whose discriminator is not zero."""
    guide = AutoImplicit(model, hidden_dims=(16,), **kwargs)
    guide.setup(x)
    nn.init.normal_(guide.ratio.network.output.weight, std=0.3)
    return guide


def snapshot(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def changed(module, before):
    """Names of the parameters and buffers that differ from a snapshot."""
    return {name for name, value in module.state_dict().items() if not value.equal(before[name])}


@pytest.mark.parametrize("contrast", ["adaptive", "prior"])
def test_value_is_the_formula(contrast, x):
    """E_q [T(z̄) + log r(z) − log p(x, z)], over the same random numbers."""
    guide = implicit(positive, x, contrast=contrast)
    elbo = AVB_ELBO(num_particles=7, max_plate_nesting=1)
    torch.manual_seed(1)
    found = elbo.differentiable_loss(positive, guide, x)

    torch.manual_seed(1)
    sampler, r, t = guide.sampler, guide.ratio.contrast, guide.ratio.network
    noise = torch.randn(7, 1, sampler.noise_dim, dtype=x.dtype, device=x.device)
    z = sampler.loc + sampler.scale * sampler.network(noise)[:, 0]  # [7, 1], log rate
    log_2pi = math.log(2 * math.pi)
    if contrast == "adaptive":
        z_bar = (z - r.loc) / r.scale
        log_r = (-0.5 * z_bar**2 - r.scale.log() - 0.5 * log_2pi)[:, 0]
    else:
        z_bar = z
        log_r = (-0.5 * z**2 - 0.5 * log_2pi)[:, 0]
    rate = z.exp()
    log_prior = -0.5 * z**2 - 0.5 * log_2pi  # of log rate: N(0, 1), Jacobian included
    log_likelihood = (rate.log() - rate * x).sum(-1)
    expected = (t(z_bar) + log_r - log_prior[:, 0] - log_likelihood).mean()
    assert found.dtype == x.dtype
    torch.testing.assert_close(found, expected)


def test_three_ways_to_ask_for_the_value(x):
    guide = implicit(positive, x)
    elbo = AVB_ELBO(num_particles=5, max_plate_nesting=1)
    values = []
    for method in (elbo.differentiable_loss, elbo.loss, elbo.loss_and_grads):
        torch.manual_seed(1)
        values.append(method(positive, guide, x))
    assert isinstance(values[1], float)
    assert values[0].item() == values[1] == values[2]
    torch.manual_seed(1)
    assert elbo(positive, guide)(x).item() == values[0].item()  # as a torch module


def test_vectorised_and_single_particles_agree(x):
    """Means of 40 evaluations over 25 particles each, within four standard errors."""
    guide = implicit(hierarchical, x)
    means, variances = [], []
    for vectorize in (True, False):
        elbo = AVB_ELBO(num_particles=25, max_plate_nesting=1, vectorize_particles=vectorize)
        values = torch.tensor([elbo.loss(hierarchical, guide, x) for _ in range(40)])
        means.append(values.mean())
        variances.append(values.var() / 40)
    assert (means[0] - means[1]).abs() < 4 * sum(variances).sqrt()


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("make_guide", [AutoNormal, AutoMultivariateNormal, AutoFlow])
def test_is_trace_elbo_for_a_known_density(make_guide, vectorize, x):
    """Same random numbers, same value, same gradients."""
    guide = make_guide(hierarchical)
    guide(x)
    kwargs = {"num_particles": 6, "vectorize_particles": vectorize, "max_plate_nesting": 1}
    results = []
    for elbo in (AVB_ELBO(**kwargs), Trace_ELBO(**kwargs)):
        guide.zero_grad()
        torch.manual_seed(1)
        value = elbo.loss_and_grads(hierarchical, guide, x)
        results.append([torch.tensor(value), *(param.grad for param in guide.parameters())])
    for ours, pyros in zip(*results, strict=True):
        torch.testing.assert_close(ours, pyros)


def test_particles_are_vectorised_unless_told_otherwise():
    assert AVB_ELBO().vectorize_particles
    assert not AVB_ELBO(vectorize_particles=False).vectorize_particles
    assert AVB_ELBO(num_particles=5).num_adversary_particles == 15
    assert AVB_ELBO(retain_graph=True).retain_graph is True  # keywords arrive where they belong


@pytest.mark.parametrize("objective", ["logistic", "f-divergence"])
def test_adversary_is_its_objective(objective, x):
    guide = implicit(positive, x, contrast="prior")
    elbo = AVB_ELBO(num_adversary_particles=50, objective=objective)
    torch.manual_seed(1)
    found = elbo.adversary(positive, guide, x)
    torch.manual_seed(1)
    guide(x)  # the adversary runs the guide once
    z = guide.sampler(torch.Size((50,)))
    t_q = guide.ratio.network(z)
    t_r = guide.ratio.network(guide.ratio.contrast.sample(torch.Size((50,))))
    if objective == "logistic":
        expected = -t_q.sigmoid().log().mean() - (1 - t_r.sigmoid()).log().mean()
    else:
        expected = t_r.exp().mean() - t_q.mean()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("contrast", ["adaptive", "prior"])
def test_as_two_svis_the_players_keep_apart(contrast, x):
    """Each step moves all the parameters of its own player, and none of the other's."""
    guide = implicit(trainable, x, contrast=contrast)
    elbo = AVB_ELBO(num_particles=8)
    adam = {"lr": 1e-2}
    svi = SVI(trainable, guide, pyro.optim.Adam(adam), elbo)
    adversary = SVI(trainable, guide, pyro.optim.Adam(adam), elbo.adversary)
    names = {name for name, _ in guide.named_parameters()}
    of_t = {name for name in names if name.startswith("ratio.network.")}
    moments = {name for name in guide.state_dict() if name.startswith("ratio.contrast.")}
    assert of_t
    assert names - of_t

    for _ in range(2):
        before, shift = snapshot(guide), pyro.param("shift").item()
        assert math.isfinite(svi.step(x))
        assert changed(guide, before) == names - of_t
        assert pyro.param("shift").item() != shift

        before, shift = snapshot(guide), pyro.param("shift").item()
        assert math.isfinite(adversary.step(x))
        assert changed(guide, before) == of_t | moments
        assert pyro.param("shift").item() == shift


@pytest.mark.parametrize("contrast", ["adaptive", "prior"])
def test_each_player_shows_pyro_its_own_parameters(contrast, x):
    """SVI gives its optimiser all that it sees, and weight decay needs no gradient."""
    guide = implicit(trainable, x, contrast=contrast)
    elbo = AVB_ELBO(num_particles=8, max_plate_nesting=1)
    seen = []
    for loss in (elbo.differentiable_loss, elbo.adversary):
        with poutine.trace(param_only=True) as trace:
            loss(trainable, guide, x)
        seen.append({node["value"].unconstrained() for node in trace.trace.nodes.values()})
    of_t = set(guide.ratio.network.parameters())
    assert seen[0] == {*guide.parameters(), pyro.param("shift").unconstrained()} - of_t
    assert seen[1] == of_t


def test_one_svi_under_trace_elbo_leaves_the_discriminator_alone(x):
    guide = implicit(trainable, x)
    svi = SVI(trainable, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    before = snapshot(guide)
    svi.step(x)
    assert changed(guide, before) == {n for n in before if n.startswith("sampler.network.")}


@pytest.mark.parametrize(
    ("still", "moving"), [("schedule", "ratio."), ("adversary_schedule", "sampler.network.")]
)
def test_fit_keeps_the_players_apart(still, moving, x):
    """With one player's learning rate at zero, only the other moves."""
    guide = implicit(positive, x)
    before = snapshot(guide)
    schedules = {"schedule": lambda _: 1.0, "adversary_schedule": lambda _: 1.0}
    schedules[still] = lambda _: 0.0
    fit(positive, guide, AVB_ELBO(8), x, num_steps=2, progress=False, **schedules)
    weights = {name for name, _ in guide.named_parameters()}
    assert weights & changed(guide, before) == {n for n in weights if n.startswith(moving)}


@pytest.mark.parametrize("order", ["guide first", "adversary first"])
def test_both_players_in_one_backward(order, x):
    """The sum of the two losses has the gradients of each (their parameters are disjoint)."""
    guide = implicit(positive, x, contrast="prior")
    elbo = AVB_ELBO(num_particles=8, max_plate_nesting=1)
    losses = [elbo.differentiable_loss, elbo.adversary]
    if order == "adversary first":
        losses.reverse()
    torch.manual_seed(1)
    sum(loss(positive, guide, x) for loss in losses).backward()
    together = {name: param.grad for name, param in guide.named_parameters()}
    guide.zero_grad()
    torch.manual_seed(1)
    for loss in losses:
        loss(positive, guide, x).backward()
    for name, param in guide.named_parameters():
        assert param.grad.abs().sum() > 0
        torch.testing.assert_close(together[name], param.grad)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"objective": "hinge"}, r"one of \['f-divergence', 'logistic'\], found 'hinge'"),
        ({"num_particles": 0}, "num_particles must be at least 1, found 0"),
        ({"num_adversary_particles": 0}, "num_adversary_particles must be at least 1, found 0"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        AVB_ELBO(**kwargs)


def test_guide_sites_must_be_reparameterisable(x):
    def guide(x):
        rate = pyro.param("alpha", x.new_ones(()))
        pyro.sample("rate", dist.Gamma(rate, rate).has_rsample_(False))

    with pytest.raises(ValueError, match=r"guide site 'rate' .*reparameterisable.* Gamma"):
        AVB_ELBO(max_plate_nesting=1).differentiable_loss(positive, guide, x)


def test_adversary_needs_a_density_to_learn(x):
    guide = AutoNormal(positive)
    with pytest.raises(ValueError, match=r"no guide site with a learned density.*'rate'"):
        AVB_ELBO().adversary(positive, guide, x)


# --- the posterior of one number, in closed form --------------------------------------------------


def conjugate(x):
    one = x.new_ones(())
    z = pyro.sample("z", dist.Normal(0 * one, one))
    pyro.sample("x", dist.Normal(z, 0.5 * one), obs=x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("contrast", "objective"),
    [("adaptive", "logistic"), ("prior", "logistic"), ("adaptive", "f-divergence")],
)
def test_recovers_a_conjugate_posterior(contrast, objective):
    """z | x is N(0.8 x, 0.2) = N(0.96, 0.447²).

    20,000 draws give standard errors of 0.003 and 0.002; what is left is the fit's: 0.03 each,
    7 % of a standard deviation. A collapsed guide is 0.4 away, the prior 0.5 and 0.9.
    """
    x = torch.tensor(1.2)
    guide = AutoImplicit(conjugate, contrast=contrast)
    elbo = AVB_ELBO(num_particles=64, objective=objective)
    result = fit(conjugate, guide, elbo, x, num_steps=1500, average=0.995, progress=False)
    with torch.no_grad():
        z = guide.get_posterior(x).sample((20_000,))
    assert z.mean().item() == pytest.approx(0.96, abs=0.03)
    assert z.std().item() == pytest.approx(math.sqrt(0.2), abs=0.03)
    evidence = dist.Normal(0.0, math.sqrt(1.25)).log_prob(x).item()
    assert -result.losses[-200:].mean().item() == pytest.approx(evidence, abs=0.05)
