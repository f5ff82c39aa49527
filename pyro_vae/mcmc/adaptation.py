"""How HMC chooses its step size, metric and trajectory length, from all chains together.

Each piece is a tuple with an ``update`` that returns the next; :class:`Adaptation` composes them.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .kernel import HMCInfo, HMCState, Metric

__all__ = [
    "Adaptation",
    "DualAveraging",
    "PooledMoments",
    "TrajectoryLength",
    "adapt",
    "back_off",
    "golden_ratio_sequence",
    "harmonic_mean_acceptance",
    "jittered",
    "num_leapfrog_steps",
    "warmup_windows",
]

# An acceptance probability counts as at least this much in the harmonic mean: without a floor, one
# chain far out in the tail would decide alone on everybody's step size.
_MIN_ACCEPTANCE = 0.1

# Shrinkage of the pooled variance, as in Stan: towards 1e-3, with the weight of five draws.
_VARIANCE_SHRINKAGE = 1e-3
_VARIANCE_SHRINKAGE_DRAWS = 5

# Adam's learning rate on log L, and the shortest L, where the metric is the identity.
_LENGTH_RATE = 0.05
_MIN_LENGTH = 0.3

# Length of the trajectories until it is tuned: a quarter of a standard normal's period, after which
# a trajectory has forgotten where it began.
QUARTER_PERIOD = math.pi / 2

_GOLDEN_RATIO = (math.sqrt(5.0) - 1.0) / 2.0

# Width of the interval of step sizes, as a fraction of the largest.
_STEP_JITTER = 0.2

# Binary orders of magnitude of wide jitter, how far it reaches above the step size, and the
# fraction of transitions that diverge from which it is used.
_WIDE = 3.0
_WIDE_TOP = 0.25
_WIDE_FROM = 5e-4

# Acceptance under which a chain counts as stuck, and the smallest factor of its step size.
_STUCK = 0.1
_MIN_FACTOR = 2.0**-30


def golden_ratio_sequence(index: int) -> float:
    """Return a number of the sequence that fills (0, 1) evenly by steps of the golden ratio.

    Every n-th of its numbers fill it as evenly: what looks at every n-th iteration, such as
    thinning, sees all of them. Those of a Halton sequence in base 2 that a power of two picks are
    all small.

    Args:
        index: Which, from 0.

    Example:
        >>> [round(golden_ratio_sequence(index), 3) for index in range(5)]
        [0.5, 0.118, 0.736, 0.354, 0.972]
    """
    return (0.5 + index * _GOLDEN_RATIO) % 1.0


def num_leapfrog_steps(
    trajectory_length: float, step_size: float, jitter: float, max_steps: int, index: int
) -> int:
    r"""Return the number of leapfrog steps that make a trajectory of a length in L (1 ± jitter).

    Lengths fill the interval evenly, so that they have no period in common with any component of
    the target, and few iterations see all of them. They are rounded up to whole steps of the mean
    size, 0.9 ε: half a step more on average.

    Args:
        trajectory_length: Mean length L; no longer than ``max_steps`` leave room for.
        step_size: Step size ε.
        jitter: Half the width of the interval of lengths, as a fraction of L; 0 to 1.
        max_steps: Largest number of steps; the smallest is 1.
        index: Number of the iteration, from 0.

    References:
        | An adaptive MCMC scheme for setting trajectory lengths in HMC (Hoffman, Radul, Sountsov,
          2021), section 3
        | https://proceedings.mlr.press/v130/hoffman21a.html

    Example:
        >>> [num_leapfrog_steps(1.5, 0.25, jitter=0.5, max_steps=100, index=i) for i in range(5)]
        [7, 5, 9, 6, 10]
    """
    mean_step = step_size * (1.0 - min(jitter, _STEP_JITTER) / 2.0)
    steps = min(trajectory_length / mean_step, max_steps / (1.0 + jitter))
    steps *= 1.0 + jitter * (2.0 * golden_ratio_sequence(index) - 1.0)
    return min(max(1, math.ceil(steps)), max_steps)


def jittered(
    step_size: Tensor,
    jitter: float,
    generator: torch.Generator | None = None,
    wide: bool = False,
) -> Tensor:
    r"""Return step sizes one a chain, uniform between 0.8 ε and ε, so that no two go in step.

    Where a density has places too narrow for the common step size, such as the neck of a funnel, a
    chain that got there by luck would stick. ``wide`` draws step sizes log-uniformly from 0.15 ε to
    1.2 ε instead, so that it finds a way out; elsewhere the shorter trajectories are a waste.

    Args:
        step_size: Step sizes ε [num_chains, 1].
        jitter: That of the lengths, from 0 to 1. Below 0.2, step sizes vary by no more than it
            says, unless widely; 0 lets them be.
        generator: Source of randomness; by default torch's global one.
        wide: Whether to let them vary widely.
    """
    if jitter == 0:
        return step_size
    uniform = torch.empty_like(step_size).uniform_(generator=generator)
    if wide:
        return step_size * torch.exp2(_WIDE_TOP - _WIDE * uniform)
    return step_size * (1.0 - min(jitter, _STEP_JITTER) * uniform)


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


class PooledMoments(NamedTuple):
    r"""The variances or covariances of all chains' positions together, updated batch by batch.

    Attributes:
        num_seen: Number of vectors so far.
        mean: Their mean [dim].
        sum_squares: Sum of squared deviations from the mean [dim], or of their outer products
            [dim, dim].

    References:
        | Updating formulae and a pairwise algorithm for computing sample variances (Chan, Golub,
          LeVeque, 1979)
    """

    num_seen: int
    mean: Tensor
    sum_squares: Tensor

    @classmethod
    def start(cls, like: Tensor, dense: bool) -> "PooledMoments":
        """Begin with nothing; ``like`` is a tensor [dim]. Sums are in float64."""
        zero = torch.zeros_like(like, dtype=torch.float64)
        return cls(0, zero, torch.outer(zero, zero) if dense else zero)

    def update(self, positions: Tensor) -> "PooledMoments":
        """Take in the positions [num_chains, dim] of all chains."""
        batch = len(positions)
        count = self.num_seen + batch
        positions = positions.to(torch.float64)
        batch_mean = positions.mean(0)
        delta, centred = batch_mean - self.mean, positions - batch_mean
        weight = self.num_seen * batch / count
        if self.sum_squares.dim() == 2:
            added = centred.mT @ centred + torch.outer(delta, delta) * weight
        else:
            added = centred.square().sum(0) + delta.square() * weight
        return PooledMoments(count, self.mean + delta * (batch / count), self.sum_squares + added)

    def metric(self, fallback: Metric) -> Metric:
        """Return the metric of the shrunken (co)variances; ``fallback`` where that is none."""
        if self.num_seen < 2:
            return fallback
        weight = self.num_seen / (self.num_seen + _VARIANCE_SHRINKAGE_DRAWS)
        covariance = weight * self.sum_squares / (self.num_seen - 1)
        ridge = torch.full_like(self.mean, (1.0 - weight) * _VARIANCE_SHRINKAGE)
        if fallback.dense:
            moved = covariance.diagonal() > 0
            covariance = covariance + torch.diag(ridge)
            usable = bool(moved.all())
        else:
            moved = covariance > 0
            covariance = torch.where(moved, covariance + ridge, fallback.inverse_mass)
            usable = True
        if not usable or not bool(torch.isfinite(covariance).all()):
            return fallback
        try:
            return Metric.from_covariance(covariance.to(fallback.inverse_mass.dtype))
        except ValueError:
            return fallback


class TrajectoryLength(NamedTuple):
    r"""Find the trajectory length at which squared distances from the mean change most (ChEES).

    .. math:: \text{ChEES} = \tfrac14 E (\|z' - E z'\|^2 - \|z - E z\|^2)^2

    climbs by Adam (β₁ = 0, β₂ = 0.95) on log L, with the gradient along the end of the
    trajectories, :math:`t\, (\|z' - \bar z'\|^2 - \|z - \bar z\|^2)\, (z' - \bar z')^\top v'`,
    averaged over chains with their acceptance probabilities as weights; distances are measured
    where the metric is the identity, so that no component dominates by its unit.

    Attributes:
        log_length: log L, the one to use now.
        log_averaged: Its average over the iterates, the one to use in the end.
        mean_square: Adam's moving average of squared gradients.
        num_updates: How many there were.

    References:
        | An adaptive MCMC scheme for setting trajectory lengths in HMC (Hoffman, Radul, Sountsov,
          2021), section 3 and algorithm 1
        | https://proceedings.mlr.press/v130/hoffman21a.html
    """

    log_length: float
    log_averaged: float
    mean_square: float = 0.0
    num_updates: int = 0

    @classmethod
    def start(cls, length: float) -> "TrajectoryLength":
        """Begin at ``length``."""
        return cls(math.log(length), math.log(length))

    def update(
        self, before: HMCState, info: HMCInfo, metric: Metric, time: Tensor, longest: float
    ) -> "TrajectoryLength":
        """Take in the last transition.

        Args:
            before: Where the chains were.
            info: What happened; divergent chains have no weight.
            metric: The metric.
            time: How long the trajectories were [num_chains].
            longest: Bound on L.
        """
        gradient = self._gradient(before.position, info, metric, time)
        if not math.isfinite(gradient):
            return self
        count = self.num_updates + 1
        mean_square = 0.95 * self.mean_square + 0.05 * gradient**2
        scale = math.sqrt(mean_square / (1.0 - 0.95**count))
        log_length = self.log_length + _LENGTH_RATE * gradient / (scale + 1e-30)
        log_length = min(max(log_length, math.log(_MIN_LENGTH)), math.log(longest))
        weight = count**-0.5
        log_averaged = weight * log_length + (1.0 - weight) * self.log_averaged
        return TrajectoryLength(log_length, log_averaged, mean_square, count)

    @staticmethod
    def _gradient(position: Tensor, info: HMCInfo, metric: Metric, time: Tensor) -> float:
        usable = ~info.diverging & torch.isfinite(info.proposal).all(-1)
        weight = torch.where(usable, info.accept_prob, 0.0)
        weight = weight / weight.sum()
        row = usable.unsqueeze(-1)
        start = metric.whiten(position)
        end = torch.where(row, metric.whiten(info.proposal), 0.0)
        velocity = torch.where(row, metric.whiten_velocity(info.momentum), 0.0)
        start = start - start.mean(0)
        end = end - (weight.unsqueeze(-1) * end).sum(0)
        change = end.square().sum(-1) - start.square().sum(-1)
        return float((weight * time * change * (end * velocity).sum(-1)).sum())

    @property
    def length(self) -> float:
        """The length to explore with."""
        return math.exp(self.log_length)

    @property
    def averaged_length(self) -> float:
        """The length to sample with."""
        return math.exp(self.log_averaged)


def back_off(factor: Tensor, info: HMCInfo) -> Tensor:
    """Return the factors [num_chains, 1] by which chains shrink their step size in the warm-up.

    A chain far out in the tail, where the density is steeper, accepts nothing at the step size of
    the crowd and would never arrive. It halves its own until it moves, and doubles it again, up
    to 1, when it has moved.

    Args:
        factor: Their factors [num_chains, 1].
        info: What happened in the last transition.
    """
    stuck = (info.accept_prob < _STUCK).unsqueeze(-1)
    moved = info.accepted.unsqueeze(-1)
    shrunk = torch.where(stuck, (factor / 2).clamp(min=_MIN_FACTOR), factor)
    return torch.where(moved, (factor * 2).clamp(max=1.0), shrunk)


class Adaptation(NamedTuple):
    """All that the warm-up learns, and where in the warm-up it is.

    Attributes:
        step: Number of warm-up iterations so far.
        step_size: The step size, by dual averaging.
        length: The trajectory length, by ChEES.
        metric: The metric in use.
        moments: What the next metric will be made of.
        factor: The chains' own factors of the step size [num_chains, 1].
        diverged: Transitions that diverged since the last metric, at the common step size.
        made: Transitions since then.
    """

    step: int
    step_size: DualAveraging
    length: TrajectoryLength
    metric: Metric
    moments: PooledMoments
    factor: Tensor
    diverged: int = 0
    made: int = 0

    @property
    def narrow_places(self) -> bool:
        """Whether the density has places too narrow for the common step size."""
        return self.diverged > _WIDE_FROM * self.made


def adapt(
    adaptation: Adaptation,
    before: HMCState,
    after: HMCState,
    info: HMCInfo,
    warmup_steps: int,
    max_leapfrog_steps: int,
    tune_length: bool = True,
) -> tuple[Adaptation, bool]:
    """Learn from one transition of the warm-up.

    The step size is learnt in every iteration, the metric in windows (see `warmup_windows`), the
    trajectory length from the first metric on.

    Args:
        adaptation: What is known so far.
        before: Where the chains were.
        after: Where they are.
        info: What happened in between.
        warmup_steps: Length of the warm-up.
        max_leapfrog_steps: Largest number of leapfrog steps.
        tune_length: Whether to tune the trajectory length.

    Returns:
        What is known now, and whether the metric is new, so that the step size is to be found
        again.
    """
    windows = warmup_windows(warmup_steps)
    step, averaging, length, metric, moments, factor, diverged, made = adaptation
    full = factor.squeeze(-1) == 1.0  # the others do not use the common step size
    step_size = averaging.step_size
    if bool(full.any()):
        averaging = averaging.update(
            harmonic_mean_acceptance(info.accept_prob[full], info.diverging[full])
        )
    if tune_length and windows and step >= windows[0]:
        time = info.num_steps * info.step_size.squeeze(-1)
        longest = max(max_leapfrog_steps * step_size, _MIN_LENGTH)
        common = info._replace(diverging=info.diverging | ~full)
        length = length.update(before, common, metric, time, longest)
    if windows and warmup_steps // 10 <= step < windows[-1]:
        moments = moments.update(after.position)
    diverged += int((info.diverging & full).sum())
    made += int(full.sum())
    renewed = step + 1 in windows
    if renewed:
        diverged = made = 0
        metric = moments.metric(fallback=metric)
        moments = PooledMoments.start(after.position[0], metric.dense)
        # The old metric's length may lie at another of the criterion's optima: a normal's recur
        # with every half period.
        length = TrajectoryLength.start(QUARTER_PERIOD)
    factor = back_off(factor, info)
    adaptation = Adaptation(step + 1, averaging, length, metric, moments, factor, diverged, made)
    return adaptation, renewed


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
