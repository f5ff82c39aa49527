"""InfoVAE (Zhao, Song, Ermon, 2017): an ELBO with a divergence between q(z) and p(z)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..divergences import MMD, Divergence
from ..terms import Terms
from .base import TermsELBO

__all__ = ["InfoVAE_ELBO"]


class InfoVAE_ELBO(TermsELBO):  # noqa: N801 - Pyro's way to name losses
    r"""Minimise the InfoVAE objective, which weighs each datum's KL and that of the aggregate.

    .. math::
        -\mathbb{E}_q \log p(x|z) + (1 - \alpha) \, \mathrm{KL}(q(z|x) \| p(z))
        + (\alpha + \lambda - 1) \, D(q(z), p(z))

    summed over the data set. q(z) = E_x q(z|x) is the aggregate posterior: D compares z of the
    *whole minibatch* with as many draws from the prior, in unconstrained space. The bigger the
    batch, the better it knows q(z). With several particles D is the average of each one's, since
    particles of one x are no independent samples of q(z); for one data point they are, and
    are taken together.

    ========================  ==========  =======  ====================
    objective                 α           λ        D
    ========================  ==========  =======  ====================
    ELBO                      0           1        any, its weight is 0
    β-VAE                     1 − β       β        any, its weight is 0
    adversarial autoencoder   1           1        ``Adversarial``
    MMD-VAE                   1           ≫ 1      ``MMD``
    ========================  ==========  =======  ====================

    With α = 1 the guide needs no density.

    Args:
        alpha: α ≤ 1. The mutual information of x and z is raised by α (as the paper has it).
        lambda\_: λ > 0, with α + λ ≥ 1.
        divergence: D, one of :mod:`pyro_vae.divergences` or a callable of z [M, d] and draws from
            the prior [M, d]. :class:`~pyro_vae.divergences.MMD` by default. One that has a method
            ``adversary``, as :class:`~pyro_vae.divergences.Adversarial`, brings a second player,
            which this loss's ``adversary`` trains and :func:`pyro_vae.fit` drives. If the prior has
            parameters, of these only ``MMD`` and the ``"saturating"`` objective train them.
        **kwargs: Those of :class:`~pyro_vae.losses.TermsELBO`.

    Raises:
        ValueError: For α > 1, λ ≤ 0 and α + λ < 1. On use: if the minibatch is too small for D, or
            D needs the score of a prior that is not a standard normal.

    References:
        | InfoVAE: Balancing Learning and Inference in Variational Autoencoders
        | (Zhao, Song, Ermon, 2017), equation 6
        | https://arxiv.org/abs/1706.02262

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 0.1).to_event(1), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x, 0.1).to_event(1))
        >>> elbo = InfoVAE_ELBO(alpha=0.0, lambda_=10.0)
        >>> elbo(model, guide)(torch.randn(64, 2)).shape
        torch.Size([])
    """

    def __init__(
        self,
        alpha: float = 0.0,
        lambda_: float = 1.0,
        divergence: Divergence | None = None,
        **kwargs: Any,
    ) -> None:
        if not alpha <= 1:
            raise ValueError(f"alpha must be at most 1, found {alpha}")
        if not lambda_ > 0:
            raise ValueError(f"lambda_ must be positive, found {lambda_}")
        if alpha + lambda_ - 1 < -1e-12:  # 0.7 + 0.3 - 1 is not 0 in floating point
            raise ValueError(
                f"alpha + lambda_ - 1 must not be negative, found {alpha} + {lambda_} - 1"
            )
        super().__init__(**kwargs)
        self.alpha = alpha
        self.lambda_ = lambda_
        self.weight = alpha + lambda_ - 1 if abs(alpha + lambda_ - 1) > 1e-12 else 0.0
        self.divergence: Any = MMD() if divergence is None else divergence

    def formula(self, terms: Terms) -> Tensor:
        """Return equation 6, negated, with D(q(z), p(z)) for each datum."""
        loss = -terms.log_likelihood
        if self.alpha != 1:
            loss = loss + (1 - self.alpha) * terms.kl
        if self.weight != 0:
            loss = loss + self.weight * self._divergence(terms)
        return terms.total(loss)

    def _divergence(self, terms: Terms) -> Tensor:
        if getattr(self.divergence, "score", NotImplemented) is None:
            terms.check_standard_normal(f"{type(self.divergence).__name__} without a score")
        groups = zip(*terms.aggregate(), strict=True)
        try:
            return torch.stack([self.divergence(z, draws) for z, draws in groups]).mean()
        except ValueError as error:
            raise ValueError(
                f"InfoVAE_ELBO: {error}. D compares {terms.num_points} data points, those of the "
                f"plates that hold all latent sites {list(terms.latents)}; with one, the "
                f"{terms.num_particles} particles (num_particles)"
            ) from error

    @property
    def needs_adversary(self) -> bool:
        """Whether D is learned by an adversary."""
        return self.weight != 0 and hasattr(self.divergence, "adversary")

    def own_adversary(self, terms: Terms) -> Tensor:
        """Return the loss of D's discriminator."""
        z, draws = terms.aggregate()
        return self.divergence.adversary(z.flatten(0, 1), draws.flatten(0, 1))
