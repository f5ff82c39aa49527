"""Normalizing-flow guides: invertible networks, with an exact density."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pyro.contrib.zuko import ZukoToPyro
from pyro.infer.autoguide import init_to_median
from torch import Size, Tensor, nn
from torch.distributions import AffineTransform, Distribution, constraints

from .amortized import Amortized
from .sampled import AutoSampled

# Zuko switches validation off for all of torch.distributions when it is imported, and Pyro's users
# would lose their error messages.
_validate_args = Distribution._validate_args
import zuko  # noqa: E402
from zuko.distributions import NormalizingFlow  # noqa: E402
from zuko.transforms import ComposedTransform  # noqa: E402

Distribution.set_default_validate_args(_validate_args)

__all__ = ["AutoFlow", "Flow"]


class FlowDistribution(ZukoToPyro):
    """A Zuko distribution as a Pyro distribution, with ``rsample`` and a support besides."""

    arg_constraints: ClassVar[dict] = {}
    support = constraints.real_vector

    @property
    def event_shape(self) -> Size:
        """The event's shape; that of a transform's parameters may have a batch in it."""
        return self.dist.base.event_shape

    def rsample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008 - torch's own default
        """Draw [*sample_shape, *batch_shape, d]; the log density comes with it and is kept."""
        return self(sample_shape)

    def expand(self, batch_shape: Size, _instance: object = None) -> FlowDistribution:
        """Return independent copies, one an entry of ``batch_shape``."""
        return FlowDistribution(self.dist.expand(batch_shape))


def make_coupling_flow(dim: int, **kwargs: Any) -> zuko.flows.Flow:
    """Make the default flow: six affine couplings, or, where nothing is to couple, a spline."""
    if dim == 1:
        return zuko.flows.NSF(dim, **kwargs)
    return zuko.flows.NICE(dim, **{"transforms": 6, "hidden_features": (64, 64), **kwargs})


def shift_and_scale(flow: NormalizingFlow, loc: Tensor, log_scale: Tensor) -> FlowDistribution:
    """Return the distribution of μ + σ ⊙ f(u), given that of f(u).

    Zuko's transforms lead from z to u. Made anew in each call of a guide: a ZukoToPyro keeps every
    sample in its cache as long as it lives.
    """
    scale = log_scale.exp()
    standardize = AffineTransform(-loc / scale, 1 / scale, event_dim=1)
    return FlowDistribution(
        NormalizingFlow(ComposedTransform(standardize, flow.transform), flow.base)
    )


class AutoFlow(AutoSampled):
    r"""Guide whose posterior is a normalizing flow, any of Zuko's.

    .. math:: z = \mu + \sigma \odot f(u), \quad u \sim N(0, I), \qquad
        \log q(z) = \log N(u; 0, I) - \log |\det \partial f / \partial u| - \sum \log \sigma

    z is the vector of all latent sites in unconstrained space; μ and σ are parameters that start
    at the model's initial values. A coupling flow costs two passes a transform in both
    directions; a masked autoregressive one d passes to sample.

    All parameters exist after the first call or after :meth:`setup`.

    Args:
        model: A Pyro model with continuous latent sites.
        flow: Takes the dimension d and ``flow_kwargs`` to a Zuko flow. By default
            ``zuko.flows.NICE`` with six affine coupling transforms and two hidden layers of 64
            units; for one latent, which leaves nothing to couple, ``zuko.flows.NSF``, a spline.
        init_loc_fn: Where each site starts, as in Pyro's AutoGuides.
        init_scale: Initial σ.
        **flow_kwargs: Passed to ``flow``.

    Raises:
        ValueError: If ``init_scale`` is not positive.

    References:
        | Density estimation using Real NVP (Dinh, Sohl-Dickstein, Bengio, 2017)
        | https://arxiv.org/abs/1605.08803
        | Zuko, normalizing flows in PyTorch (Rozet et al., 2022)
        | https://zuko.readthedocs.io

    Example:
        >>> from pyro.infer import Predictive
        >>> from pyro_vae.models import eight_schools_avb
        >>> guide = AutoFlow(eight_schools_avb, flow=zuko.flows.NSF, transforms=2)
        >>> guide.setup()
        >>> draws = Predictive(eight_schools_avb, guide=guide, num_samples=100, parallel=True)()
        >>> draws["eta"].shape
        torch.Size([100, 8])
    """

    def __init__(
        self,
        model: Callable,
        flow: Callable[..., zuko.flows.Flow] | None = None,
        *,
        init_loc_fn: Callable = init_to_median,
        init_scale: float = 1.0,
        **flow_kwargs: Any,
    ) -> None:
        if not init_scale > 0:
            raise ValueError(f"init_scale must be positive, found {init_scale}")
        super().__init__(model, init_loc_fn=init_loc_fn)
        self.make_flow = flow
        self.flow_kwargs = flow_kwargs
        self.init_scale = init_scale

    def _create_parameters(self, loc: Tensor, args: tuple, kwargs: dict) -> None:
        make_flow = self.make_flow or make_coupling_flow
        self.flow = make_flow(self.latent_dim, **self.flow_kwargs).to(loc)
        self.loc = nn.Parameter(loc.clone())
        self.log_scale = nn.Parameter(torch.full_like(loc, self.init_scale).log())

    def get_posterior(self, *args: Any, **kwargs: Any) -> FlowDistribution:
        """Return the distribution of the latents in unconstrained space."""
        self.setup(*args, **kwargs)
        return shift_and_scale(self.flow(), self.loc, self.log_scale)


class Flow(Amortized):
    r"""Guide whose posterior is a normalizing flow conditional on an encoder's features.

    .. math:: z = \mu(x) + \sigma(x) \odot f(u; h(x)), \quad u \sim N(0, I)

    h(x) are the features, μ and log σ a linear layer on them, f any of Zuko's flows, with the
    features as its context. By default f is a conditional real NVP, exact and quick in both
    directions.

    See :class:`~pyro_vae.guides.amortized.Amortized` for how minibatches scale and where the
    parameters live.

    Args:
        encoder: Takes x [N, \*event] to features [N, h].
        latent_dim: Size d of z.
        flow: Takes the dimension d, ``context=h`` and ``flow_kwargs`` to a Zuko flow. By default
            that of :class:`AutoFlow`: ``zuko.flows.NICE`` with six affine coupling transforms and
            two hidden layers of 64 units, or, for one latent, ``zuko.flows.NSF``.
        num_features: h, and with the next four as in
            :class:`~pyro_vae.guides.amortized.Amortized`.
        site: Name of the latent site.
        plate: Name of the plate of the data.
        size: Number of rows of the whole data set.
        subsample_size: Number of rows that the guide draws from x.
        **flow_kwargs: Passed to ``flow``.

    References:
        | Density estimation using Real NVP (Dinh, Sohl-Dickstein, Bengio, 2017)
        | https://arxiv.org/abs/1605.08803
        | Taming VAEs (Rezende, Viola, 2018), whose VAE+NVP has such a posterior
        | https://arxiv.org/abs/1810.00597

    Example:
        >>> from pyro_vae.nn import MLP
        >>> guide = Flow(MLP(64, 32), 4, transforms=2)
        >>> guide(torch.randn(10, 64))["z"].shape
        torch.Size([10, 4])
        >>> q = guide.get_posterior(torch.randn(10, 64))
        >>> q.log_prob(q.rsample((5,))).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        encoder: nn.Module,
        latent_dim: int,
        flow: Callable[..., zuko.flows.Flow] | None = None,
        *,
        num_features: int | None = None,
        site: str = "z",
        plate: str = "data",
        size: int | None = None,
        subsample_size: int | None = None,
        **flow_kwargs: Any,
    ) -> None:
        super().__init__(
            encoder,
            latent_dim,
            num_features=num_features,
            site=site,
            plate=plate,
            size=size,
            subsample_size=subsample_size,
        )
        make_flow = flow or make_coupling_flow
        self.flow = make_flow(latent_dim, context=self.num_features, **flow_kwargs)
        self.head = nn.Linear(self.num_features, 2 * latent_dim)

    def get_posterior(self, x: Tensor, *args: Any, **kwargs: Any) -> FlowDistribution:
        """Return q(z|x), with batch shape [N] and event shape [d]."""
        features = self._features(x, *args, **kwargs)
        return shift_and_scale(self.flow(features), *self.head(features).chunk(2, -1))
