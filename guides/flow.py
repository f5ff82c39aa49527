"""Normalizing-flow guides: invertible networks, with an exact density."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from pyro.contrib.zuko import ZukoToPyro
from pyro.infer.autoguide import init_to_median
from torch import Size, Tensor, nn
from torch.distributions import AffineTransform, Distribution, constraints

from .sampled import AutoSampled

# Zuko switches validation off for all of torch.distributions when it is imported, and Pyro's users
# would lose their error messages.
_validate_args = Distribution._validate_args
import zuko  # noqa: E402
from zuko.distributions import NormalizingFlow  # noqa: E402
from zuko.transforms import ComposedTransform  # noqa: E402

Distribution.set_default_validate_args(_validate_args)

__all__ = ["AutoFlow"]


class FlowDistribution(ZukoToPyro):
    """A Zuko distribution as a Pyro distribution, with ``rsample`` and a support besides."""

    arg_constraints: ClassVar[dict] = {}
    support = constraints.real_vector

    def rsample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008 - torch's own default
        """Draw [*sample_shape, *batch_shape, d]; the log density comes with it and is kept."""
        return self(sample_shape)

    def expand(self, batch_shape: Size, _instance: object = None) -> FlowDistribution:
        """Return independent copies, one an entry of ``batch_shape``."""
        return FlowDistribution(self.dist.expand(batch_shape))


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
        make_flow = self.make_flow
        if make_flow is None:
            coupling = partial(zuko.flows.NICE, transforms=6, hidden_features=(64, 64))
            make_flow = zuko.flows.NSF if self.latent_dim == 1 else coupling
        self.flow = make_flow(self.latent_dim, **self.flow_kwargs).to(loc)
        self.loc = nn.Parameter(loc.clone())
        self.log_scale = nn.Parameter(torch.full_like(loc, self.init_scale).log())

    def get_posterior(self, *args: Any, **kwargs: Any) -> FlowDistribution:
        """Return the distribution of the latents in unconstrained space."""
        self.setup(*args, **kwargs)
        # Zuko's transforms lead from z to u. Made anew in each call: a ZukoToPyro keeps every
        # sample in its cache as long as it lives.
        flow, scale = self.flow(), self.log_scale.exp()
        standardize = AffineTransform(-self.loc / scale, 1 / scale, event_dim=1)
        return FlowDistribution(
            NormalizingFlow(ComposedTransform(standardize, flow.transform), flow.base)
        )
