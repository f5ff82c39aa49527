"""Distributions of data given a decoder's output: what a VAE's likelihood is made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor, nn
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all
from torch.nn.functional import logsigmoid, softplus

from ..tracing import settled

__all__ = [
    "Bernoulli",
    "ContinuousBernoulli",
    "ContinuousBernoulliDistribution",
    "DiscretizedLogistic",
    "DiscretizedLogisticDistribution",
    "Gaussian",
    "Observation",
]

LEVELS_AT_ONCE = 32  # in the sum over levels of a mean: bounds its memory


# --- distributions --------------------------------------------------------------------------------


class ContinuousBernoulliDistribution(dist.ContinuousBernoulli):
    r"""Continuous Bernoulli distribution that is exact, with its gradients, at every logit.

    .. math:: \log p(x) = \ell x - \log \frac{e^\ell - 1}{\ell}, \qquad x \in [0, 1]

    torch's goes through probabilities: in single precision its gradients are noise where λ = σ(ℓ)
    is near ½ (a difference of two numbers near 450), and beyond :math:`|\ell| = 16` its normaliser
    is constant. Here all is computed from ℓ, by series where :math:`|\ell| < \frac12`.

    Args:
        logits: ℓ of any shape.

    References:
        | The continuous Bernoulli: fixing a pervasive error in variational autoencoders
        | (Loaiza-Ganem, Cunningham, 2019), equations 6 to 8
        | https://arxiv.org/abs/1907.06845

    Example:
        >>> ContinuousBernoulliDistribution(logits=torch.tensor([0.0, 100.0])).mean
        tensor([0.5000, 0.9900])
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density at ``value``."""
        if self._validate_args:
            self._validate_sample(value)
        logits, value = broadcast_all(self.logits, value)
        near, size = _split(logits)
        far = -size * torch.where(logits > 0, 1 - value, value)
        return torch.where(_is_near(logits), near * (value - 0.5), far) - self._log_ratio(logits)

    @staticmethod
    def _log_ratio(logits: Tensor) -> Tensor:
        """Return log((e^ℓ − 1)/ℓ) less ℓ/2 near 0, less max(ℓ, 0) elsewhere."""
        near, size = _split(logits)
        square = (near / 2) ** 2
        # log(sinh(h)/h) in h², h = ℓ/2
        coefficients = (1 / 6, -1 / 180, 1 / 2835, -1 / 37800, 1 / 467775, -691 / 3831077250)
        series = _polynomial(square, coefficients) * square
        return torch.where(_is_near(logits), series, torch.log(-torch.expm1(-size) / size))

    @property
    def mean(self) -> Tensor:
        """The mean 1/(1 − e^{−ℓ}) − 1/ℓ."""
        near, size = _split(self.logits)
        far = self.logits.sign() * (0.5 - torch.exp(-size) / torch.expm1(-size) - 1 / size)
        square = near**2
        # half of coth(ℓ/2) − 2/ℓ, in ℓ
        coefficients = (1 / 12, -1 / 720, 1 / 30240, -1 / 1209600, 1 / 47900160)
        series = _polynomial(square, coefficients) * near
        return 0.5 + torch.where(_is_near(self.logits), series, far)

    @property
    def variance(self) -> Tensor:
        """The variance 1/ℓ² − 1/(4 sinh²(ℓ/2))."""
        near, size = _split(self.logits)
        far = size**-2 - torch.exp(-size) / torch.expm1(-size) ** 2
        coefficients = (1 / 12, -3 / 720, 5 / 30240, -7 / 1209600, 9 / 47900160)
        return torch.where(_is_near(self.logits), _polynomial(near**2, coefficients), far)

    def entropy(self) -> Tensor:
        """Return the differential entropy, in nats."""
        logits = self.logits
        less = torch.where(_is_near(logits), logits / 2, logits.clamp(min=0))
        return self._log_ratio(logits) + less - logits * self.mean

    def cdf(self, value: Tensor) -> Tensor:
        """Return the probability of at most ``value``."""
        logits, value = broadcast_all(self.logits, value)
        value = value.clamp(0, 1)
        size = torch.where(logits == 0, 1.0, logits.abs())
        inside = torch.expm1(-size * torch.where(logits > 0, 1 - value, value)) / torch.expm1(-size)
        return torch.where(logits == 0, value, torch.where(logits > 0, 1 - inside, inside))

    def icdf(self, value: Tensor) -> Tensor:
        """Return the quantile at the level ``value``."""
        logits, value = broadcast_all(self.logits, value)
        size = torch.where(logits == 0, 1.0, logits.abs())
        level = torch.where(logits > 0, 1 - value, value)
        # −0 at level 0, and an ulp beyond 1 where e^{−|ℓ|} is lost in 1
        inside = (-torch.log1p(level * torch.expm1(-size)) / size).clamp(0, 1)
        return torch.where(logits == 0, value, torch.where(logits > 0, 1 - inside, inside))


def _is_near(logits: Tensor) -> Tensor:
    return logits.abs() < 0.5


def _split(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return ℓ for the series and |ℓ| for the formula, each harmless where the other is taken."""
    near = _is_near(logits)
    return torch.where(near, logits, 0.0), torch.where(near, 1.0, logits.abs())


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    total = torch.zeros_like(x)
    for coefficient in reversed(coefficients):
        total = total * x + coefficient
    return total


class _Levels(constraints.Constraint):
    """The numbers k/(K − 1), k = 0 … K − 1, as far as half precision tells them apart."""

    is_discrete = True

    def __init__(self, levels: int) -> None:
        self.levels = levels

    def check(self, value: Tensor) -> Tensor:
        places = value * (self.levels - 1)
        return (value >= 0) & (value <= 1) & ((places - places.round()).abs() < 0.2)


class DiscretizedLogisticDistribution(TorchDistribution):
    r"""Logistic distribution rounded to K equidistant levels of [0, 1]; the edges take the tails.

    With :math:`w = 1/(K - 1)` the distance of the levels x = 0, w, 2w, …, 1,

    .. math:: P(x) = \sigma(a) - \sigma(b), \quad a = \frac{x + w/2 - \mu}{s},
        \; b = \frac{x - w/2 - \mu}{s}

    with a = ∞ at x = 1 and b = −∞ at x = 0. Computed as
    :math:`\log \sigma(a) + \log \sigma(-b) + \log(1 - e^{-w/s})`, which is exact far in the tails.

    Args:
        loc: μ, in units of x.
        scale: s, in units of x, positive.
        levels: K, at least 2.

    Raises:
        ValueError: For fewer than two levels; under validation for a scale that is not positive,
            and for values that are no levels.

    References:
        | PixelCNN++ (Salimans, Karpathy, Chen, Kingma, 2017), section 2.1, one component
        | https://arxiv.org/abs/1701.05517

    Example:
        >>> levels = torch.linspace(0, 1, 256)
        >>> d = DiscretizedLogisticDistribution(torch.tensor(0.9), torch.tensor(0.2))
        >>> d.log_prob(levels).exp().sum()
        tensor(1.0000)
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012
    has_rsample = False

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor,
        levels: int = 256,
        validate_args: bool | None = None,
    ) -> None:
        if levels < 2:
            raise ValueError(f"levels must be at least 2, found {levels}")
        self.loc, self.scale = broadcast_all(loc, scale)
        self.levels = levels
        super().__init__(self.loc.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        """Return the K levels."""
        return _Levels(self.levels)

    def expand(self, batch_shape: Size, _instance: Any = None) -> DiscretizedLogisticDistribution:
        """Return the distribution with a larger batch shape."""
        new = self._get_checked_instance(DiscretizedLogisticDistribution, _instance)
        new.loc, new.scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        new.levels = self.levels
        super(DiscretizedLogisticDistribution, new).__init__(new.loc.shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log probability of the level nearest to ``value``."""
        if self._validate_args:
            self._validate_sample(value)
        last = self.levels - 1
        level = (value * last).round()
        below = logsigmoid(((level + 0.5) / last - self.loc) / self.scale)
        above = logsigmoid((self.loc - (level - 0.5) / last) / self.scale)
        width = torch.log(-torch.expm1(-1 / (last * self.scale)))
        inside = below + above + width
        return torch.where(level <= 0, below, torch.where(level >= last, above, inside))

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - as in torch
        """Draw levels."""
        shape = self._extended_shape(Size(sample_shape))
        u = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device)
        tiny = torch.finfo(u.dtype).tiny
        x = self.loc + self.scale * torch.logit(u.clamp(min=tiny))
        last = self.levels - 1
        return (x.clamp(0, 1) * last).round() / last

    @property
    def mean(self) -> Tensor:
        r"""The mean, :math:`w \sum_{k=1}^{K-1} P(x \ge kw)`, a sum over all levels."""
        last = self.levels - 1
        loc, scale = self.loc.unsqueeze(-1), self.scale.unsqueeze(-1)
        edges = (torch.arange(last, dtype=loc.dtype, device=loc.device) + 0.5) / last
        total = torch.zeros_like(self.loc)
        for some in edges.split(LEVELS_AT_ONCE):
            total = total + torch.sigmoid((loc - some) / scale).sum(-1)
        return total / last


# --- observations ---------------------------------------------------------------------------------


class Observation(nn.Module):
    r"""Base of the distributions of x given a decoder's output.

    A decoder returns ``num_params`` numbers for each element of x, stacked in the event's first
    dimension: [\*, num_params · C, H, W] for images, [\*, num_params · D] for vectors.

    Attributes:
        num_params: Decoder outputs per element of x.
        kind: The data that it takes: ``"unit"``, numbers in [0, 1] and so binary ones as well, or
            ``"real"``, any number.
    """

    num_params: int = 1
    kind: Literal["binary", "unit", "real"] = "real"

    def dist(self, params: Tensor, event_dim: int = 3) -> TorchDistribution:
        r"""Return p(x|z) with the batch shape of params and the event shape of x.

        Args:
            params: The decoder's output [\*, num_params · C, \*rest].
            event_dim: Number of x's event dimensions: 3 for images, 1 for vectors.
        """
        raise NotImplementedError

    def mean(self, params: Tensor, event_dim: int = 3) -> Tensor:
        r"""Return E[x|z] [\*, C, \*rest]; see :meth:`dist`."""
        return self.dist(params, event_dim).mean

    def check(self, x: Tensor) -> None:
        """Raise a ValueError if x has values that this distribution does not take."""
        if self.kind == "real":
            self._require(x, lambda: x.isfinite(), "finite numbers")
        else:
            self._require(x, lambda: (x >= 0) & (x <= 1), "numbers in [0, 1]")

    def _require(self, x: Tensor, good: Callable[[], Tensor], expected: str) -> None:
        if not x.is_floating_point():
            raise ValueError(f"{type(self).__name__} takes floating-point numbers, found {x.dtype}")
        if torch.compiler.is_compiling():
            return
        try:
            passed = settled(lambda: good().all())
        except RuntimeError:  # under vmap over the data, no value is known
            return
        if not passed:
            bad = x[~good()]
            raise ValueError(
                f"{type(self).__name__} takes {expected}: found {bad.numel()} of {x.numel()} that "
                f"are not, such as {bad[0].item():.6g}"
            )

    def _chunk(self, params: Tensor, event_dim: int) -> tuple[Tensor, ...]:
        channels = params.shape[-event_dim] if params.dim() >= event_dim else 0
        if channels < self.num_params or channels % self.num_params:
            raise ValueError(
                f"{type(self).__name__} needs {self.num_params} numbers per element of x, in the "
                f"first of {event_dim} event dimensions: found params of shape "
                f"{list(params.shape)}"
            )
        return params.chunk(self.num_params, -event_dim)


class Bernoulli(Observation):
    r"""Binary x; the decoder returns logits.

    .. math:: \log p(x|z) = \sum_i x_i \log \sigma(\ell_i) + (1 - x_i) \log \sigma(-\ell_i)

    Grey values in (0, 1) are taken as well, as is commonly done: the value is then a cross-entropy
    between pixels, no log density of x. It trains, and its maximum is where x̂ = x, but it is to be
    compared with itself alone; :class:`ContinuousBernoulli` has the normaliser that it lacks.

    References:
        | Auto-Encoding Variational Bayes (Kingma, Welling, 2014), appendix C.1
        | https://arxiv.org/abs/1312.6114

    Example:
        >>> p = Bernoulli().dist(torch.zeros(2, 1, 4, 4))
        >>> p.log_prob(torch.ones(2, 1, 4, 4))  # 16 log ½
        tensor([-11.0904, -11.0904])
    """

    kind = "unit"

    def dist(self, params: Tensor, event_dim: int = 3) -> TorchDistribution:
        """Return p(x|z); see :meth:`Observation.dist`."""
        (logits,) = self._chunk(params, event_dim)
        # torch would refuse grey values; `check` has seen to the range.
        return dist.Bernoulli(logits=logits, validate_args=False).to_event(event_dim)


class ContinuousBernoulli(Observation):
    """x in [0, 1] with the density that a Bernoulli's cross-entropy lacks the normaliser of.

    The decoder returns logits. See :class:`ContinuousBernoulliDistribution`.

    References:
        | The continuous Bernoulli: fixing a pervasive error in variational autoencoders
        | (Loaiza-Ganem, Cunningham, 2019)
        | https://arxiv.org/abs/1907.06845

    Example:
        >>> p = ContinuousBernoulli().dist(torch.zeros(2, 3), event_dim=1)
        >>> p.log_prob(torch.rand(2, 3))  # uniform
        tensor([0., 0.])
    """

    kind = "unit"

    def dist(self, params: Tensor, event_dim: int = 3) -> TorchDistribution:
        """Return p(x|z); see :meth:`Observation.dist`."""
        (logits,) = self._chunk(params, event_dim)
        return ContinuousBernoulliDistribution(logits=logits).to_event(event_dim)


class _LocationScale(Observation):
    """Observation with a location from the decoder, and a scale from there or elsewhere."""

    def __init__(
        self, scale: float | Literal["learned", "pixel"], min_scale: float, init_scale: float
    ) -> None:
        super().__init__()
        if scale not in ("learned", "pixel") and not _is_positive(scale):
            raise ValueError(
                f"scale must be a positive number, 'learned' or 'pixel', found {scale!r}"
            )
        if not _is_positive(min_scale):
            raise ValueError(f"min_scale must be positive, found {min_scale!r}")
        if not (_is_positive(init_scale) and init_scale > min_scale):
            raise ValueError(f"init_scale must be above min_scale {min_scale}, found {init_scale}")
        self.scale = scale
        self.min_scale = min_scale
        self.num_params = 2 if scale == "pixel" else 1
        # so that min_scale + softplus(offset + 0) = init_scale
        self._offset = math.log(math.expm1(init_scale - min_scale))
        self.raw_scale = nn.Parameter(torch.zeros(())) if scale == "learned" else None

    def _loc_scale(self, params: Tensor, event_dim: int) -> tuple[Tensor, Tensor]:
        loc, *of_pixels = self._chunk(params, event_dim)
        raw = of_pixels[0] if of_pixels else self.raw_scale
        if raw is None:
            return loc, loc.new_full((), float(self.scale))
        return loc, self.min_scale + softplus(raw + self._offset)

    def extra_repr(self) -> str:
        """Return what the module's repr shows."""
        return f"scale={self.scale!r}"


def _is_positive(number: Any) -> bool:
    return isinstance(number, (int, float)) and math.isfinite(number) and number > 0


class Gaussian(_LocationScale):
    r"""Real x; the decoder returns the mean and, for ``scale="pixel"``, the scale of each element.

    .. math:: x_i \mid z \sim N(\mu_i(z), s_i^2), \quad
        s_i = s_{\min} + \mathrm{softplus}(c + r_i(z))

    A scale that is learned runs to zero wherever x can be reconstructed exactly, and the density to
    infinity: hence the floor. c is such that the scale starts at ``init_scale``.

    Args:
        scale: s, fixed, in units of x; ``"learned"``: one number for all, a parameter; ``"pixel"``:
            of each element, from the decoder.
        min_scale: Floor of a scale that is learned, in units of x. The default is 2.5 of 256 grey
            levels.
        init_scale: Where a scale that is learned starts, for a decoder that returns 0.

    Raises:
        ValueError: For a scale that is neither positive nor one of the two words; a floor that is
            not positive; ``init_scale`` not above it.

    References:
        | Auto-Encoding Variational Bayes (Kingma, Welling, 2014), appendix C.2
        | https://arxiv.org/abs/1312.6114
        | Simple and Effective VAE Training with Calibrated Decoders (Rybkin, Daniilidis, Levine,
        | 2021), section 3: one learned scale
        | https://arxiv.org/abs/2006.13202

    Example:
        >>> Gaussian("pixel").dist(torch.zeros(2, 6, 4, 4)).event_shape
        torch.Size([3, 4, 4])
        >>> [name for name, _ in Gaussian("learned").named_parameters()]
        ['raw_scale']
    """

    kind = "real"

    def __init__(
        self,
        scale: float | Literal["learned", "pixel"] = 1.0,
        *,
        min_scale: float = 0.01,
        init_scale: float = 0.5,
    ) -> None:
        super().__init__(scale, min_scale, init_scale)

    def dist(self, params: Tensor, event_dim: int = 3) -> TorchDistribution:
        """Return p(x|z); see :meth:`Observation.dist`."""
        loc, scale = self._loc_scale(params, event_dim)
        return dist.Normal(loc, scale).to_event(event_dim)


class DiscretizedLogistic(_LocationScale):
    r"""x on equidistant grey levels of [0, 1]; the decoder returns a logistic's location and scale.

    See :class:`DiscretizedLogisticDistribution`. Probabilities, not densities: divided by the
    number of elements and log 2, the value is in bits per dimension.

    Its curvature in (μ, s) is not positive semidefinite, so that GRAE takes
    ``curvature="hessian"``.

    Args:
        levels: K; 256 for 8-bit images, 17 for scikit-learn's digits.
        scale: ``"pixel"``: of each element, from the decoder; ``"learned"``: one number for all;
            or fixed, in units of x.
        min_scale: Floor of a scale that is learned; by default a tenth of the levels' distance,
            where a level in its middle has all but 1 % of the mass.
        init_scale: Where a scale that is learned starts, for a decoder that returns 0.

    Raises:
        ValueError: For fewer than two levels, and as :class:`Gaussian`.

    References:
        | PixelCNN++ (Salimans, Karpathy, Chen, Kingma, 2017), section 2.1, one component
        | https://arxiv.org/abs/1701.05517

    Example:
        >>> p = DiscretizedLogistic(levels=17).dist(torch.zeros(2, 2, 8, 8))
        >>> p.sample().shape
        torch.Size([2, 1, 8, 8])
    """

    kind = "unit"

    def __init__(
        self,
        levels: int = 256,
        scale: float | Literal["learned", "pixel"] = "pixel",
        *,
        min_scale: float | None = None,
        init_scale: float = 0.25,
    ) -> None:
        if levels < 2:
            raise ValueError(f"levels must be at least 2, found {levels}")
        super().__init__(scale, 0.1 / (levels - 1) if min_scale is None else min_scale, init_scale)
        self.levels = levels

    def dist(self, params: Tensor, event_dim: int = 3) -> TorchDistribution:
        """Return p(x|z); see :meth:`Observation.dist`."""
        loc, scale = self._loc_scale(params, event_dim)
        return DiscretizedLogisticDistribution(loc, scale, self.levels).to_event(event_dim)

    def check(self, x: Tensor) -> None:
        """Raise a ValueError if x has values that are none of the levels."""
        super().check(x)
        self._require(
            x,
            lambda: _Levels(self.levels).check(x),
            f"multiples of 1/{self.levels - 1} (levels={self.levels})",
        )

    def extra_repr(self) -> str:
        """Return what the module's repr shows."""
        return f"levels={self.levels}, {super().extra_repr()}"
