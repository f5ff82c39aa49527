"""β-VAE (Higgins et al., 2017), with the KL's weight on a schedule and free bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..terms import Terms
from .base import TermsELBO

__all__ = ["BetaVAE_ELBO", "KLSchedule"]


class KLSchedule(nn.Module):
    r"""Raise the KL's weight from one value to another: constant, linear or in cycles.

    .. math:: \beta_t = \beta_{min} + (\beta_{max} - \beta_{min}) \min(1, (t \bmod c) / w)

    for a warm-up of w and cycles of c steps or epochs. t is a buffer: it is saved with the loss
    and restored.

    Args:
        n_steps_kl_warmup: w in steps, which the loss counts.
        n_epochs_kl_warmup: w in epochs, which you count: call :meth:`epoch` after each. With
            neither, β is ``max_kl_weight`` throughout.
        min_kl_weight: β at the start of the warm-up.
        max_kl_weight: β at its end.
        cycle: c, in the warm-up's unit; without it there is one warm-up.

    Raises:
        ValueError: For both warm-ups at once, one that is not positive, a cycle shorter than it, or
            a negative weight.

    References:
        | Cyclical Annealing Schedule: A Simple Approach to Mitigating KL Vanishing
        | (Fu et al., 2019)
        | https://arxiv.org/abs/1903.10145

    Example:
        >>> schedule = KLSchedule(n_steps_kl_warmup=4, cycle=6)
        >>> weights = []
        >>> for step in range(8):
        ...     weights.append(float(schedule.weight))
        ...     schedule.step()
        >>> weights
        [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 0.0, 0.25]
    """

    count: Tensor

    def __init__(
        self,
        n_steps_kl_warmup: int | None = None,
        n_epochs_kl_warmup: int | None = None,
        *,
        min_kl_weight: float = 0.0,
        max_kl_weight: float = 1.0,
        cycle: int | None = None,
    ) -> None:
        super().__init__()
        if n_steps_kl_warmup is not None and n_epochs_kl_warmup is not None:
            raise ValueError(
                "expected n_steps_kl_warmup or n_epochs_kl_warmup, found both: "
                f"{n_steps_kl_warmup} and {n_epochs_kl_warmup}"
            )
        self.by_epoch = n_epochs_kl_warmup is not None
        warmup = n_epochs_kl_warmup if self.by_epoch else n_steps_kl_warmup
        if warmup is not None and warmup < 1:
            raise ValueError(f"the KL warm-up must be at least 1 long, found {warmup}")
        if cycle is not None and (warmup is None or cycle < warmup):
            raise ValueError(f"cycle must be no shorter than the warm-up {warmup}, found {cycle}")
        for name, weight in (("min_kl_weight", min_kl_weight), ("max_kl_weight", max_kl_weight)):
            if not weight >= 0:
                raise ValueError(f"{name} must not be negative, found {weight}")
        self.warmup = warmup
        self.cycle = cycle
        self.min_kl_weight = min_kl_weight
        self.max_kl_weight = max_kl_weight
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @property
    def weight(self) -> Tensor:
        """β now, a scalar."""
        top = torch.tensor(self.max_kl_weight, dtype=torch.float64, device=self.count.device)
        if self.warmup is None:
            return top
        count = self.count if self.cycle is None else self.count % self.cycle
        progress = (count.double() / self.warmup).clamp(max=1)
        return self.min_kl_weight + (top - self.min_kl_weight) * progress

    def step(self) -> None:
        """Count a step; the loss does it."""
        if not self.by_epoch:
            self.count = self.count + 1

    def epoch(self) -> None:
        """Count an epoch."""
        if self.by_epoch:
            self.count = self.count + 1

    def extra_repr(self) -> str:
        """Return what the module's repr shows."""
        unit = "epochs" if self.by_epoch else "steps"
        return (
            f"warmup={self.warmup} {unit}, cycle={self.cycle}, "
            f"min_kl_weight={self.min_kl_weight}, max_kl_weight={self.max_kl_weight}"
        )


class BetaVAE_ELBO(TermsELBO):  # noqa: N801 - Pyro's way to name losses
    r"""Minimise the β-VAE objective, with β on a schedule and free bits if asked for.

    .. math:: -\mathbb{E}_q \log p(x|z) + \beta \, \mathrm{KL}(q(z|x) \| p(z))

    summed over the data set; β = 1 is the ELBO. With free bits, the KL is

    .. math:: \sum_k \max(f, \mathbb{E}_x \mathrm{KL}_k)

    the average over the minibatch of each coordinate's KL (of each site's, where it does not split
    into coordinates), of which f nats come for free.

    Args:
        beta: β, a number or a :class:`KLSchedule`.
        free_bits: f, in nats.
        **kwargs: Those of :class:`~pyro_vae.losses.TermsELBO`.

    Raises:
        ValueError: For a negative β or f.

    References:
        | beta-VAE: Learning Basic Visual Concepts with a Constrained Variational Framework
        | (Higgins et al., 2017), equation 4
        | https://openreview.net/forum?id=Sy2fzU9gl
        | Improving Variational Inference with Inverse Autoregressive Flow
        | (Kingma et al., 2016), appendix C.8 (free bits)
        | https://arxiv.org/abs/1606.04934

    Example:
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from pyro_vae.models import gauss
        >>> elbo = BetaVAE_ELBO(KLSchedule(n_steps_kl_warmup=100))
        >>> loss = elbo(gauss, AutoNormal(gauss))()
        >>> dict(elbo.state_dict())
        {'beta.count': tensor(1)}
    """

    def __init__(
        self, beta: float | KLSchedule = 1.0, *, free_bits: float = 0.0, **kwargs: Any
    ) -> None:
        if not isinstance(beta, KLSchedule) and not beta >= 0:
            raise ValueError(f"beta must not be negative, found {beta}")
        if not free_bits >= 0:
            raise ValueError(f"free_bits must not be negative, found {free_bits}")
        super().__init__(**kwargs)
        self.beta = beta
        self.free_bits = free_bits

    def formula(self, terms: Terms) -> Tensor:
        """Return the negative log likelihood plus β times the KL."""
        beta = self.beta.weight if isinstance(self.beta, KLSchedule) else self.beta
        kl = terms.kl
        if self.free_bits:
            kl = terms.mean(terms.kl_by_dim).clamp(min=self.free_bits).sum()
        return terms.total(beta * kl - terms.log_likelihood)

    def advance(self, terms: Terms) -> None:
        """Count a step of the schedule."""
        if isinstance(self.beta, KLSchedule):
            self.beta.step()
