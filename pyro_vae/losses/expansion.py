"""What GRAE and the Taylor objective share: log p(x|z) expanded about the guide's mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..curvature import AtMean, Expansion, join_coupled_points
from ..terms import NonFiniteError, Terms, TracePair
from ..tracing import settled
from .base import TermsELBO

__all__ = ["ExpansionELBO", "cholesky", "log_det"]


class ExpansionELBO(TermsELBO):
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


def cholesky(at: Expansion, H: Tensor, beta: float | Tensor) -> Tensor:
    """Return the Cholesky factor of I − H/β [N, d, d]."""
    matrix = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device) - H / beta
    if not settled(lambda: matrix.isfinite().all()):
        culprits = ", ".join(at.terms.nonfinite()) or "the derivatives alone"
        raise NonFiniteError(f"{at.who}: the curvature is not finite; found not finite: {culprits}")
    factor, info = torch.linalg.cholesky_ex(matrix)
    if settled(lambda: (info > 0).any()):
        bad = info.nonzero().flatten().tolist()
        raise ValueError(
            f"{at.who}: I − H/β must be positive definite, found that it is not at "
            f"{len(bad)} of {len(info)} data points, first at {bad[0]}: log p(x|z) is convex there "
            "along some latents of "
            f"{list(at.terms.latents)}, and no covariance is best. A larger beta or "
            'curvature="gauss-newton" has none of this'
        )
    # A graph runs without the check: what has no factor must not pass for one that has.
    return torch.where((info > 0).reshape(-1, 1, 1), torch.nan, factor)


def log_det(factor: Tensor) -> Tensor:
    """Return the log determinant [N] of a matrix from its Cholesky factor [N, d, d]."""
    return 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
