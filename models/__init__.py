"""Generative models: Pyro model functions and the VAE, installed as ``pyro_vae.models``."""

from .densities import gauss, rosenbrock, torus
from .eight_schools import (
    eight_schools_avb,
    eight_schools_centered,
    eight_schools_noncentered,
)
from .observations import (
    Bernoulli,
    ContinuousBernoulli,
    DiscretizedLogistic,
    Gaussian,
    Observation,
)
from .posteriors import (
    bounded_and_simplex,
    correlated_gaussian,
    funnel_noncentered,
    gaussian_process,
    hierarchical_regression,
    linear_regression,
    logistic_regression,
)
from .vae import VAE

__all__ = [
    "VAE",
    "Bernoulli",
    "ContinuousBernoulli",
    "DiscretizedLogistic",
    "Gaussian",
    "Observation",
    "bounded_and_simplex",
    "correlated_gaussian",
    "eight_schools_avb",
    "eight_schools_centered",
    "eight_schools_noncentered",
    "funnel_noncentered",
    "gauss",
    "gaussian_process",
    "hierarchical_regression",
    "linear_regression",
    "logistic_regression",
    "rosenbrock",
    "torus",
]
