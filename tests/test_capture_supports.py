"""Every kind of support: the density and its gradient beside Pyro's, the Jacobian beside autograd.

A warning fails a test here as everywhere, so that nothing runs row by row or out of a graph.
"""

from contextlib import ExitStack

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer.mcmc.util import initialize_model
from torch.distributions import constraints

from pyro_vae.capture import UnconstrainedModel, capture
from pyro_vae.supports import bijection_to


class Bell(dist.TorchDistribution):
    """A density proportional to exp(-|x|²/2) over any support."""

    arg_constraints = {}  # noqa: RUF012

    def __init__(self, one, constraint, event_shape=(), batch_shape=()):
        self.one, self.constraint = one, constraint
        super().__init__(torch.Size(batch_shape), torch.Size(event_shape), validate_args=False)

    @property
    def support(self):
        return self.constraint

    def expand(self, batch_shape, _instance=None):
        return Bell(self.one, self.constraint, self.event_shape, batch_shape)

    def sample(self, sample_shape=()):
        transform = bijection_to(self.constraint)
        shape = transform.inverse_shape((*sample_shape, *self.batch_shape, *self.event_shape))
        return transform(torch.randn(shape).to(self.one))

    def log_prob(self, x):
        events = list(range(-len(self.event_shape), 0))
        return -0.5 * (x.square().sum(events) if events else x.square())


def positive(one):
    return dist.Gamma(2.0 * one, one)


def half_cauchy(one):
    return dist.HalfCauchy(2.0 * one)


def unit_interval(one):
    return dist.Beta(2.0 * one, 3.0 * one)


def interval(one):
    return dist.Uniform(-1.0 * one, 3.0 * one)


def above(one):
    return dist.Pareto(2.0 * one, 3.0 * one)


def below(one):
    return Bell(one, constraints.less_than(2.0 * one), ())


def circular(one):
    return dist.VonMises(0.5 * one, 2.0 * one)


def simplex(one):
    return dist.Dirichlet(torch.stack([one, 2.0 * one, 3.0 * one]))


def ordered(one):
    base = dist.Normal(one.new_zeros(3), one).to_event(1)
    return dist.TransformedDistribution(base, dist.transforms.OrderedTransform())


def ordered_improper(one):
    return Bell(one, dist.constraints.ordered_vector, (3,))


def positive_ordered(one):
    return Bell(one, dist.constraints.positive_ordered_vector, (3,))


def cholesky_of_correlation(one):
    return dist.LKJCholesky(3, 2.0 * one)


def correlation(one):
    return dist.LKJ(3, 2.0 * one)


def cholesky(one):
    return Bell(one, constraints.lower_cholesky, (2, 2))


def softplus_cholesky(one):
    return Bell(one, dist.constraints.softplus_lower_cholesky, (2, 2))


def positive_definite(one):
    return dist.Wishart(5.0 * one, torch.eye(2).to(one))


def mixture(one):
    return dist.MixtureSameFamily(
        dist.Categorical(one.new_ones(2)), dist.Normal(torch.stack([-one, one]), 0.5 * one)
    )


SUPPORTS = [
    *(positive, half_cauchy, unit_interval, interval, above, below, circular, simplex, ordered),
    *(ordered_improper, positive_ordered, cholesky_of_correlation, correlation, cholesky),
    *(softplus_cholesky, positive_definite, mixture),
]
# Pyro's own potential has no bijection to these.
OURS = [cholesky, softplus_cholesky, positive_definite, mixture]
# torch's sampler of the Wishart distribution does not batch, and loops until it has a regular
# matrix: with a warning.
quiet = pytest.mark.filterwarnings("ignore:Singular sample detected")


def one_site(make, one, plates=()):
    """Return a model of one latent site, in plates of these sizes, that is also observed."""

    def model():
        with ExitStack() as stack:
            for i, size in enumerate(plates):
                stack.enter_context(pyro.plate(f"plate{i}", size, dim=-1 - i))
            x = pyro.sample("x", make(one))
        pyro.deterministic("square", x.square())
        total = x.sum(list(range(-make(one).event_dim - len(plates), 0)) or None)
        pyro.sample("y", dist.Normal(total, 2.0 * one), obs=one)

    return model


def several(one):
    """Return a model with sites of many supports at once, and everything around them."""

    def model():
        scale = pyro.sample("scale", dist.HalfCauchy(one))
        with pyro.plate("groups", 2):
            weights = pyro.sample("weights", simplex(one))
            factor = pyro.sample("factor", cholesky_of_correlation(one))
            with poutine.mask(mask=torch.tensor([True, False])):
                loc = pyro.sample("loc", dist.Normal(one.new_zeros(3), one).to_event(1))
        cuts = pyro.sample("cuts", ordered(one))
        top = pyro.deterministic("top", cuts[..., -1] * scale)
        pyro.factor("penalty", -top.square() - cuts[..., 0].abs())
        center = (weights * loc).sum(-2)
        mask = torch.tensor([True, False, True])
        with poutine.scale(scale=3.0), pyro.plate("data", 3), poutine.mask(mask=mask):
            y = dist.MultivariateNormal(center, scale_tril=factor[..., 0, :, :])
            pyro.sample("y", y, obs=one.new_tensor([[0.5] * 3, [2.0] * 3, [-1.0] * 3]))

    return model


def pyro_log_density(density):
    """Return the function from one vector to minus Pyro's potential."""
    _, potential, _, _ = initialize_model(density.model, density.args)

    def log_density(row):
        return -potential(
            {
                name: row[site.slice].reshape(site.unconstrained_shape)
                for name, site in density.sites.items()
            }
        )

    return log_density


def check(density, z, dtype, log_density):
    tolerance = {torch.float32: 2e-4, torch.float64: 1e-9}[dtype]
    close = {"rtol": tolerance, "atol": tolerance}
    assert density.dtype == dtype
    value = density.log_density(z)
    assert value.dtype == dtype

    rows = [row.clone().requires_grad_() for row in z]
    expected = [log_density(row) for row in rows]
    gradients = [torch.autograd.grad(v, row)[0] for v, row in zip(expected, rows, strict=True)]
    torch.testing.assert_close(value, torch.stack(expected).detach(), **close)
    gradient = torch.func.grad(lambda points: density.log_density(points).sum())
    torch.testing.assert_close(gradient(z), torch.stack(gradients), **close)
    captured = capture(gradient, z, compile=False)
    torch.testing.assert_close(captured(z), torch.stack(gradients), **close)
    assert captured.graph is not None

    values = density.constrain(z)
    for name, site in density.sites.items():
        assert values[name].shape == (len(z), *site.shape)
        assert values[name].dtype == site.dtype
    # The inverse of a correlation's Cholesky factor has few digits in float32.
    back = 1e-2 if dtype == torch.float32 else 1e-6
    torch.testing.assert_close(density.unconstrain(values), z, rtol=back, atol=back)


@quiet
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("make", "plates"),
    # Pyro's LKJ cannot be expanded, so that it fits in no plate.
    [
        pytest.param(m, p, marks=[pytest.mark.slow] if p == (2,) else [])
        for m in SUPPORTS
        for p in [(), (2,), (3, 2)]
        if m is not correlation or not p
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_one_site(make, plates, dtype):
    one = torch.tensor(1.0, dtype=dtype)
    density = UnconstrainedModel(one_site(make, one, plates))
    z = 0.7 * torch.randn(4, density.dim, dtype=dtype)
    # One vector at a time, nothing is batched.
    check(density, z, dtype, density.log_density if make in OURS else pyro_log_density(density))
    square = density.deterministic(z)["square"]
    torch.testing.assert_close(square, density.constrain(z)["x"].square())
    start = density.initial(3)
    assert start.shape == (3, density.dim)
    assert start.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_several_sites(dtype):
    density = UnconstrainedModel(several(torch.tensor(1.0, dtype=dtype)))
    check(density, density.initial(4), dtype, pyro_log_density(density))


@pytest.mark.slow
def test_several_sites_compiled():
    density = UnconstrainedModel(several(torch.tensor(1.0)))
    z = density.initial(8)
    gradient = torch.func.grad(lambda points: density.log_density(points).sum())
    compiled = capture(gradient, z)
    assert compiled.compiled
    torch.testing.assert_close(compiled(z), gradient(z), rtol=1e-3, atol=1e-4)


def free_coordinates(make, value):
    """Return the entries of a value that determine it, over which its density is taken."""
    if make is simplex:
        return value[:-1]
    if make in (cholesky_of_correlation, correlation):
        return value[torch.ones(3, 3).tril(-1).bool()]
    if make in (cholesky, softplus_cholesky, positive_definite):
        return value[torch.ones(2, 2).tril().bool()]
    return value.reshape(-1)


@quiet
@pytest.mark.parametrize("make", SUPPORTS, ids=lambda make: make.__name__)
def test_jacobian_is_that_of_autograd(make):
    one = torch.tensor(1.0, dtype=torch.float64)
    density = UnconstrainedModel(one_site(make, one))
    z = 0.7 * torch.randn(4, density.dim, dtype=torch.float64)
    for row in z:
        value = density.constrain(row)["x"]
        found = density.log_prior(row) - make(one).log_prob(value)
        jacobian = torch.autograd.functional.jacobian(
            lambda u: free_coordinates(make, density.constrain(u)["x"]), row
        )
        assert jacobian.shape == (density.dim, density.dim)
        torch.testing.assert_close(found, torch.linalg.slogdet(jacobian).logabsdet)


def test_a_support_without_a_bijection_names_the_site():
    def model():
        pyro.sample("direction", dist.ProjectedNormal(torch.ones(3)))

    with pytest.raises(ValueError, match=r"'direction': found the support .*expected"):
        UnconstrainedModel(model)
