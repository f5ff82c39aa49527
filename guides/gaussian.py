"""Amortised Gaussian guides, through Cholesky factors."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pyro.distributions import Independent, MultivariateNormal, Normal
from torch import Tensor, nn

from .amortized import Amortized

__all__ = ["Gaussian"]


class Gaussian(Amortized):
    r"""Guide whose posterior is Gaussian, its moments a linear layer on an encoder's features.

    .. math:: q(z \mid x) = N(\mu(x), L(x) L(x)^\top)

    L is lower triangular with a positive diagonal: diagonal; zero outside square blocks on the
    diagonal; or full.

    See :class:`~pyro_vae.guides.amortized.Amortized` for how minibatches scale and where the
    parameters live.

    Args:
        encoder: Takes x [N, \*event] to features [N, h].
        latent_dim: Size d of z.
        covariance: ``"diagonal"``, ``"block"`` or ``"full"``.
        block_size: Size of the blocks, a divisor of d, for ``"block"``.
        **kwargs: ``num_features``, ``site``, ``plate``, ``size``, ``subsample_size``, as in
            :class:`~pyro_vae.guides.amortized.Amortized`.

    Raises:
        ValueError: For an unknown covariance, or a block size that does not fit; when called, for
            moments that are not finite or standard deviations of 0.

    References:
        | Auto-Encoding Variational Bayes (Kingma, Welling, 2014), section 3
        | https://arxiv.org/abs/1312.6114

    Example:
        >>> from pyro_vae.nn import MLP
        >>> guide = Gaussian(MLP(64, 32), 4, covariance="block", block_size=2)
        >>> guide(torch.randn(10, 64))["z"].shape
        torch.Size([10, 4])
        >>> guide.get_posterior(torch.randn(1, 64)).scale_tril[0] != 0
        tensor([[ True, False, False, False],
                [ True,  True, False, False],
                [False, False,  True, False],
                [False, False,  True,  True]])
    """

    rows: Tensor
    cols: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        latent_dim: int,
        *,
        covariance: Literal["diagonal", "block", "full"] = "diagonal",
        block_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(encoder, latent_dim, **kwargs)
        if covariance not in ("diagonal", "block", "full"):
            raise ValueError(
                f"covariance must be 'diagonal', 'block' or 'full', found {covariance!r}"
            )
        if (block_size is not None) != (covariance == "block"):
            raise ValueError(
                "block_size goes with covariance='block': "
                f"found block_size={block_size} and covariance={covariance!r}"
            )
        block = {"diagonal": 1, "full": latent_dim}.get(covariance, block_size)
        assert block is not None
        if block < 1 or latent_dim % block:
            raise ValueError(
                f"block_size must divide latent_dim: found {block}, expected a divisor of "
                f"{latent_dim}"
            )
        self.covariance = covariance
        # The places below the diagonal that lie within a block.
        rows, cols = torch.tril_indices(latent_dim, latent_dim, -1)
        inside = rows // block == cols // block
        self.register_buffer("rows", rows[inside], persistent=False)
        self.register_buffer("cols", cols[inside], persistent=False)
        self.head = nn.Linear(self.num_features, 2 * latent_dim + len(self.rows))

    def get_posterior(
        self, x: Tensor, *args: Any, **kwargs: Any
    ) -> Independent | MultivariateNormal:
        """Return q(z|x), with batch shape [N] and event shape [d].

        Raises:
            ValueError: If its moments are not finite or a standard deviation has fallen to 0, while
                distributions validate their arguments.
        """
        d = self.latent_dim
        moments = self.head(self._features(x, *args, **kwargs))
        loc, log_scale, below = moments.split([d, d, len(self.rows)], -1)
        scale = log_scale.exp()
        try:
            if self.covariance == "diagonal":  # torch knows more divergences of this one
                return Normal(loc, scale).to_event(1)
            tril = torch.diag_embed(scale)
            tril[..., self.rows, self.cols] = below
            return MultivariateNormal(loc, scale_tril=tril)
        except ValueError as error:
            raise ValueError(self._what_is_wrong(loc, scale, below)) from error

    def _what_is_wrong(self, loc: Tensor, scale: Tensor, below: Tensor) -> str:
        """Say which moments of q(z|x) are none; a loss may reward standard deviations of 0."""
        moments = torch.cat([loc, scale, below], -1)
        bad, zeros = int((~moments.isfinite()).sum()), int((scale == 0).sum())
        found = [f"{bad} of {moments.numel()} moments not finite"] if bad else []
        if zeros:
            found.append(f"{zeros} of {scale.numel()} standard deviations fallen to 0")
        return (
            f"guide site {self.site!r}, q(z|x): found {' and '.join(found) or 'no valid moments'}, "
            "expected finite means and positive standard deviations; look at x, the learning rate, "
            "and whether the loss keeps q(z|x) from collapsing to a point"
        )

    @torch.no_grad()
    def quantiles(
        self, quantiles: list[float] | Tensor, x: Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return the exact quantiles of each element of z, ``{site: [len(quantiles), N, d]}``."""
        q = self.get_posterior(x, *args, **kwargs)
        levels = torch.as_tensor(quantiles, dtype=q.mean.dtype, device=q.mean.device)
        return {self.site: Normal(q.mean, q.stddev).icdf(levels[:, None, None])}
