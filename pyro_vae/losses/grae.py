"""Gaussian regularised autoencoders: deterministic β-VAEs (Kumar, Poole, 2020)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import MultivariateNormal
from torch import Tensor

from ..curvature import Expansion
from ..terms import Terms
from .expansion import ExpansionELBO, cholesky, log_det

__all__ = ["GRAE_ELBO"]


class GRAE_ELBO(ExpansionELBO):  # noqa: N801 - Pyro's way to name losses
    r"""Deterministic negative β-ELBO whose guide has the best covariance there is: GRAE.

    With h(x) the guide's mean, :math:`f_x(z) = \log p(x|z)` and H its Hessian at h, the loss is

    .. math:: -f_x(h) + \tfrac\beta2 \|h\|^2 + R, \qquad
        \Sigma = (I - H/\beta)^{-1}

    summed over the data plate. The guide's own covariance plays no part: Σ is
    :meth:`posterior_covariance`. The regulariser R, and H in Σ, depend on ``curvature``:

    ================  ====================================================  ==================
    curvature         R                                                     equations
    ================  ====================================================  ==================
    "hessian"         :math:`\frac\beta2 \log\det(I - H/\beta)`             (9), (10)
    "gauss-newton"    the same with :math:`-H = J^T W J`                    (11), (12), (13)
    "columns"         :math:`\frac\beta2 \sum_i \log(1 + w_i/\beta)`        (14)
    "first-order"     :math:`\frac12 \sum_i w_i`                            section 5.3
    ================  ====================================================  ==================

    J is the Jacobian of the decoder's output, :math:`W = -\nabla_g^2 \log p(x; g)` (see
    :func:`~pyro_vae.curvature.output_curvature`), :math:`w_i = \|W^{1/2} J_{:i}\|^2`.

    W depends on the parameters that the observation was built with, as Bernoulli's logits or
    probabilities; a family without a known W wants "hessian".

    With "columns" and one column this is the paper's GRAE≈. The exact H may be such that
    :math:`I - H/\beta` is not positive definite; the Taylor objective then has no best covariance
    and the loss no value, which is an error, and not a rare one at the start of training. That
    cannot happen to the others.

    Args:
        beta: Weight of the KL, above 0.
        curvature: See above.
        num_columns: How many columns of J "columns" and "first-order" draw at random, without
            replacement, in the place of all d; the sum is scaled by d / num_columns.
        orthogonality: Weight of the squared cosines between the columns of
            :math:`W^{1/2} J`, summed over pairs. Of columns that are drawn at random, at least two
            then, the sum is scaled to all pairs.
        **kwargs: Those of :class:`pyro.infer.ELBO`. Particles are all alike here: one is run.

    Raises:
        ValueError: For arguments out of range. On use: for a prior that is not a standard normal,
            a guide without a mean, a family of observations without a known W, and where
            :math:`I - H/\beta` is not positive definite.

    References:
        | On Implicit Regularization in β-VAEs (Kumar, Poole, 2020), equations 9 to 14
        | https://arxiv.org/abs/2002.00041

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(2 * z, 1.0).to_event(1), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(0.4 * x, 1.0).to_event(1))
        >>> elbo, x = GRAE_ELBO(), torch.tensor([[1.0], [3.0]])
        >>> elbo.posterior_covariance(model, guide, x).flatten()  # 1/(1 + 2²)
        tensor([0.2000, 0.2000])
        >>> evidence = dist.Normal(0.0, 5**0.5).log_prob(x).sum()
        >>> torch.isclose(elbo.differentiable_loss(model, guide, x), -evidence)
        tensor(True)
    """

    curvatures = ("hessian", "gauss-newton", "columns", "first-order")

    def __init__(
        self,
        beta: float = 1.0,
        curvature: str = "gauss-newton",
        num_columns: int | None = None,
        orthogonality: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(beta, curvature, **kwargs)
        if num_columns is not None and curvature not in ("columns", "first-order"):
            raise ValueError(
                'num_columns is for the curvatures "columns" and "first-order", found '
                f"{num_columns} with {curvature!r}"
            )
        if num_columns is not None and num_columns < 1:
            raise ValueError(f"num_columns must be at least 1, found {num_columns}")
        if not 0 <= orthogonality < float("inf"):
            raise ValueError(
                f"orthogonality must be finite and not negative, found {orthogonality}"
            )
        if orthogonality and curvature == "hessian":
            raise ValueError(
                f"orthogonality is of the Jacobian's columns, found {orthogonality} with curvature "
                "'hessian'; expected another curvature"
            )
        self.num_columns = num_columns
        self.orthogonality = orthogonality

    def formula(self, terms: Terms) -> Tensor:
        """Return −f_x(h) + (β/2)‖h‖² + R."""
        at, beta = self._expand(terms)
        regularizer = self._regularizer(at, beta)
        return terms.total(-terms.log_likelihood + beta / 2 * at.h.square().sum(-1) + regularizer)

    def _regularizer(self, at: Expansion, beta: float | Tensor) -> Tensor:
        """Return R [N], with the penalty on columns that are not orthogonal."""
        if self.curvature == "hessian":
            return beta / 2 * log_det(cholesky(at, at.hessian, beta))
        d = at.h.shape[-1]
        k = self._count(d)
        # A penalty on pairs takes a pair: of these, the other terms have the first k.
        columns = torch.arange(d) if k == d else torch.randperm(d)[: max(k, 2)]
        if not self.orthogonality:
            columns = columns[:k]
        gram = at.gauss_newton(columns)  # JᵀWJ [N, k, k]
        w = gram.diagonal(dim1=-2, dim2=-1)
        if self.curvature == "gauss-newton":
            regularizer = beta / 2 * log_det(cholesky(at, -gram, beta))
        elif self.curvature == "columns":
            regularizer = beta / 2 * d / k * (w[:, :k] / beta).log1p().sum(-1)
        else:  # log det to first order: beta cancels. (The paper prints ½ for (13), not for (12).)
            regularizer = d / (2 * k) * w[:, :k].sum(-1)
        if self.orthogonality and d > 1:
            pairs = d * (d - 1) / (len(columns) * (len(columns) - 1))
            regularizer = regularizer + self.orthogonality * pairs * _squared_cosines(gram)
        return regularizer

    def _count(self, d: int) -> int:
        k = d if self.num_columns is None else self.num_columns
        if k > d:
            raise ValueError(f"num_columns must be at most the number of latents {d}, found {k}")
        return k

    @torch.no_grad()
    def posterior(
        self, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> MultivariateNormal:
        r"""Return :math:`N(h, (I - H/\beta)^{-1})`, of batch shape [N] and event shape [d].

        H is that of equation (9) for ``curvature="hessian"`` and of (11) for all others. The
        order of the d latents is that of the model's sites.
        """
        with torch.enable_grad():
            at, beta = self._expand(self.terms(model, guide, *args, **kwargs))
            factor = cholesky(at, self._hessian(at), beta)
        covariance = torch.cholesky_inverse(factor)
        return MultivariateNormal(at.h.detach(), covariance)

    def posterior_covariance(
        self, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return that of :meth:`posterior` [N, d, d]."""
        return self.posterior(model, guide, *args, **kwargs).covariance_matrix


def _squared_cosines(gram: Tensor) -> Tensor:
    """Return Σ_{i<j} (u_i · u_j)² / (‖u_i‖² ‖u_j‖²) [N] from inner products u_i · u_j [N, k, k]."""
    w = gram.diagonal(dim1=-2, dim2=-1)
    norms = (w.unsqueeze(-1) * w.unsqueeze(-2)).clamp(min=torch.finfo(w.dtype).tiny)
    return (gram.square() / norms).triu(1).sum((-2, -1))
