"""Learned log density ratios, and the distributions whose log density they are.

An implicit distribution can be sampled, z = f(ε), and has no density. A network T is trained to
tell its samples from those of a *contrast* r, whose density is known; at its optimum
T* = log q − log r, so that log q(z) ≈ T(z) + log r(z) takes the place of log q in any loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar, Protocol

import torch
from pyro.distributions import TorchDistribution
from pyro.poutine import Trace
from pyro.poutine.runtime import effectful
from torch import Size, Tensor, nn
from torch.distributions import Independent, Normal, constraints
from torch.nn.functional import softplus

from .distributed import gather

__all__ = [
    "AdaptiveContrast",
    "Contrast",
    "DensityRatio",
    "ImplicitDistribution",
    "NormalContrast",
    "f_divergence_loss",
    "implicit_distributions",
    "logistic_loss",
    "show_parameters",
]


MIN_SCALE = 1e-6  # of the contrast, as a share of its first


def logistic_loss(t_q: Tensor, t_r: Tensor) -> Tensor:
    r"""Return the logistic regression loss, smallest at T* = log q − log r.

    .. math:: -\mathbb{E}_q \log \sigma(T) - \mathbb{E}_r \log(1 - \sigma(T))

    Args:
        t_q: T at samples of q, of any shape.
        t_r: T at samples of the contrast r, of any shape.

    References:
        | Adversarial Variational Bayes (Mescheder, Nowozin, Geiger, 2017), equation 3.3
        | https://arxiv.org/abs/1701.04722

    Example:
        >>> logistic_loss(torch.zeros(3), torch.zeros(3))  # 2 log 2
        tensor(1.3863)
    """
    return softplus(-t_q).mean() + softplus(t_r).mean()


def f_divergence_loss(t_q: Tensor, t_r: Tensor) -> Tensor:
    r"""Return the f-divergence form of the discriminator's loss, smallest at T* = log q − log r.

    .. math:: \mathbb{E}_r e^T - \mathbb{E}_q T

    The paper's T is ours plus one: its :math:`\mathbb{E}_r e^{T-1} - \mathbb{E}_q T` has its
    optimum at log q − log r + 1. Minus the value is a lower bound of KL(q ‖ r) − 1. The
    exponential makes it unstable; :func:`logistic_loss` is the default everywhere.

    Args:
        t_q: T at samples of q, of any shape.
        t_r: T at samples of the contrast r, of any shape.

    References:
        | Adversarial Variational Bayes (Mescheder, Nowozin, Geiger, 2017), equation 6.10
        | https://arxiv.org/abs/1701.04722

    Example:
        >>> f_divergence_loss(torch.zeros(3), torch.zeros(3))
        tensor(1.)
    """
    return t_r.exp().mean() - t_q.mean()


class Contrast(Protocol):
    """What the discriminator holds samples against: r(z), with a density."""

    def log_prob(self, z: Tensor) -> Tensor:
        """Return log r(z), z [*, d] → [*]."""

    def sample(self, sample_shape: Size) -> Tensor:
        """Draw [*sample_shape, d] from r."""

    def standardize(self, z: Tensor) -> Tensor:
        """Return z̄, what the network is given for z."""

    def adapt(self, z: Tensor) -> None:
        """Move r towards samples z [n, d] of q."""


class NormalContrast(nn.Module):
    r"""Contrast with a normal distribution whose moments are known, r = N(μ, diag σ²).

    With moments for each x, :math:`r(z \mid x) = N(\mu(x), \operatorname{diag} \sigma^2(x))`, this
    is the contrast of one minibatch under an amortised guide; with μ = 0 and σ = 1 it is the usual
    prior. The network is given z̄ = (z − μ)/σ. No gradient passes through μ and σ.

    Args:
        loc: μ [d], or [N, d] for r(z|x).
        scale: σ, of the same shape.

    References:
        | Adversarial Variational Bayes (Mescheder, Nowozin, Geiger, 2017), algorithms 1 and 2
        | https://arxiv.org/abs/1701.04722

    Example:
        >>> contrast = NormalContrast(torch.zeros(5, 2), torch.ones(5, 2))
        >>> z = contrast.sample(Size((3, 5)))
        >>> z.shape, contrast.log_prob(z).shape
        (torch.Size([3, 5, 2]), torch.Size([3, 5]))
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("loc", loc.detach())
        self.register_buffer("scale", scale.detach())

    def log_prob(self, z: Tensor) -> Tensor:
        """Return log r(z) = −½‖z̄‖² − Σ log σ − (d/2) log 2π, z [*, d] → [*]."""
        return Independent(Normal(self.loc, self.scale, validate_args=False), 1).log_prob(z)

    def sample(self, sample_shape: Size) -> Tensor:
        """Draw [*sample_shape, d] from r; for r(z|x) the last of ``sample_shape`` is N."""
        shape = (*sample_shape, self.loc.shape[-1])
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + self.scale * noise

    def standardize(self, z: Tensor) -> Tensor:
        """Return z̄ = (z − μ)/σ."""
        return (z - self.loc) / self.scale

    def adapt(self, z: Tensor) -> None:
        """Leave the moments alone."""

    def extra_repr(self) -> str:
        """Return what the module's repr shows."""
        return f"dim={self.loc.shape[-1]}"


class AdaptiveContrast(NormalContrast):
    r"""Contrast with a normal distribution that has the guide's moments: r = N(μ, diag σ²).

    The discriminator then only learns how the guide differs from a Gaussian, which is far less
    than how it differs from the prior. It is given z̄ = (z − μ)/σ. μ and σ are moving averages
    over the guide's samples, kept as buffers; no gradient passes through them.

    Args:
        loc: Initial μ [d].
        scale: Initial σ [d].
        decay: Weight of the past in the moving averages, in [0, 1); 0 takes each batch's moments.

    References:
        | Adversarial Variational Bayes (Mescheder, Nowozin, Geiger, 2017), section 4
        | https://arxiv.org/abs/1701.04722

    Example:
        >>> contrast = AdaptiveContrast(torch.zeros(2), torch.ones(2), decay=0.0)
        >>> contrast.adapt(3 + 2 * torch.randn(10000, 2))
        >>> contrast.loc.round(), contrast.scale.round()
        (tensor([3., 3.]), tensor([2., 2.]))
    """

    def __init__(self, loc: Tensor, scale: Tensor, decay: float = 0.9) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), found {decay}")
        super().__init__(loc.clone(), scale.clone())
        self.decay = decay
        self.min_scale = MIN_SCALE * float(scale.min())

    @torch.no_grad()
    def adapt(self, z: Tensor) -> None:
        """Move μ and σ towards the moments of samples z [n, d] of q; n of one says nothing."""
        z = gather(z)
        if len(z) < 2:
            return
        variance, loc = torch.var_mean(z, 0)
        # A step that is not finite must leave the density of the last good one, and a guide that
        # collapses to a point one that is still a density.
        good = loc.isfinite() & variance.isfinite()
        loc = torch.where(good, loc, self.loc)
        variance = torch.where(good, variance.clamp(min=self.min_scale**2), self.scale.square())
        # A batch's variance is about its own mean, so that a drift of the mean is no variance.
        # Not in place: the graph of a loss that is still to be differentiated holds μ and σ.
        self.loc = self.loc.lerp(loc, 1 - self.decay)
        self.scale = self.scale.square().lerp(variance, 1 - self.decay).sqrt()

    def extra_repr(self) -> str:
        """Return what the module's repr shows."""
        return f"dim={len(self.loc)}, decay={self.decay}"


class DensityRatio(nn.Module):
    r"""Estimate log q(z) − log r(z) by a network that tells samples of q from samples of r.

    Args:
        network: T, a module [\*, d] → [\*]; given a context, one of the context and z.
        contrast: r.
        context: What T is given before z: ``(x,)`` for T(x, z), where q and r are those of z given
            x. No gradient reaches it.

    Example:
        >>> contrast = AdaptiveContrast(torch.zeros(2), torch.ones(2))
        >>> ratio = DensityRatio(nn.Sequential(nn.Linear(2, 1), nn.Flatten(-2)), contrast)
        >>> ratio(torch.randn(5, 2)).shape
        torch.Size([5])
    """

    def __init__(
        self, network: nn.Module, contrast: Contrast, context: tuple[Tensor, ...] = ()
    ) -> None:
        super().__init__()
        self.network = network
        self.contrast = contrast
        self.context = tuple(value.detach() for value in context)

    def forward(self, z: Tensor) -> Tensor:
        """Return T(z̄) or T(x, z̄); gradients reach T's weights and z."""
        return self.network(*self.context, self.contrast.standardize(z))

    def frozen(self, z: Tensor) -> Tensor:
        """Return T(z̄) or T(x, z̄); gradients reach z alone.

        E_q ∇_φ T* = 0 for the guide's parameters φ (Proposition 2 of the paper), so T's weights
        are held fixed in the guide's and the model's loss.
        """
        weights = {name: weight.detach() for name, weight in self.network.named_parameters()}
        inputs = (*self.context, self.contrast.standardize(z))
        return torch.func.functional_call(self.network, weights, inputs)


class ImplicitDistribution(TorchDistribution):
    r"""Distribution of z = f(ε), whose log density is *learned*.

    ``rsample`` is exact; ``log_prob`` is the discriminator's word:

    .. math:: \log q(z) \approx T(\bar z) + \log r(z)

    with T's weights held fixed, so that the distribution works under every loss that asks for
    log q. How good it is depends on how well T was trained: a weak T makes log q, and with it an
    ELBO, look better than it is. Code that needs a true density must look at
    :attr:`learned_density`.

    Args:
        sampler: Takes a shape [\*] to reparameterised samples [\*, d].
        ratio: T and its contrast.
        dim: d.
        batch_shape: Independent copies.
        adversary: What the adversary's loss calls for T with its weights; ``ratio`` by default.
            A guide gives its own method here, so that Pyro sees T's parameters there and only
            there.

    Example:
        >>> contrast = AdaptiveContrast(torch.zeros(2), torch.ones(2))
        >>> network = nn.Sequential(nn.Linear(2, 1), nn.Flatten(-2))
        >>> def sampler(shape):
        ...     return torch.rand(*shape, 2)
        >>> q = ImplicitDistribution(sampler, DensityRatio(network, contrast), dim=2)
        >>> q.log_prob(q.rsample((7,))).shape
        torch.Size([7])
    """

    arg_constraints: ClassVar[dict] = {}
    support = constraints.real_vector
    has_rsample = True

    #: ``log_prob`` is an estimate by a network, not the density of the samples.
    learned_density = True

    def __init__(
        self,
        sampler: Callable[[Size], Tensor],
        ratio: DensityRatio,
        dim: int,
        batch_shape: tuple[int, ...] = (),
        adversary: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.sampler = sampler
        self.ratio = ratio
        self.adversary = ratio if adversary is None else adversary
        super().__init__(Size(batch_shape), Size((dim,)), validate_args=False)

    def expand(
        self, batch_shape: tuple[int, ...], _instance: object = None
    ) -> ImplicitDistribution:
        """Return independent copies, one an entry of ``batch_shape``."""
        (dim,) = self.event_shape
        return type(self)(self.sampler, self.ratio, dim, batch_shape, self.adversary)

    def rsample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        """Draw [*sample_shape, *batch_shape, d], differentiable in the sampler's parameters."""
        return self.sampler(Size(sample_shape) + self.batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the learned log density T(z̄) + log r(z); gradients reach ``value`` alone."""
        return self.ratio.frozen(value) + self.ratio.contrast.log_prob(value)

    def discriminate(self, num_samples: int) -> tuple[Tensor, Tensor]:
        r"""Return T at fresh samples of q and of r, differentiable in T's weights alone.

        Moves the contrast to the samples of q on the way.

        Returns:
            ``(t_q, t_r)``, each [num_samples, \*batch_shape].
        """
        shape = Size((num_samples,)) + self.batch_shape
        with torch.no_grad():
            z = self.sampler(shape)
            self.ratio.contrast.adapt(z.reshape(-1, *self.event_shape))
            contrast = self.ratio.contrast.sample(shape)
        t_q, t_r = self.adversary(torch.stack([z, contrast]))
        return t_q, t_r


def implicit_distributions(trace: Trace) -> Iterator[ImplicitDistribution]:
    """Yield the distributions of a guide's trace whose density is learned.

    They are found under whatever wraps them: ``to_event``, ``mask``, a transformation.

    Args:
        trace: A trace of the guide.
    """
    for _, site in trace.iter_stochastic_nodes():
        fn = site["fn"]
        while hasattr(fn, "base_dist"):
            fn = fn.base_dist
        if getattr(fn, "learned_density", False):
            yield fn


def show_parameters(module: nn.Module, without: nn.Module | None = None) -> None:
    """Tell whoever listens, ``SVI`` or ``fit``, that a module's parameters are in play.

    As ``pyro.module`` does, but without the global parameter store, where a second module of the
    same name would silently stand for the first. The parameters live in the module and are saved
    by its ``state_dict``.

    Args:
        module: A module, such as the discriminator that an adversary's loss trains.
        without: A module in it whose parameters are another player's.

    Example:
        >>> import pyro.poutine as poutine
        >>> with poutine.trace(param_only=True) as capture:
        ...     show_parameters(nn.Linear(2, 1))
        >>> len(capture.trace.nodes)
        2
    """
    owner = f"{type(module).__name__}_{id(module):x}"
    hidden = set() if without is None else set(without.parameters())
    for name, parameter in module.named_parameters():
        if parameter in hidden:
            continue
        _show(parameter, name=f"{owner}.{name}")


@effectful(type="param")
def _show(parameter: nn.Parameter) -> Tensor:
    value = parameter.detach()
    value.unconstrained = lambda: parameter  # type: ignore[attr-defined]
    return value
