"""The variational autoencoder's generative half: a decoder, an observation, a standard normal."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor, nn

from ..ratios import show_parameters
from .observations import Observation

__all__ = ["VAE"]


class VAE(nn.Module):
    r"""Model of data x by latents z through a decoder, one latent z for each row of x.

    .. math:: z \sim N(0, I_d), \qquad x \mid z \sim p(x; g(z))

    with g the decoder and p the observation. A Pyro model: call it with x, under any loss and any
    amortised guide. Parameters live in the module alone, as those of
    :class:`~pyro_vae.guides.amortized.Amortized`: save them by ``state_dict``.

    An autoregressive decoder, such as :class:`~pyro_vae.pixelcnn.PixelCNN`, has
    ``autoregressive = True``, is called with z and x, and can ``sample(z, observation)``.

    Args:
        decoder: Takes z [\*, d], of any batch shape, to the observation's parameters
            [\*, num_params · C, \*rest].
        observation: p(x; g). See :mod:`pyro_vae.models.observations`.
        latent_dim: d.
        event_shape: Shape (C, \*rest) of one data point: (C, H, W) for images, (D,) for vectors.
        site: Name of the latent site.
        observed: Name of the observed site.
        plate: Name of the plate of the data, at dimension −1.
        size: Number of rows of the whole data set; those of x by default. The log density of a
            minibatch of N is scaled by size/N. The guide must name the same.

    Raises:
        ValueError: For a size that is not positive, an empty event shape. When called: for x of
            another shape, out of the observation's range, or with more rows than ``size``; for a
            decoder whose output does not fit.

    References:
        | Auto-Encoding Variational Bayes (Kingma, Welling, 2014), section 3
        | https://arxiv.org/abs/1312.6114

    Example:
        >>> from pyro_vae.guides import Gaussian
        >>> from pyro_vae.losses import BetaVAE_ELBO
        >>> from pyro_vae.models import Bernoulli
        >>> from pyro_vae.nn import MLP
        >>> model = VAE(MLP(2, 16), Bernoulli(), latent_dim=2, event_shape=(16,))
        >>> guide = Gaussian(MLP(16, 8), latent_dim=2)
        >>> loss = BetaVAE_ELBO()(model, guide)(torch.ones(5, 16))
        >>> model.sample(3).shape
        torch.Size([3, 16])
    """

    _zeros: Tensor

    def __init__(
        self,
        decoder: nn.Module,
        observation: Observation,
        latent_dim: int,
        event_shape: tuple[int, ...],
        *,
        site: str = "z",
        observed: str = "x",
        plate: str = "data",
        size: int | None = None,
    ) -> None:
        super().__init__()
        if latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1, found {latent_dim}")
        if size is not None and size < 1:
            raise ValueError(f"size must be at least 1, found {size}")
        if not event_shape or min(event_shape) < 1:
            raise ValueError(
                "event_shape must be that of one data point, such as (1, 28, 28) or (64,): found "
                f"{tuple(event_shape)}"
            )
        if not isinstance(observation, Observation):
            raise ValueError(
                "observation must be one of pyro_vae.models.observations, such as Bernoulli(): "
                f"found {type(observation).__name__}"
            )
        self.decoder = decoder
        self.observation = observation
        self.latent_dim = latent_dim
        self.event_shape = Size(event_shape)
        self.site = site
        self.observed = observed
        self.plate = plate
        self.size = size
        # The prior is of the decoder's type and device.
        like = next(decoder.parameters(), torch.zeros(()))
        self.register_buffer("_zeros", like.new_zeros(latent_dim).detach(), persistent=False)

    @property
    def autoregressive(self) -> bool:
        """Whether the decoder conditions each element of x on those before it."""
        return getattr(self.decoder, "autoregressive", False)

    def forward(self, x: Tensor) -> Tensor:
        """Sample z and observe x [N, *event_shape]; return x."""
        self._check(x)
        show_parameters(self)
        num = len(x)
        size = num if self.size is None else self.size
        if num > size:
            raise ValueError(f"size must be at least the rows of x: found {size} and {num}")
        rows = torch.arange(num, device=x.device)
        with pyro.plate(self.plate, size, subsample=rows, dim=-1):
            z = pyro.sample(self.site, self.prior())
            return pyro.sample(self.observed, self.likelihood(z, x), obs=x)

    def prior(self) -> TorchDistribution:
        """Return p(z), with event shape [d]."""
        return dist.Normal(self._zeros, torch.ones_like(self._zeros)).to_event(1)

    def likelihood(self, z: Tensor, x: Tensor | None = None) -> TorchDistribution:
        r"""Return p(x|z), with the batch shape of z and the event shape of x.

        Args:
            z: Latents [\*, d].
            x: What an autoregressive decoder conditions each element on, the elements before it
                in x [\*, \*event_shape]; ``log_prob`` of that x is then log p(x|z). Others ignore
                it.

        Raises:
            ValueError: For a decoder that is autoregressive, without x; for a z that does not end
                in d; for a decoder whose output does not fit.
        """
        if z.dim() == 0 or z.shape[-1] != self.latent_dim:
            raise ValueError(
                f"z must have shape [*, {self.latent_dim}], latent_dim: found {list(z.shape)}"
            )
        if not self.autoregressive:
            params = self.decoder(z)
        elif x is None:
            raise ValueError(
                "an autoregressive decoder's likelihood is that of one x: found x=None, expected "
                f"the data [*, {self._event()}]"
            )
        else:
            params = self.decoder(z, x)
        return self.observation.dist(self._fitting(params, z), len(self.event_shape))

    def reconstruct(self, z: Tensor) -> Tensor:
        r"""Return E[x|z] [\*, \*event_shape]; a sample of p(x|z) if autoregressive.

        Args:
            z: Latents [\*, d].
        """
        if self.autoregressive:
            return self._draw(z)
        return self.likelihood(z).mean

    @torch.no_grad()
    def sample(self, num: int, *, z: Tensor | None = None) -> Tensor:
        r"""Draw x [num, \*event_shape] from the model.

        Args:
            num: How many.
            z: Latents [num, d] to use; draws from the prior by default.

        Raises:
            ValueError: For a z of another shape.
        """
        if num < 1:
            raise ValueError(f"num must be at least 1, found {num}")
        if z is None:
            z = self.prior().sample((num,))
        elif z.shape != (num, self.latent_dim):
            raise ValueError(f"z must have shape [{num}, {self.latent_dim}], found {list(z.shape)}")
        return self._draw(z)

    @torch.no_grad()
    def _draw(self, z: Tensor) -> Tensor:
        if self.autoregressive:
            return self.decoder.sample(z, self.observation)  # type: ignore[operator]
        return self.likelihood(z).sample()

    def _check(self, x: Tensor) -> None:
        expected = f"[N, {self._event()}]"
        if not isinstance(x, Tensor):
            raise ValueError(
                f"site {self.observed!r}: expected a tensor {expected}, found {type(x).__name__}"
            )
        if x.dim() == 0 or x.shape[1:] != self.event_shape:
            raise ValueError(
                f"site {self.observed!r}: expected x of shape {expected}, found {list(x.shape)}"
            )
        if len(x) == 0:
            raise ValueError(f"site {self.observed!r}: x must have rows, found none")
        try:
            self.observation.check(x)
        except ValueError as error:
            raise ValueError(f"site {self.observed!r}: {error}") from error

    def _fitting(self, params: Tensor, z: Tensor) -> Tensor:
        """Return the decoder's output, if it fits z and x."""
        first, *rest = self.event_shape
        event = [self.observation.num_params * first, *rest]
        if list(params.shape) != [*z.shape[:-1], *event]:
            raise ValueError(
                f"the decoder must return {self.observation.num_params} numbers for each element "
                f"of x: found shape {list(params.shape)} for z {list(z.shape)}, expected "
                f"{[*z.shape[:-1], *event]}"
            )
        return params

    def _event(self) -> str:
        return ", ".join(map(str, self.event_shape))

    def extra_repr(self) -> str:
        """Return what the module's repr shows."""
        return (
            f"latent_dim={self.latent_dim}, event_shape={tuple(self.event_shape)}, "
            f"site={self.site!r}, observed={self.observed!r}, plate={self.plate!r}"
        )
