"""The ten posteriors of ``pyro_vae.models.posteriors`` as NumPyro models: same sites, same data."""

from __future__ import annotations

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array


def eight_schools_avb(y: Array, sigma: Array) -> None:
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    tau = numpyro.sample("tau", dist.Normal(0, 1))
    with numpyro.plate("schools", len(y)):
        eta = numpyro.sample("eta", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def eight_schools_centered(y: Array, sigma: Array) -> None:
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("schools", len(y)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_noncentered(y: Array, sigma: Array) -> None:
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("schools", len(y)):
        theta_trans = numpyro.sample("theta_trans", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(mu + tau * theta_trans, sigma), obs=y)


def linear_regression(x: Array, y: Array) -> None:
    intercept = numpyro.sample("intercept", dist.Normal(0, 2.5))
    coefficients = numpyro.sample(
        "coefficients", dist.Normal(0, 2.5).expand([x.shape[1]]).to_event(1)
    )
    noise_scale = numpyro.sample("noise_scale", dist.Exponential(1.0))
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", dist.Normal(intercept + x @ coefficients, noise_scale), obs=y)


def logistic_regression(x: Array, y: Array) -> None:
    intercept = numpyro.sample("intercept", dist.Normal(0, 1))
    coefficients = numpyro.sample(
        "coefficients", dist.Normal(0, 1).expand([x.shape[1]]).to_event(1)
    )
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", dist.Bernoulli(logits=intercept + x @ coefficients), obs=y)


def correlated_gaussian(precision: Array) -> None:
    dim = len(precision)
    x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.real_vector, (), (dim,)))
    numpyro.factor("log_density", -0.5 * x @ precision @ x)


def hierarchical_regression(group: Array, x: Array, y: Array, num_groups: int) -> None:
    intercept_loc = numpyro.sample("intercept_loc", dist.Normal(0, 2.5))
    intercept_scale = numpyro.sample("intercept_scale", dist.HalfNormal(1))
    slope_loc = numpyro.sample("slope_loc", dist.Normal(0, 2.5))
    slope_scale = numpyro.sample("slope_scale", dist.HalfNormal(1))
    noise_scale = numpyro.sample("noise_scale", dist.HalfNormal(1))
    with numpyro.plate("groups", num_groups):
        intercept_raw = numpyro.sample("intercept_raw", dist.Normal(0, 1))
        slope_raw = numpyro.sample("slope_raw", dist.Normal(0, 1))
    intercept = intercept_loc + intercept_scale * intercept_raw
    slope = slope_loc + slope_scale * slope_raw
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", dist.Normal(intercept[group] + slope[group] * x, noise_scale), obs=y)


def gaussian_process(x: Array, y: Array) -> None:
    amplitude = numpyro.sample("amplitude", dist.LogNormal(0, 1))
    lengthscale = numpyro.sample("lengthscale", dist.LogNormal(0, 1))
    noise_scale = numpyro.sample("noise_scale", dist.LogNormal(0, 1))
    covariance = amplitude**2 * jnp.exp(-((x[:, None] - x) ** 2) / (2 * lengthscale**2))
    covariance = covariance + noise_scale**2 * jnp.eye(len(x))
    scale_tril = jnp.linalg.cholesky(covariance)
    numpyro.sample("y", dist.MultivariateNormal(jnp.zeros_like(x), scale_tril=scale_tril), obs=y)


def funnel_noncentered(scale: Array, dim: int) -> None:
    numpyro.sample("y", dist.Normal(0, scale))
    numpyro.sample("x_raw", dist.Normal(0, 1).expand([dim - 1]).to_event(1))


def bounded_and_simplex(spectra: Array, y: Array) -> None:
    illumination = numpyro.sample("illumination", dist.Uniform(0.5, 1.5))
    shares = numpyro.sample("shares", dist.Dirichlet(jnp.ones(spectra.shape[1])))
    noise_scale = numpyro.sample("noise_scale", dist.Exponential(1.0))
    with numpyro.plate("data", len(spectra)):
        numpyro.sample("y", dist.Normal(illumination * (spectra @ shares), noise_scale), obs=y)


MODELS = {
    model.__name__: model
    for model in (
        eight_schools_centered,
        eight_schools_noncentered,
        eight_schools_avb,
        linear_regression,
        logistic_regression,
        correlated_gaussian,
        hierarchical_regression,
        gaussian_process,
        funnel_noncentered,
        bounded_and_simplex,
    )
}
