"""The contract that every guide keeps, whatever its family."""

import copy
from functools import partial

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import nn

from pyro_vae import guides
from pyro_vae.guides import AutoFlow, AutoImplicit
from pyro_vae.guides.flow import zuko  # imported from here, it leaves validation on
from pyro_vae.models import eight_schools_avb

pytestmark = pytest.mark.usefixtures("param_store")

SMALL = {"transforms": 2, "hidden_features": (8,)}
GUIDES = {
    "AutoFlow": AutoFlow,
    "AutoFlow-NSF": partial(AutoFlow, flow=zuko.flows.NSF, **SMALL),
    "AutoFlow-MAF": partial(AutoFlow, flow=zuko.flows.MAF, **SMALL),
    "AutoImplicit": AutoImplicit,
    "AutoImplicit-prior": partial(AutoImplicit, contrast="prior"),
}


def eight_schools(x):
    return eight_schools_avb(x, torch.ones_like(x))


def constrained(x):
    """Positive, simplex, interval and a correlation matrix; a plate of two within."""
    one = x.new_ones(())
    scale = pyro.sample("scale", dist.HalfNormal(one))
    weights = pyro.sample("weights", dist.Dirichlet(x.new_ones(3)))
    pyro.sample("corr", dist.LKJCholesky(3, one))
    with pyro.plate("pair", 2):
        rate = pyro.sample("rate", dist.Uniform(2 * one, 5 * one))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(weights[..., :1] * rate.sum(-1, keepdim=True), scale), obs=x)


def one_number(x):
    scale = pyro.sample("scale", dist.LogNormal(x.new_zeros(()), x.new_ones(())))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(x.new_zeros(()), scale), obs=x)


MODELS = {"eight_schools": eight_schools, "constrained": constrained, "one_number": one_number}


@pytest.fixture
def x(dtype, device):
    return torch.tensor([0.5, -1.0, 2.0], dtype=dtype, device=device)


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]


@pytest.fixture(params=GUIDES)
def make_guide(request):
    return GUIDES[request.param]


@pytest.fixture
def guide(make_guide, model, x):
    """A guide that has met its model, with no weight at zero."""
    guide = make_guide(model)
    guide.setup(x)
    if isinstance(guide, AutoImplicit):
        nn.init.normal_(guide.ratio.network.output.weight, std=0.3)
    return guide


def latents(model, x):
    """The latent sites of the model's own trace."""
    trace = poutine.trace(model).get_trace(x)
    return {n: trace.nodes[n] for n in trace.stochastic_nodes if trace.nodes[n]["type"] == "sample"}


def is_plate(node):
    return type(node["fn"]).__name__ == "_Subsample"


def check_sites(values, model, x, batch=()):
    """Check names, shapes, dtype and support; ``batch`` is in front of every shape."""
    sites = {name: node for name, node in latents(model, x).items() if not is_plate(node)}
    assert set(values) == set(sites)
    for name, node in sites.items():
        assert values[name].shape == batch + node["value"].shape, name
        assert values[name].dtype == x.dtype, name
        assert values[name].device.type == x.device.type, name
        assert node["fn"].support.check(values[name]).all(), name


def draws(guide, x, n=50):
    torch.manual_seed(1)
    return guide.get_posterior(x).sample((n,))


def learned(name):
    """Whether a parameter is the discriminator's rather than the guide's own."""
    return name.startswith("ratio.")


def test_every_guide_is_tested():
    """The amortised ones in test_amortized.py."""
    assert {name.split("-")[0] for name in GUIDES} == {
        name for name in guides.__all__ if name.startswith("Auto")
    }


def test_call_returns_the_sites(guide, model, x):
    check_sites(guide(x), model, x)


def test_call_traces_the_sites_that_it_returns(guide, model, x):
    trace = poutine.trace(guide).get_trace(x)
    for name, value in trace.nodes["_RETURN"]["value"].items():
        assert trace.nodes[name]["value"] is value
    assert trace.log_prob_sum().isfinite()


@pytest.mark.parametrize("parallel", [True, False])
def test_predictive(guide, model, x, parallel):
    """Draws have the shapes that those of Pyro's own guides have, and are not repeated."""
    found = Predictive(model, guide=guide, num_samples=20, parallel=parallel)(x)
    pyros = AutoMultivariateNormal(model)
    pyros(x)
    expected = Predictive(model, guide=pyros, num_samples=20, parallel=parallel)(x)
    assert {n: v.shape for n, v in found.items()} == {n: v.shape for n, v in expected.items()}
    for name, node in latents(model, x).items():
        if not is_plate(node):
            assert found[name].dtype == x.dtype
            assert len(found[name].flatten(1).unique(dim=0)) == 20


def test_under_a_plate_of_particles(guide, model, x):
    def particles():
        with pyro.plate("particles", 6, dim=-2):
            return guide(x)

    trace = poutine.trace(particles).get_trace()
    trace.compute_log_prob()
    (name,) = (n for n in trace.stochastic_nodes if n.endswith("_latent"))
    z = trace.nodes[name]["value"]
    assert z.shape == (6, 1, guide.latent_dim)
    torch.testing.assert_close(
        trace.nodes[name]["log_prob"], guide.get_posterior(x).log_prob(z.detach())
    )
    for value in trace.nodes["_RETURN"]["value"].values():
        assert value.shape[0] == 6


def test_median_and_quantiles(guide, model, x):
    check_sites(guide.median(x), model, x)
    levels = [0.1, 0.5, 0.9]
    for quantiles in (guide.quantiles(levels, x), guide.quantiles(torch.tensor(levels), x)):
        check_sites(quantiles, model, x, batch=(3,))
    for name in {"mu", "tau", "eta", "scale", "rate"} & set(quantiles):
        assert (quantiles[name].diff(dim=0) > 0).all(), name
        assert not quantiles[name].requires_grad


def test_quantiles_are_those_of_the_draws(make_guide, x):
    """10,000 draws give a median a standard error of 1.25 sd/100 where the density is normal.

    In probability it is √(0.25/10,000) = 0.005, whatever the density.
    """
    guide = make_guide(one_number)
    median, quantiles = guide.median(x)["scale"], guide.quantiles([0.2, 0.9], x)["scale"]
    with torch.no_grad():
        scale = guide.get_posterior(x).sample((10_000,)).exp()[:, 0]
    for level, value in ((0.5, median), (0.2, quantiles[0]), (0.9, quantiles[1])):
        se = (level * (1 - level) / 10_000 * 2) ** 0.5  # of both sets of draws
        assert ((scale < value).double().mean() - level).abs() < 4 * se


def test_posterior_over_the_unconstrained_vector(make_guide, model, x):
    """Before any call: get_posterior sets the guide up."""
    guide = make_guide(model)
    q = guide.get_posterior(x)
    assert q.event_shape == (guide.latent_dim,)
    z = q.rsample((4, 5))
    assert z.shape == (4, 5, guide.latent_dim)
    assert z.requires_grad
    assert q.log_prob(z).shape == (4, 5)
    assert q.expand((3,)).rsample((4,)).shape == (4, 3, guide.latent_dim)
    expected = {"eight_schools": 5, "constrained": 1 + 2 + 3 + 2, "one_number": 1}
    assert guide.latent_dim == expected[model.__name__]


def test_setup_makes_all_parameters(make_guide, model, x):
    guide = make_guide(model)
    guide.setup(x)
    before = {name: (id(value), value.clone()) for name, value in guide.named_parameters()}
    assert before
    state = guide.state_dict()
    guide.setup(x)  # again: nothing happens
    guide(x)
    guide.median(x)
    after = dict(guide.named_parameters())
    assert {n: id(value) for n, value in after.items()} == {n: i for n, (i, _) in before.items()}
    assert all(torch.equal(after[name], value) for name, (_, value) in before.items())
    assert set(guide.state_dict()) == set(state)
    assert all(value.dtype == x.dtype for value in after.values())


#: Programs that are captured in a second or two; a flow of many layers takes longer.
QUICK = {("AutoImplicit", "eight_schools"), ("AutoFlow-MAF", "one_number")}
CAPTURED = [
    pytest.param(guide, model, "captured", marks=[] if quick else [pytest.mark.slow])
    for guide in GUIDES
    for model in MODELS
    for quick in [(guide, model) in QUICK]
]
COMPILED = pytest.param(
    "AutoImplicit", "eight_schools", "compiled", marks=[pytest.mark.compiled, pytest.mark.slow]
)


@pytest.mark.parametrize(("make_guide", "model", "run"), [*CAPTURED, COMPILED], indirect=True)
def test_captured_loss_and_gradients_are_the_plain_ones(guide, model, x, run):
    elbo = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    plain = type(run)(compile=False)
    expected = plain.loss_and_gradients(elbo, model, guide, x)
    torch.testing.assert_close(run.loss_and_gradients(elbo, model, guide, x), expected)


@pytest.mark.parametrize("vectorize", [True, False])
def test_gradients_reach_the_guide_and_not_the_discriminator(guide, model, x, vectorize):
    elbo = Trace_ELBO(num_particles=8, vectorize_particles=vectorize, max_plate_nesting=1)
    elbo.loss_and_grads(model, guide, x)
    names = [name for name, _ in guide.named_parameters()]
    assert any(not learned(name) for name in names)
    for name, param in guide.named_parameters():
        if learned(name):
            assert param.grad is None, name
        elif guide.latent_dim > 1 or "hyper" not in name:  # in 1-d nothing conditions a coupling
            assert param.grad.abs().sum() > 0, name
            assert param.grad.isfinite().all(), name


def test_pyro_sees_the_guides_own_parameters(guide, x):
    """What SVI would hand to the guide's optimiser."""
    seen = poutine.trace(guide, param_only=True).get_trace(x)
    found = {node["value"].unconstrained() for node in seen.nodes.values()}
    own = {param for name, param in guide.named_parameters() if not learned(name)}
    assert found == own


def test_trains_under_plain_svi(make_guide, model, x):
    """The loss falls where the density is known; a learned one is another player's to keep up."""
    guide = make_guide(model)
    guide.setup(x)
    elbo = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=1)
    before = {name: value.clone() for name, value in guide.named_parameters()}
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 5e-3}), elbo)
    known = not getattr(guide.get_posterior(x), "learned_density", False)
    losses = torch.tensor([svi.step(x) for _ in range(60 if known else 3)])
    assert losses.isfinite().all()
    if known and guide.latent_dim > 1:  # in 1-d a coupling flow has nothing to couple
        assert losses[-20:].median() < losses[:20].quantile(0.2)
    for name, value in guide.named_parameters():
        if learned(name):
            assert torch.equal(value, before[name]), name
    assert any(not torch.equal(value, before[name]) for name, value in guide.named_parameters())


def test_same_seed_same_draws(guide, x):
    assert torch.equal(draws(guide, x), draws(guide, x))
    torch.manual_seed(2)
    assert not torch.equal(guide.get_posterior(x).sample((50,)), draws(guide, x))


def test_same_seed_same_parameters(make_guide, model, x):
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        pyro.clear_param_store()
        guide = make_guide(model)
        guide.setup(x)
        states.append(guide.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_state_dict_round_trip_into_a_fresh_guide(guide, make_guide, model, x):
    """Parameters and buffers make the whole state: draws and log densities come back."""
    z = draws(guide, x)
    log_prob = guide.get_posterior(x).log_prob(z)
    state = copy.deepcopy(guide.state_dict())
    pyro.clear_param_store()
    fresh = make_guide(model)
    fresh.setup(x)
    assert not torch.equal(draws(fresh, x), z)
    pyro.clear_param_store()
    fresh.load_state_dict(state)
    assert torch.equal(draws(fresh, x), z)
    torch.testing.assert_close(fresh.get_posterior(x).log_prob(z), log_prob)


def test_deepcopy_is_independent(guide, x):
    z = draws(guide, x)
    twin = copy.deepcopy(guide)
    pyro.clear_param_store()  # in which the two have one name
    assert torch.equal(draws(twin, x), z)
    with torch.no_grad():
        for param in twin.parameters():
            param.add_(0.1)
    pyro.clear_param_store()
    assert not torch.equal(draws(twin, x), z)
    pyro.clear_param_store()
    assert torch.equal(draws(guide, x), z)


def test_starts_at_the_models_initial_values(make_guide, x):
    """With a small initial scale the first draws lie about ``init_loc_fn``'s values."""
    init = partial(pyro.infer.autoguide.init_to_value, values={"scale": x.new_tensor(20.0)})
    guide = make_guide(one_number, init_loc_fn=init, init_scale=1e-3)
    assert guide.median(x)["scale"].item() == pytest.approx(20.0, rel=0.02)


@pytest.mark.parametrize("init_scale", [0.0, -1.0])
def test_bad_scale(make_guide, init_scale):
    with pytest.raises(ValueError, match=f"init_scale must be positive, found {init_scale}"):
        make_guide(one_number, init_scale=init_scale)
