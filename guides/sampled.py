"""What the guides for one posterior share: known by their samples, not by a location and scale."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor, distributions

__all__ = ["AutoSampled"]

NUM_DRAWS = 10_000


class AutoSampled(AutoContinuous):
    """Base of the guides whose medians and quantiles are those of draws.

    Pyro's :class:`~pyro.infer.autoguide.AutoContinuous` does the rest: one distribution over the
    concatenated latents in unconstrained space, ``get_posterior``, whose samples are cut into the
    model's sites and mapped to their supports.
    """

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Create all parameters, given the model's arguments. The first call does so too."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._setup_prototype(*args, **kwargs)
            loc = self._init_loc()
            self._check_init(loc)
            self._create_parameters(loc, args, kwargs)
        except Exception:
            self.prototype_trace = None  # not set up: the next call says again what is wrong
            raise

    def _check_init(self, loc: Tensor) -> None:
        start = 0
        for name, shape in self._unconstrained_shapes.items():
            part = loc[start : (start := start + shape.numel())]
            if not part.isfinite().all():
                raise ValueError(
                    f"site {name!r} starts at {part.tolist()} in unconstrained space, expected "
                    "finite numbers; another init_loc_fn may do"
                )

    def _create_parameters(self, loc: Tensor, args: tuple, kwargs: dict) -> None:
        """Create the guide's parameters.

        Args:
            loc: Where the latents start, in unconstrained space [latent_dim].
            args: The model's positional arguments.
            kwargs: The model's keyword arguments.
        """
        raise NotImplementedError

    def get_posterior(self, *args: Any, **kwargs: Any) -> TorchDistribution:
        """Return the distribution of the latents in unconstrained space."""
        raise NotImplementedError

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return each site's median, from 10,000 draws. See :meth:`quantiles`."""
        return {name: q[0] for name, q in self.quantiles([0.5], *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(
        self, quantiles: list[float] | Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return each site's quantiles [len(quantiles), *site], from 10,000 draws.

        As in Pyro's AutoGuides they are taken in unconstrained space and mapped to the support:
        those of the site itself where that map is increasing in each coordinate, as for intervals
        and positive numbers; a point of the support in any case.
        """
        draws = self.get_posterior(*args, **kwargs)((NUM_DRAWS,))
        levels = torch.as_tensor(quantiles, dtype=draws.dtype, device=draws.device)
        result: dict[str, list[Tensor]] = {}
        for latent in torch.quantile(draws, levels, dim=0):
            for site, value in self._unpack_latent(latent):
                transform = distributions.biject_to(site["fn"].support)
                result.setdefault(site["name"], []).append(transform(value))
        return {name: torch.stack(values) for name, values in result.items()}
