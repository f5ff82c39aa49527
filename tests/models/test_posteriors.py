"""The benchmark posteriors: their data, and the exact moments against independent quadratures."""

import math

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from scipy import integrate, stats

from pyro_vae.capture import UnconstrainedModel
from pyro_vae.mcmc import HMC
from pyro_vae.models import posteriors
from pyro_vae.models.posteriors import POSTERIORS

DTYPES = [torch.float32, torch.float64]
EXACT = [name for name, posterior in POSTERIORS.items() if posterior.mean_sd]
WITHOUT_DATA = ["correlated_gaussian", "funnel_noncentered"]


def test_the_ten_posteriors():
    assert list(POSTERIORS) == [
        "eight_schools_centered",
        "eight_schools_noncentered",
        "eight_schools_avb",
        "linear_regression",
        "logistic_regression",
        "correlated_gaussian",
        "hierarchical_regression",
        "gaussian_process",
        "funnel_noncentered",
        "bounded_and_simplex",
    ]


@pytest.mark.parametrize("name", POSTERIORS)
def test_the_registry_names_the_model(name):
    assert POSTERIORS[name].model.__name__ == name


@pytest.mark.parametrize("name", POSTERIORS)
def test_data_come_from_a_private_generator(name):
    """The same whatever the global generator holds, which is left alone; others by another seed."""
    data = POSTERIORS[name].data
    state = torch.get_rng_state()
    first = data(torch.float64, 0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    again, other = data(torch.float64, 0), data(torch.float64, 1)
    tensors = [i for i, a in enumerate(first) if isinstance(a, torch.Tensor)]
    assert all(torch.equal(first[i], again[i]) for i in tensors)
    simulated = not name.startswith("eight_schools") and name != "funnel_noncentered"
    assert any(not torch.equal(first[i], other[i]) for i in tensors) == simulated


@pytest.mark.parametrize("name", POSTERIORS)
def test_one_seed_is_one_data_set_in_both_types(name):
    single, double = (POSTERIORS[name].data(dtype, 3) for dtype in DTYPES)
    for a, b in zip(single, double, strict=True):
        if isinstance(b, torch.Tensor) and b.is_floating_point():
            assert (a.dtype, b.dtype) == (torch.float32, torch.float64)
            torch.testing.assert_close(a, b.float())
        else:
            assert np.array_equal(a, b)


def test_the_sizes_that_the_benchmark_names():
    shapes = {
        name: [list(a.shape) for a in posterior.data(torch.float32, 0) if torch.is_tensor(a)]
        for name, posterior in POSTERIORS.items()
    }
    assert shapes["linear_regression"] == [[500, 10], [500]]
    assert shapes["logistic_regression"] == [[1000, 25], [1000]]
    assert shapes["correlated_gaussian"] == [[100, 100]]
    assert shapes["hierarchical_regression"] == [[400], [400], [400]]
    assert shapes["gaussian_process"] == [[100], [100]]
    group, *_, num_groups = POSTERIORS["hierarchical_regression"].data(torch.float32, 0)
    assert num_groups == 40
    assert len(group.unique()) == 40


def test_the_gaussian_is_ill_conditioned_along_no_coordinate():
    """Neither in its own units nor in those of the marginals, which a diagonal metric gives."""
    (precision,) = posteriors.correlated_gaussian_data(dtype=torch.float64)
    torch.testing.assert_close(precision, precision.mT)
    assert torch.linalg.cond(precision).item() == pytest.approx(1e4, rel=1e-6)
    sd = torch.linalg.inv(precision).diagonal().sqrt()
    assert torch.linalg.cond(sd[:, None] * precision * sd) > 5e3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", POSTERIORS)
def test_captures_in_both_types(name, dtype):
    """Batched by vmap, in the data's type, the rows as each is alone, with finite gradients."""
    posterior = POSTERIORS[name]
    density = UnconstrainedModel(posterior.model, posterior.data(dtype, 0))
    z = density.initial(4)
    assert density.dtype == z.dtype == dtype
    log_density = density.log_density(z)
    assert log_density.dtype == dtype
    alone = torch.stack([density.log_density(row) for row in z])
    torch.testing.assert_close(log_density, alone, rtol=1e-3, atol=1e-3)
    gradient = torch.func.grad(lambda z: density.log_density(z).sum())(z)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", [name for name in POSTERIORS if name not in WITHOUT_DATA])
def test_without_y_the_data_are_sampled(name):
    posterior = POSTERIORS[name]
    args = list(posterior.data(torch.float64, 0))
    place = 0 if name.startswith("eight_schools") else 2 if "hierarchical" in name else 1
    y, args[place] = args[place], None
    node = poutine.trace(posterior.model).get_trace(*args).nodes["y"]
    assert not node["is_observed"]
    assert node["value"].shape == y.shape
    assert node["value"].dtype == torch.float64
    assert not torch.equal(node["value"], y)


def test_a_singular_covariance_is_nan_for_its_chain_alone():
    """With no noise to speak of a smooth kernel has no Cholesky factor."""
    x, y = POSTERIORS["gaussian_process"].data(torch.float32, 0)
    density = UnconstrainedModel(posteriors.gaussian_process, (x, y))
    z = torch.tensor([[0.0, 0.0, -1.0], [0.0, 3.0, -20.0]])  # logarithms of the three sites
    found = density.log_density(z)
    gradient = torch.func.grad(lambda z: density.log_density(z).sum())(z)
    assert found.isfinite().tolist() == [True, False]
    assert gradient[0].isfinite().all()


# -- exact moments ---------------------------------------------------------------------------------


def moments(log_density, grids):
    """Mean and sd of each coordinate of a density on a grid; numpy, one axis a coordinate."""
    points = np.meshgrid(*grids, indexing="ij")
    log_p = log_density(*points)
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    means = [(p * x).sum() for x in points]
    return [(m, math.sqrt((p * (x - m) ** 2).sum())) for m, x in zip(means, points, strict=True)]


@pytest.mark.parametrize("name", EXACT)
def test_exact_moments_have_the_shapes_of_the_sites(name):
    posterior = POSTERIORS[name]
    args = posterior.data(torch.float32, 0)
    sites = UnconstrainedModel(posterior.model, args).sites
    found = posterior.mean_sd(*args)
    assert list(found) == list(sites)
    for site, (mean, sd) in found.items():
        assert mean.shape == sd.shape == sites[site].shape
        assert mean.dtype == sd.dtype == torch.float64
        assert (sd > 0).all()


def condition(columns, prior_variance, noise_variance, y):
    """Return log p(y), mean and covariance of b ~ N(0, diag) given y ~ N(columns b, diag)."""
    cross = prior_variance[:, None] * columns.T
    covariance = columns @ cross + np.diag(noise_variance)
    gain = np.linalg.solve(covariance, cross.T).T
    log_evidence = stats.multivariate_normal(np.zeros(len(y)), covariance).logpdf(y)
    return log_evidence, gain @ y, np.diag(prior_variance) - gain @ cross.T


def mix(log_weights, means, variances):
    """Mean and sd of a mixture with moments [G, P]; numpy."""
    p = np.exp(np.array(log_weights) - max(log_weights))
    p /= p.sum()
    mean = p @ np.array(means)
    return mean, np.sqrt(p @ (np.array(variances) + np.array(means) ** 2) - mean**2)


@pytest.mark.parametrize("centered", [True, False])
def test_exact_moments_of_gelmans_schools_against_dense_algebra(centered):
    """The same sum over τ, each term from the whole covariance matrix of y."""
    y, sigma = np.array([3.0, -2.0, 7.0, 0.5]), np.array([1.5, 4.0, 2.0, 3.0])
    log_weights, means, variances = [], [], []
    for log_tau in np.linspace(-15, 9, 401):
        tau = math.exp(log_tau)
        columns = np.column_stack([np.ones(4), tau * np.eye(4)])
        prior_variance = np.array([25.0, 1, 1, 1, 1])
        log_evidence, mean, covariance = condition(columns, prior_variance, sigma**2, y)
        # mu, tau and the effects: η, or θ = μ + τ η
        effects = columns if centered else np.eye(5)[1:]
        to_sites = np.vstack([np.eye(5)[0], np.zeros(5), effects])
        log_weights.append(log_evidence + stats.halfcauchy.logpdf(tau, 0, 5) + log_tau)
        means.append(to_sites @ mean + tau * np.eye(6)[1])
        variances.append(np.diag(to_sites @ covariance @ to_sites.T))
    mean, sd = mix(log_weights, means, variances)
    name = "eight_schools_centered" if centered else "eight_schools_noncentered"
    found = POSTERIORS[name].mean_sd(torch.tensor(y), torch.tensor(sigma))
    assert list(found) == ["mu", "tau", "theta" if centered else "theta_trans"]
    for k, expected in enumerate((mean, sd)):
        flat = torch.cat([moments[k].reshape(-1) for moments in found.values()])
        np.testing.assert_allclose(flat.numpy(), expected, rtol=1e-4)


def test_exact_moments_of_gelmans_data():
    """The reference posterior of posteriordb says 4.41 ± 3.31 for μ and 3.6 ± 3.2 for τ."""
    for name in ("eight_schools_centered", "eight_schools_noncentered"):
        posterior = POSTERIORS[name]
        found = posterior.mean_sd(*posterior.data(torch.float64, 0))
        assert [float(v) for v in found["mu"]] == pytest.approx([4.4, 3.3], abs=0.05)
        assert [float(v) for v in found["tau"]] == pytest.approx([3.6, 3.2], abs=0.05)


def test_exact_moments_of_the_avb_schools():
    """E τ = E η = 0 exactly; the rest as by quadrature over (μ, τ) in test_models."""
    posterior = POSTERIORS["eight_schools_avb"]
    found = posterior.mean_sd(*posterior.data(torch.float64, 0))
    assert float(found["mu"][0]) == pytest.approx(0.776, abs=0.001)
    assert float(found["tau"][1]) == pytest.approx(0.79, abs=0.005)
    for site in ("tau", "eta"):
        assert found[site][0].abs().max() < 1e-12


@pytest.mark.slow
def test_exact_moments_of_a_linear_regression_against_a_grid():
    x, y = torch.tensor([[0.5], [-1.0], [2.0], [0.3]]), torch.tensor([1.0, -0.5, 2.5, 1.5])
    data = list(zip(x[:, 0].tolist(), y.tolist(), strict=True))

    def log_density(a, b, log_sigma):
        sigma = np.exp(log_sigma)
        prior = stats.norm.logpdf(a, 0, 2.5) + stats.norm.logpdf(b, 0, 2.5) - sigma + log_sigma
        return prior + sum(stats.norm.logpdf(v, a + b * u, sigma) for u, v in data)

    grids = [np.linspace(-9, 11, 401), np.linspace(-9, 11, 401), np.linspace(-3.5, 3, 61)]
    (a, b, _) = moments(log_density, grids)
    found = posteriors.POSTERIORS["linear_regression"].mean_sd(x, y)
    assert tuple(map(float, found["intercept"])) == pytest.approx(a, rel=1e-4)
    assert tuple(map(float, found["coefficients"])) == pytest.approx(b, rel=1e-4)

    def evidence(sigma, power):
        features = np.column_stack([np.ones(4), x.numpy()])
        covariance = 2.5**2 * features @ features.T + sigma**2 * np.eye(4)
        likelihood = stats.multivariate_normal(np.zeros(4), covariance).pdf(y.numpy())
        return sigma**power * math.exp(-sigma) * likelihood

    total, first, second = (integrate.quad(evidence, 0, 30, args=(k,))[0] for k in range(3))
    mean = first / total
    sd = math.sqrt(second / total - mean**2)
    assert tuple(map(float, found["noise_scale"])) == pytest.approx((mean, sd), rel=1e-5)


@pytest.mark.slow
def test_exact_moments_of_a_hierarchical_regression_against_dense_algebra():
    """The same sum over the three scales, each term from the whole covariance matrix of y."""
    num_groups, num_data = 8, 120
    group, x, y, _ = posteriors.hierarchical_regression_data(
        num_groups, num_data, dtype=torch.float64
    )
    found = posteriors.POSTERIORS["hierarchical_regression"].mean_sd(group, x, y, num_groups)
    member = np.eye(num_groups)[group.numpy()]
    design = np.column_stack([np.ones(num_data), x, member, member * x[:, None].numpy()])
    prior_variance = np.array([2.5**2, 2.5**2, *[1.0] * (2 * num_groups)])
    log_weights, means, variances = [], [], []
    wide, narrow = np.linspace(-3.6, 1.2, 17), np.linspace(-0.7, 0.4, 11)
    for log_scales in np.stack(np.meshgrid(wide, wide, narrow), -1).reshape(-1, 3):
        s_a, s_b, noise = scales = np.exp(log_scales)
        columns = design * np.repeat([1, 1, s_a, s_b], [1, 1, num_groups, num_groups])
        noise_variance = np.full(num_data, noise**2)
        log_evidence, mean, covariance = condition(
            columns, prior_variance, noise_variance, y.numpy()
        )
        log_weights.append(log_evidence + stats.halfnorm.logpdf(scales).sum() + log_scales.sum())
        means.append([*mean, *scales])
        variances.append([*np.diag(covariance), 0, 0, 0])
    mean, sd = mix(log_weights, means, variances)
    sites = ["intercept_loc", "slope_loc", "intercept_raw", "slope_raw"]
    sites += ["intercept_scale", "slope_scale", "noise_scale"]
    for k, expected in enumerate((mean, sd)):
        flat = torch.cat([found[site][k].reshape(-1) for site in sites])
        np.testing.assert_allclose(flat.numpy(), expected, rtol=5e-3, atol=5e-3)


def test_exact_moments_of_a_gaussian_process_against_a_grid():
    x, y = posteriors.gaussian_process_data(8, dtype=torch.float64)
    density = UnconstrainedModel(posteriors.gaussian_process, (x, y))
    axis = torch.linspace(-5, 5, 51, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis, axis)
    p = torch.softmax(torch.cat([density.log_density(part) for part in z.split(20_000)]), 0)
    value = z.exp()
    mean = p @ value
    sd = (p @ (value - mean) ** 2).sqrt()
    found = posteriors.POSTERIORS["gaussian_process"].mean_sd(x, y)
    for k, site in enumerate(density.sites):
        assert tuple(map(float, found[site])) == pytest.approx(
            (float(mean[k]), float(sd[k])), rel=1e-3
        )


def test_exact_moments_of_the_gaussian_and_the_funnel():
    precision = torch.tensor([[2.0, -0.5], [-0.5, 1.0]])
    mean, sd = POSTERIORS["correlated_gaussian"].mean_sd(precision)["x"]
    assert mean.tolist() == [0, 0]
    assert sd.square().tolist() == pytest.approx([1 / 1.75, 2 / 1.75])
    found = POSTERIORS["funnel_noncentered"].mean_sd(torch.tensor(3.0), 4)
    assert [float(v) for v in found["y"]] == [0, 3]
    assert [v.tolist() for v in found["x_raw"]] == [[0, 0, 0], [1, 1, 1]]


def test_the_funnel_itself_is_neals():
    """x given y is N(0, exp(y/2)) in the draws of the prior, which is the target."""
    with pyro.plate("draws", 20_000, dim=-1):
        trace = poutine.trace(posteriors.funnel_noncentered).get_trace(dim=3)
    y, x = trace.nodes["y"]["value"], trace.nodes["x"]["value"]
    assert x.shape == (20_000, 2)
    standardised = x / (y / 2).exp()[:, None]
    assert float(y.std()) == pytest.approx(3, rel=0.02)
    assert float(standardised.std()) == pytest.approx(1, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", POSTERIORS)
def test_hmc_runs_without_compiling(name):
    posterior = POSTERIORS[name]
    args = posterior.data(torch.float64, 0)
    mcmc = HMC(posterior.model, 64, 20, 40, compile=False, progress=False, seed=0)
    mcmc.run(*args)
    for value in mcmc.get_samples().values():
        assert value.isfinite().all()
