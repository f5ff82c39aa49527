"""Adversarial variational Bayes (Mescheder, Nowozin, Geiger, 2017)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.util import torch_item
from torch import Tensor

from ..ratios import f_divergence_loss, implicit_distributions, logistic_loss

__all__ = ["AVB_ELBO"]

OBJECTIVES = {"logistic": logistic_loss, "f-divergence": f_divergence_loss}


class AVB_ELBO(Trace_ELBO):  # noqa: N801 - Pyro's way to name losses
    r"""Negative ELBO of an implicit guide, with the adversary that learns the guide's density.

    A guide site with an :class:`~pyro_vae.ratios.ImplicitDistribution` has no density. A second
    player, the discriminator T, learns it from samples against a contrast r:

    .. math::
        \text{guide and model:} \quad & \min \; \mathbb{E}_{q(z)}
            [T(\bar z) + \log r(z) - \log p(x, z)] \\
        \text{adversary:} \quad & \min_T \; {-\mathbb{E}_q \log \sigma(T)}
            - \mathbb{E}_r \log(1 - \sigma(T))

    The first is this loss; the second is :meth:`adversary`, with its own optimiser and number of
    steps. With the prior as contrast this is the paper's Algorithm 1, with
    :class:`~pyro_vae.ratios.AdaptiveContrast` its Algorithm 2. A guide whose density is known
    needs no second player; its loss is the usual ELBO.

    The value is what the *discriminator claims*. Too weak a discriminator claims too much.

    Args:
        num_particles: Samples of z for the guide's step.
        num_adversary_particles: Samples of z, and of the contrast, for each of the adversary's;
            three times as many by default.
        objective: The adversary's loss, ``"logistic"`` or ``"f-divergence"`` (equation 6.10, less
            stable).
        **kwargs: Those of :class:`pyro.infer.Trace_ELBO`. Unlike there, particles are vectorised
            unless ``vectorize_particles=False``.

    Raises:
        ValueError: For an unknown objective; if a guide site cannot be reparameterised, or, by
            :meth:`adversary`, if no guide site has a density to learn.

    References:
        | Adversarial Variational Bayes: Unifying Variational Autoencoders and Generative
        | Adversarial Networks (Mescheder, Nowozin, Geiger, 2017), equations 3.3, 3.7 and 4.2
        | https://arxiv.org/abs/1701.04722

    Example:
        As two players, each with an optimiser of its own:

        >>> import pyro
        >>> from pyro.infer import SVI
        >>> from pyro_vae.guides import AutoImplicit
        >>> from pyro_vae.models import eight_schools_avb
        >>> guide = AutoImplicit(eight_schools_avb)
        >>> elbo = AVB_ELBO(num_particles=32)
        >>> adam = {"lr": 1e-3, "betas": (0.5, 0.999)}
        >>> svi = SVI(eight_schools_avb, guide, pyro.optim.Adam(adam), elbo)
        >>> adversary = SVI(eight_schools_avb, guide, pyro.optim.Adam(adam), elbo.adversary)
        >>> for step in range(3):
        ...     _ = adversary.step(), adversary.step(), svi.step()

        In one line:

        >>> from pyro_vae import fit
        >>> result = fit(eight_schools_avb, guide, elbo, num_steps=3, progress=False)
    """

    def __init__(
        self,
        num_particles: int = 128,
        num_adversary_particles: int | None = None,
        objective: str = "logistic",
        **kwargs: Any,
    ) -> None:
        if objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {sorted(OBJECTIVES)}, found {objective!r}")
        if num_adversary_particles is None:
            num_adversary_particles = 3 * num_particles
        for name, count in (
            ("num_particles", num_particles),
            ("num_adversary_particles", num_adversary_particles),
        ):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, found {count}")
        self.objective = objective
        self.num_adversary_particles = num_adversary_particles
        kwargs.setdefault("vectorize_particles", True)
        super().__init__(num_particles=num_particles, **kwargs)

    def differentiable_loss(
        self, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return the guide's and the model's loss; T's weights are held fixed in it."""
        loss = torch.zeros(())
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            _check_reparameterized(guide_trace)
            log_q = guide_trace.log_prob_sum()  # T(z̄) + log r(z), equations 3.7 and 4.2
            log_p = model_trace.log_prob_sum()  # log p(x, z)
            loss = loss + (log_q - log_p) / self.num_particles
        return loss

    def adversary(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """Return the discriminator's loss, differentiable in T's weights alone.

        One call draws ``num_adversary_particles`` samples of the guide and of the contrast, and
        moves an adaptive contrast towards the guide's moments. It has the signature of a loss for
        :class:`pyro.infer.SVI`, which then sees T's parameters and no others.
        """
        # Hidden, or SVI would hand the guide's parameters to the adversary's optimiser.
        with torch.no_grad(), poutine.block(hide_types=["param"]):
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        implicit = list(implicit_distributions(guide_trace))
        if not implicit:
            raise ValueError(
                "AVB_ELBO.adversary found no guide site with a learned density: found the sites "
                f"{list(guide_trace.stochastic_nodes)}; fit this guide by Trace_ELBO, "
                "or use AutoImplicit"
            )
        objective = OBJECTIVES[self.objective]
        losses = [objective(*q.discriminate(self.num_adversary_particles)) for q in implicit]
        return sum(losses[1:], losses[0])

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Return the value of :meth:`differentiable_loss`."""
        return torch_item(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Return the value of :meth:`differentiable_loss` and backpropagate it."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return torch_item(loss)


def _check_reparameterized(trace: poutine.Trace) -> None:
    for name, site in trace.iter_stochastic_nodes():
        if not site["fn"].has_rsample:
            raise ValueError(
                f"guide site {name!r} must be reparameterisable (have rsample), "
                f"found {type(site['fn']).__name__}"
            )
