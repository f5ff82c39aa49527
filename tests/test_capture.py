"""The captured density against closed forms, against Pyro's own, and against bad input."""

import math
import warnings
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer.mcmc.util import initialize_model
from torch.distributions import constraints
from torch.utils._pytree import tree_leaves

from pyro_vae.capture import UnconstrainedModel, capture


def linear_gaussian(x):
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=x)


def positive_and_simplex(x):
    scale = pyro.sample("scale", dist.HalfCauchy(2.0))
    weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    rate = pyro.sample("rate", dist.Beta(2.0, 3.0).expand([2]).to_event(1))
    pyro.deterministic("ratio", rate[..., 0] / scale)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(weights[..., 0] + rate[..., 1], scale), obs=x)


def matrices(x):
    factor = pyro.sample("factor", dist.LKJCholesky(3, 2.0))
    order = pyro.sample(
        "order",
        dist.TransformedDistribution(
            dist.Normal(torch.zeros(3), 1.0).to_event(1), dist.transforms.OrderedTransform()
        ),
    )
    pyro.sample("x", dist.MultivariateNormal(order, scale_tril=factor), obs=x)


def handlers(x):
    z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
    mask = torch.tensor([True, False, True])
    with poutine.scale(scale=3.0), pyro.plate("data", len(x)), poutine.mask(mask=mask):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    pyro.factor("factor", -z.square())
    return {"anything": "goes"}


MODELS = [
    (linear_gaussian, torch.tensor([0.5, -1.0, 2.0])),
    (positive_and_simplex, torch.tensor([0.5, -1.0, 2.0])),
    (matrices, torch.tensor([0.5, -1.0, 2.0])),
    (handlers, torch.tensor([0.5, -1.0, 2.0])),
]


@pytest.mark.parametrize(("model", "x"), MODELS)
def test_agrees_with_pyro(model, x):
    density = UnconstrainedModel(model, (x,))
    _, potential, transforms, _ = initialize_model(model, (x,))
    z = density.initial(5)
    for row in z:
        parts = {
            name: row[site.slice].reshape(site.unconstrained_shape)
            for name, site in density.sites.items()
        }
        assert set(transforms) | set(parts) == set(parts)
        expected = -potential(parts)
        torch.testing.assert_close(density.log_density(row), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        density.log_density(z), torch.stack([density.log_density(row) for row in z])
    )


@pytest.mark.parametrize(("model", "x"), MODELS)
def test_constrain_and_back(model, x):
    density = UnconstrainedModel(model, (x,))
    z = density.initial(6).reshape(2, 3, density.dim)
    values = density.constrain(z)
    for name, site in density.sites.items():
        assert values[name].shape == (2, 3, *site.shape)
    torch.testing.assert_close(density.unconstrain(values), z, rtol=1e-3, atol=1e-3)
    assert density.log_density(z).shape == (2, 3)
    assert density.log_density(z[:0]).shape == (0, 3)


@pytest.mark.parametrize(("model", "x"), MODELS)
def test_captured_gradient_is_autograd(model, x):
    density = UnconstrainedModel(model, (x,))
    z = density.initial(3).requires_grad_()
    captured = capture(torch.func.grad(lambda v: density.log_density(v).sum()), z, compile=False)
    (expected,) = torch.autograd.grad(density.log_density(z).sum(), z)
    torch.testing.assert_close(captured(z), expected)


def test_linear_gaussian_closed_form():
    x = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)

    def model():
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), x.new_ones(2)).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(), x.new_tensor(0.5)).expand([3]).to_event(1), obs=x)

    density = UnconstrainedModel(model)
    assert density.dtype == torch.float64
    z = torch.tensor([0.3, -0.2], dtype=torch.float64)
    prior = -0.5 * z.square().sum() - math.log(2 * math.pi)
    likelihood = -0.5 * ((x - z.sum()) / 0.5).square().sum() - 3 * math.log(
        0.5 * math.sqrt(2 * math.pi)
    )
    torch.testing.assert_close(density.log_prior(z), prior)
    torch.testing.assert_close(density.log_density(z), prior + likelihood)
    rows = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(density.log_density, rows)


def test_support_that_depends_on_a_latent():
    def model():
        top = pyro.sample("top", dist.Gamma(3.0, 1.0))
        pyro.sample("below", dist.Uniform(0.0, top))

    density = UnconstrainedModel(model)
    z = density.sample_prior(200)
    values = density.constrain(z)
    assert bool((values["below"] < values["top"]).all())
    torch.testing.assert_close(density.unconstrain(values), z, rtol=1e-3, atol=1e-3)
    # The density of (log top, logit(below / top)): the uniform part is a logistic density.
    u, v = z.unbind(-1)
    log_top = dist.Gamma(3.0, 1.0).log_prob(u.exp()) + u
    logistic = torch.nn.functional.logsigmoid(v) + torch.nn.functional.logsigmoid(-v)
    torch.testing.assert_close(density.log_density(z), log_top + logistic, rtol=1e-4, atol=1e-4)


def test_improper_prior():
    def model():
        z = pyro.sample("z", dist.ImproperUniform(constraints.positive, (), (2,)))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=torch.ones(2))

    density = UnconstrainedModel(model)
    z = density.initial(50)
    assert bool((z.abs() <= 2).all())
    expected = z.sum(-1)  # the Jacobian of exp, nothing else
    torch.testing.assert_close(density.log_prior(z), expected)
    with pytest.raises(ValueError, match="'z' has an improper prior"):
        density.sample_prior(3)


def test_sample_prior_has_the_prior_moments():
    def model():
        mean = pyro.sample("mean", dist.Normal(1.0, 2.0))
        with pyro.plate("groups", 3):
            pyro.sample("x", dist.Normal(mean, 1.0))

    z = UnconstrainedModel(model).sample_prior(20_000)
    # mean: N(1, 4); x: variance 5, covariance with mean 4. Standard errors: of a mean
    # sqrt(5 / 2e4) = 0.016, of a variance 5 sqrt(2 / 2e4) = 0.05; four of them.
    torch.testing.assert_close(z.mean(0), torch.ones(4), atol=0.064, rtol=0)
    covariance = torch.cov(z.T)
    expected = torch.full((4, 4), 4.0) + torch.diag(torch.tensor([0.0, 1.0, 1.0, 1.0]))
    torch.testing.assert_close(covariance, expected, atol=0.2, rtol=0)


def test_missing_values_under_a_mask_give_finite_gradients():
    x = torch.tensor([1.0, math.nan, 2.0])

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3), poutine.mask(mask=~torch.isnan(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    density = UnconstrainedModel(model)
    z = torch.tensor([0.5], requires_grad=True)
    (gradient,) = torch.autograd.grad(density.log_density(z), z)
    torch.testing.assert_close(gradient, torch.tensor([-0.5 + 0.5 + 1.5]))


def test_deterministic_sites():
    model, x = MODELS[1]
    density = UnconstrainedModel(model, (x,))
    z = density.initial(4)
    values = density.constrain(z)
    torch.testing.assert_close(
        density.deterministic(z)["ratio"], values["rate"][:, 0] / values["scale"]
    )
    assert set(density.observed) == {"x"}


def test_parameters_are_constant_and_the_store_untouched(param_store):
    def model():
        scale = pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
        pyro.sample("z", dist.Normal(0.0, scale))

    density = UnconstrainedModel(model)
    assert list(param_store.keys()) == []
    pyro.param("scale", torch.tensor(5.0), constraint=constraints.positive)
    later = UnconstrainedModel(model)
    zero = torch.zeros(1)
    torch.testing.assert_close(density.log_density(zero), dist.Normal(0.0, 2.0).log_prob(zero)[0])
    torch.testing.assert_close(later.log_density(zero), dist.Normal(0.0, 5.0).log_prob(zero)[0])


def test_changes_no_global_state():
    model, x = MODELS[1]
    state = torch.get_rng_state()
    density = UnconstrainedModel(model, (x,))
    density.log_density(torch.zeros(2, density.dim))
    density.constrain(torch.zeros(2, density.dim))
    assert torch.equal(state, torch.get_rng_state())
    # Settings of torch and Pyro are watched by a fixture around every test.


def test_is_invisible_to_handlers_around_it():
    density = UnconstrainedModel(linear_gaussian, (torch.zeros(3),))
    with poutine.trace() as tracer:
        density.log_density(torch.zeros(2))
    assert not tracer.trace.nodes


def branching(x):
    """A model whose density, but not its sites, depends on a latent by a Python branch."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    scale = 1.0 if z > 0 else 2.0
    pyro.sample("x", dist.Normal(z, scale), obs=x)


def branching_log_density(z, x):
    scale = torch.where(z > 0, 1.0, 2.0)
    return dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, scale).log_prob(x)


def test_row_by_row_where_vmap_cannot():
    x = torch.tensor(0.7)
    density = UnconstrainedModel(branching, (x,))
    z = torch.tensor([[0.5], [-0.5], [1.0]])
    with pytest.warns(UserWarning, match=r"cannot be batched by torch.vmap.*control flow"):
        values = density.log_density(z)
    again = density.log_density(z)  # no second warning
    assert torch.equal(values, again)
    torch.testing.assert_close(values, branching_log_density(z[:, 0], x))
    torch.testing.assert_close(density.log_likelihood(z)["x"], values - density.log_prior(z))


def test_batching_error_says_why_and_is_the_only_word():
    x = torch.tensor(0.7)
    assert UnconstrainedModel(linear_gaussian, (torch.zeros(3),)).batching_error() is None
    density = UnconstrainedModel(branching, (x,))
    assert "control flow" in density.batching_error()
    z = density.initial(4)  # no warning
    torch.testing.assert_close(density.log_density(z), branching_log_density(z[:, 0], x))


def multinomial(x):
    p = pyro.sample("p", dist.Dirichlet(torch.ones(4)))
    pyro.sample("x", dist.Multinomial(10, p), obs=x)


def ordered_logistic(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4):
        pyro.sample("x", dist.OrderedLogistic(z * x, torch.tensor([-1.0, 1.0])), obs=x % 3)


def filled_step_by_step(x):
    """An autoregression that writes its path into a tensor of zeros."""
    a = pyro.sample("a", dist.Normal(0.0, 0.5))
    path = torch.zeros(len(x) + 1)
    path[0] = a
    for t in range(len(x)):
        path[t + 1] = a * path[t].clone() + x[t]
    pyro.sample("x", dist.Normal(path[1:], 1.0).to_event(1), obs=x.flip(0))


def checks_its_data(x):
    if (x < 0).any() or not bool(torch.isfinite(x).all()):
        raise ValueError("x is not a vector of positive numbers")
    z = pyro.sample("z", dist.Normal(0.0, float(x.mean())))
    with pyro.plate("data", int(x.max().item())):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def asks_for_data(x):
    z = pyro.sample("z", dist.Normal(x.data.mean(), 1.0))
    pyro.sample("x", dist.Normal(z.data * 0 + z, 1.0).expand([4]).to_event(1), obs=x)


@pytest.mark.parametrize(
    "model", [multinomial, ordered_logistic, filled_step_by_step, checks_its_data, asks_for_data]
)
def test_batches_and_captures_what_torch_alone_does_not(model):
    """Masked assignment, tensors filled in place, Python that looks at the data."""
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    density = UnconstrainedModel(model, (x,))
    z = density.initial(5)
    values = density.log_density(z)  # a warning fails the test
    rows = [row.clone().requires_grad_() for row in z]
    expected = [density.log_density(row) for row in rows]
    torch.testing.assert_close(values, torch.stack(expected).detach())
    gradients = [torch.autograd.grad(v, row)[0] for v, row in zip(expected, rows, strict=True)]
    gradient = torch.func.grad(lambda points: density.log_density(points).sum())
    captured = capture(gradient, z, compile=model is filled_step_by_step)
    torch.testing.assert_close(captured(z), torch.stack(gradients))


def discrete():
    pyro.sample("k", dist.Categorical(torch.ones(3)))


def no_latent():
    pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))


def subsampled():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 10, subsample_size=4) as index:
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(10)[index])


def missing():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3):
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor([0.0, math.nan, math.nan]))


def outside():
    z = pyro.sample("z", dist.Beta(1.0, 1.0))
    with pyro.plate("data", 3):
        pyro.sample("x", dist.Bernoulli(z), obs=torch.tensor([0.0, 2.0, 1.0]))


def changing():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(0.0, torch.ones(int(1e6 * z.abs()) + 1)).to_event(1))


def impossible():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("wall", z.abs() * 0 - math.inf)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (discrete, "latent site 'k' is discrete"),
        (no_latent, "no latent site"),
        (subsampled, r"'data', which is subsampled: found 4 of 10"),
        (missing, "observed site 'x': found 2 NaN of 3 values"),
        (outside, "observed site 'x': found 1 values outside the support"),
        (changing, "depend on random values"),
    ],
)
def test_bad_models(model, message):
    with pytest.raises(ValueError, match=message):
        UnconstrainedModel(model)


def test_no_starting_point_names_the_site():
    with pytest.raises(ValueError, match="not finite: log_prob of site 'wall';"):
        UnconstrainedModel(impossible).initial(4, max_tries=4)


def test_a_gradient_that_is_never_finite_names_its_site():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.factor("f", (w * 0).sqrt() + z.sum())  # the derivative of √ at 0, times 0

    density = UnconstrainedModel(model)
    assert bool(torch.isfinite(density.log_density(torch.zeros(1, 3))).all())
    with pytest.raises(ValueError, match="not finite: the gradient at site 'w';"):
        density.initial(4, max_tries=4)


def test_starts_have_finite_densities_and_gradients():
    """One prior draw in six has density 0, one a gradient of NaN, one a covariance not regular."""

    def model():
        u = pyro.sample("u", dist.Uniform(0.0, 6.0))
        pyro.factor("hole", torch.where(u < 1, -math.inf, 0.0))
        pyro.factor("kink", ((u > 2) * (u - 2)).sqrt())  # below 2 the derivative is ∞ times 0
        covariance = torch.eye(2) + torch.where((u > 2) & (u < 3), 2.0, 0.5) * (1 - torch.eye(2))
        y = dist.MultivariateNormal(torch.zeros(2), covariance_matrix=covariance)
        pyro.sample("y", y, obs=torch.ones(2))

    density = UnconstrainedModel(model)
    z = density.initial(200)
    assert bool((density.constrain(z)["u"] > 3).all())
    assert bool(torch.isfinite(density.log_density(z)).all())


def test_a_random_density_is_not_one_to_sample():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("noise", z + torch.randn(()))

    with pytest.raises(ValueError, match="the log density is random: found"):
        UnconstrainedModel(model).initial(4)


def singular_in_a_third(how):
    """A model whose covariance has no Cholesky factor where |r| > 1, a third of the prior."""

    def model(y):
        r = pyro.sample("r", dist.Uniform(-1.5, 1.5))
        matrix = torch.eye(2) + r * (1 - torch.eye(2))
        if how == "inverse":
            matrix = torch.where(r.abs() > 1, 1.0, matrix)  # of rank one
            pyro.factor("y", -0.5 * y @ torch.linalg.inv(matrix) @ y)
        elif how == "solve":
            matrix = torch.where(r.abs() > 1, 1.0, matrix)
            pyro.factor("y", -0.5 * y @ torch.linalg.solve(matrix, y))
        elif how == "factor":
            factor = torch.linalg.cholesky(matrix)
            pyro.sample("y", dist.MultivariateNormal(y * 0, scale_tril=factor), obs=y)
        else:
            pyro.sample("y", dist.MultivariateNormal(y * 0, **{how: matrix}), obs=y)

    return model


@pytest.mark.parametrize(
    ("how", "compile"),
    [
        ("covariance_matrix", False),
        ("covariance_matrix", True),
        ("precision_matrix", False),
        ("factor", False),
        ("inverse", False),
        ("solve", False),
    ],
)
def test_a_chain_without_a_cholesky_factor_touches_no_other(how, compile):
    y = torch.tensor([0.5, -1.0])
    for _ in range(10):  # the model has a covariance of its own at every draw from the prior
        density = UnconstrainedModel(singular_in_a_third(how), (y,))
    z = torch.linspace(-3, 3, 60).unsqueeze(-1)
    r = density.constrain(z)["r"]
    singular = r.abs() > 1
    assert 15 < int(singular.sum()) < 45

    def value_and_gradient(points):
        def total(points):
            value = density.log_density(points)
            return value.sum(), value

        gradient, value = torch.func.grad(total, has_aux=True)(points)
        return value, gradient

    good = z[~singular].clone().requires_grad_()
    expected = torch.stack([density.log_density(row) for row in good])
    (expected_gradient,) = torch.autograd.grad(expected.sum(), good)
    for function in (value_and_gradient, capture(value_and_gradient, z, compile=compile)):
        value, gradient = function(z)
        assert torch.equal(torch.isnan(value), singular)
        torch.testing.assert_close(value[~singular], expected.detach())
        torch.testing.assert_close(gradient[~singular], expected_gradient)
    start = density.initial(64)
    assert bool((density.constrain(start)["r"].abs() < 1).all())
    assert bool(torch.isfinite(density.sample_prior(64)).all())


def test_pointwise_log_likelihood():
    """Unscaled, 0 where masked, by site: as arviz wants it."""
    x = torch.tensor([0.5, -1.0, math.nan])
    mask = ~torch.isnan(x)

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", 3), poutine.scale(scale=7.0), poutine.mask(mask=mask):
            pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)
        y = dist.Normal(z, 2.0).to_event(1)
        with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1):
            pyro.sample("y", y, obs=torch.ones(2, 3, 2))
        pyro.sample("one", dist.Poisson(z[..., 1].exp()), obs=torch.tensor(3.0))
        pyro.factor("none", z.sum())

    density = UnconstrainedModel(model)
    z = torch.randn(4, 5, 2)
    found = density.log_likelihood(z)
    assert list(found) == ["x", "y", "one"]
    log_prob = dist.Normal(z[..., :1], 1.0).log_prob(x.nan_to_num())
    torch.testing.assert_close(found["x"], torch.where(mask, log_prob, 0.0))
    log_prob = dist.Normal(z, 2.0).log_prob(torch.ones(2)).sum(-1)
    torch.testing.assert_close(found["y"], log_prob[..., None, None].expand(4, 5, 2, 3))
    log_prob = dist.Poisson(z[..., 1].exp()).log_prob(torch.tensor(3.0))
    torch.testing.assert_close(found["one"], log_prob)
    joint = 7 * found["x"].sum(-1) + found["y"].sum((-1, -2)) + found["one"] + z.sum(-1)
    torch.testing.assert_close(density.log_density(z), density.log_prior(z) + joint)


def test_bad_vectors_and_values():
    density = UnconstrainedModel(linear_gaussian, (torch.zeros(3),))
    with pytest.raises(ValueError, match=r"found shape \[5\]; expected \[\*, 2\]"):
        density.log_density(torch.zeros(5))
    with pytest.raises(ValueError, match="expected \\['z'\\]"):
        density.unconstrain({"w": torch.zeros(2)})
    with pytest.raises(ValueError, match="site 'z': found shape"):
        density.unconstrain({"z": torch.zeros(4, 3)})
    for call in (density.sample_prior, density.initial):
        with pytest.raises(ValueError, match="found 0"):
            call(0)


def test_capture_runs_the_function_once_and_checks_shapes():
    calls = []

    def fn(x, y):
        calls.append(None)
        return {"sum": x + y}

    x = torch.randn(3)
    captured = capture(fn, x, x, compile=False)  # the same tensor twice is two inputs
    y = torch.randn(3)
    torch.testing.assert_close(captured(x, y)["sum"], x + y)
    assert len(calls) == 1
    with pytest.raises(ValueError, match="expected"):
        captured(x, torch.randn(4))


def test_capture_falls_back_where_the_course_depends_on_values():
    def fn(x):
        return x if x.sum() > 0 else -x

    with pytest.warns(UserWarning, match="cannot be captured"):
        captured = capture(fn, torch.ones(2))
    assert captured(-torch.ones(2)).tolist() == [1.0, 1.0]
    assert captured.graph is None
    assert not captured.compiled
    with pytest.raises(ValueError, match="expected"):
        captured(torch.ones(3))
    with pytest.raises(ZeroDivisionError):
        capture(lambda x: x / (1 // 0), torch.ones(2))


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@pytest.mark.parametrize(
    "make",
    [
        lambda x, y: x + y,
        lambda x, y: (x + y,),
        lambda x, y: [x + y, x - y],
        lambda x, y: Pair(x + y, x - y),
        lambda x, y: {"sum": x + y, "pair": Pair(x, y), "half": 0.5, "five": 5},
        lambda x, y: (),
    ],
)
def test_captured_output_has_the_structure_of_the_function(make):
    x, y = torch.randn(2, 3)
    captured = capture(make, x, y, compile=False)
    x, y = torch.randn(2, 3)
    expected = make(x, y)
    for found in (captured(x, y), captured.run(x, y)):
        assert type(found) is type(expected)
        torch.testing.assert_close(tree_leaves(found), tree_leaves(expected))


def test_constants_are_computed_once():
    """Also those of an index, which no compiler takes otherwise; what changes is no constant."""
    weights, mask = torch.rand(4), torch.tensor([True, False, True, True])

    def fn(x):
        buffer = torch.zeros(4)
        buffer[mask] = x
        noise = torch.rand(3) * weights[mask].log()
        buffer.add_(weights.log())
        return buffer + torch.full((2, 1), 3.0) * weights.exp(), noise

    x = torch.randn(3)
    found = {compile: capture(fn, x, compile=compile) for compile in (False, True)}
    names = [str(node.target) for node in found[False].graph.graph.nodes]
    assert not [name for name in names if "log" in name or "aten.exp" in name]
    for captured in found.values():
        assert captured.graph is not None
        for x in torch.randn(2, 3):
            torch.testing.assert_close(captured(x)[0], fn(x)[0])
            assert not torch.equal(captured(x)[1], captured(x)[1])
    assert found[True].compiled


def test_captured_takes_nested_inputs_and_keeps_numbers():
    captured = capture(lambda p, n: p.first * n + p.second, Pair(*torch.ones(2, 3)), 2)
    p = Pair(*torch.randn(2, 3))
    torch.testing.assert_close(captured(p, 2), 2 * p.first + p.second)
    torch.testing.assert_close(captured.run(p, 2), 2 * p.first + p.second)
    with pytest.raises(ValueError, match=r"found .*\(3,\).*expected .*\(2,\)"):
        captured(p, 3)
    with pytest.raises(ValueError, match="expected"):
        captured(tuple(p), 2)


def test_compiled_is_the_function_in_every_respect():
    """Outputs that are inputs or views of them, other strides, gradients on, a constant."""
    weights = torch.randn(3, requires_grad=True)

    def fn(x, y):
        return x, x.view(-1), (x * weights).sum(-1) + y.exp()

    x, y = torch.randn(4, 3), torch.randn(4)
    settings = torch._inductor.config.get_config_copy()
    captured = capture(fn, x, y)
    assert captured.compiled
    assert torch._inductor.config.get_config_copy() == settings
    for a in (x, torch.randn(3, 4).T, torch.randn(1, 3).expand(4, 3)):
        a.requires_grad_()
        found, expected = captured(a, y), fn(a.detach().contiguous(), y)
        torch.testing.assert_close(found, tuple(value.detach() for value in expected))
        assert not any(value.requires_grad for value in found[1:])
    with torch.no_grad():
        torch.testing.assert_close(captured.run(x, y), captured(x, y))
    for bad in [(x, y, y), (x,), (x, y.double()), (x, y[:2]), (x, 1.0), (x, [y])]:
        with pytest.raises(ValueError, match="inputs of a captured function"):
            captured(*bad)


@pytest.mark.parametrize("compile", [False, True])
def test_captured_changes_in_place(compile):
    def fn(x):
        x.add_(1)
        return 2 * x

    x = torch.zeros(2, 3)
    captured = capture(fn, x, compile=compile)
    assert x.sum() == 0  # the example is left alone
    assert captured(x).sum() == 12
    assert x.sum() == 6
    with pytest.raises(ValueError, match="inputs of a captured function"):
        captured(torch.zeros(3, 2).T)  # a copy would be changed in its place


def broken(*args, **kwargs):
    raise RuntimeError("no C++ compiler")


def test_capture_falls_back_without_a_compiler(monkeypatch):
    monkeypatch.setattr("pyro_vae.capture._inductor", broken)
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(UserWarning, match=r"cannot be compiled.*no C\+\+ compiler"):
        captured = capture(lambda x: 2 * x, torch.ones(2))
    assert captured(torch.ones(2)).tolist() == [2.0, 2.0]
    assert captured.graph is not None
    assert not captured.compiled


def test_torch_compile_has_the_last_word(monkeypatch):
    monkeypatch.setattr("pyro_vae.capture._inductor", broken)
    captured = capture(lambda x: 2 * x, torch.ones(2))
    assert captured.compiled
    assert captured(torch.ones(2)).tolist() == [2.0, 2.0]


@pytest.mark.parametrize("what", ["fresh", "view", "itself", "constant", "in place", "empty"])
def test_compiled_without_wrappers_is_the_same(what):
    held = torch.ones(3)
    functions = {
        "fresh": lambda x: 2 * x,
        "view": lambda x: (x.mT, x[0], x + 1),
        "itself": lambda x: (x, x, 2 * x),
        "constant": lambda x: (held, x * held),
        "in place": lambda x: x.add_(1) * 2,
        "empty": lambda x: x[:0] * 2,
    }
    function = functions[what]
    captured = capture(function, torch.zeros(2, 3))
    assert captured.compiled
    if what in ("fresh", "in place"):
        assert captured.program[2].__qualname__.endswith("direct")
    for value in (1.0, 2.0):
        one, two = torch.full((2, 3), value), torch.full((2, 3), value)
        torch.testing.assert_close(captured(one), function(two))
        torch.testing.assert_close(one, two)


def test_capture_compiles_without_warnings():
    density = UnconstrainedModel(linear_gaussian, (torch.zeros(3),))
    z = torch.randn(8, 2)
    gradient = torch.func.grad(lambda v: density.log_density(v).sum())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = capture(gradient, z)
    torch.testing.assert_close(compiled(z), gradient(z))


def test_a_dependence_that_two_runs_can_miss():
    """w depends on z, but not where z < 0: the relu is 0 there, and the same in every run."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("w", dist.Normal(5.0 * torch.relu(z), 0.1))

    for seed in range(10):
        pyro.set_rng_seed(seed)
        draws = UnconstrainedModel(model).sample_prior(500)
        on = draws[:, 0] > 0.5
        assert (draws[on, 1] > 1.0).all()


def test_a_dependence_through_a_comparison():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("w", dist.Normal(torch.where(z > 2.5, 100.0, 0.0), 0.1))

    for seed in range(10):
        pyro.set_rng_seed(seed)
        z, w = UnconstrainedModel(model).sample_prior(4000).T
        assert torch.equal(z > 2.5, w > 50.0)


@pytest.mark.gpu
def test_on_cuda():
    """A mixture of two normals with an unsure covariance, summed out, captured and compiled."""

    def model(x):
        weights = pyro.sample("weights", dist.Dirichlet(x.new_ones(2)))
        r = pyro.sample("r", dist.Uniform(-1.5 * x.new_ones(()), 1.5))
        covariance = torch.eye(2, device=x.device) + r * (1 - torch.eye(2, device=x.device))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(weights))
            loc = (2.0 * k).unsqueeze(-1).expand((*k.shape, 2))
            y = dist.MultivariateNormal(loc, covariance_matrix=covariance)
            pyro.sample("y", y, obs=x)

    x = torch.randn(5, 2)
    densities = [
        UnconstrainedModel(model, (x.to(device),), enumerate_discrete=True)
        for device in ("cpu", "cuda")
    ]
    z = torch.linspace(-3, 3, 20).unsqueeze(-1).expand(20, 2).contiguous()
    expected = densities[0].log_density(z)
    assert 0 < int(torch.isnan(expected).sum()) < 20
    gradients = [
        torch.func.grad(lambda points, d=d: d.log_density(points).sum()) for d in densities
    ]
    for compile in (False, True):
        captured = capture(gradients[1], z.cuda(), compile=compile)
        assert captured.compiled == compile
        found = captured(z.cuda())
        assert found.device.type == "cuda"
        torch.testing.assert_close(
            found.cpu(), gradients[0](z), rtol=1e-3, atol=1e-3, equal_nan=True
        )
    torch.testing.assert_close(
        densities[1].log_density(z.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4, equal_nan=True
    )
    assert densities[1].initial(8).device.type == "cuda"
    assert densities[1].log_likelihood(z.cuda())["y"].shape == (20, 5)


@pytest.mark.slow
def test_a_program_is_found_again_on_disk(tmp_path, monkeypatch):
    """Of the same function a later process has a program in a fraction of the first one's time."""
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # where there is none yet

    def gradient(z):
        return torch.func.grad(lambda z: (z.sin() * z.cumsum(0)).sum())(z)

    z, hits, found = torch.tensor([0.3, -1.2, 2.0]), [], []
    for _ in range(2):  # one process will do: each compiles, and looks on disk first
        counters["inductor"]["fxgraph_cache_hit"] = 0
        captured = capture(gradient, z)
        assert captured.compiled
        hits.append(counters["inductor"]["fxgraph_cache_hit"])
        found.append(captured(z))
    assert hits == [0, 1]
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], gradient(z))


@pytest.mark.slow
def test_programs_on_disk_are_told_apart_by_their_constants(tmp_path, monkeypatch):
    """Numbers, and tensors made or closed over, are of a program or are given to it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    z = torch.tensor([0.3, -1.2, 2.0])
    for number, made, outer in [(2.0, 1.0, 1.0), (3.0, 1.0, 1.0), (2.0, 5.0, 1.0), (2.0, 1.0, 7.0)]:
        weights = torch.tensor([1.0, outer, 2.0])

        def gradient(z, number=number, made=made, weights=weights):
            inner = torch.tensor([made, 2.0, 3.0])
            return torch.func.grad(lambda z: (number * inner * weights * z.sin()).sum())(z)

        torch.testing.assert_close(capture(gradient, z)(z), gradient(z))


def test_draws_that_nothing_uses_are_made_all_the_same():
    """A compiled program takes as many random numbers as its function, in the same order."""

    def function(x):
        torch.randn(5)
        torch.nn.functional.dropout(x, 0.5)  # in place, on a tensor of its own
        torch.native_dropout(x, 0.5, True)  # which returns two tensors
        torch.randperm(7)
        return x + torch.randn(3), x.exp()

    x = torch.tensor([0.0, 1.0, 2.0])
    captured = capture(function, x)
    assert captured.compiled
    for _ in range(2):
        torch.manual_seed(3)
        expected, after = function(x), torch.get_rng_state()
        torch.manual_seed(3)
        found = captured(x)
        assert len(found) == 2
        torch.testing.assert_close(found, expected)
        assert torch.equal(torch.get_rng_state(), after)
