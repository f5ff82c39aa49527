"""Objectives, one file a method, as subclasses of Pyro's ``ELBO``."""

from .avb import AVB_ELBO
from .base import TermsELBO
from .beta_vae import BetaVAE_ELBO
from .dvae import DVAE_ELBO
from .geco import GECO_ELBO
from .grae import GRAE_ELBO
from .infovae import InfoVAE_ELBO
from .iwae import IWAE_ELBO
from .kl_schedule import KLSchedule
from .taylor import Taylor_ELBO

__all__ = [
    "AVB_ELBO",
    "DVAE_ELBO",
    "GECO_ELBO",
    "GRAE_ELBO",
    "IWAE_ELBO",
    "BetaVAE_ELBO",
    "InfoVAE_ELBO",
    "KLSchedule",
    "Taylor_ELBO",
    "TermsELBO",
]
