"""Divergences between distributions of which only samples are at hand."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor

__all__ = ["KnnKL", "knn_kl"]

NUM_BLOCKS = 20  # disjoint blocks for the standard error, which is itself known to 1/√40 = 16%


class KnnKL(NamedTuple):
    """A nearest-neighbour estimate of a Kullback-Leibler divergence.

    Attributes:
        value: The estimate, in nats. It can be slightly negative.
        standard_error: Its Monte Carlo standard error; NaN with fewer than 20 (k + 1) samples.
    """

    value: float
    standard_error: float


def knn_kl(x: Tensor | NDArray, y: Tensor | NDArray, k: int = 3) -> KnnKL:
    r"""Estimate KL(q ‖ p) from samples of q and of p by nearest neighbours.

    .. math:: \frac{d}{n} \sum_{i=1}^n \log \frac{\nu_k(x_i)}{\rho_k(x_i)} + \log \frac{m}{n - 1}

    with ρₖ(xᵢ) the distance from xᵢ to its k-th neighbour among the other x, and νₖ(xᵢ) the
    distance to its k-th neighbour among the y. Both are Euclidean: give all coordinates one scale.

    The estimator is biased for finite samples, the more so the further q is from p and the higher
    the dimension. Print the value between two halves of the reference next to it. The standard
    error is that of the mean over 20 disjoint blocks (which tends to be on the large side), so
    serial correlation within blocks is accounted for.

    More than k copies of one x (a sampler collapsed to a point, an MCMC chain that is stuck) make
    the estimate +∞: a distribution with atoms is infinitely far from one with a density. Fewer
    copies only bias it upwards.

    Args:
        x: Samples of q [n, d].
        y: Samples of p [m, d].
        k: Which neighbour. Larger k has less variance and more bias.

    Raises:
        ValueError: If the shapes do not fit, there are no more than k samples, or some are not
            finite.

    References:
        | Divergence estimation for multidimensional densities via k-nearest-neighbor distances
        | (Wang, Kulkarni, Verdú, 2009)
        | https://doi.org/10.1109/TIT.2009.2016060

    Example:
        >>> x, y = torch.randn(5000, 1), 0.5 + torch.randn(5000, 1)
        >>> estimate = knn_kl(x, y)  # the truth is 0.5² / 2 = 0.125
        >>> abs(estimate.value - 0.125) < 4 * estimate.standard_error
        True
    """
    x, y = _samples(x, "x", k), _samples(y, "y", k)
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"x and y must have one dimension: found x {list(x.shape)}, y {list(y.shape)}"
        )
    value = _estimate(x, y, k)
    standard_error = float("nan")
    if min(len(x), len(y)) >= NUM_BLOCKS * (k + 1):
        # The variance falls as 1/n, so the mean over blocks varies as much as the whole estimate.
        pairs = zip(np.array_split(x, NUM_BLOCKS), np.array_split(y, NUM_BLOCKS), strict=True)
        blocks = np.array([_estimate(a, b, k) for a, b in pairs])
        if np.isfinite(blocks).all():
            standard_error = float(blocks.std(ddof=1) / np.sqrt(NUM_BLOCKS))
    return KnnKL(value, standard_error)


def _samples(x: Tensor | NDArray, name: str, k: int) -> NDArray:
    array = x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)
    if array.ndim != 2:
        raise ValueError(f"{name} must have the shape [n, d], found {list(array.shape)}")
    if len(array) <= k or k < 1:
        raise ValueError(f"k must be at least 1 and less than the {len(array)} samples {name}: {k}")
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).any(1).sum())
        raise ValueError(f"{name} must be finite: {bad} of its {len(array)} samples are not")
    return array.astype(np.float64)


def _estimate(x: NDArray, y: NDArray, k: int) -> float:
    (n, d), m = x.shape, len(y)
    # The first neighbour of a point within its own sample is itself. workers=-1: all cores.
    rho = cKDTree(x).query(x, [k + 1], workers=-1)[0][:, 0]
    nu = cKDTree(y).query(x, [k], workers=-1)[0][:, 0]
    if (rho == 0).any():
        return float("inf")
    with np.errstate(divide="ignore"):  # νₖ = 0, where an x is also a y: −∞ is right
        return float(d * np.mean(np.log(nu / rho)) + np.log(m / (n - 1)))
