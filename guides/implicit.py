"""Implicit guides: noise through a network, with a density learned by an adversary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pyro.infer.autoguide import init_to_mean, init_to_median
from pyro.nn.module import pyro_method
from torch import Size, Tensor, nn

from ..capture import UnconstrainedModel
from ..nn import MLP, JointDiscriminator, NoiseBasis, ResidualDiscriminator
from ..ratios import (
    MIN_SCALE,
    AdaptiveContrast,
    Contrast,
    DensityRatio,
    ImplicitDistribution,
    NormalContrast,
    show_parameters,
)
from .amortized import Amortized, check_positive
from .sampled import AutoSampled

__all__ = ["AutoImplicit", "Implicit"]

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


def check_widths(dim: int, widths: dict[str, int]) -> None:
    """Raise a ValueError where a sampler's samples would lie on a surface."""
    for name, width in widths.items():
        if width < dim:
            raise ValueError(
                f"{name} must be at least the number of latents, or the guide has no density: "
                f"found {width}, expected {dim} or more"
            )


def check_contrast(contrast: str) -> None:
    """Raise a ValueError for an unknown contrast."""
    if contrast not in ("adaptive", "prior"):
        raise ValueError(f"contrast must be 'adaptive' or 'prior', found {contrast!r}")


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
        check_contrast(contrast)
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
        check_widths(
            dim, {"noise_dim": noise_dim, "hidden_dims": min(self.hidden_dims, default=dim)}
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


class Implicit(Amortized):
    r"""Guide whose posterior is noise through a network, conditional on x: any shape.

    .. math:: z = f(x, \varepsilon), \quad \varepsilon \sim N(0, I), \qquad
        \log q(z \mid x) \approx T(x, \bar z) + \log r(z \mid x)

    The noise enters

    * behind the encoder, ``noise="features"``: f is a network on the features and ε;
    * before it, ``"input"``: the encoder is given ε beside the elements of x;
    * as a basis, ``"basis"``: :math:`z_k = \sum_i v_{i,k}(\varepsilon_i) a_{i,k}(x)` with small
      networks v and with coefficients a linear in the features, so that the moments of q(z|x) are
      known from those of v: :math:`E z_k = \sum_i E[v_{i,k}] a_{i,k}`,
      :math:`\operatorname{Var} z_k = \sum_i \operatorname{Var}[v_{i,k}] a_{i,k}^2`.

    The density is learned by a discriminator T(x, z) against a contrast r, so the guide works under
    any loss, but the discriminator has to be trained beside it: by :func:`pyro_vae.fit`, or by an
    ``SVI`` of its own with :meth:`pyro_vae.losses.AVB_ELBO.adversary`. T's parameters are in the
    guide's ``state_dict``, and are shown to that player only.

    See :class:`~pyro_vae.guides.amortized.Amortized` for how minibatches scale and where the
    parameters live.

    Args:
        encoder: Takes x [N, \*event] to features [N, h]; with ``noise="input"``, rows
            [N, x_dim + noise_dim].
        latent_dim: Size d of z.
        noise: Where the noise enters: ``"features"``, ``"input"`` or ``"basis"``.
        noise_dim: Size of ε; 2d + 4 by default. For a basis, the size of each
            :math:`\varepsilon_i`; 4 by default.
        hidden_dims: Widths of the network on features and noise.
        num_basis: Number of basis vectors.
        contrast: ``"adaptive"``, a Gaussian for each x with the moments of q(z|x) (Algorithm 2), or
            ``"prior"``, N(0, I) (Algorithm 1). No gradient passes through the moments.
        num_moment_particles: Number of noise vectors, always the same ones, that give the contrast
            its moments: those of z for each x, or of v for a basis.
        discriminator: T, a module x [N, \*event], z [\*, N, d] → [\*, N]; by default a
            :class:`~pyro_vae.nn.JointDiscriminator` with two layers of 256, whose x_dim is that of
            the encoder's first linear layer.
        **kwargs: ``num_features``, ``site``, ``plate``, ``size``, ``subsample_size``, as in
            :class:`~pyro_vae.guides.amortized.Amortized`.

    Raises:
        ValueError: For an unknown noise or contrast; for too little noise; if no discriminator is
            given and the encoder does not start with a linear layer.

    References:
        | Adversarial Variational Bayes (Mescheder, Nowozin, Geiger, 2017), algorithms 1 and 2,
        | equations III.1 to III.3
        | https://arxiv.org/abs/1701.04722

    Example:
        >>> guide = Implicit(MLP(64, 32), 2)
        >>> x = torch.randn(10, 64)
        >>> guide(x)["z"].shape
        torch.Size([10, 2])
        >>> q = guide.get_posterior(x)
        >>> q.log_prob(q.rsample((5,))).shape
        torch.Size([5, 10])
    """

    discriminator: nn.Module
    moment_noise: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        latent_dim: int,
        *,
        noise: Literal["features", "input", "basis"] = "features",
        noise_dim: int | None = None,
        hidden_dims: tuple[int, ...] = (128, 128),
        num_basis: int = 16,
        contrast: Literal["adaptive", "prior"] = "adaptive",
        num_moment_particles: int = 32,
        discriminator: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(encoder, latent_dim, **kwargs)
        check_contrast(contrast)
        if noise not in ("features", "input", "basis"):
            raise ValueError(f"noise must be 'features', 'input' or 'basis', found {noise!r}")
        if noise_dim is None:
            noise_dim = 4 if noise == "basis" else 2 * latent_dim + 4
        check_positive(noise_dim=noise_dim, num_basis=num_basis)
        if num_moment_particles < 2 or num_moment_particles % 2:
            raise ValueError(
                f"num_moment_particles must be even and positive, found {num_moment_particles}"
            )
        h, d = self.num_features, latent_dim
        if noise == "features":
            check_widths(d, {"noise_dim": noise_dim, "hidden_dims": min(hidden_dims, default=d)})
            self.head: nn.Module = MLP(h + noise_dim, d, hidden_dims)
        elif noise == "input":
            check_widths(d, {"noise_dim": noise_dim, "num_features": h})
            self.head = nn.Linear(h, d)
        else:
            check_widths(d, {"num_basis · noise_dim": num_basis * noise_dim})
            self.head = nn.Linear(h, num_basis * d)
            self.basis = NoiseBasis(num_basis, d, noise_dim)
        width = noise_dim * (num_basis if noise == "basis" else 1)
        x_dim = _input_width(encoder)
        if x_dim is not None and noise == "input":
            x_dim -= noise_dim
            if x_dim < 1:
                raise ValueError(
                    "with noise='input' the encoder takes x and the noise: found an encoder of "
                    f"{x_dim + noise_dim} inputs, expected more than noise_dim={noise_dim}"
                )
        self.default_discriminator = discriminator is None
        if discriminator is None:
            if x_dim is None:
                raise ValueError(
                    f"discriminator must be given: found that the encoder, a "
                    f"{type(encoder).__name__}, does not start with a linear layer that says how "
                    "many elements x has"
                )
            discriminator = JointDiscriminator(x_dim, d, (256, 256))
        self.x_dim = x_dim
        self.noise = noise
        self.contrast = contrast
        self.discriminator = discriminator
        # Antithetic and, if there is enough, white: the moments of a sampler that is linear in the
        # noise are exact then, and the mean in any case.
        half = torch.randn(num_moment_particles // 2, width)
        if len(half) >= width:
            half = torch.linalg.qr(half).Q * len(half) ** 0.5
        else:
            half = half / half.square().mean(0).sqrt()
        self.register_buffer("moment_noise", torch.cat([half, -half]))

    def condition(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        r"""Return what the discriminator is given for x, given the model's arguments [N, \*event].

        By default x itself. Override it together with :meth:`features`: q depends on all that the
        encoder is given, and T has to see that too.
        """
        return x

    def get_posterior(self, x: Tensor, *args: Any, **kwargs: Any) -> ImplicitDistribution:
        """Return q(z|x), with batch shape [N] and event shape [d]; its density is learned."""
        if self.noise == "input":
            rows = x.flatten(1)
            if self.x_dim not in (None, rows.shape[1]):
                raise ValueError(
                    f"with noise='input' the encoder takes x and the noise: found {rows.shape[1]} "
                    f"elements of x, expected {self.x_dim}, the encoder's inputs less noise_dim"
                )
        else:
            rows = self._features(x, *args, **kwargs)
        condition = self.condition(x, *args, **kwargs)
        if self.default_discriminator and condition.flatten(1).shape[1] != self.x_dim:
            raise ValueError(
                f"the discriminator was made for {self.x_dim} elements, as the encoder, found "
                f"{condition.flatten(1).shape[1]}: expected a condition() that returns all that "
                "the encoder is given, or discriminator="
            )

        def push(noise: Tensor) -> Tensor:
            """Take noise [*, N, noise_width] to z [*, N, d]."""
            if self.noise == "basis":
                return (self.basis(noise) * self._coefficients(rows)).sum(-2)
            inputs = torch.cat([rows.expand(*noise.shape[:-1], rows.shape[-1]), noise], -1)
            if self.noise == "input":  # the encoder knows one batch dimension
                inputs = self._features(inputs.flatten(0, -2), *args, **kwargs)
            return self.head(inputs).reshape(*noise.shape[:-1], self.latent_dim)

        def sampler(shape: Size) -> Tensor:
            width = self.moment_noise.shape[-1]
            return push(torch.randn(*shape, width, dtype=rows.dtype, device=rows.device))

        ratio = DensityRatio(self.discriminator, self._contrast(rows, push), context=(condition,))

        def adversary(z: Tensor) -> Tensor:
            show_parameters(self.discriminator)
            return ratio(z)

        return ImplicitDistribution(sampler, ratio, self.latent_dim, (len(x),), adversary)

    def _coefficients(self, features: Tensor) -> Tensor:
        """Return a(x) [N, num_basis, d]."""
        return self.head(features).unflatten(-1, (-1, self.latent_dim))

    @torch.no_grad()
    def _contrast(self, rows: Tensor, push: Callable[[Tensor], Tensor]) -> NormalContrast:
        """Return r(z|x).

        Its moments are those of the same noise in every call. That makes it a function of x, which
        T can take into account; of which r it is T's optimum does not depend.
        """
        if self.contrast == "prior":
            loc = rows.new_zeros(self.latent_dim)
            return NormalContrast(loc, loc + 1)
        if self.noise == "basis":  # equations III.2 and III.3
            var, loc = torch.var_mean(self.basis(self.moment_noise), 0, correction=0)
            coefficients = self._coefficients(rows)
            loc, var = (loc * coefficients).sum(-2), (var * coefficients.square()).sum(-2)
        else:
            noise = self.moment_noise[:, None].expand(-1, len(rows), -1)
            var, loc = torch.var_mean(push(noise), 0, correction=0)
        # A guide that collapses to a point must leave a density.
        return NormalContrast(loc, var.sqrt().clamp(min=MIN_SCALE))


def _input_width(encoder: nn.Module) -> int | None:
    """Return the size of the rows that the encoder takes, if its first layer with weights says."""
    for layer in encoder.modules():
        if isinstance(layer, nn.Linear):
            return layer.in_features
        if next(layer.parameters(recurse=False), None) is not None:
            break
    return None
