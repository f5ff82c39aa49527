"""The Taylor objective, which GRAE minimises over covariances (Kumar, Poole, 2020)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..terms import Terms
from .expansion import ExpansionELBO, log_det

__all__ = ["Taylor_ELBO"]


class Taylor_ELBO(ExpansionELBO):  # noqa: N801
    r"""Deterministic negative β-ELBO: log p(x|z) is expanded about the mean of a Gaussian guide.

    .. math:: -f_x(h) - \tfrac12 \mathrm{tr}(H \Sigma)
        + \beta\, \mathrm{KL}(N(h, \Sigma) \,\|\, N(0, I))

    with :math:`f_x(z) = \log p(x|z)` and H its Hessian at h, summed over the data plate; h and Σ
    are the guide's. It is exact where log p(x|z) is quadratic in z. :class:`GRAE_ELBO` is its
    minimum over Σ, lower by
    :math:`\frac\beta2 [\mathrm{tr}(A\Sigma) - \log\det(A\Sigma) - d]`, :math:`A = I - H/\beta`.

    Args:
        beta: Weight of the KL, above 0.
        curvature: ``"hessian"`` for the exact H (4), ``"gauss-newton"`` for
            :math:`-J^T W J` (7).
        **kwargs: Those of :class:`pyro.infer.ELBO`. Particles are all alike here: one is run.

    Raises:
        ValueError: For arguments out of range. On use: for a prior that is not a standard normal,
            a guide site that is not Gaussian, and a family of observations without a known W.

    References:
        | On Implicit Regularization in β-VAEs (Kumar, Poole, 2020), equations 4, 7 and 8
        | https://arxiv.org/abs/2002.00041

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...     pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> def guide(x):
        ...     pyro.sample("z", dist.Normal(x / 2, 0.5**0.5).to_event(1))
        >>> loss = Taylor_ELBO().differentiable_loss(model, guide, torch.ones(2))
        >>> torch.isclose(loss, -dist.Normal(torch.zeros(2), 2**0.5).log_prob(torch.ones(2)).sum())
        tensor(True)
    """

    def __init__(self, beta: float = 1.0, curvature: str = "hessian", **kwargs: Any) -> None:
        super().__init__(beta, curvature, **kwargs)

    def formula(self, terms: Terms) -> Tensor:
        """Return −f_x(h) − ½ tr(HΣ) + β KL(N(h, Σ) ‖ N(0, I))."""
        at, beta = self._expand(terms)
        covariance = at.covariance()
        variances = covariance.diagonal(dim1=-2, dim2=-1)
        entropy = log_det(torch.linalg.cholesky(covariance)) / 2  # but for a constant
        kl = (at.h.square() + variances - 1).sum(-1) / 2 - entropy
        trace = (self._hessian(at) * covariance).sum((-2, -1))
        return terms.total(-terms.log_likelihood - trace / 2 + beta * kl)
