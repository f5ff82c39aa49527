"""Bijections from the real numbers to the support of a distribution.

Those of ``torch.distributions.biject_to``, Pyro's among them, and two that it has not got: to the
Cholesky factors of covariance matrices, and to these matrices themselves.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints
from torch.distributions.transforms import IndependentTransform

__all__ = ["LowerCholeskyBijection", "PositiveDefiniteBijection", "bijection_to"]


def _size_of_triangle(count: int) -> int:
    """Return d for d (d + 1) / 2 entries."""
    size = (math.isqrt(8 * count + 1) - 1) // 2
    if size * (size + 1) // 2 != count:
        raise ValueError(f"x: found {count} entries; expected d (d + 1) / 2 for a triangle")
    return size


class _TriangleTransform(Transform):
    """From vectors [*, d (d + 1) / 2] to matrices [*, d, d]."""

    domain = constraints.real_vector
    bijective = True

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    __hash__ = Transform.__hash__

    def forward_shape(self, shape: Any) -> torch.Size:
        size = _size_of_triangle(shape[-1])
        return torch.Size((*shape[:-1], size, size))

    def inverse_shape(self, shape: Any) -> torch.Size:
        return torch.Size((*shape[:-2], shape[-1] * (shape[-1] + 1) // 2))


class LowerCholeskyBijection(_TriangleTransform):
    r"""Lower triangular matrices with a positive diagonal: its logarithm, and the rest as it is.

    .. math:: \log |\det J| = \sum_i \log L_{ii}

    Example:
        >>> LowerCholeskyBijection()(torch.tensor([0.0, 3.0, 0.0]))
        tensor([[1., 0.],
                [3., 1.]])
    """

    codomain = constraints.lower_cholesky

    def _call(self, x: Tensor) -> Tensor:
        size = _size_of_triangle(x.shape[-1])
        # The entries above the diagonal are that at place 0. A gather, unlike an assignment to a
        # part of a matrix of zeros, can be batched by torch.vmap.
        index = torch.zeros(size, size, dtype=torch.long, device=x.device)
        rows, columns = torch.tril_indices(size, size, device=x.device)
        index[rows, columns] = torch.arange(1, x.shape[-1] + 1, device=x.device)
        lower = torch.nn.functional.pad(x, (1, 0))[..., index]
        diagonal = torch.eye(size, dtype=torch.bool, device=x.device)
        return torch.where(diagonal, torch.where(diagonal, lower, 0.0).exp(), lower)

    def _inverse(self, y: Tensor) -> Tensor:
        diagonal = torch.eye(y.shape[-1], dtype=torch.bool, device=y.device)
        logs = torch.where(diagonal, torch.where(diagonal, y, 1.0).log(), y)
        rows, columns = torch.tril_indices(*y.shape[-2:], device=y.device)
        return logs[..., rows, columns]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return log |det J| [*] over the entries on and below the diagonal."""
        return y.diagonal(dim1=-2, dim2=-1).log().sum(-1)


class PositiveDefiniteBijection(_TriangleTransform):
    r"""Positive definite matrices :math:`P = L L^\top`, by their Cholesky factor.

    .. math:: \log |\det J| = d \log 2 + \sum_{i=1}^d (d - i + 2) \log L_{ii}

    over the entries of P on and below the diagonal, the measure of ``Wishart.log_prob``.

    Example:
        >>> PositiveDefiniteBijection()(torch.tensor([0.0, 3.0, 0.0]))
        tensor([[ 1.,  3.],
                [ 3., 10.]])
    """

    codomain = constraints.positive_definite
    _factor = LowerCholeskyBijection()

    def _call(self, x: Tensor) -> Tensor:
        lower = self._factor(x)
        return lower @ lower.mT

    def _inverse(self, y: Tensor) -> Tensor:
        inverse: Tensor = self._factor.inv(torch.linalg.cholesky(y))
        return inverse

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return log |det J| [*]."""
        logs = self._factor(x).diagonal(dim1=-2, dim2=-1).log()
        size = y.shape[-1]
        powers = torch.arange(size + 1, 1, -1, dtype=x.dtype, device=x.device)
        return size * math.log(2) + (powers * logs).sum(-1)


def bijection_to(constraint: Any) -> Transform:
    """Return the bijection from the real numbers to a support.

    Args:
        constraint: A constraint of torch or Pyro.

    Raises:
        ValueError: If there is none, as for a sphere.

    Example:
        >>> bijection_to(constraints.positive_definite)
        PositiveDefiniteBijection()
    """
    if isinstance(constraint, constraints.independent):
        base = bijection_to(constraint.base_constraint)
        return IndependentTransform(base, constraint.reinterpreted_batch_ndims)
    if type(constraint).__name__ == "MixtureSameFamilyConstraint":
        base = constraint.base_constraint
        # Bounds would have a dimension more than a draw, one entry a component.
        if not any(isinstance(value, Tensor) for value in vars(base).values()):
            return bijection_to(base)
    if constraint is constraints.positive_definite:
        return PositiveDefiniteBijection()
    if isinstance(constraint, type(constraints.lower_cholesky)):  # Pyro's softplus_lower_cholesky
        return LowerCholeskyBijection()
    try:
        return biject_to(constraint)
    except NotImplementedError as error:
        raise ValueError(
            f"found the support {constraint}; expected one to which the real numbers have a "
            "bijection (torch.distributions.biject_to)"
        ) from error
