"""Two-dimensional targets with known shapes, on which a guide's family shows at a glance."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

__all__ = ["gauss", "rosenbrock", "torus"]


CENTER = torch.tensor(1.0)
SQUARED_RADIUS = torch.tensor(2.0)
LOC = torch.zeros(2)
SCALE_TRIL = torch.tensor([[1.0, 0.0], [0.8, 0.6]])


def _point_in_plane(name: str, like: Tensor) -> Tensor:
    """Sample the site ``x`` [2] under a flat density, given the target's one number.

    The normal distribution only says where to start: masked, it adds nothing to the log density.
    """
    if like.dim() != 0:
        raise ValueError(f"{name} must be a single number, shape []; found {list(like.shape)}")
    zero, two = like.new_zeros(2), like.new_full((2,), 2.0)
    return pyro.sample("x", dist.Normal(zero, two).to_event(1).mask(False))


def rosenbrock(center: Tensor = CENTER) -> None:
    r"""Banana-shaped density of the adversarial variational Bayes notebook, two mirrored arms.

    .. math:: \log p(x) = -(x_1 - c)^2 - (x_2^2 - x_1)^2 + \text{const}

    Sites: ``x`` [2].

    Args:
        center: c [].

    Raises:
        ValueError: If ``center`` is not a single number.

    References:
        | Adversarial Variational Bayes (Mescheder, Nowozin, Geiger, 2017)
        | https://arxiv.org/abs/1701.04722

    Example:
        >>> data = {"x": torch.tensor([1.0, 1.0])}
        >>> conditioned = pyro.condition(rosenbrock, data)
        >>> pyro.poutine.trace(conditioned).get_trace().log_prob_sum()
        tensor(0.)
    """
    x = _point_in_plane("center", center)
    x1, x2 = x[..., 0], x[..., 1]
    pyro.factor("log_density", -((x1 - center) ** 2) - (x2**2 - x1) ** 2)


def torus(squared_radius: Tensor = SQUARED_RADIUS) -> None:
    r"""Ring-shaped density of the adversarial variational Bayes notebook.

    .. math:: \log p(x) = -(x_1^2 + x_2^2 - R^2)^2 + \text{const}

    Sites: ``x`` [2].

    Args:
        squared_radius: R² [].

    Raises:
        ValueError: If ``squared_radius`` is not a single number.

    References:
        | Adversarial Variational Bayes (Mescheder, Nowozin, Geiger, 2017)
        | https://arxiv.org/abs/1701.04722

    Example:
        >>> conditioned = pyro.condition(torus, {"x": torch.tensor([1.0, 1.0])})
        >>> pyro.poutine.trace(conditioned).get_trace().log_prob_sum()
        tensor(0.)
    """
    x = _point_in_plane("squared_radius", squared_radius)
    pyro.factor("log_density", -((x.square().sum(-1) - squared_radius) ** 2))


def gauss(loc: Tensor = LOC, scale_tril: Tensor = SCALE_TRIL) -> None:
    r"""Sample a correlated normal distribution, which a full-rank guide matches exactly.

    .. math:: x \sim N(\mu, L L^T), \quad \text{by default with unit variances, correlation } 0.8

    Sites: ``x`` [d].

    Args:
        loc: μ [d].
        scale_tril: L [d, d], lower triangular.

    Raises:
        ValueError: If the shapes are not [d] and [d, d].

    Example:
        >>> pyro.poutine.trace(gauss).get_trace().nodes["x"]["value"].shape
        torch.Size([2])
    """
    if loc.dim() != 1 or scale_tril.shape != (len(loc), len(loc)):
        raise ValueError(
            "loc must have the shape [d] and scale_tril [d, d]; "
            f"found {list(loc.shape)} and {list(scale_tril.shape)}"
        )
    pyro.sample("x", dist.MultivariateNormal(loc, scale_tril=scale_tril))
