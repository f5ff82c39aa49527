"""Deterministic β-VAEs: the regularisers implicit in the ELBO (Kumar, Poole, 2020)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from pyro.distributions import MultivariateNormal
from torch import Tensor

from ..curvature import AtMean, Expansion, join_coupled_points
from ..terms import NonFiniteError, Terms, TracePair
from .base import TermsELBO

__all__ = ["GRAE_ELBO", "Taylor_ELBO"]


class _ExpansionELBO(TermsELBO):
    """Base of the losses that expand log p(x|z) about the guide's mean h, and sample nothing."""

    curvatures: tuple[str, ...] = ("hessian", "gauss-newton")

    def __init__(self, beta: float, curvature: str, **kwargs: Any) -> None:
        if not 0 < beta < float("inf"):
            raise ValueError(f"beta must be positive and finite, found {beta}")
        if curvature not in self.curvatures:
            raise ValueError(f"curvature must be one of {self.curvatures}, found {curvature!r}")
        super().__init__(**kwargs)
        self.beta = beta
        self.curvature = curvature

    def _expand(self, terms: Terms) -> tuple[Expansion, float | Tensor]:
        at = Expansion(terms, type(self).__name__)
        return at, self.beta * at.kl_scale

    def _hessian(self, at: Expansion) -> Tensor:
        """Return H [N, d, d] as the loss takes it."""
        return at.hessian if self.curvature == "hessian" else -at.gauss_newton()

    def _get_traces(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict
    ) -> Iterator[TracePair]:
        with AtMean():  # one run: all particles would be the same
            yield join_coupled_points(self._get_trace(model, guide, args, kwargs))

    def _evaluate(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Terms]:
        with torch.enable_grad():  # the loss itself differentiates, in an evaluation too
            loss, terms = super()._evaluate(*args, **kwargs)
        return (loss if torch.is_grad_enabled() else loss.detach()), terms


class GRAE_ELBO(_ExpansionELBO):  # noqa: N801 - Pyro's way to name losses
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

    With "columns" and one column this is the paper's GRAE≈. The exact H may be such that
    :math:`I - H/\beta` is not positive definite; the Taylor objective then has no best covariance
    and the loss no value, which is an error. That cannot happen to the others.

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
            return beta / 2 * _log_det(_cholesky(at, at.hessian, beta))
        d = at.h.shape[-1]
        k = self._count(d)
        # A penalty on pairs takes a pair: of these, the other terms have the first k.
        columns = range(d) if k == d else torch.randperm(d)[: max(k, 2)].tolist()
        if not self.orthogonality:
            columns = columns[:k]
        gram = at.gauss_newton(columns)  # JᵀWJ [N, k, k]
        w = gram.diagonal(dim1=-2, dim2=-1)
        if self.curvature == "gauss-newton":
            regularizer = beta / 2 * _log_det(_cholesky(at, -gram, beta))
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
            factor = _cholesky(at, self._hessian(at), beta)
        covariance = torch.cholesky_inverse(factor)
        return MultivariateNormal(at.h.detach(), covariance)

    def posterior_covariance(
        self, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return that of :meth:`posterior` [N, d, d]."""
        return self.posterior(model, guide, *args, **kwargs).covariance_matrix


class Taylor_ELBO(_ExpansionELBO):  # noqa: N801
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
        >>> from pyro_vae.models import gauss
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
        log_det = _log_det(torch.linalg.cholesky(covariance))
        kl = (at.h.square() + variances - 1).sum(-1) / 2 - log_det / 2
        trace = (self._hessian(at) * covariance).sum((-2, -1))
        return terms.total(-terms.log_likelihood - trace / 2 + beta * kl)


def _cholesky(at: Expansion, H: Tensor, beta: float | Tensor) -> Tensor:
    """Return the Cholesky factor of I − H/β [N, d, d]."""
    matrix = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device) - H / beta
    if not matrix.isfinite().all():
        culprits = ", ".join(at.terms.nonfinite()) or "the derivatives alone"
        raise NonFiniteError(f"{at.who}: the curvature is not finite; found not finite: {culprits}")
    factor, info = torch.linalg.cholesky_ex(matrix)
    if bad := info.nonzero().flatten().tolist():
        raise ValueError(
            f"{at.who}: I − H/β must be positive definite, found that it is not at "
            f"{len(bad)} of {len(info)} data points, first at {bad[0]}: log p(x|z) is convex there "
            "along some latents of "
            f"{list(at.terms.latents)}, and no covariance is best. A larger beta or "
            'curvature="gauss-newton" has none of this'
        )
    return factor


def _log_det(factor: Tensor) -> Tensor:
    """Return the log determinant [N] of a matrix from its Cholesky factor [N, d, d]."""
    return 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _squared_cosines(gram: Tensor) -> Tensor:
    """Return Σ_{i<j} (u_i · u_j)² / (‖u_i‖² ‖u_j‖²) [N] from inner products u_i · u_j [N, k, k]."""
    w = gram.diagonal(dim1=-2, dim2=-1)
    norms = (w.unsqueeze(-1) * w.unsqueeze(-2)).clamp(min=torch.finfo(w.dtype).tiny)
    return (gram.square() / norms).triu(1).sum((-2, -1))
