"""β-VAE (Higgins et al., 2017), with the KL's weight on a schedule and free bits."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..distributed import average
from ..terms import Terms
from .base import TermsELBO
from .kl_schedule import KLSchedule

__all__ = ["BetaVAE_ELBO"]


class BetaVAE_ELBO(TermsELBO):  # noqa: N801 - Pyro's way to name losses
    r"""Minimise the β-VAE objective, with β on a schedule and free bits if asked for.

    .. math:: -\mathbb{E}_q \log p(x|z) + \beta \, \mathrm{KL}(q(z|x) \| p(z))

    summed over the data set; β = 1 is the ELBO. With free bits, the KL is

    .. math:: \sum_k \max(f, \mathbb{E}_x \mathrm{KL}_k)

    the average over the minibatch of each coordinate's KL (of each site's, where it does not split
    into coordinates), of which f nats come for free; before β, but with what
    ``poutine.scale`` says of a site.

    Args:
        beta: β, a number or a :class:`KLSchedule`.
        free_bits: f, in nats.
        **kwargs: Those of :class:`~pyro_vae.losses.TermsELBO`.

    Raises:
        ValueError: For a negative β or f.

    References:
        | beta-VAE: Learning Basic Visual Concepts with a Constrained Variational Framework
        | (Higgins et al., 2017), equation 4
        | https://openreview.net/forum?id=Sy2fzU9gl
        | Improving Variational Inference with Inverse Autoregressive Flow
        | (Kingma et al., 2016), appendix C.8 (free bits)
        | https://arxiv.org/abs/1606.04934

    Example:
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from pyro_vae.losses import KLSchedule
        >>> from pyro_vae.models import gauss
        >>> elbo = BetaVAE_ELBO(KLSchedule(n_steps_kl_warmup=100))
        >>> loss = elbo(gauss, AutoNormal(gauss))()
        >>> dict(elbo.state_dict())
        {'beta.count': tensor(1)}
    """

    def __init__(
        self, beta: float | KLSchedule = 1.0, *, free_bits: float = 0.0, **kwargs: Any
    ) -> None:
        if not isinstance(beta, KLSchedule) and not beta >= 0:
            raise ValueError(f"beta must not be negative, found {beta}")
        if not free_bits >= 0:
            raise ValueError(f"free_bits must not be negative, found {free_bits}")
        super().__init__(**kwargs)
        self.beta = beta
        self.free_bits = free_bits

    def formula(self, terms: Terms) -> Tensor:
        """Return the negative log likelihood plus β times the KL."""
        if not isinstance(self.beta, KLSchedule) and self.beta == 0:
            return terms.total(-terms.log_likelihood)  # whatever the KL: 0 · ∞ is NaN
        beta = self.beta.weight if isinstance(self.beta, KLSchedule) else self.beta
        kl = terms.kl
        if self.free_bits:
            kl = average(terms.mean(terms.kl_by_dim)).clamp(min=self.free_bits).sum()
        return terms.total(beta * kl - terms.log_likelihood)

    def advance(self, terms: Terms) -> None:
        """Count a step of the schedule."""
        if isinstance(self.beta, KLSchedule):
            self.beta.step()
