"""Inference networks: Pyro guides, installed as ``pyro_vae.guides``."""

from .amortized import Amortized
from .flow import AutoFlow, Flow
from .gaussian import Gaussian
from .implicit import AutoImplicit, Implicit

__all__ = ["Amortized", "AutoFlow", "AutoImplicit", "Flow", "Gaussian", "Implicit"]
