"""Discrete latents summed out: against closed forms, brute force and Pyro's own potential."""

import math
from itertools import product

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import config_enumerate
from pyro.infer.mcmc.util import initialize_model
from pyro.ops.indexing import Vindex
from torch.distributions import constraints

from pyro_vae.capture import UnconstrainedModel, capture


def log_normal(x, loc, scale=1.0):
    return dist.Normal(loc, scale).log_prob(x)


def mixture(x):
    """A Gaussian mixture, with an assignment for each point."""
    weights = pyro.sample("weights", dist.Dirichlet(x.new_ones(3)))
    with pyro.plate("components", 3):
        loc = pyro.sample("loc", dist.Normal(x.new_zeros(()), 3.0))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[k], 1.0), obs=x)


def mixture_pointwise(values, x):
    weights, loc = values["weights"].unsqueeze(-2), values["loc"].unsqueeze(-2)
    return (weights.log() + log_normal(x.unsqueeze(-1), loc)).logsumexp(-1)


def hidden_markov(x):
    """A chain of two states; each step sees the state, by pyro.markov."""
    transition = pyro.sample("transition", dist.Dirichlet(x.new_ones(2, 2)).to_event(1))
    loc = pyro.sample("loc", dist.Normal(x.new_zeros(2), 3.0).to_event(1))
    k = 0
    for t in pyro.markov(range(len(x))):
        k = pyro.sample(f"k{t}", dist.Categorical(Vindex(transition)[..., k, :]))
        pyro.sample(f"x{t}", dist.Normal(Vindex(loc)[..., k], 1.0), obs=x[t])


def paths(values, x, length):
    """Every path of a chain that starts after state 0, with its log probability."""
    for states in product(range(2), repeat=length):
        steps = zip((0, *states), states, strict=False)
        yield states, sum(values["transition"][..., a, b].log() for a, b in steps)


def hidden_markov_likelihood(values, x):
    terms = [
        log_p + sum(log_normal(x[t], values["loc"][..., k]) for t, k in enumerate(states))
        for states, log_p in paths(values, x, len(x))
    ]
    return torch.stack(terms).logsumexp(0)


def one_indicator(x):
    """One indicator for all points; a continuous latent depends on it."""
    k = pyro.sample("k", dist.Bernoulli(x.new_tensor(0.3)))
    loc = pyro.sample("loc", dist.Normal(2.0 * k, x.new_ones(())))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc + k, 1.0), obs=x)


def one_indicator_joint(values, x):
    loc = values["loc"]
    terms = [
        math.log(0.3 if k else 0.7)
        + log_normal(loc, 2.0 * k)
        + log_normal(x, (loc + k).unsqueeze(-1)).sum(-1)
        for k in (0.0, 1.0)
    ]
    return torch.stack(terms).logsumexp(0)


def nested(x):
    """A Bernoulli for each group, and a Categorical for each point of it."""
    rate = pyro.sample("rate", dist.Beta(x.new_tensor(2.0), x.new_tensor(3.0)))
    probs = x.new_tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])
    with pyro.plate("groups", x.shape[1], dim=-1):
        b = pyro.sample("b", dist.Bernoulli(rate))
        with pyro.plate("points", x.shape[0], dim=-2):
            c = pyro.sample("c", dist.Categorical(probs[b.long()]))
            pyro.sample("x", dist.Normal(b + 2.0 * c, 1.0), obs=x)


def nested_likelihood(values, x):
    rate, probs = values["rate"], torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]]).to(x)
    groups = [
        (rate.log() if b else (-rate).log1p()).unsqueeze(-1)
        + (probs[b].log() + log_normal(x.unsqueeze(-1), b + 2.0 * torch.arange(3)))
        .logsumexp(-1)
        .sum(0)
        for b in (0, 1)
    ]
    return torch.stack(groups).logsumexp(0).sum(-1)


DATA = torch.tensor([0.5, -1.0, 2.0, 3.5, -2.0, 0.1])
# A model, its data, and the log density of the data given the continuous sites. Where these depend
# on a discrete site, it is their joint density.
MODELS = {
    "mixture": (mixture, DATA, lambda values, x: mixture_pointwise(values, x).sum(-1)),
    "hidden_markov": (hidden_markov, DATA, hidden_markov_likelihood),
    "nested": (nested, DATA.reshape(3, 2), nested_likelihood),
    "one_indicator": (one_indicator, DATA, one_indicator_joint),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_the_closed_form_and_with_pyro(name, dtype):
    model, x, closed_form = MODELS[name]
    x = x.to(dtype)
    density = UnconstrainedModel(model, (x,), enumerate_discrete=True)
    assert density.discrete
    assert not set(density.discrete) & set(density.sites)
    assert density.dtype == dtype
    z = density.initial(5)
    found = density.log_density(z)
    assert found.dtype == dtype
    expected = closed_form(density.constrain(z), x)
    if name != "one_indicator":
        expected = expected + density.log_prior(z)
    torch.testing.assert_close(found, expected)

    _, potential, _, _ = initialize_model(model, (x,))
    for row, value in zip(z, found, strict=True):
        parts = {
            name: row[site.slice].reshape(site.unconstrained_shape)
            for name, site in density.sites.items()
        }
        torch.testing.assert_close(value, -potential(parts), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "compile"),
    [
        *((name, False) for name in MODELS),
        pytest.param("hidden_markov", True, marks=[pytest.mark.compiled, pytest.mark.slow]),
    ],
)
def test_captured_gradient_is_autograd(name, compile):
    model, x, _ = MODELS[name]
    density = UnconstrainedModel(model, (x,), enumerate_discrete=True)
    z = density.initial(4)
    gradient = torch.func.grad(lambda points: density.log_density(points).sum())
    rows = [row.clone().requires_grad_() for row in z]
    expected = torch.stack([torch.autograd.grad(density.log_density(row), row)[0] for row in rows])
    captured = capture(gradient, z, compile=compile)
    torch.testing.assert_close(captured(z), expected, rtol=1e-4, atol=1e-5)


def test_prior_sums_to_one():
    density = UnconstrainedModel(mixture, (DATA,), enumerate_discrete=True)
    z = density.initial(3)
    values = density.constrain(z)
    transform = density.sites["weights"].transform
    u = z[:, density.sites["weights"].slice]
    expected = (
        dist.Dirichlet(torch.ones(3)).log_prob(values["weights"])
        + transform.log_abs_det_jacobian(u, values["weights"])
        + log_normal(values["loc"], 0.0, 3.0).sum(-1)
    )
    torch.testing.assert_close(density.log_prior(z), expected)


def test_prior_draws_of_what_depends_on_a_discrete_site():
    density = UnconstrainedModel(one_indicator, (DATA,), enumerate_discrete=True)
    loc = density.sample_prior(20_000)[:, 0]
    # 0.7 N(0, 1) + 0.3 N(2, 1): mean 0.6, variance 1 + 4·0.21. Four standard errors.
    torch.testing.assert_close(loc.mean(), torch.tensor(0.6), rtol=0, atol=0.04)
    torch.testing.assert_close(loc.var(), torch.tensor(1.84), rtol=0, atol=0.08)


def test_pointwise_log_likelihood():
    density = UnconstrainedModel(mixture, (DATA,), enumerate_discrete=True)
    z = density.initial(4).reshape(2, 2, -1)
    found = density.log_likelihood(z)
    assert list(found) == ["x"]
    torch.testing.assert_close(found["x"], mixture_pointwise(density.constrain(z), DATA))

    density = UnconstrainedModel(hidden_markov, (DATA,), enumerate_discrete=True)
    z = density.initial(4)
    values, found = density.constrain(z), density.log_likelihood(z)
    for t in range(len(DATA)):
        terms = [
            log_p + log_normal(DATA[t], values["loc"][:, states[t]])
            for states, log_p in paths(values, DATA, t + 1)
        ]
        torch.testing.assert_close(found[f"x{t}"], torch.stack(terms).logsumexp(0))

    density = UnconstrainedModel(nested, (DATA.reshape(3, 2),), enumerate_discrete=True)
    z = density.initial(4)
    found, x = density.log_likelihood(z)["x"], DATA.reshape(3, 2)
    assert found.shape == (4, 3, 2)
    each = [
        nested_likelihood(density.constrain(z), x[i : i + 1, j : j + 1])
        for i in range(3)
        for j in range(2)
    ]
    torch.testing.assert_close(found, torch.stack(each, -1).reshape(4, 3, 2))


def test_a_site_without_discrete_parents_beside_one_with():
    mask = torch.tensor([True, False, True, True, True, True])

    def model(x):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        k = pyro.sample("k", dist.Bernoulli(0.3))
        with pyro.plate("data", len(x)), poutine.mask(mask=mask), poutine.scale(scale=2.0):
            pyro.sample("x", dist.Normal(loc[0], 1.0), obs=x)
            pyro.sample("y", dist.Normal(loc[1] + k, 1.0), obs=x)
        pyro.sample("free", dist.Normal(loc[0], torch.ones(3)), obs=torch.zeros(3))
        pyro.factor("none", k * 0.0)

    density = UnconstrainedModel(model, (DATA,), enumerate_discrete=True)
    z = density.initial(3)
    loc, found = density.constrain(z)["loc"], density.log_likelihood(z)
    assert set(found) == {"x", "y", "free"}
    x = torch.where(mask, log_normal(DATA, loc[:, :1]), 0.0)
    y = [torch.where(mask, log_normal(DATA, loc[:, 1:] + k), 0.0) for k in (0.0, 1.0)]
    free = log_normal(torch.zeros(3), loc[:, :1])
    torch.testing.assert_close(found["x"], x)
    marginal = torch.stack([y[0] + math.log(0.7), y[1] + math.log(0.3)]).logsumexp(0)
    torch.testing.assert_close(found["y"], marginal)
    torch.testing.assert_close(found["free"], free)
    # The scale lies inside the sum, and the dimension without a plate is no hindrance.
    joint = torch.stack(
        [2 * y[0].sum(-1) + math.log(0.7), 2 * y[1].sum(-1) + math.log(0.3)]
    ).logsumexp(0)
    expected = density.log_prior(z) + 2 * x.sum(-1) + joint + free.sum(-1)
    torch.testing.assert_close(density.log_density(z), expected)


def test_deterministic_sites():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Categorical(torch.ones(3)))
        pyro.deterministic("twice", 2 * loc)
        pyro.deterministic("either", loc + k)
        pyro.sample("x", dist.Normal(loc + k, 1.0), obs=x)

    density = UnconstrainedModel(model, (DATA[0],), enumerate_discrete=True)
    z = density.initial(4)
    found = density.deterministic(z)
    assert set(found) == {"twice"}
    torch.testing.assert_close(found["twice"], 2 * z[:, 0])


def test_support_that_depends_on_a_continuous_latent():
    def model(x):
        k = pyro.sample("k", dist.Bernoulli(0.3))
        top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
        below = pyro.sample("below", dist.Uniform(0.0, top))
        pyro.sample("x", dist.Normal(below + k, 1.0), obs=x)

    density = UnconstrainedModel(model, (DATA[0],), enumerate_discrete=True)
    z = density.initial(4)
    values = density.constrain(z)
    assert bool((values["below"] < values["top"]).all())
    torch.testing.assert_close(density.unconstrain(values), z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("expand", [False, True])
def test_annotations_of_the_user_are_respected(expand):
    plain = UnconstrainedModel(mixture, (DATA,), enumerate_discrete=True)
    annotated = UnconstrainedModel(
        config_enumerate(mixture, expand=expand), (DATA,), enumerate_discrete=True
    )
    z = plain.initial(3)
    torch.testing.assert_close(annotated.log_density(z), plain.log_density(z))


def test_factors_that_disagree_do_not_underflow():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.factor("one", 300.0 * k + z)
        pyro.factor("other", 300.0 * (1 - k))

    density = UnconstrainedModel(model, enumerate_discrete=True)
    z = torch.tensor([[0.5], [-1.0]])
    found = density.log_density(z) - density.log_prior(z)
    torch.testing.assert_close(found, 300.0 + z[:, 0])


def test_impossible_states_have_gradient_zero():
    def model(x):
        logits = torch.tensor([[0.0, -math.inf, 0.0], [0.0, 0.0, -math.inf], [0.0, 0.0, 0.0]])
        loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        k = 0
        for t in pyro.markov(range(3)):
            k = pyro.sample(f"k{t}", dist.Categorical(logits=Vindex(logits)[..., k, :]))
            allowed = torch.where(k == 1, -math.inf, 0.0)
            pyro.factor(f"f{t}", Vindex(loc)[..., k] + allowed)

    density = UnconstrainedModel(model, (DATA,), enumerate_discrete=True)
    z = torch.randn(3, 3, requires_grad=True)
    value = density.log_density(z)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert bool(torch.isfinite(value).all())
    assert bool(torch.isfinite(gradient).all())
    torch.testing.assert_close(gradient[:, 1], -z[:, 1].detach())  # the prior's alone


def count(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    k = pyro.sample("k", dist.Poisson(z.exp()))
    pyro.sample("x", dist.Normal(k, 1.0), obs=x)


def sequential(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "sequential"})
    pyro.sample("x", dist.Normal(z + k, 1.0), obs=x)


def local_sampling(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel", "num_samples": 9})
    pyro.sample("x", dist.Normal(z + k, 1.0), obs=x)


def without_plate(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    k = pyro.sample("k", dist.Bernoulli(torch.tensor([0.5, 0.3])))
    pyro.sample("x", dist.Normal(z + k.sum(), 1.0), obs=x)


def to_event(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    k = pyro.sample("k", dist.Bernoulli(torch.tensor([0.5, 0.3])).to_event(1))
    pyro.sample("x", dist.Normal(z + k.sum(), 1.0), obs=x)


def only_discrete(x):
    k = pyro.sample("k", dist.Bernoulli(0.5))
    pyro.sample("x", dist.Normal(k, 1.0), obs=x)


def branch(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    k = pyro.sample("k", dist.Bernoulli(0.5))
    pyro.sample("x", dist.Normal(z if k > 0 else -z, 1.0), obs=x)


def support(x):
    k = pyro.sample("k", dist.Bernoulli(0.5))
    z = pyro.sample("z", dist.Uniform(0.0, 1.0 + k))
    pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def crossed_plates(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    rows, columns = pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 2, dim=-1)
    with rows:
        a = pyro.sample("a", dist.Bernoulli(0.5))
    with columns:
        b = pyro.sample("b", dist.Bernoulli(0.5))
    with rows, columns:
        pyro.sample("x", dist.Normal(z + a + b, 1.0), obs=torch.zeros(3, 2))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (count, "'k' is discrete .*cannot be enumerated.*GammaPoisson"),
        (sequential, "'k' is discrete .*'enumerate': 'sequential'"),
        (local_sampling, "'k' is discrete .*'num_samples': 9"),
        (without_plate, r"'k' is discrete .*batch shape \[2\].*no plate"),
        (to_event, "'k' is discrete .*cannot be enumerated"),
        (only_discrete, r"no latent site that is continuous; found the discrete sites \['k'\]"),
        (branch, r"\['k'\] cannot be summed out; the reason: RuntimeError"),
        (support, "'z': found a support that depends on a discrete"),
        (crossed_plates, r"\['a', 'b'\] cannot be summed out; the reason: NotImplementedError"),
    ],
)
def test_what_cannot_be_summed_out_says_so(model, message):
    with pytest.raises(ValueError, match=message):
        UnconstrainedModel(model, (DATA[0],), enumerate_discrete=True)


def test_discrete_sites_need_to_be_asked_for():
    with pytest.raises(
        ValueError, match=r"'k' is discrete \(Categorical\).*enumerate_discrete=True"
    ):
        UnconstrainedModel(mixture, (DATA,))
    with pytest.raises(ValueError, match=r"'k' is discrete .*cannot be enumerated"):
        UnconstrainedModel(count, (DATA[0],))


def test_no_starting_point_names_the_site():
    def model():
        z = pyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))
        k = pyro.sample("k", dist.Categorical(logits=torch.tensor([0.0, -math.inf])))
        pyro.factor("wall", z * 0 + torch.where(k == 0, -math.inf, 0.0))
        pyro.factor("wall again", z * 0 - math.inf)

    density = UnconstrainedModel(model, enumerate_discrete=True)
    with pytest.raises(ValueError, match="not finite: log_prob of site 'wall again';"):
        density.initial(3, max_tries=4)
