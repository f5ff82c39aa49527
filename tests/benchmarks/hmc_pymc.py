"""The ten posteriors of ``pyro_vae.models.posteriors`` as PyMC models: same sites, same data."""

from __future__ import annotations

import numpy as np
import pymc as pm
import pytensor.tensor as pt


def eight_schools_avb(y: np.ndarray, sigma: np.ndarray) -> None:
    mu = pm.Normal("mu", 0, 1)
    tau = pm.Normal("tau", 0, 1)
    eta = pm.Normal("eta", 0, 1, shape=len(y))
    pm.Normal("y", mu + tau * eta, sigma, observed=y)


def eight_schools_centered(y: np.ndarray, sigma: np.ndarray) -> None:
    mu = pm.Normal("mu", 0, 5)
    tau = pm.HalfCauchy("tau", 5)
    theta = pm.Normal("theta", mu, tau, shape=len(y))
    pm.Normal("y", theta, sigma, observed=y)


def eight_schools_noncentered(y: np.ndarray, sigma: np.ndarray) -> None:
    mu = pm.Normal("mu", 0, 5)
    tau = pm.HalfCauchy("tau", 5)
    theta_trans = pm.Normal("theta_trans", 0, 1, shape=len(y))
    pm.Normal("y", mu + tau * theta_trans, sigma, observed=y)


def linear_regression(x: np.ndarray, y: np.ndarray) -> None:
    intercept = pm.Normal("intercept", 0, 2.5)
    coefficients = pm.Normal("coefficients", 0, 2.5, shape=x.shape[1])
    noise_scale = pm.Exponential("noise_scale", 1.0)
    pm.Normal("y", intercept + pt.dot(x, coefficients), noise_scale, observed=y)


def logistic_regression(x: np.ndarray, y: np.ndarray) -> None:
    intercept = pm.Normal("intercept", 0, 1)
    coefficients = pm.Normal("coefficients", 0, 1, shape=x.shape[1])
    pm.Bernoulli("y", logit_p=intercept + pt.dot(x, coefficients), observed=y)


def correlated_gaussian(precision: np.ndarray) -> None:
    x = pm.Flat("x", shape=len(precision))
    pm.Potential("log_density", -0.5 * pt.dot(x, pt.dot(precision, x)))


def hierarchical_regression(
    group: np.ndarray, x: np.ndarray, y: np.ndarray, num_groups: int
) -> None:
    intercept_loc = pm.Normal("intercept_loc", 0, 2.5)
    intercept_scale = pm.HalfNormal("intercept_scale", 1)
    slope_loc = pm.Normal("slope_loc", 0, 2.5)
    slope_scale = pm.HalfNormal("slope_scale", 1)
    noise_scale = pm.HalfNormal("noise_scale", 1)
    intercept_raw = pm.Normal("intercept_raw", 0, 1, shape=num_groups)
    slope_raw = pm.Normal("slope_raw", 0, 1, shape=num_groups)
    intercept = intercept_loc + intercept_scale * intercept_raw
    slope = slope_loc + slope_scale * slope_raw
    pm.Normal("y", intercept[group] + slope[group] * x, noise_scale, observed=y)


def gaussian_process(x: np.ndarray, y: np.ndarray) -> None:
    amplitude = pm.LogNormal("amplitude", 0, 1)
    lengthscale = pm.LogNormal("lengthscale", 0, 1)
    noise_scale = pm.LogNormal("noise_scale", 0, 1)
    squared_distance = ((x[:, None] - x) ** 2).astype(x.dtype)
    covariance = amplitude**2 * pt.exp(-squared_distance / (2 * lengthscale**2))
    covariance = covariance + noise_scale**2 * np.eye(len(x), dtype=x.dtype)
    pm.MvNormal("y", np.zeros_like(x), cov=covariance, observed=y)


def funnel_noncentered(scale: np.ndarray, dim: int) -> None:
    pm.Normal("y", 0, float(scale))
    pm.Normal("x_raw", 0, 1, shape=dim - 1)


def bounded_and_simplex(spectra: np.ndarray, y: np.ndarray) -> None:
    illumination = pm.Uniform("illumination", 0.5, 1.5)
    shares = pm.Dirichlet("shares", np.ones(spectra.shape[1]))
    noise_scale = pm.Exponential("noise_scale", 1.0)
    pm.Normal("y", illumination * pt.dot(spectra, shares), noise_scale, observed=y)


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
