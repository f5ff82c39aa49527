"""Implicit guides: noise through a network, with a density learned by an adversary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pyro.infer.autoguide import init_to_mean, init_to_median
from pyro.nn.module import pyro_method
from torch import Size, Tensor, nn

from ..capture import UnconstrainedModel
from ..nn import MLP, ResidualDiscriminator
from ..ratios import AdaptiveContrast, Contrast, DensityRatio, ImplicitDistribution
from .sampled import AutoSampled

__all__ = ["AutoImplicit"]

NUM_MOMENT_DRAWS = 4096  # for the adaptive contrast's first moments


def init_to_finite_mean(site: dict | None = None) -> Tensor | Callable:
    """Start at the prior's mean, or at its median where the mean is infinite (a half-Cauchy's)."""
    if site is None:
        return init_to_finite_mean
    mean = init_to_mean(site)
    return mean if mean.isfinite().all() else init_to_median(site)


class _Sampler(nn.Module):
    """z = loc + scale · network(ε), with a fixed location and scale."""

    loc: Tensor

    def __init__(self, network: nn.Module, noise_dim: int, loc: Tensor, scale: float) -> None:
        super().__init__()
        self.noise_dim = noise_dim
        self.network = network
        self.scale = scale
        self.register_buffer("loc", loc.clone())

    def forward(self, shape: Size) -> Tensor:
        noise = torch.randn(*shape, self.noise_dim, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + self.scale * self.network(noise)


class PriorContrast(nn.Module):
    """Contrast with the model's prior p(z), in unconstrained space (the paper's Algorithm 1)."""

    def __init__(self, density: UnconstrainedModel) -> None:
        super().__init__()
        self.density = density

    def log_prob(self, z: Tensor) -> Tensor:
        """Return log p(z), with the Jacobian of the constraints, z [*, d] → [*]."""
        return self.density.log_prior(z)

    def sample(self, sample_shape: Size) -> Tensor:
        """Draw [*sample_shape, d] from the prior."""
        return self.density.sample_prior(sample_shape.numel()).reshape(*sample_shape, -1)

    def standardize(self, z: Tensor) -> Tensor:
        """Return z as it is."""
        return z

    def adapt(self, z: Tensor) -> None:
        """Leave the prior alone."""


class AutoImplicit(AutoSampled):
    r"""Guide whose posterior is noise through a network: any shape, any number of modes.

    .. math:: z = f(\varepsilon), \quad \varepsilon \sim N(0, I), \qquad
        \log q(z) \approx T(\bar z) + \log r(z)

    z is the vector of all latent sites in unconstrained space. Its density is learned by a
    discriminator T against a contrast r, so the guide works under any loss, but the discriminator
    has to be trained beside it: by :func:`pyro_vae.fit`, or by an ``SVI`` of its own with
    :meth:`pyro_vae.losses.AVB_ELBO.adversary`. ``guide.get_posterior().learned_density`` is true.

    All parameters exist after the first call or after :meth:`setup`.

    Args:
        model: A Pyro model with continuous latent sites.
        noise_dim: Size of ε; 2d + 4 by default, for d latents.
        hidden_dims: Widths of f's layers.
        contrast: ``"adaptive"``, a Gaussian with the guide's moments (Algorithm 2), or
            ``"prior"`` (Algorithm 1), for models whose prior can be sampled.
        discriminator: Takes d to T, a module [\*, d] → [\*].
        init_loc_fn: Where each site starts, as in Pyro's AutoGuides; by default at the prior's
            mean, or its median where that is infinite. Their default, the median of 15 draws, is
            off to one side, and a guide that starts there is more often left with too much mass
            on that side.
        init_scale: Unit of the network's output, in unconstrained space: about the posterior's
            standard deviations.

    Raises:
        ValueError: For an unknown contrast; where the guide meets a model whose latents it cannot
            handle.

    References:
        | Adversarial Variational Bayes (Mescheder, Nowozin, Geiger, 2017), algorithms 1 and 2
        | https://arxiv.org/abs/1701.04722

    Example:
        >>> from pyro.infer import Predictive
        >>> from pyro_vae.models import eight_schools_avb
        >>> guide = AutoImplicit(eight_schools_avb)
        >>> guide.setup()
        >>> draws = Predictive(eight_schools_avb, guide=guide, num_samples=100, parallel=True)()
        >>> draws["eta"].shape
        torch.Size([100, 8])
    """

    def __init__(
        self,
        model: Callable,
        *,
        noise_dim: int | None = None,
        hidden_dims: tuple[int, ...] = (128, 128),
        contrast: Literal["adaptive", "prior"] = "adaptive",
        discriminator: Callable[[int], nn.Module] = ResidualDiscriminator,
        init_loc_fn: Callable = init_to_finite_mean,
        init_scale: float = 1.0,
    ) -> None:
        if contrast not in ("adaptive", "prior"):
            raise ValueError(f"contrast must be 'adaptive' or 'prior', found {contrast!r}")
        if not init_scale > 0:
            raise ValueError(f"init_scale must be positive, found {init_scale}")
        super().__init__(model, init_loc_fn=init_loc_fn)
        self._prior = (model,)  # in a tuple, not a submodule; AutoGuide's own model is wrapped
        self.noise_dim = noise_dim
        self.hidden_dims = tuple(hidden_dims)
        self.contrast = contrast
        self.discriminator = discriminator
        self.init_scale = init_scale

    def _create_parameters(self, loc: Tensor, args: tuple, kwargs: dict) -> None:
        dim = self.latent_dim
        noise_dim = 2 * dim + 4 if self.noise_dim is None else self.noise_dim
        widths = [("noise_dim", noise_dim), *(("hidden_dims", w) for w in self.hidden_dims)]
        for name, width in widths:
            if width < dim:
                raise ValueError(
                    f"{name} must be at least the number of latents, or the guide has no density: "
                    f"found {width}, expected {dim} or more"
                )
        network = MLP(noise_dim, dim, self.hidden_dims)
        sampler = _Sampler(network, noise_dim, loc, self.init_scale).to(loc)
        contrast: Contrast
        if self.contrast == "adaptive":
            with torch.no_grad():
                variance, mean = torch.var_mean(sampler(Size((NUM_MOMENT_DRAWS,))), 0)
            contrast = AdaptiveContrast(mean, variance.sqrt())
        else:
            contrast = PriorContrast(UnconstrainedModel(self._prior[0], args, kwargs))
        self.sampler = sampler
        self.ratio = DensityRatio(self.discriminator(dim), contrast).to(loc)

    @pyro_method
    def _log_ratio(self, z: Tensor) -> Tensor:
        return self.ratio(z)

    def get_posterior(self, *args: Any, **kwargs: Any) -> ImplicitDistribution:
        """Return the distribution of the latents in unconstrained space."""
        self.setup(*args, **kwargs)
        # A PyroModule registers the parameters of a submodule where it is looked up. Looked up
        # past that, T's stay out of the guide's; `_log_ratio` shows them to the adversary.
        ratio: Any = self._modules["ratio"]
        return ImplicitDistribution(self.sampler, ratio, self.latent_dim, adversary=self._log_ratio)
