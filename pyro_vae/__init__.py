"""Variational-autoencoder objectives, implicit and flow guides, and many-chain HMC for Pyro."""

from ._version import __version__
from .compare import Comparison, compare
from .svi import NonFiniteError, adversarial_recipe, fit

__all__ = ["Comparison", "NonFiniteError", "__version__", "adversarial_recipe", "compare", "fit"]
