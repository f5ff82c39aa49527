"""Variational-autoencoder objectives, implicit and flow guides, and many-chain HMC for Pyro."""

from ._version import __version__
from .compare import Comparison, compare
from .svi import fit

__all__ = ["Comparison", "__version__", "compare", "fit"]
