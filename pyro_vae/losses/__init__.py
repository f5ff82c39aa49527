"""Objectives, one file a method, as subclasses of Pyro's ``ELBO``."""

from .avb import AVB_ELBO

__all__ = ["AVB_ELBO"]
