"""The importance-weighted bound (Burda et al., 2016), for minibatches too."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ..terms import Terms, TracePair
from .base import TermsELBO

__all__ = ["IWAE_ELBO"]


class IWAE_ELBO(TermsELBO):  # noqa: N801 - Pyro's way to name losses
    r"""Minimise minus the importance-weighted bound, of each data point.

    .. math:: -\sum_n \log \frac{1}{k} \sum_{s=1}^k w_{sn}, \qquad
        w_{sn} = \frac{p(x_n, z_{sn})}{q(z_{sn} | x_n)}

    k is the number of particles. The average is within each data point, and a subsampled plate's
    scale outside the logarithm, so that the value under a minibatch is right in expectation.
    (:class:`pyro.infer.RenyiELBO` averages over whole minibatches, scale included.)

    Args:
        num_particles: k. Particles are vectorised unless ``vectorize_particles=False``.
        doubly_reparameterized: Whether to use a gradient for the guide that has no score term and
            a signal-to-noise ratio that does not fall with k:
            :math:`\sum_s \tilde w_s^2 \, \partial \log w_s / \partial z_s \cdot dz_s / d\phi`.
        **kwargs: Those of :class:`~pyro_vae.losses.TermsELBO`.

    Raises:
        ValueError: On use, for k > 1: if the joint density is no sum over the data points of the
            plates that hold all latent sites.

    References:
        | Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov, 2016), equation 8
        | https://arxiv.org/abs/1509.00519
        | Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives
        | (Tucker, Lawson, Gu, Maddison, 2019), equation 8
        | https://arxiv.org/abs/1810.04152

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", 60000, subsample_size=len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", 60000, subsample_size=len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5).to_event(1))  # exact
        >>> x = torch.zeros(8, 2)
        >>> elbo = IWAE_ELBO(num_particles=5)
        >>> elbo.loss(model, guide, x) / 60000  # -log p(x) = -log N(0; 0, 2 I)
        2.531...
    """

    def __init__(
        self, num_particles: int = 5, *, doubly_reparameterized: bool = False, **kwargs: Any
    ) -> None:
        kwargs.setdefault("vectorize_particles", True)
        super().__init__(num_particles=num_particles, **kwargs)
        self.doubly_reparameterized = doubly_reparameterized

    def formula(self, terms: Terms) -> Tensor:
        """Return minus the bound, equation 8."""
        if terms.num_particles > 1:
            terms.check_decomposes("IWAE_ELBO")
        log_w = terms.log_weight  # [S, N]
        bound = log_w.logsumexp(0, keepdim=True) - math.log(len(log_w))
        loss = -terms.total(bound)
        if self.doubly_reparameterized and torch.is_grad_enabled():
            surrogate = self._surrogate(terms)
            loss = loss.detach() + (surrogate - surrogate.detach())
        return loss

    def _surrogate(self, terms: Terms) -> Tensor:
        """Return what has the doubly reparameterised gradient; its value means nothing."""
        log_w = terms.log_weight
        w = log_w.detach().softmax(0) * terms.num_particles  # `total` averages over particles
        model_part = terms.total(w * (terms.log_likelihood + terms.log_prior))
        # ∂/∂z at fixed parameters, which is why z are leaves of this graph: see _Leaves
        leaves = [leaf for pair in terms.pairs for leaf in _leaves(pair)]
        objective = terms.total(w * w / terms.num_particles * log_w)
        z = [leaf for _, leaf in leaves]
        partials = torch.autograd.grad(objective, z, retain_graph=True, allow_unused=True)
        pairs = zip(z, partials, strict=True)
        adjoints = [torch.zeros_like(leaf) if g is None else g for leaf, g in pairs]
        guide_part = torch.zeros_like(model_part)
        for i in reversed(range(len(leaves))):
            sample, _ = leaves[i]
            if not sample.requires_grad:
                continue
            guide_part = guide_part + (adjoints[i] * sample).sum()
            # a later site's sample depends on the earlier ones
            earlier = [leaf for _, leaf in leaves[:i]]
            if earlier:
                more = torch.autograd.grad(
                    sample, earlier, adjoints[i], retain_graph=True, allow_unused=True
                )
                for j, part in enumerate(more):
                    adjoints[j] = adjoints[j] if part is None else adjoints[j] + part
        return -(model_part + guide_part)

    def _get_trace(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> TracePair:
        if self.doubly_reparameterized and torch.is_grad_enabled():
            guide = _Leaves()(guide)
        return super()._get_trace(model, guide, args, kwargs)


class _Leaves(Messenger):
    """Let each latent be a leaf of the graph, and keep the sample that it was cut from."""

    def _pyro_sample(self, msg: Any) -> None:
        # A plate's subsample has no rsample; a latent without one is complained about elsewhere.
        if msg["is_observed"] or msg["done"] or not msg["fn"].has_rsample:
            return
        sample = msg["fn"](*msg["args"], **msg["kwargs"])
        msg["value"] = sample.detach().requires_grad_()
        msg["infer"] = {**msg["infer"], "_sample": sample}
        msg["done"] = True


def _leaves(pair: TracePair) -> list[tuple[Tensor, Tensor]]:
    sites = (pair.guide.nodes[name] for name in pair.guide.stochastic_nodes)
    return [(site["infer"]["_sample"], site["value"]) for site in sites]
