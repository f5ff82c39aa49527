"""Inference networks: Pyro guides, installed as ``pyro_vae.guides``."""

from .flow import AutoFlow
from .implicit import AutoImplicit

__all__ = ["AutoFlow", "AutoImplicit"]
