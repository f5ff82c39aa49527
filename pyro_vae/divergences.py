"""Divergences between distributions of which only samples are at hand.

:func:`knn_kl` judges: it estimates a KL and its standard error, without a gradient. The modules
train: each takes samples z of q, reparameterised, and draws of p to a scalar whose gradient moves
the z towards p. They share the interface of :class:`Divergence`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor, nn
from torch.nn.functional import softplus

from .distributed import gather
from .ratios import logistic_loss, show_parameters

__all__ = ["MMD", "Adversarial", "Divergence", "KnnKL", "Stein", "knn_kl"]

NUM_BLOCKS = 20  # disjoint blocks for the standard error, which is itself known to 1/√40 = 16%


def _rbf(s: Tensor) -> Tensor:
    return torch.exp(-s / 2)


def _imq(s: Tensor) -> Tensor:
    return 1 / (1 + s)


# name -> (kernel of s = ‖z − z'‖²/b, default b as a multiple of the dimension d)
KERNELS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "rbf": (_rbf, 1.0),
    "imq": (_imq, 2.0),
}

OBJECTIVES = ("non-saturating", "saturating", "density-ratio")


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


class Divergence(nn.Module):
    r"""Base of the divergences that a guide can be trained by.

    A subclass defines ``forward``. One that is learned beside the guide also has a method
    ``adversary(z, prior_draws)``, the loss of the second player: that it is there says that the
    divergence needs one.

    Shapes:
        z [M, d], prior_draws [M', d] → a scalar.
    """

    def forward(self, z: Tensor, prior_draws: Tensor) -> Tensor:
        """Return the divergence of q, of which z [M, d] are samples, from p.

        Args:
            z: Reparameterised samples of q [M, d]; the gradient goes through them.
            prior_draws: Draws from p [M', d].
        """
        raise NotImplementedError


class MMD(Divergence):
    r"""Estimate the squared maximum mean discrepancy between q and p.

    .. math::
        \mathbb{E}_{q,q} \, k(z, z') - 2 \, \mathbb{E}_{q,p} \, k(z, \hat z)
            + \mathbb{E}_{p,p} \, k(\hat z, \hat z')

    with z, z' ~ q and ẑ, ẑ' ~ p independent. It is zero if and only if q = p, for the kernels
    named here. Kernels are functions of s = ‖z − z'‖²/b with a bandwidth b, in squared units of z:

    ========= ========================== ==================================== =========
    kernel    k(s)                       in the usual symbols                 default b
    ========= ========================== ==================================== =========
    ``"rbf"`` exp(−s/2)                  exp(−‖z − z'‖²/(2ℓ²)), b = ℓ²         d
    ``"imq"`` 1/(1 + s)                  C/(C + ‖z − z'‖²), b = C              2d
    callable  what it returns for s                                           1
    ========= ========================== ==================================== =========

    The unbiased estimator leaves out the pairs of a sample with itself, and can be slightly
    negative. The biased one keeps them and is never negative, but too large by
    k(0) − E k(z, z') over M, and the same for p over M'.

    Both samples enter whole: the statement is about q(z), the aggregate over a minibatch, unlike
    :class:`pyro.infer.Trace_MMD`, which compares the particles of one data point. In data parallel
    training it is that of all processes.

    Args:
        kernel: ``"rbf"``, ``"imq"``, or a callable that takes s, of any shape, to positive definite
            k elementwise; it may be a module with parameters of its own.
        bandwidths: b, or several of them, whose kernels are added.
        unbiased: Which estimator.

    Raises:
        ValueError: For an unknown kernel or a bandwidth that is not positive; when called, if the
            shapes do not fit, there are fewer than two samples (one, if biased) on a side, or
            some are not finite.

    References:
        | InfoVAE: Balancing Learning and Inference in Variational Autoencoders (Zhao, Song, Ermon,
        | 2017), section 4.1
        | https://arxiv.org/abs/1706.02262

        | A Kernel Two-Sample Test (Gretton et al., 2012), equations 3 and 5
        | https://jmlr.org/papers/v13/gretton12a.html

    Example:
        >>> mmd = MMD("imq", bandwidths=[1.0, 4.0])
        >>> near = mmd(torch.randn(500, 2), torch.randn(500, 2))
        >>> far = mmd(torch.randn(500, 2) + 1, torch.randn(500, 2))
        >>> bool(far > near)
        True
    """

    def __init__(
        self,
        kernel: str | Callable[[Tensor], Tensor] = "rbf",
        bandwidths: float | Sequence[float] | None = None,
        unbiased: bool = True,
    ) -> None:
        super().__init__()
        if not callable(kernel) and kernel not in KERNELS:
            raise ValueError(
                f"kernel must be one of {sorted(KERNELS)} or a callable, found {kernel!r}"
            )
        self.kernel = kernel
        self.bandwidths = None if bandwidths is None else _bandwidths(bandwidths)
        self.unbiased = unbiased

    def forward(self, z: Tensor, prior_draws: Tensor) -> Tensor:
        """Return the estimate of MMD²; the gradient reaches both arguments."""
        z, prior_draws = gather(z), gather(prior_draws)
        _check(z, prior_draws, at_least=2 if self.unbiased else 1)
        within_q = self._mean_within(self.kernel_matrix(z, z))
        within_p = self._mean_within(self.kernel_matrix(prior_draws, prior_draws))
        return within_q - 2 * self.kernel_matrix(z, prior_draws).mean() + within_p

    def kernel_matrix(self, x: Tensor, y: Tensor) -> Tensor:
        """Return k(xᵢ, yⱼ), summed over bandwidths, x [n, d] and y [m, d] → [n, m]."""
        # By differences: the faster ‖x‖² + ‖y‖² − 2xᵀy cancels in float32 where points are close
        # together and far from the origin. The gradient is zero, not NaN, where points coincide;
        # torch has no second derivative of cdist.
        squared = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
        if isinstance(self.kernel, str):
            kernel, default = KERNELS[self.kernel]
            bandwidths = self.bandwidths or (default * x.shape[-1],)
        else:
            kernel, bandwidths = self.kernel, self.bandwidths or (1.0,)
        values = [kernel(squared / bandwidth) for bandwidth in bandwidths]
        if values[0].shape != squared.shape:
            raise ValueError(
                f"kernel must return one value for each squared distance: found "
                f"{list(values[0].shape)}, expected {list(squared.shape)}"
            )
        return sum(values[1:], values[0])

    def _mean_within(self, k: Tensor) -> Tensor:
        if not self.unbiased:
            return k.mean()
        n = len(k)
        return (k.sum() - k.diagonal().sum()) / (n * (n - 1))

    def extra_repr(self) -> str:
        """Return what the module's repr shows."""
        return f"kernel={self.kernel!r}, bandwidths={self.bandwidths}, unbiased={self.unbiased}"


class Stein(Divergence):
    r"""Move samples of q along the Stein variational gradient of KL(q ‖ p).

    .. math::
        \varphi^*(z_i) = \frac{1}{M} \sum_{j=1}^M \left[ k(z_j, z_i) \nabla \log p(z_j)
            + \nabla_{z_j} k(z_j, z_i) \right]

    is the steepest direction, among the functions of k's space, that takes the samples *towards*
    p. So the gradient is that of the surrogate

    .. math:: -\frac{1}{M} \sum_{i=1}^M z_i^\top \, \mathrm{stop\_grad}(\varphi^*(z_i))

    which the paper prints without the minus sign; minimised so, it would drive samples away. The
    surrogate's value means nothing. The value returned is the MMD² by the same kernel, for the
    reports: **value and gradient are not of one function**.

    Args:
        kernel: As for :class:`MMD`.
        bandwidths: As for :class:`MMD`.
        score: ∇ log p, a callable [M, d] → [M, d]; by default that of the standard normal, −z.

    Raises:
        ValueError: As :class:`MMD`; and if the score has the wrong shape.

    References:
        | InfoVAE: Balancing Learning and Inference in Variational Autoencoders (Zhao, Song, Ermon,
        | 2017), section 4.1 and appendix B
        | https://arxiv.org/abs/1706.02262

        | Stein Variational Gradient Descent (Liu, Wang, 2016), equations 6 and 8
        | https://arxiv.org/abs/1608.04471

    Example:
        >>> z = (2 + torch.randn(100, 1)).requires_grad_()
        >>> Stein()(z, torch.randn(100, 1)).backward()
        >>> bool(z.grad.mean() > 0)  # a step against the gradient takes the samples to the prior
        True
    """

    def __init__(
        self,
        kernel: str | Callable[[Tensor], Tensor] = "rbf",
        bandwidths: float | Sequence[float] | None = None,
        score: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.mmd = MMD(kernel, bandwidths)
        self.score = score

    def forward(self, z: Tensor, prior_draws: Tensor) -> Tensor:
        """Return the MMD², with the surrogate's gradient; it reaches z alone."""
        value = self.mmd(z, prior_draws).detach()
        z = gather(z)
        surrogate = -(z * self.direction(z)).sum() / len(z)
        return value + (surrogate - surrogate.detach())

    def direction(self, z: Tensor) -> Tensor:
        """Return φ*(z), without a gradient, [M, d] → [M, d]."""
        z = z.detach()
        score = -z if self.score is None else self.score(z).detach()
        if score.shape != z.shape:
            raise ValueError(
                f"score must return the shape of z: found {list(score.shape)}, "
                f"expected {list(z.shape)}"
            )
        # k is a function of zⱼ − zᵢ, so its gradient in zⱼ is minus that in zᵢ.
        repulsion = torch.func.grad(lambda w: self.mmd.kernel_matrix(w, z).sum())(z)
        return ((self.mmd.kernel_matrix(z, z) @ score - repulsion) / len(z)).detach()

    def extra_repr(self) -> str:
        """Return what the module's repr shows."""
        return f"score={'standard normal' if self.score is None else self.score}"


class Adversarial(Divergence):
    r"""Estimate a divergence by a discriminator that tells samples of q from draws of p.

    The discriminator T is trained by logistic regression, q labelled 1 and p labelled 0, through
    :meth:`adversary`; at its optimum T* = log q − log p. The guide's side holds T's weights fixed:

    .. math::
        \text{non-saturating:} \quad & {-\mathbb{E}_q} \log(1 - \sigma(T)) - \log 2 \\
        \text{saturating:} \quad & \log 2 + \tfrac12 \left[ \mathbb{E}_q \log \sigma(T)
            + \mathbb{E}_p \log(1 - \sigma(T)) \right] \\
        \text{density-ratio:} \quad & \mathbb{E}_q T

    At T*, and with m = (q + p)/2, these are KL(q ‖ p) − KL(q ‖ m); the Jensen-Shannon divergence;
    and KL(q ‖ p). All are 0 at T = 0, where a discriminator starts whose last layer is zero: for
    this the first has log 2, half the players' loss at a tie, taken off. The saturating one has
    almost no gradient where the discriminator is sure that a sample is q's; the others have.
    The gradient of the first is that of KL(q ‖ p) − 2 JS.

    The value is what the *discriminator claims*: too weak a discriminator claims too little.

    Args:
        discriminator: T, a module [M, d] → [M].
        objective: ``"non-saturating"``, ``"saturating"`` or ``"density-ratio"``.

    Raises:
        ValueError: For an unknown objective or a discriminator that is no module; when called, if
            the shapes do not fit or samples are not finite.

    References:
        | InfoVAE: Balancing Learning and Inference in Variational Autoencoders (Zhao, Song, Ermon,
        | 2017), section 4.1
        | https://arxiv.org/abs/1706.02262

        | Generative Adversarial Nets (Goodfellow et al., 2014), equation 1 and section 3
        | https://arxiv.org/abs/1406.2661

        | Adversarial Variational Bayes (Mescheder, Nowozin, Geiger, 2017), equations 3.3 and 3.7
        | https://arxiv.org/abs/1701.04722

    Example:
        >>> from pyro_vae.nn import ResidualDiscriminator
        >>> divergence = Adversarial(ResidualDiscriminator(2))
        >>> z, prior_draws = 1 + torch.randn(64, 2), torch.randn(64, 2)
        >>> float(divergence(z, prior_draws))
        0.0
        >>> adam = torch.optim.Adam(divergence.parameters(), 1e-2)
        >>> for step in range(20):
        ...     adam.zero_grad()
        ...     divergence.adversary(z, prior_draws).backward()
        ...     adam.step()
        >>> bool(divergence(z, prior_draws) > 0)
        True
    """

    def __init__(self, discriminator: nn.Module, objective: str = "non-saturating") -> None:
        super().__init__()
        if objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {sorted(OBJECTIVES)}, found {objective!r}")
        if not isinstance(discriminator, nn.Module):
            raise ValueError(
                "discriminator must be a torch.nn.Module, whose parameters the adversary trains: "
                f"found {type(discriminator).__name__}"
            )
        self.discriminator = discriminator
        self.objective = objective

    def forward(self, z: Tensor, prior_draws: Tensor) -> Tensor:
        """Return the guide's side; the gradient reaches the samples, and no weight of T's."""
        _check(z, prior_draws, at_least=1)
        weights = {k: v.detach() for k, v in self.discriminator.named_parameters()}
        t_q = _one_each(torch.func.functional_call(self.discriminator, weights, z), z)
        if self.objective == "density-ratio":
            return t_q.mean()
        if self.objective == "non-saturating":
            return softplus(t_q).mean() - math.log(2)
        t_p = torch.func.functional_call(self.discriminator, weights, prior_draws)
        t_p = _one_each(t_p, prior_draws)
        return math.log(2) - (softplus(-t_q).mean() + softplus(t_p).mean()) / 2

    def adversary(self, z: Tensor, prior_draws: Tensor) -> Tensor:
        """Return T's loss, the logistic regression's; the gradient reaches T's weights alone.

        Shows T's parameters to ``SVI`` or ``fit``, if one listens, here and only here.
        """
        _check(z, prior_draws, at_least=1)
        show_parameters(self.discriminator)
        z, prior_draws = z.detach(), prior_draws.detach()
        t_q = _one_each(self.discriminator(z), z)
        t_p = _one_each(self.discriminator(prior_draws), prior_draws)
        return logistic_loss(t_q, t_p)

    def extra_repr(self) -> str:
        """Return what the module's repr shows."""
        return f"objective={self.objective!r}"


def _bandwidths(bandwidths: float | Sequence[float]) -> tuple[float, ...]:
    values = (bandwidths,) if isinstance(bandwidths, (int, float)) else tuple(bandwidths)
    if not values or not all(math.isfinite(b) and b > 0 for b in values):
        raise ValueError(f"bandwidths must be positive and finite, found {bandwidths}")
    return tuple(float(b) for b in values)


def _one_each(t: Tensor, z: Tensor) -> Tensor:
    if t.shape != z.shape[:1]:
        raise ValueError(
            f"discriminator must return one number for each sample: found {list(t.shape)}, "
            f"expected {[len(z)]}"
        )
    return t


def _check(z: Tensor, prior_draws: Tensor, at_least: int) -> None:
    for name, samples in (("z", z), ("prior_draws", prior_draws)):
        if samples.ndim != 2:
            raise ValueError(f"{name} must have the shape [n, d], found {list(samples.shape)}")
        if len(samples) < at_least:
            raise ValueError(
                f"{name} must hold at least {at_least} samples, found {len(samples)}"
                + (": a batch of one says nothing about a distribution" if at_least > 1 else "")
            )
        _check_finite(samples, name)
    if z.shape[1] != prior_draws.shape[1] or z.dtype != prior_draws.dtype:
        raise ValueError(
            "z and prior_draws must have one dimension and dtype: found "
            f"z {list(z.shape)} {z.dtype}, prior_draws {list(prior_draws.shape)} "
            f"{prior_draws.dtype}"
        )


def _check_finite(samples: Tensor, name: str) -> None:
    if torch.compiler.is_compiling():
        return
    try:
        bad = int((~samples.isfinite()).any(1).sum())
    except RuntimeError:  # being captured or under vmap: no value is known; the loss will be NaN
        return
    if bad:
        raise ValueError(f"{name} must be finite: {bad} of its {len(samples)} samples are not")
