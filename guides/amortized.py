"""What the amortised guides share: an encoder, the plate of the data, one latent site."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..ratios import show_parameters

__all__ = ["Amortized"]

NUM_DRAWS = 1_000  # for quantiles


class Amortized(nn.Module):
    r"""Base of the guides that compute q(z|x) from x by an encoder: one latent z for each row of x.

    A guide is called with the model's arguments; the first is x. It samples the site inside the
    plate of the data:

    * by default x is the minibatch in hand, N rows of a data set of ``size``. The log density is
      scaled by size/N, as it is in a model that says ``pyro.plate("data", size,
      subsample=indices)``; both must name the same size. The indices themselves are the model's to
      know.
    * with ``subsample_size`` x is the whole data set: the plate draws that many rows, and the
      model, which says ``with pyro.plate("data", size, subsample_size=…) as i: x[i]``, gets the
      same. Tensors among the other arguments that are as long as x are cut likewise.

    The parameters all exist after construction. They live in the module alone, not in Pyro's
    global store, where a second guide would silently be given those of the first: save them by
    ``state_dict``. ``SVI`` and ``elbo(model, guide)`` both see them. As under Pyro's setting
    ``module_local_params``, what looks parameters up by name in that store does not find them:
    ``JitTrace_ELBO`` fails, and ``PyroOptim.save`` saves no state that could be loaded. To resume
    training take a torch optimiser.

    Subclasses define :meth:`get_posterior`. :meth:`features` may be overridden, to feed the encoder
    from several of the model's arguments.

    Args:
        encoder: Takes x [N, \*event] to features [N, h].
        latent_dim: Size d of z.
        num_features: h; by default the ``out_features`` of the encoder's last linear layer.
        site: Name of the latent site, whose distribution in the model has event shape [d].
        plate: Name of the plate of the data, at dimension −1.
        size: Number of rows of the whole data set; N by default.
        subsample_size: Number of rows that the guide draws from x; by default it takes x whole. The
            attribute may be set to None after training, for a model of other data taken whole.

    Raises:
        ValueError: For a size that is not positive; if h is not given and the encoder has no linear
            layer; when called, if x does not fit.
    """

    def __init__(
        self,
        encoder: nn.Module,
        latent_dim: int,
        *,
        num_features: int | None = None,
        site: str = "z",
        plate: str = "data",
        size: int | None = None,
        subsample_size: int | None = None,
    ) -> None:
        super().__init__()
        if num_features is None:
            linear = [layer for layer in encoder.modules() if isinstance(layer, nn.Linear)]
            if not linear:
                raise ValueError(
                    f"num_features must be given: found no linear layer in the encoder, a "
                    f"{type(encoder).__name__}, to infer the number of its features from"
                )
            num_features = linear[-1].out_features
        check_positive(
            latent_dim=latent_dim,
            num_features=num_features,
            size=size,
            subsample_size=subsample_size,
        )
        self.encoder = encoder
        self.discriminator: nn.Module | None = None  # whose parameters are another player's
        self.latent_dim = latent_dim
        self.num_features = num_features
        self.site = site
        self.plate = plate
        self.size = size
        self.subsample_size = subsample_size

    def features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the encoder's features [N, h], given the model's arguments."""
        return self.encoder(x)

    def _features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        features = self.features(x, *args, **kwargs)
        if features.shape != (len(x), self.num_features):
            raise ValueError(
                f"the encoder's features have shape {tuple(features.shape)}, expected "
                f"{(len(x), self.num_features)}; num_features= sets the second"
            )
        return features

    def get_posterior(self, x: Tensor, *args: Any, **kwargs: Any) -> TorchDistribution:
        """Return q(z|x), with batch shape [N] and event shape [d]."""
        raise NotImplementedError

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample the site, [N, d] or, under plates of particles, [*, N, d]."""
        if not isinstance(x, Tensor) or x.dim() == 0:
            found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"the guide's first argument must be a tensor of rows, found {found}, "
                "expected the data x [N, ...]"
            )
        if len(x) == 0:
            raise ValueError("the guide's first argument must have rows, found none")
        show_parameters(self, without=self.discriminator)
        num = len(x)
        if self.subsample_size is None:
            size = num if self.size is None else self.size
            if num > size:
                raise ValueError(f"size must be at least the rows of x: found {size} and {num}")
            # Replayed, a plate's indices would replace the model's own: these are kept from it.
            with poutine.block(hide=[self.plate]):
                rows = torch.arange(num, device=x.device)
                plate = pyro.plate(self.plate, size, subsample=rows, dim=-1)
        else:
            if self.size not in (None, num):
                raise ValueError(
                    f"with subsample_size x must be the whole data: found {num} rows, expected "
                    f"size={self.size}"
                )
            if self.subsample_size > num:
                raise ValueError(
                    f"subsample_size must be at most the rows of x: found {self.subsample_size} "
                    f"and {num}"
                )
            plate = pyro.plate(
                self.plate, num, subsample_size=self.subsample_size, dim=-1, device=x.device
            )
        with plate as index:
            if self.subsample_size is not None:
                x, args, kwargs = tree_map(
                    lambda value: value[index] if _is_long_as(value, num) else value,
                    (x, args, kwargs),
                )
            return {self.site: pyro.sample(self.site, self.get_posterior(x, *args, **kwargs))}

    def sample_latent(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Draw z [N, d] from q(z|x), differentiable in the guide's parameters."""
        return self.get_posterior(x, *args, **kwargs).rsample()

    def median(self, x: Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the median of each element of z, ``{site: [N, d]}``. See :meth:`quantiles`."""
        return {name: q[0] for name, q in self.quantiles([0.5], x, *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(
        self, quantiles: list[float] | Tensor, x: Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return quantiles of each element of z, ``{site: [len(quantiles), N, d]}``.

        From 1,000 draws for each row of x; exact for a :class:`Gaussian`.
        """
        draws = self.get_posterior(x, *args, **kwargs).sample((NUM_DRAWS,))
        levels = torch.as_tensor(quantiles, dtype=draws.dtype, device=draws.device)
        return {self.site: torch.quantile(draws, levels, dim=0)}

    def extra_repr(self) -> str:
        """Return what the module's repr shows."""
        return f"latent_dim={self.latent_dim}, site={self.site!r}, plate={self.plate!r}"


def check_positive(**values: int | None) -> None:
    """Raise a ValueError for the first argument that is given and not at least one."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, found {value}")


def _is_long_as(value: Any, num: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == num
