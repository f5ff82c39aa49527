"""Variational-autoencoder objectives, implicit and flow guides, and many-chain HMC for Pyro."""

from ._version import __version__
from .compare import Comparison, compare
from .fit import NonFiniteError, adversarial_recipe, fit
from .svi import SVI, compile

__all__ = [
    "SVI",
    "Comparison",
    "NonFiniteError",
    "__version__",
    "adversarial_recipe",
    "compare",
    "compile",
    "fit",
]
