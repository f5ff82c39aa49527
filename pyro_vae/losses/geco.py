"""GECO (Rezende, Viola, 2018): minimise the KL under constraints on the reconstruction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..constraints import ReconstructionError
from ..distributed import average
from ..terms import Terms
from .base import TermsELBO

__all__ = ["GECO_ELBO"]

Constraint = Callable[[Tensor, Tensor], Tensor]


class GECO_ELBO(TermsELBO):  # noqa: N801 - Pyro's way to name losses
    r"""Minimise the KL subject to constraints E C(x, x̂) ≤ 0, by multipliers that adapt.

    .. math:: \mathrm{KL}(q(z|x) \| p(z)) + \sum_l \lambda_l \, C_l, \quad
        C_l = \hat C_l + \mathrm{sg}[\bar C_l - \hat C_l]

    summed over the data set: x̂ is the mean of the observed site, Ĉ a constraint's average over the
    minibatch, C̄ its moving average, sg holds gradients. After each step

    .. math:: \bar C \leftarrow a \bar C + (1 - a) \hat C, \qquad
        \lambda \leftarrow \lambda \exp(\nu \bar C)

    λ and C̄ are buffers: saved, restored and moved with the loss. Of the constrained observation's
    distribution only mean and mask take part; other observed sites keep their log densities.
    1/λ is the equivalent β in the units of the constraint: for an error per element, of D, and a
    Gaussian of variance s², β = D / (2 s² λ).

    How fast λ settles: for a squared error that falls as 1/λ, log λ comes near its last value
    within some 1/(ν κ²) steps, without swinging if :math:`4 \nu \kappa^2 \le 1 - a`; and from
    where it is e times too large it falls no faster. With the defaults these are 333 steps at
    κ = 0.1, 926 at 0.06: fit for runs of many thousands. For short ones take the violation
    *relative* to κ², where they are 1/ν for every κ:
    ``GECO_ELBO(ReconstructionError(κ, relative=True), decay=0.9, rate=0.02, bounds=(1e-3, 1e3))``.
    λ then is the nats of KL that the last e-fold of the squared error cost, tens or some hundred
    for images, so that bounds can keep it from growing without end while the model still learns.

    Args:
        constraint: A callable of x and x̂, [M, \*shape] each, to values [M], at most 0 where
            satisfied; or a mapping from names to such. See :mod:`pyro_vae.constraints`.
            :class:`~pyro_vae.constraints.ReconstructionError` by default.
        tolerance: κ of the default constraint, a root mean square per element; or what another
            constraint may reach, subtracted from it, if it has no tolerance of its own.
        decay: a. For some 1/(1 − a) steps C̄ remembers the start, and λ grows too far; for short
            runs take less, such as 0.9.
        rate: ν, fit for squared errors per element of 0.01 to 0.1; take less for larger values,
            such as those of relative violations.
        bounds: The range in which λ is kept.
        site: The observed site's name; needed only where there are several.
        **kwargs: Those of :class:`~pyro_vae.losses.TermsELBO`.

    Raises:
        ValueError: For a decay not in [0, 1), a rate or bounds that are not positive, neither
            constraint nor tolerance. On use: for a constraint whose values are not one a data
            point, an observed site without a mean, several without ``site``.

    References:
        | Taming VAEs (Rezende, Viola, 2018), equation 2 and algorithm 1
        | https://arxiv.org/abs/1810.00597

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 0.1).to_event(1), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x, 0.5).to_event(1))
        >>> elbo = GECO_ELBO(tolerance=0.1)
        >>> loss = elbo(model, guide)(torch.randn(64, 2))
        >>> elbo.multipliers > 1  # the error is 0.5, more than is tolerated
        tensor([True])
    """

    multipliers: Tensor
    moving_averages: Tensor
    num_steps: Tensor

    def __init__(
        self,
        constraint: Constraint | Mapping[str, Constraint] | None = None,
        tolerance: float | None = None,
        *,
        decay: float = 0.99,
        rate: float = 0.3,
        bounds: tuple[float, float] = (1e-6, 1e6),
        site: str | None = None,
        **kwargs: Any,
    ) -> None:
        if constraint is None:
            if tolerance is None:
                raise ValueError("expected a constraint or a tolerance, found neither")
            constraint, tolerance = ReconstructionError(tolerance), None
        if not isinstance(constraint, Mapping):
            constraint = {"constraint": constraint}
        if not constraint:
            raise ValueError("expected at least one constraint, found none")
        for name, c in constraint.items():
            if tolerance is not None and hasattr(c, "tolerance"):
                raise ValueError(
                    f"constraint {name!r} has a tolerance of {c.tolerance}, found another: "
                    f"{tolerance}"
                )
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), found {decay}")
        if not rate > 0:
            raise ValueError(f"rate must be positive, found {rate}")
        if not 0 < bounds[0] <= 1 <= bounds[1]:
            raise ValueError(f"bounds must be positive and hold 1, where λ starts, found {bounds}")
        super().__init__(**kwargs)
        self.constraints = dict(constraint)
        # those that are modules are ours too: saved and moved with the loss
        modules = {n: c for n, c in constraint.items() if isinstance(c, nn.Module)}
        self.constraint_modules = nn.ModuleDict(modules)
        self.tolerance = 0.0 if tolerance is None else tolerance
        self.decay, self.rate, self.bounds, self.site = decay, rate, bounds, site
        ones = torch.ones(len(constraint), dtype=torch.float64)
        self.register_buffer("multipliers", ones)
        self.register_buffer("moving_averages", 0 * ones)
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))

    def formula(self, terms: Terms) -> Tensor:
        """Return the Lagrangian at the present multipliers."""
        site = terms.observed_site(self.site)
        loss = terms.kl - terms.log_likelihood_without(site)
        averages = []
        for i, (c, c_hat, share) in enumerate(self._values(terms, site)):
            c_bar = self.moving_averages[i].lerp(c_hat.to(self.moving_averages), 1 - self.decay)
            c_bar = torch.where(self.num_steps == 0, c_hat.to(c_bar), c_bar)  # C̄⁰ = Ĉ⁰
            averages.append(c_bar)
            loss = loss + self.multipliers[i] * (c + share * (c_bar - c_hat))
        self._averages = torch.stack(averages)
        return terms.total(loss)

    def advance(self, terms: Terms) -> None:
        """Move the averages and the multipliers, but for a step that is not finite."""
        good = self._averages.isfinite()
        self.moving_averages = self._averages.where(good, self.moving_averages)
        grown = self.multipliers * (self.rate * self.moving_averages).exp()
        self.multipliers = grown.clamp(*self.bounds).where(good, self.multipliers)
        self.num_steps = self.num_steps + good.all()

    def _values(self, terms: Terms, site: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield of each constraint C [S, N], 0 where masked, Ĉ, and the share not masked."""
        x, x_hat = (value.flatten(0, 1) for value in terms.reconstruction(site))
        unmasked = terms.unmasked(site)
        for name, constraint in self.constraints.items():
            c = constraint(x, x_hat)
            if c.shape != x.shape[:1]:
                raise ValueError(
                    f"constraint {name!r} must give one value a data point: found the shape "
                    f"{list(c.shape)}, expected {[len(x)]}"
                )
            c = (c - self.tolerance).reshape(terms.num_particles, terms.num_points)
            c = c.where(unmasked, c.new_zeros(()))
            # Over the joint batch of all processes, so that their multipliers stay the same.
            share = average(terms.mean(unmasked.to(c))).clamp(min=torch.finfo(c.dtype).tiny)
            yield c, (average(terms.mean(c.detach())) / share), share
