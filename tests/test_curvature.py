"""Curvature of log p(x|z): families, derivatives, plates."""

from functools import partial

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from torch import nn
from torch.autograd import functional

from pyro_vae.curvature import (
    AtMean,
    Expansion,
    hessian,
    jacobian,
    join_coupled_points,
    output_curvature,
)
from pyro_vae.guides import AutoFlow, AutoImplicit
from pyro_vae.models import gauss
from pyro_vae.terms import NonFiniteError, Terms, get_trace_pair


def as_is(values):
    (value,) = values
    return value


def probabilities(*shape):
    return torch.rand(*shape) * 0.8 + 0.1


def simplex(*shape):
    p = torch.rand(*shape).double() + 0.1
    return p / p.sum(-1, keepdim=True)


# name -> (takes parameters to a distribution, parameters)
FAMILIES = {
    "Normal loc": (partial(dist.Normal, scale=torch.tensor(0.7)), [torch.randn(3)]),
    "LogNormal loc": (partial(dist.LogNormal, scale=torch.tensor(0.7)), [torch.randn(3)]),
    "Bernoulli logits": (lambda g: dist.Bernoulli(logits=g), [torch.randn(3)]),
    "Bernoulli probs": (dist.Bernoulli, [probabilities(3)]),
    "Binomial logits": (lambda g: dist.Binomial(7, logits=g), [torch.randn(3)]),
    "Binomial probs": (lambda g: dist.Binomial(7, probs=g), [probabilities(3)]),
    "Geometric logits": (lambda g: dist.Geometric(logits=g), [torch.randn(3)]),
    "Geometric probs": (dist.Geometric, [probabilities(3)]),
    "NegativeBinomial logits": (lambda g: dist.NegativeBinomial(5.0, logits=g), [torch.randn(3)]),
    "NegativeBinomial probs": (
        lambda g: dist.NegativeBinomial(5.0, probs=g),
        [probabilities(3)],
    ),
    "ContinuousBernoulli logits": (lambda g: dist.ContinuousBernoulli(logits=g), [torch.randn(3)]),
    "Poisson": (dist.Poisson, [torch.rand(3) * 5]),
    "Exponential": (dist.Exponential, [torch.rand(3) + 0.1]),
    "Gamma": (dist.Gamma, [torch.rand(3) + 0.5, torch.rand(3) + 0.5]),
    "Beta": (lambda g: dist.Beta(g[..., 0], g[..., 1]), [torch.rand(3, 2) + 0.5]),
    "Dirichlet": (dist.Dirichlet, [torch.rand(3, 4) + 0.5]),
    "Categorical logits": (lambda g: dist.Categorical(logits=g), [torch.randn(3, 4)]),
    "Categorical probs": (lambda g: dist.Categorical(probs=g), [simplex(3, 4)]),
    "OneHotCategorical logits": (lambda g: dist.OneHotCategorical(logits=g), [torch.randn(3, 4)]),
    "OneHotCategorical probs": (lambda g: dist.OneHotCategorical(g), [simplex(3, 4)]),
    "MultivariateNormal": (
        partial(dist.MultivariateNormal, covariance_matrix=torch.eye(4) + 0.3),
        [torch.randn(3, 4)],
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_curvature_of_a_family_is_minus_the_hessian_of_its_log_density(name):
    make, params = FAMILIES[name]
    params = [g.double() for g in params]
    if isinstance(make, partial):
        make = partial(make.func, **{k: v.double() for k, v in make.keywords.items()})
    fn = make(*params)
    x = fn.sample()
    if name.startswith("Categorical") or name.startswith("OneHot"):
        # log p of unnormalised parameters; on the simplex and for normalised logits the same
        index = x.argmax(-1) if name.startswith("OneHot") else x

        def log_prob(g):
            log_p = g.log_softmax(-1) if name.endswith("logits") else g.log()
            return log_p.gather(-1, index.unsqueeze(-1)).sum()
    else:

        def log_prob(*g):
            return make(*g).log_prob(x).sum()

    v = [torch.randn_like(g) for g in params]
    _, expected = functional.hvp(log_prob, tuple(params), tuple(v))
    output = output_curvature(fn, x)
    vectors = v if name not in ("Normal loc", "LogNormal loc") else [*v, torch.zeros(3)]
    found = output.curvature(*vectors)[: len(v)]
    for g, mine, theirs in zip(output.params, found, expected, strict=False):
        assert g.shape == mine.shape
        torch.testing.assert_close(mine, -theirs)


def test_curvature_of_a_scale_is_its_fisher_information():
    """The expectation of minus the Hessian, by a quadrature that is exact for two points."""
    loc, scale = torch.randn(3).double(), torch.rand(3).double() + 0.5
    u, v = torch.randn(3).double(), torch.randn(3).double()
    expected = [torch.zeros(3).double(), torch.zeros(3).double()]
    for sign in (-1, 1):  # two points with the first three moments of a normal
        x = loc + sign * scale

        def log_prob(loc, scale, x=x):
            return dist.Normal(loc, scale).log_prob(x).sum()

        _, product = functional.hvp(log_prob, (loc, scale), (u, v))
        expected = [e - p / 2 for e, p in zip(expected, product, strict=True)]
    output = output_curvature(dist.Normal(loc, scale), x)
    torch.testing.assert_close(list(output.curvature(u, v)), expected)


def test_curvature_of_probabilities_is_that_of_the_paper():
    """1/(1 − x − g)², its section 5.1."""
    x, g = torch.tensor([0.0, 1.0]), torch.tensor([0.2, 0.9])
    (w,) = output_curvature(dist.Bernoulli(g), x).curvature(torch.ones(2))
    torch.testing.assert_close(w, 1 / (1 - x - g) ** 2)


@pytest.mark.parametrize("family", [dist.Bernoulli, dist.Binomial, dist.Categorical])
@pytest.mark.parametrize("built_with", ["logits", "probs"])
def test_parameters_are_those_that_a_distribution_was_built_with(built_with, family):
    g = simplex(2, 3)
    fn = family(**{built_with: g})
    fn.log_prob(torch.ones(2, 3) if family is not dist.Categorical else torch.ones(2))
    assert {"logits", "probs"} <= set(dir(fn))
    _ = fn.logits, fn.probs  # both are there now
    (found,) = output_curvature(fn.to_event(1), torch.ones(fn.batch_shape)).params
    assert found is getattr(fn, built_with)


def test_unknown_family_is_named():
    with pytest.raises(ValueError, match=r"found Laplace, expected one of .*'Bernoulli'"):
        output_curvature(dist.Laplace(0.0, 1.0), torch.zeros(()))


# --- differentiation -----------------------------------------------------------------------------


@pytest.fixture
def network(dtype, device):
    return nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 5)).to(dtype=dtype, device=device)


@pytest.fixture
def z(dtype, device):
    return torch.randn(4, 3, dtype=dtype, device=device, requires_grad=True)


def test_hessian_point_by_point(network, z):
    found = hessian(network(z).square().sum(-1), [z], as_is)
    for n in range(4):
        expected = functional.hessian(lambda z: network(z).square().sum(), z[n])
        torch.testing.assert_close(found[n], expected)


def test_hessian_is_zero_where_log_p_is_linear_or_free_of_the_latents(z):
    assert hessian(z.sum(-1), [z], as_is).equal(torch.zeros_like(z).unsqueeze(-1).expand(4, 3, 3))
    assert not hessian(torch.ones(4), [z], as_is).any()


def test_jacobian_columns_point_by_point(network, z):
    found, other, constant = jacobian([network(z), z, torch.ones(4)], [z], as_is, [2, 0])
    assert found.shape == (2, 4, 5)
    for n in range(4):
        expected = functional.jacobian(network, z[n])  # [5, 3]
        torch.testing.assert_close(found[:, n], expected[:, [2, 0]].T)
    torch.testing.assert_close(other, torch.eye(3).to(z)[[2, 0]].unsqueeze(1).expand(2, 4, 3))
    assert not constant.any()


@pytest.mark.parametrize("what", ["hessian", "jacobian"])
def test_derivatives_can_be_differentiated_again(what, network, z):
    """Against differences of the value, in every parameter of the network and in z."""

    def value():
        g = network(z)
        if what == "hessian":
            return hessian(g.square().sum(-1), [z], as_is).sin().sum()
        return jacobian([g], [z], as_is, [0, 1])[0].sin().sum()

    inputs = [*network.parameters(), z]
    grads = torch.autograd.grad(value(), inputs, allow_unused=True)
    for found, tensor in zip(grads, inputs, strict=True):
        direction = torch.randn_like(tensor)
        step = 1e-5 if tensor.dtype == torch.float64 else 1e-2
        with torch.no_grad():
            tensor += step * direction
            high = value_without_grad(value)
            tensor -= 2 * step * direction
            low = value_without_grad(value)
            tensor += step * direction
        expected = (high - low) / (2 * step)
        found = torch.zeros(()) if found is None else (found * direction).sum()
        tolerance = 1e-6 if tensor.dtype == torch.float64 else 0.02
        assert abs(float(found - expected)) <= tolerance * (1 + abs(float(expected)))


def value_without_grad(value):
    with torch.enable_grad():
        return value().detach()


# --- the guide at its mean -----------------------------------------------------------------------


def test_at_mean_sets_latent_sites_alone():
    def model():
        with pyro.plate("data", 10, subsample_size=3):
            z = pyro.sample("z", dist.Gamma(3.0, 2.0))
            return pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(3))

    with AtMean():
        trace = poutine.trace(model).get_trace()
        replayed = poutine.trace(poutine.replay(model, trace=trace)).get_trace()
    z = trace.nodes["z"]["value"]
    assert z.requires_grad
    assert z.tolist() == [1.5] * 3
    assert replayed.nodes["z"]["value"] is z
    assert trace.nodes["x"]["value"].tolist() == [1.0] * 3
    assert trace.nodes["data"]["value"].shape == (3,)


def test_at_mean_keeps_the_graph_of_the_mean():
    loc = torch.zeros(2, requires_grad=True)
    with AtMean():
        z = pyro.sample("z", dist.Normal(loc, 1.0))
    (grad,) = torch.autograd.grad(z.sum(), loc)
    assert grad.tolist() == [1.0, 1.0]


@pytest.mark.usefixtures("param_store")
@pytest.mark.parametrize("make_guide", [AutoFlow, AutoImplicit])
def test_at_mean_refuses_a_guide_known_by_its_samples(make_guide):
    guide = make_guide(gauss)
    with AtMean(), pytest.raises(ValueError, match=r"guide site '_Auto\w+_latent'.* mean"):
        guide()


def test_at_mean_refuses_a_learned_density_that_has_a_mean():
    class Learned(dist.Normal):
        learned_density = True

    with AtMean(), pytest.raises(ValueError, match=r"guide site 'z': .* found Learned"):
        pyro.sample("z", Learned(torch.zeros(2), 1.0).to_event(1))


def test_at_mean_refuses_a_mean_that_is_not_finite():
    with AtMean(), pytest.raises(NonFiniteError, match=r"guide site 'z': .*StudentT"):
        pyro.sample("z", dist.StudentT(1.0))


# --- plates, sites, scales -----------------------------------------------------------------------


def expansion(model, guide, join=True):
    with AtMean():
        pair = get_trace_pair(model, guide, (), {}, float("inf"))
    if join:
        pair = join_coupled_points(pair)
    return Expansion(Terms([pair]), "Test_ELBO")


def standard_normal(*shape):
    return dist.Normal(torch.zeros(*shape).double(), 1.0).to_event(len(shape))


def point_guide(**shapes):
    """A guide whose sites have random means."""
    means = {name: torch.randn(shape).double() for name, shape in shapes.items()}

    def sample(name, event_dim):
        pyro.sample(name, dist.Normal(means[name], 0.5).to_event(event_dim))

    return means, sample


W = torch.randn(6, 3).double()
X = torch.randn(4, 6).double()
SCALE = torch.rand(6).double() + 0.5
PRECISION = W.T @ (W / SCALE.square()[:, None])  # JᵀWJ of x ~ N(W z, SCALE)


def check(at, expected):
    """Hessian and Gauss–Newton matrix are −expected and expected: the decoder is linear."""
    torch.testing.assert_close(at.gauss_newton(), expected)
    torch.testing.assert_close(at.hessian, -expected)
    some = at.gauss_newton([1, 0])
    torch.testing.assert_close(some, expected[:, [1, 0]][:, :, [1, 0]])


def test_one_site_in_the_data_plate():
    means, sample = point_guide(z=(4, 3))

    def model():
        with pyro.plate("data", 4):
            z = pyro.sample("z", standard_normal(3))
            pyro.sample("x", dist.Normal(z @ W.T, SCALE).to_event(1), obs=X)

    def guide():
        with pyro.plate("data", 4):
            sample("z", 1)

    at = expansion(model, guide)
    torch.testing.assert_close(at.h, means["z"])
    check(at, PRECISION.expand(4, 3, 3))


def test_several_latent_and_observed_sites_in_one_vector():
    _, sample = point_guide(a=(4,), b=(4, 2))

    def model():
        with pyro.plate("data", 4):
            a = pyro.sample("a", dist.Normal(torch.zeros(()).double(), 1.0))
            b = pyro.sample("b", standard_normal(2))
            mean = torch.cat([a[..., None], b], -1) @ W.T
            pyro.sample("x", dist.Normal(mean[:, :2], SCALE[:2]).to_event(1), obs=X[:, :2])
            pyro.sample("y", dist.Normal(mean[:, 2:], SCALE[2:]).to_event(1), obs=X[:, 2:])

    def guide():  # in another order than the model
        with pyro.plate("data", 4):
            sample("b", 1)
            sample("a", 0)

    check(expansion(model, guide), PRECISION.expand(4, 3, 3))


def test_plates_within_and_beside_the_data_plate():
    """Pixels in a plate of their own, latents in another, the data plate outermost."""
    _, sample = point_guide(z=(4, 3))

    def model():
        data, units = pyro.plate("data", 4, dim=-2), pyro.plate("units", 3, dim=-1)
        with data, units:
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
        with data, pyro.plate("pixels", 6, dim=-1):
            pyro.sample("x", dist.Normal(z @ W.T, SCALE), obs=X)

    def guide():
        with pyro.plate("data", 4, dim=-2), pyro.plate("units", 3, dim=-1):
            sample("z", 0)

    check(expansion(model, guide), PRECISION.expand(4, 3, 3))


def test_data_plate_within_another_plate():
    _, sample = point_guide(z=(4, 3))

    def model():
        with pyro.plate("data", 4, dim=-1):
            z = pyro.sample("z", standard_normal(3))
            with pyro.plate("pixels", 6, dim=-2):
                pyro.sample("x", dist.Normal((z @ W.T).T, SCALE[:, None]), obs=X.T)

    def guide():
        with pyro.plate("data", 4):
            sample("z", 1)

    check(expansion(model, guide), PRECISION.expand(4, 3, 3))


def test_only_observations_that_depend_on_the_latents_need_a_family():
    _, sample = point_guide(z=(4, 3))
    reach = 0.0

    def model():
        with pyro.plate("data", 4):
            z = pyro.sample("z", standard_normal(3))
            pyro.sample("x", dist.Normal(z @ W.T, SCALE).to_event(1), obs=X)
            weight = torch.ones(4, requires_grad=True)
            pyro.factor("penalty", -(weight**2) + (reach * z.sum(-1) if reach else 0.0))

    def guide():
        with pyro.plate("data", 4):
            sample("z", 1)

    check(expansion(model, guide), PRECISION.expand(4, 3, 3))
    reach = 1.0
    with pytest.raises(ValueError, match=r"site 'penalty' is not known: found Unit"):
        expansion(model, guide).gauss_newton()


def test_latents_of_the_whole_data_set_are_one_point():
    _, sample = point_guide(z=(3,))

    def model():
        z = pyro.sample("z", standard_normal(3))
        with pyro.plate("data", 40, subsample=torch.arange(4)):  # each stands for ten
            pyro.sample("x", dist.Normal(z @ W.T, SCALE).to_event(1), obs=X)

    at = expansion(model, lambda: sample("z", 1))
    assert at.h.shape == (1, 3)
    check(at, 40 * PRECISION.unsqueeze(0))


def test_no_plate_at_all_is_one_point_with_all_latents():
    _, sample = point_guide(z=(4, 3))

    def model():
        z = pyro.sample("z", standard_normal(4, 3))
        pyro.sample("x", dist.Normal(z @ W.T, SCALE).to_event(2), obs=X)

    expected = torch.block_diag(*[PRECISION] * 4).unsqueeze(0)
    check(expansion(model, lambda: sample("z", 2)), expected)


def test_observations_in_no_plate_are_counted():
    """Without validation Pyro takes a batch of observations of one distribution."""
    _, sample = point_guide(z=(3,))

    def model():
        z = pyro.sample("z", standard_normal(3))
        pyro.sample("x", dist.Normal(z @ W.T, SCALE).to_event(1), obs=X)

    with pyro.validation_enabled(False):
        check(expansion(model, lambda: sample("z", 1)), 4 * PRECISION.unsqueeze(0))


def test_masks_and_scales_of_the_observation_are_in_the_curvature():
    _, sample = point_guide(z=(4, 3))
    pixels = torch.rand(4, 6) < 0.6
    points = torch.tensor([True, False, True, True])

    def model():
        with pyro.plate("data", 4):
            z = pyro.sample("z", standard_normal(3))
            fn = dist.Normal(z @ W.T, SCALE).mask(pixels).to_event(1)
            with poutine.scale(scale=2.5), poutine.mask(mask=points):
                pyro.sample("x", fn, obs=X)

    def guide():
        with pyro.plate("data", 4):
            sample("z", 1)

    weights = 2.5 * pixels * points[:, None] / SCALE.square()
    check(expansion(model, guide), torch.einsum("di,nd,dj->nij", W, weights, W))


def test_scale_that_the_latents_reach():
    """Fisher information JᵀJ/s² + 2 J_sᵀJ_s/s²; the Hessian is another matrix there."""
    means, sample = point_guide(z=(4, 3))
    V = 0.3 * torch.randn(6, 3).double()

    def model():
        with pyro.plate("data", 4):
            z = pyro.sample("z", standard_normal(3))
            pyro.sample("x", dist.Normal(z @ W.T, (z @ V.T).exp()).to_event(1), obs=X)

    def guide():
        with pyro.plate("data", 4):
            sample("z", 1)

    weights = (means["z"] @ V.T).exp() ** -2
    expected = torch.einsum("di,nd,dj->nij", W, weights, W) + 2 * V.T @ V
    torch.testing.assert_close(expansion(model, guide).gauss_newton(), expected)


def test_parameter_without_a_known_curvature_is_named():
    _, sample = point_guide(z=(4, 3))

    def model():
        with pyro.plate("data", 4):
            z = pyro.sample("z", standard_normal(3))
            tril = z.exp().diag_embed()
            pyro.sample("x", dist.MultivariateNormal(z, scale_tril=tril), obs=X[:, :3])

    def guide():
        with pyro.plate("data", 4):
            sample("z", 1)

    with pytest.raises(ValueError, match="reach 'scale_tril' of observed site 'x'"):
        expansion(model, guide).gauss_newton()


def test_observation_of_another_event_shape_is_named():
    _, sample = point_guide(z=(4, 1))

    def model():
        with pyro.plate("data", 4):
            z = pyro.sample("z", standard_normal(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=X)

    def guide():
        with pyro.plate("data", 4):
            sample("z", 1)

    with pytest.raises(ValueError, match=r"site 'x': found .* shape \[4, 6\], expected .*\[1\]"):
        expansion(model, guide).gauss_newton()


def gaussian_pair(p=None, q=None, wrap=None):
    """One latent of four data points; the prior's or the guide's distribution given, or wrapped."""

    def model():
        with pyro.plate("data", 4):
            fn = dist.Normal(torch.zeros(4), torch.ones(4)) if p is None else p
            if wrap is None:
                z = pyro.sample("z", fn)
            else:
                with wrap:
                    z = pyro.sample("z", fn)
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(4))
        return z

    def guide():
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(torch.ones(4), 1.0) if q is None else q)

    return model, guide


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"p": dist.Normal(torch.zeros(4), 2.0)}, "normal prior at site 'z', found Normal"),
        ({"p": dist.LogNormal(torch.zeros(4), 1.0)}, "prior at site 'z', found LogNormal"),
        ({"p": dist.Normal(torch.zeros(4), 1.0).mask(False)}, "site 'z' masked"),
        ({"wrap": poutine.mask(mask=torch.tensor([True, True, False, True]))}, "site 'z' masked"),
        ({"wrap": poutine.scale(scale=2.0)}, "expected one scale"),
    ],
)
def test_latents_that_make_no_sense_are_named(kwargs, message):
    model, guide = gaussian_pair(**kwargs)
    with pytest.raises(ValueError, match=message):
        expansion(model, guide)


def test_masks_of_the_data_points_and_others():
    model, guide = gaussian_pair()
    mask = torch.tensor([True, True, False, True])
    masked = poutine.mask(model, mask=mask)
    assert expansion(masked, poutine.mask(guide, mask=mask)).terms.present.equal(mask)
    for other in (guide, poutine.mask(guide, mask=~mask)):
        with pytest.raises(ValueError, match="site 'z' masked"):
            expansion(masked, other)


def test_prior_that_depends_on_another_latent_is_found_even_at_zero():
    def model():
        a = pyro.sample("a", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("b", dist.Normal(a, 1.0))

    def guide():
        for name in ("a", "b"):
            pyro.sample(name, dist.Normal(torch.zeros(()), 1.0))

    with pytest.raises(ValueError, match="at site 'b', found one that depends on another"):
        expansion(model, guide)


def test_latents_in_a_plate_that_the_data_are_not_in_are_one_point():
    """Regression: a plate of weights, and data that depend on all of them."""
    _, sample = point_guide(z=(3,))

    def model():
        with pyro.plate("weights", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Normal(z @ W.T, SCALE).to_event(1), obs=X)

    def guide():
        with pyro.plate("weights", 3):
            sample("z", 0)

    with pytest.raises(ValueError, match=r"in the data plates \['weights'\], found one outside"):
        expansion(model, guide, join=False)
    check(expansion(model, guide), 4 * PRECISION.unsqueeze(0))


def test_points_stay_apart_beside_a_site_that_does_not_depend_on_them():
    model, guide = gaussian_pair()

    def with_penalty():
        model()
        weight = torch.ones((), requires_grad=True)
        pyro.factor("penalty", -(weight**2))

    assert expansion(with_penalty, guide).h.shape == (4, 1)


def test_covariance_of_the_guide():
    tril = torch.randn(4, 2, 2).double().tril() + 5 * torch.eye(2).double()
    scale = torch.rand(4, 3).double() + 0.1

    def model():
        with pyro.plate("data", 4):
            pyro.sample("a", standard_normal(2))
            pyro.sample("b", standard_normal(3))

    def guide():
        with pyro.plate("data", 4):
            pyro.sample("b", dist.Normal(torch.zeros(4, 3).double(), scale).to_event(1))
            pyro.sample("a", dist.MultivariateNormal(torch.zeros(4, 2).double(), scale_tril=tril))

    found = expansion(model, guide).covariance()
    for n in range(4):
        expected = torch.block_diag(tril[n] @ tril[n].T, scale[n].square().diag())
        torch.testing.assert_close(found[n], expected)


def test_covariance_of_a_guide_whose_sites_depend_is_refused():
    def model():
        for name in ("a", "b"):
            pyro.sample(name, dist.Normal(torch.zeros(()), 1.0))

    def guide():
        a = pyro.sample("a", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("b", dist.Normal(torch.zeros(()), a.exp()))

    with pytest.raises(ValueError, match="'b' to depend on another latent"):
        expansion(model, guide).covariance()
