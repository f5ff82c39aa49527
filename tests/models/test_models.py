"""Every model against its formula, under the contract that all models keep."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyro
import pyro.poutine as poutine
import pytest
import torch
from pyro.poutine.util import site_is_subsample
from scipy import stats

from pyro_vae import models


class Case(NamedTuple):
    """What a model's documentation says. The value of a factor is empty, of shape (0,)."""

    args: list  # numbers and lists of floats become tensors of the type under test
    latents: dict[str, tuple]
    observed: dict[str, tuple]
    log_density: Callable  # of a dict of values and of the arguments, all in numpy
    bad_args: list  # each a list of arguments, with what the error must show


SCHOOLS = [[1.0, -2.0, 0.5], [0.7, 1.5, 2.0]]
BAD_SCHOOLS = [
    ([[1.0, 2.0], [1.0, 1.0, 1.0]], r"y and sigma .*y \[2\] and sigma \[3\]"),
    ([[[1.0], [2.0]], [[1.0], [1.0]]], r"y and sigma .*y \[2, 1\] and sigma \[2, 1\]"),
    ([None, 1.0], r"y and sigma .*y None and sigma \[\]"),
]
normal = stats.norm.logpdf


def schools_avb(values, y, sigma):
    mu, tau, eta = values["mu"], values["tau"], values["eta"]
    likelihood = normal(y, mu + tau * eta, sigma).sum()
    return likelihood + normal(mu) + normal(tau) + normal(eta).sum()


def schools_centered(values, y, sigma):
    mu, tau, theta = values["mu"], values["tau"], values["theta"]
    prior = normal(mu, 0, 5) + stats.halfcauchy.logpdf(tau, 0, 5) + normal(theta, mu, tau).sum()
    return prior + normal(y, theta, sigma).sum()


def schools_noncentered(values, y, sigma):
    mu, tau, eta = values["mu"], values["tau"], values["theta_trans"]
    prior = normal(mu, 0, 5) + stats.halfcauchy.logpdf(tau, 0, 5) + normal(eta).sum()
    return prior + normal(y, mu + tau * eta, sigma).sum()


def rosenbrock(values, center):
    x1, x2 = values["x"]
    return -((x1 - center) ** 2) - (x2**2 - x1) ** 2


def torus(values, squared_radius):
    x1, x2 = values["x"]
    return -((x1**2 + x2**2 - squared_radius) ** 2)


def gauss(values, loc, scale_tril):
    return stats.multivariate_normal(loc, scale_tril @ scale_tril.T).logpdf(values["x"])


def linear(values, x, y):
    a, b, sigma = values["intercept"], values["coefficients"], values["noise_scale"]
    prior = normal(a, 0, 2.5) + normal(b, 0, 2.5).sum() + stats.expon.logpdf(sigma)
    return prior + normal(y, a + x @ b, sigma).sum()


def logistic(values, x, y):
    a, b = values["intercept"], values["coefficients"]
    likelihood = stats.bernoulli.logpmf(y, 1 / (1 + np.exp(-(a + x @ b)))).sum()
    return likelihood + normal(a) + normal(b).sum()


def quadratic_form(values, precision):
    return -values["x"] @ precision @ values["x"] / 2


def hierarchical(values, group, x, y, num_groups):
    prior = normal(values["intercept_loc"], 0, 2.5) + normal(values["slope_loc"], 0, 2.5)
    for scale in ("intercept_scale", "slope_scale", "noise_scale"):
        prior += stats.halfnorm.logpdf(values[scale])
    likelihood = 0.0
    for j in range(num_groups):
        a, b = values["intercept_raw"][j], values["slope_raw"][j]
        prior += normal(a) + normal(b)
        intercept = values["intercept_loc"] + values["intercept_scale"] * a
        slope = values["slope_loc"] + values["slope_scale"] * b
        mean = intercept + slope * x[group == j]
        likelihood += normal(y[group == j], mean, values["noise_scale"]).sum()
    return prior + likelihood


def process(values, x, y):
    alpha, ell, sigma = (values[k] for k in ("amplitude", "lengthscale", "noise_scale"))
    prior = sum(stats.lognorm.logpdf(v, 1) for v in (alpha, ell, sigma))
    covariance = [[alpha**2 * math.exp(-(((a - b) / ell) ** 2) / 2) for b in x] for a in x]
    covariance = np.array(covariance) + sigma**2 * np.eye(len(x))
    return prior + stats.multivariate_normal(np.zeros(len(x)), covariance).logpdf(y)


def funnel(values, scale, dim):
    assert values["x_raw"].shape == (dim - 1,)
    return normal(values["y"], 0, scale) + normal(values["x_raw"]).sum()


def unmixing(values, spectra, y):
    g, w, sigma = values["illumination"], values["shares"], values["noise_scale"]
    prior = stats.uniform.logpdf(g, 0.5, 1.0) + stats.expon.logpdf(sigma)
    prior += stats.dirichlet.logpdf(w, np.ones(len(w)))
    return prior + normal(y, g * spectra @ w, sigma).sum()


REGRESSION = [[[0.3, -1.0], [1.2, 0.4], [-0.7, 0.1]], [1.0, -0.5, 0.2]]
BINARY = [REGRESSION[0], [1.0, 0.0, 1.0]]
GROUPED = [[1, 0, 1, 2], [0.5, -1.0, 2.0, 0.1], [1.0, 0.3, -0.2, 0.7], 3]
CURVE = [[0.0, 0.4, 1.5], [1.0, 0.8, -0.3]]
SPECTRA = [[[0.8, 0.2], [0.5, 0.5], [0.1, 0.9]], [0.6, 0.5, 0.4]]
BAD_REGRESSION = [
    ([[[1.0, 2.0]], [1.0, 2.0]], r"x must .*x \[1, 2\] and y \[2\]"),
    ([[1.0, 2.0], [1.0, 2.0]], r"x must .*x \[2\] and y \[2\]"),
    ([[1.0, 2.0], None], r"x must .*x \[2\] and y None"),
]

CASES = {
    "linear_regression": Case(
        REGRESSION,
        {"intercept": (), "coefficients": (2,), "noise_scale": ()},
        {"y": (3,)},
        linear,
        BAD_REGRESSION,
    ),
    "logistic_regression": Case(
        BINARY, {"intercept": (), "coefficients": (2,)}, {"y": (3,)}, logistic, BAD_REGRESSION
    ),
    "correlated_gaussian": Case(
        [[[2.0, -0.5], [-0.5, 1.0]]],
        {"x": (2,)},
        {"log_density": (0,)},
        quadratic_form,
        [
            ([[1.0, 2.0]], r"precision must .*precision \[2\]"),
            ([[[1.0, 2.0]]], r"precision must .*precision \[1, 2\]"),
        ],
    ),
    "hierarchical_regression": Case(
        GROUPED,
        {
            "intercept_loc": (),
            "intercept_scale": (),
            "slope_loc": (),
            "slope_scale": (),
            "noise_scale": (),
            "intercept_raw": (3,),
            "slope_raw": (3,),
        },
        {"intercept": (3,), "slope": (3,), "y": (4,)},
        hierarchical,
        [
            ([[0, 1], [1.0, 2.0], [1.0]], r"group \[2\], x \[2\] and y \[1\]"),
            ([[0], [1.0, 2.0], None], r"group \[1\], x \[2\] and y None"),
            ([0, 1.0, 2.0], r"group \[\], x \[\] and y \[\]"),
            ([[0.0, 1.0], [1.0, 2.0], [1.0, 2.0]], r"group must hold integers .*torch.float"),
        ],
    ),
    "gaussian_process": Case(
        CURVE,
        {"amplitude": (), "lengthscale": (), "noise_scale": ()},
        {"y": (3,)},
        process,
        [
            ([[1.0, 2.0], [1.0]], r"x and y .*x \[2\] and y \[1\]"),
            ([1.0, None], r"x and y .*x \[\] and y None"),
        ],
    ),
    "funnel_noncentered": Case(
        [3.0, 4],
        {"y": (), "x_raw": (3,)},
        {"x": (3,)},
        funnel,
        [([[3.0]], r"scale .*\[1\]"), ([3.0, 1], r"dim must be at least 2; found 1")],
    ),
    "bounded_and_simplex": Case(
        SPECTRA,
        {"illumination": (), "shares": (2,), "noise_scale": ()},
        {"y": (3,)},
        unmixing,
        [
            ([SPECTRA[0], [1.0]], r"spectra must .*spectra \[3, 2\] and y \[1\]"),
            ([[1.0], None], r"spectra must .*spectra \[1\] and y None"),
        ],
    ),
    "eight_schools_avb": Case(
        SCHOOLS, {"mu": (), "tau": (), "eta": (3,)}, {"y": (3,)}, schools_avb, BAD_SCHOOLS
    ),
    "eight_schools_centered": Case(
        SCHOOLS, {"mu": (), "tau": (), "theta": (3,)}, {"y": (3,)}, schools_centered, BAD_SCHOOLS
    ),
    "eight_schools_noncentered": Case(
        SCHOOLS,
        {"mu": (), "tau": (), "theta_trans": (3,)},
        {"theta": (3,), "y": (3,)},
        schools_noncentered,
        BAD_SCHOOLS,
    ),
    "rosenbrock": Case(
        [0.7], {"x": (2,)}, {"log_density": (0,)}, rosenbrock, [([[0.7, 1.0]], r"center .*\[2\]")]
    ),
    "torus": Case(
        [1.7], {"x": (2,)}, {"log_density": (0,)}, torus, [([[1.7]], r"squared_radius .*\[1\]")]
    ),
    "gauss": Case(
        [[1.0, -2.0, 0.0], [[2.0, 0.0, 0.0], [0.5, 1.0, 0.0], [-1.0, 0.3, 0.5]]],
        {"x": (3,)},
        {},
        gauss,
        [
            ([[1.0, 2.0], [[1.0]]], r"found \[2\] and \[1, 1\]"),
            ([1.0, [[1.0]]], r"found \[\] and \[1, 1\]"),
            ([[1.0, 2.0], [1.0, 2.0]], r"found \[2\] and \[2\]"),
        ],
    ),
}
EIGHT_SCHOOLS = [name for name in CASES if name.startswith("eight_schools")]


def as_tensors(args, dtype, device):
    """Floats become tensors of ``dtype``, lists of integers index tensors; the rest stays."""

    def convert(a):
        if a is None or (isinstance(a, int) and a > 0):
            return a
        floats = torch.tensor(a).is_floating_point()
        return torch.tensor(a, dtype=dtype if floats else None, device=device)

    return [convert(a) for a in args]


def draw(case, dtype, device):
    """Values of the latent sites, in (0.5, 1.5) except on a simplex."""
    values = {
        name: torch.rand(shape, dtype=dtype, device=device) + 0.5
        for name, shape in case.latents.items()
    }
    if "shares" in values:
        values["shares"] = values["shares"] / values["shares"].sum()
    return values


def run(name, values, args):
    model = pyro.condition(getattr(models, name), values)
    return poutine.trace(model).get_trace(*args)


def test_every_model_is_tested():
    """The modules in test_vae.py and test_observations.py."""
    functions = {name for name in models.__all__ if not isinstance(getattr(models, name), type)}
    assert set(CASES) == functions


@pytest.mark.parametrize("name", CASES)
def test_runs_on_its_defaults(name):
    trace = poutine.trace(getattr(models, name)).get_trace()
    trace.compute_log_prob()
    assert trace.log_prob_sum().isfinite()


@pytest.mark.parametrize("name", CASES)
def test_has_the_documented_sites(name, dtype, device):
    case = CASES[name]
    trace = poutine.trace(getattr(models, name)).get_trace(*as_tensors(case.args, dtype, device))
    latents = {
        name: trace.nodes[name]["value"]
        for name in trace.stochastic_nodes
        if not site_is_subsample(trace.nodes[name])
    }
    observed = {n: trace.nodes[n]["value"].shape for n in trace.observation_nodes}
    assert {n: v.shape for n, v in latents.items()} == case.latents
    assert observed == case.observed
    documented = getattr(models, name).__doc__
    for site in {*case.latents, *case.observed} - {"log_density"}:
        assert f"``{site}``" in documented


@pytest.mark.parametrize("name", CASES)
def test_dtype_and_device_follow_the_data(name, dtype, device):
    case = CASES[name]
    trace = poutine.trace(getattr(models, name)).get_trace(*as_tensors(case.args, dtype, device))
    for site in {**case.latents, **case.observed}:
        value = trace.nodes[site]["value"]
        assert value.device.type == device.type, site
        assert value.dtype == dtype, site
    assert trace.log_prob_sum().dtype == dtype


@pytest.mark.parametrize("name", CASES)
def test_log_density_is_the_formula(name, device):
    case = CASES[name]
    args = as_tensors(case.args, torch.float64, device)
    for _ in range(5):
        values = draw(case, torch.float64, device)
        found = run(name, values, args).log_prob_sum().item()
        numbers = {site: value.cpu().numpy() for site, value in values.items()}
        given = [a if isinstance(a, int) else np.array(a) for a in case.args]
        expected = case.log_density(numbers, *given)
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_vectorises_under_a_plate_of_particles(name, device):
    """Draws of the particles are independent, and each has the density that it has alone."""
    case = CASES[name]
    args = as_tensors(case.args, torch.float64, device)

    def particles(*args):
        with pyro.plate("particles", 4, dim=-2):
            getattr(models, name)(*args)

    trace = poutine.trace(particles).get_trace(*args)
    trace.compute_log_prob()
    values = {site: trace.nodes[site]["value"] for site in case.latents}
    total = torch.zeros(4, dtype=torch.float64, device=device)
    for site in {**case.latents, **case.observed}:
        log_prob = torch.as_tensor(trace.nodes[site]["log_prob"])
        if log_prob.dim():  # a flat density's is a plain zero
            assert log_prob.shape[0] == 4
            total += log_prob.sum(-1)
    for value in values.values():
        assert value.shape[0] == 4
        assert len(value.flatten(1).unique(dim=0)) == 4
    for i in range(4):
        alone = {site: values[site][i].reshape(shape) for site, shape in case.latents.items()}
        expected = run(name, alone, args).log_prob_sum()
        torch.testing.assert_close(total[i], expected)


@pytest.mark.parametrize("name", CASES)
def test_bad_shapes_are_named(name, dtype, device):
    for args, message in CASES[name].bad_args:
        with pytest.raises(ValueError, match=message):
            getattr(models, name)(*as_tensors(args, dtype, device))


@pytest.mark.parametrize("name", EIGHT_SCHOOLS)
def test_without_y_the_effects_are_sampled(name, dtype, device):
    """Given the latents, y has the mean and standard deviation of its likelihood."""
    _, sigma = as_tensors(SCHOOLS, dtype, device)
    case = CASES[name]
    values = draw(case, dtype, device)
    n = 2000

    def many():
        with pyro.plate("draws", n, dim=-2):
            getattr(models, name)(None, sigma)

    trace = poutine.trace(pyro.condition(many, values)).get_trace()
    y = trace.nodes["y"]["value"]
    assert not trace.nodes["y"]["is_observed"]
    assert y.shape == (n, 3)
    assert y.dtype == dtype
    mean = values.get("theta", values["mu"] + values["tau"] * values.get("eta", 0.0))
    if "theta_trans" in values:
        mean = values["mu"] + values["tau"] * values["theta_trans"]
    z = (y.mean(0) - mean) / (sigma / math.sqrt(n))
    assert z.abs().max() < 4
    assert ((y.std(0) / sigma - 1) * math.sqrt(2 * n)).abs().max() < 4


def test_tau_and_eta_change_sign_together(device):
    """The two modes of the paper's posterior are mirror images."""
    values = draw(CASES["eight_schools_avb"], torch.float64, device)
    args = as_tensors(SCHOOLS, torch.float64, device)
    mirrored = {"mu": values["mu"], "tau": -values["tau"], "eta": -values["eta"]}
    half = {**values, "tau": -values["tau"]}
    at = [run("eight_schools_avb", v, args).log_prob_sum() for v in (values, mirrored, half)]
    torch.testing.assert_close(at[0], at[1])
    assert (at[0] - at[2]).abs() > 0.1


def test_centred_and_noncentred_have_one_posterior(device):
    """Equal densities up to the Jacobian of θ = μ + τ θ̃, τ^J."""
    args = as_tensors(SCHOOLS, torch.float64, device)
    values = draw(CASES["eight_schools_noncentered"], torch.float64, device)
    trace = run("eight_schools_noncentered", values, args)
    theta = trace.nodes["theta"]["value"]
    torch.testing.assert_close(theta, values["mu"] + values["tau"] * values["theta_trans"])
    moved = {"mu": values["mu"], "tau": values["tau"], "theta": theta}
    centered = run("eight_schools_centered", moved, args).log_prob_sum()
    torch.testing.assert_close(trace.log_prob_sum(), centered + 3 * values["tau"].log())


def test_default_data_give_the_papers_posterior():
    """By quadrature over (μ, τ), η integrated out: E μ = 0.776, sd τ = 0.79."""
    trace = poutine.trace(models.eight_schools_avb).get_trace()
    y, sigma = (
        x.double().numpy() for x in (trace.nodes["y"]["value"], trace.nodes["y"]["fn"].scale)
    )
    mu, tau = np.meshgrid(np.linspace(-4, 5, 301), np.linspace(-5, 5, 301), indexing="ij")
    scale = np.sqrt(tau[..., None] ** 2 + sigma**2)
    log_p = normal(mu) + normal(tau) + normal(y, mu[..., None], scale).sum(-1)
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    assert (p * mu).sum() == pytest.approx(0.776, abs=0.001)
    assert math.sqrt((p * tau**2).sum()) == pytest.approx(0.79, abs=0.005)


def test_gelmans_data():
    for model in (models.eight_schools_centered, models.eight_schools_noncentered):
        node = poutine.trace(model).get_trace().nodes["y"]
        assert node["value"].tolist() == [28, 8, -3, 7, -1, 1, 18, 12]
        assert node["fn"].scale.tolist() == [15, 10, 16, 11, 9, 11, 10, 18]
