"""Adversarial variational Bayes (Mescheder, Nowozin, Geiger, 2017)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..terms import Terms
from .base import TermsELBO

__all__ = ["AVB_ELBO"]


class AVB_ELBO(TermsELBO):  # noqa: N801 - Pyro's way to name losses
    r"""Negative ELBO of an implicit guide, with the adversary that learns the guide's density.

    A guide site with an :class:`~pyro_vae.ratios.ImplicitDistribution` has no density. A second
    player, the discriminator T, learns it from samples against a contrast r:

    .. math::
        \text{guide and model:} \quad & \min \; \mathbb{E}_{q(z|x)}
            [T(x, \bar z) + \log r(z|x) - \log p(x, z)] \\
        \text{adversary:} \quad & \min_T \; {-\mathbb{E}_q \log \sigma(T)}
            - \mathbb{E}_r \log(1 - \sigma(T))

    The first is this loss; the second is :meth:`adversary`, with its own optimiser and number of
    steps. With the prior as contrast this is the paper's Algorithm 1, with
    :class:`~pyro_vae.ratios.AdaptiveContrast` its Algorithm 2. A guide whose density is known
    needs no second player; its loss is the usual ELBO.

    The value is what the *discriminator claims*. Too weak a one claims too small a KL, and the loss
    looks too low.

    Every loss of this library has ``adversary``; this one is the plain ELBO, with the particles
    that one posterior wants. For an amortised guide take ``num_particles=1`` or a few.

    Args:
        num_particles: Samples of z (a data point) for the guide's step, vectorised unless
            ``vectorize_particles=False``.
        **kwargs: Those of :class:`~pyro_vae.losses.TermsELBO`, ``num_adversary_particles`` and
            ``objective`` (``"logistic"``, or ``"f-divergence"``, equation 6.10, less stable)
            among them.

    Raises:
        ValueError: For an unknown objective; if a guide site cannot be reparameterised, or, by
            :meth:`adversary`, if no guide site has a density to learn.

    References:
        | Adversarial Variational Bayes: Unifying Variational Autoencoders and Generative
        | Adversarial Networks (Mescheder, Nowozin, Geiger, 2017), equations 3.3, 3.7 and 4.2
        | https://arxiv.org/abs/1701.04722

    Example:
        As two players, each with an optimiser of its own:

        >>> import pyro
        >>> from pyro.infer import SVI
        >>> from pyro_vae.guides import AutoImplicit
        >>> from pyro_vae.models import eight_schools_avb
        >>> guide = AutoImplicit(eight_schools_avb)
        >>> elbo = AVB_ELBO(num_particles=32)
        >>> adam = {"lr": 1e-3, "betas": (0.5, 0.999)}
        >>> svi = SVI(eight_schools_avb, guide, pyro.optim.Adam(adam), elbo)
        >>> adversary = SVI(eight_schools_avb, guide, pyro.optim.Adam(adam), elbo.adversary)
        >>> for step in range(3):
        ...     _ = adversary.step(), adversary.step(), svi.step()

        In one line:

        >>> from pyro_vae import fit
        >>> result = fit(eight_schools_avb, guide, elbo, num_steps=3, progress=False)
    """

    def __init__(self, num_particles: int = 128, **kwargs: Any) -> None:
        kwargs.setdefault("vectorize_particles", True)
        super().__init__(num_particles=num_particles, **kwargs)

    def formula(self, terms: Terms) -> Tensor:
        """Return the negative ELBO, equation 3.7; T's weights are held fixed in log q."""
        return terms.total(terms.kl - terms.log_likelihood)
