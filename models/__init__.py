"""Generative models: plain Pyro model functions, installed as ``pyro_vae.models``."""

from .densities import gauss, rosenbrock, torus
from .eight_schools import (
    eight_schools_avb,
    eight_schools_centered,
    eight_schools_noncentered,
)

__all__ = [
    "eight_schools_avb",
    "eight_schools_centered",
    "eight_schools_noncentered",
    "gauss",
    "rosenbrock",
    "torus",
]
