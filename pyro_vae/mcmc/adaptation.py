"""How HMC chooses its step size, metric and number of steps, from all chains together."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "DualAveraging",
    "PooledVariance",
    "halton",
    "harmonic_mean_acceptance",
    "num_leapfrog_steps",
    "warmup_windows",
]

# An acceptance probability counts as at least this much in the harmonic mean: without a floor, one
# chain far out in the tail would decide alone on everybody's step size.
_MIN_ACCEPTANCE = 0.01

# Shrinkage of the pooled variance, as in Stan: towards 1e-3, with the weight of five draws.
_VARIANCE_SHRINKAGE = 1e-3
_VARIANCE_SHRINKAGE_DRAWS = 5


def halton(index: int, base: int = 2) -> float:
    """Return the element ``index`` = 1, 2, … of the Halton (van der Corput) sequence in (0, 1).

    Args:
        index: Which element, from 1.
        base: A prime.

    Example:
        >>> [halton(i) for i in (1, 2, 3, 4)]
        [0.5, 0.25, 0.75, 0.125]
    """
    result, fraction = 0.0, 1.0
    while index > 0:
        fraction /= base
        result += fraction * (index % base)
        index //= base
    return result


def num_leapfrog_steps(
    trajectory_length: float, step_size: float, uniform: float, max_steps: int
) -> int:
    r"""Return the jittered number of leapfrog steps, :math:`⌈2 u L / ε⌉` within 1 … max_steps.

    With u uniform the mean length of a trajectory is L and half a step. Lengths between 0 and 2L
    have no period in common with any component of the target, so that none can be revisited for
    ever.

    Args:
        trajectory_length: Mean length L.
        step_size: Step size ε.
        uniform: u in (0, 1).
        max_steps: Largest number of steps.

    Example:
        >>> num_leapfrog_steps(trajectory_length=1.5, step_size=0.25, uniform=0.5, max_steps=100)
        6
    """
    steps = 2.0 * uniform * trajectory_length / step_size
    return max(1, math.ceil(min(steps, float(max_steps))))


def harmonic_mean_acceptance(accept_prob: Tensor, diverging: Tensor) -> float:
    r"""Return the harmonic mean of acceptance over the chains that did not diverge.

    The harmonic mean looks at the worst chains, the arithmetic mean at the crowd. It is multiplied
    by the fraction of chains that did not diverge: a few stuck chains do not spoil the step size of
    the others, while a step size at which most chains diverge is too large.

    Args:
        accept_prob: Acceptance probabilities [num_chains].
        diverging: Which chains diverged [num_chains].

    References:
        | An adaptive MCMC scheme for setting trajectory lengths in HMC (Hoffman, Radul, Sountsov,
          2021), section 4
        | https://proceedings.mlr.press/v130/hoffman21a.html

    Example:
        >>> harmonic_mean_acceptance(torch.tensor([1.0, 0.5]), torch.tensor([False, False]))
        0.666...
    """
    kept = ~diverging
    count = kept.sum()
    inverse = torch.where(kept, accept_prob.clamp(min=_MIN_ACCEPTANCE).reciprocal(), 0.0).sum()
    fraction = count / kept.numel()
    return float(torch.where(count > 0, fraction * count / inverse, 0.0))


class DualAveraging(NamedTuple):
    r"""Find the step size at which acceptance meets its target.

    .. math::
        \bar H_t = (1 - \tfrac{1}{t + t_0}) \bar H_{t-1} + \tfrac{1}{t + t_0} (δ - a_t), \quad
        \log ε_t = μ - \tfrac{\sqrt t}{γ} \bar H_t, \quad
        \log \bar ε_t = t^{-κ} \log ε_t + (1 - t^{-κ}) \log \bar ε_{t-1}

    with γ = 0.05, t₀ = 10, κ = 0.75, the paper's values, and μ the logarithm of the first step
    size.

    Attributes:
        target: Target acceptance δ.
        mu: μ, towards which the step size shrinks.
        log_step: log ε, the one to use now.
        log_averaged: log ε̄, the one to use in the end.
        mean_error: H̄.
        num_updates: t.

    References:
        | The No-U-Turn sampler (Hoffman, Gelman, 2014), section 3.2
        | https://arxiv.org/abs/1111.4246
    """

    target: float
    mu: float
    log_step: float
    log_averaged: float
    mean_error: float = 0.0
    num_updates: int = 0

    @classmethod
    def start(cls, step_size: float, target: float) -> "DualAveraging":
        """Begin at ``step_size``."""
        log_step = math.log(step_size)
        return cls(target=target, mu=log_step, log_step=log_step, log_averaged=log_step)

    def update(self, acceptance: float) -> "DualAveraging":
        """Take in the acceptance of the last transition."""
        gamma, t0, kappa = 0.05, 10.0, 0.75
        count = self.num_updates + 1
        weight = 1.0 / (count + t0)
        mean_error = (1.0 - weight) * self.mean_error + weight * (self.target - acceptance)
        log_step = self.mu - math.sqrt(count) / gamma * mean_error
        forget = count**-kappa
        log_averaged = forget * log_step + (1.0 - forget) * self.log_averaged
        return self._replace(
            log_step=log_step, log_averaged=log_averaged, mean_error=mean_error, num_updates=count
        )

    @property
    def step_size(self) -> float:
        """The step size to explore with."""
        return math.exp(self.log_step)

    @property
    def averaged_step_size(self) -> float:
        """The step size to sample with."""
        return math.exp(self.log_averaged)


class PooledVariance(NamedTuple):
    """The variances of all chains' positions together, updated batch by batch.

    Attributes:
        num_seen: Number of vectors so far.
        mean: Their mean [dim].
        sum_squares: Sum of squared deviations from the mean [dim].

    References:
        | Updating formulae and a pairwise algorithm for computing sample variances (Chan, Golub,
          LeVeque, 1979)
    """

    num_seen: int
    mean: Tensor
    sum_squares: Tensor

    @classmethod
    def start(cls, like: Tensor) -> "PooledVariance":
        """Begin with nothing; ``like`` is a tensor [dim]."""
        return cls(0, torch.zeros_like(like), torch.zeros_like(like))

    def update(self, positions: Tensor) -> "PooledVariance":
        """Take in the positions [num_chains, dim] of all chains."""
        batch = len(positions)
        count = self.num_seen + batch
        batch_mean = positions.mean(0)
        delta = batch_mean - self.mean
        sum_squares = (
            self.sum_squares
            + (positions - batch_mean).square().sum(0)
            + delta.square() * (self.num_seen * batch / count)
        )
        return PooledVariance(count, self.mean + delta * (batch / count), sum_squares)

    def variance(self, fallback: Tensor) -> Tensor:
        """Return the shrunken variances [dim]; ``fallback`` where they are not usable."""
        if self.num_seen < 2:
            return fallback
        weight = self.num_seen / (self.num_seen + _VARIANCE_SHRINKAGE_DRAWS)
        variance = self.sum_squares / (self.num_seen - 1)
        shrunken = weight * variance + (1.0 - weight) * _VARIANCE_SHRINKAGE
        usable = torch.isfinite(shrunken) & (variance > 0)
        return torch.where(usable, shrunken, fallback)


def warmup_windows(warmup_steps: int) -> list[int]:
    """Return the steps of the warm-up after which the metric is replaced, in order.

    The first tenth only moves the chains towards the posterior; then come windows that double in
    length; the last tenth only settles the step size. What was seen before a window is forgotten.

    Args:
        warmup_steps: Length of the warm-up.

    Example:
        >>> warmup_windows(500)
        [62, 86, 134, 230, 450]
    """
    if warmup_steps < 20:
        return []
    start, stop = warmup_steps // 10, warmup_steps - warmup_steps // 10
    window = max(5, warmup_steps // 40)
    ends = []
    while start < stop:
        # A last window that the next, twice as long, could not follow takes all that is left.
        end = start + window if start + 3 * window <= stop else stop
        ends.append(end)
        start, window = end, 2 * window
    return ends
