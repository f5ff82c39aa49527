"""What all losses share: they are a formula in the terms of one run of model and guide."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.infer import ELBO
from torch import Tensor, nn

from ..ratios import f_divergence_loss, implicit_distributions, logistic_loss
from ..terms import NonFiniteError, Terms, TracePair, get_trace_pair

__all__ = ["OBJECTIVES", "TermsELBO"]

#: The adversary's losses, by name.
OBJECTIVES = {"logistic": logistic_loss, "f-divergence": f_divergence_loss}


class TermsELBO(ELBO, nn.Module):
    r"""Base of the losses: a subclass writes its formula in the :class:`~pyro_vae.terms.Terms`.

    A loss is an :class:`pyro.infer.ELBO`, for ``SVI`` and as ``elbo(model, guide)``, and a module:
    what it remembers (multipliers, schedules, discriminators) is in its ``state_dict``. That state
    advances with each ``differentiable_loss`` or ``loss_and_grads`` in training mode while
    gradients are on; ``loss`` and ``SVI.evaluate_loss`` leave it alone.

    A guide whose density is learned needs a second player under every loss: see :meth:`adversary`
    and :class:`~pyro_vae.losses.AVB_ELBO`. :func:`pyro_vae.fit` drives both.

    Args:
        num_particles: Samples of z a data point.
        num_adversary_particles: The same for the adversary's steps; by default three times as many.
        objective: The adversary's loss, ``"logistic"`` or ``"f-divergence"``.
        analytic_kl: Whether KL(q(z|x) ‖ p(z)) is in closed form where torch knows one. With False
            it is log q − log p at the samples, as in :class:`pyro.infer.Trace_ELBO`.
        **kwargs: Those of :class:`pyro.infer.ELBO`: ``vectorize_particles``, off unless a loss says
            otherwise and much quicker for many particles; ``max_plate_nesting``, ``retain_graph``.

    Raises:
        ValueError: For counts below one and an unknown objective. On use: if model and guide do
            not fit each other, or a guide site cannot be reparameterised.

    Example:
        A new loss is its formula; this one counts the KL twice:

        >>> class TwiceKL(TermsELBO):
        ...     def formula(self, terms):
        ...         return terms.total(2 * terms.kl - terms.log_likelihood)
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from pyro_vae.models import gauss
        >>> TwiceKL()(gauss, AutoNormal(gauss))().shape
        torch.Size([])
    """

    # of pyro.infer.ELBO
    num_particles: int
    vectorize_particles: bool
    max_plate_nesting: float
    retain_graph: bool | None
    _vectorized_num_particles: Callable[[Callable], Callable]

    def __init__(
        self,
        *,
        num_particles: int = 1,
        num_adversary_particles: int | None = None,
        objective: str = "logistic",
        analytic_kl: bool = True,
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
        nn.Module.__init__(self)
        ELBO.__init__(self, num_particles=num_particles, **kwargs)
        self.num_adversary_particles = num_adversary_particles
        self.objective = objective
        self.analytic_kl = analytic_kl

    def formula(self, terms: Terms) -> Tensor:
        """Return the loss, a scalar, from the terms. Every loss has its own."""
        raise NotImplementedError

    def advance(self, terms: Terms) -> None:
        """Advance the loss's state, after a step's formula. Most losses have none."""

    def terms(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Terms:
        """Run guide and model, ``num_particles`` times or with a plate of particles."""
        pairs = list(self._get_traces(model, guide, args, kwargs))

        def run_model() -> list[poutine.Trace]:
            if self.vectorize_particles:
                run, count = self._vectorized_num_particles(model), 1
            else:
                run, count = model, self.num_particles
            with poutine.block():
                return [poutine.trace(run).get_trace(*args, **kwargs) for _ in range(count)]

        return Terms(pairs, run_model, analytic_kl=self.analytic_kl)

    def differentiable_loss(
        self, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return the loss, differentiable in the parameters of model and guide."""
        return self._evaluate(model, guide, args, kwargs, advance=True)[0]

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Return the value of the loss, and leave its state as it is."""
        return self._evaluate(model, guide, args, kwargs, advance=False)[0].item()

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Return the value of the loss and backpropagate it.

        Raises:
            NonFiniteError: If the value is not finite, with the names of the sites to blame.
                Nothing is backpropagated then.
        """
        loss, terms = self._evaluate(model, guide, args, kwargs, advance=True)
        value = loss.item()
        if not loss.isfinite():
            culprits = ", ".join(terms.nonfinite()) or "no single site"
            raise NonFiniteError(f"the loss is not finite ({value}); found not finite: {culprits}")
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return value

    def adversary(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """Return the adversary's loss, differentiable in the discriminators' weights alone.

        One call draws ``num_adversary_particles`` samples a data point of each guide site whose
        density is learned, and of its contrast. It has the signature of a loss for
        :class:`pyro.infer.SVI`, which then sees the discriminators' parameters and no others.

        Raises:
            ValueError: If there is nothing for it to learn.
        """
        # Hidden, or SVI would hand the guide's parameters to the adversary's optimiser.
        with torch.no_grad(), poutine.block(hide_types=["param"]):
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        objective = OBJECTIVES[self.objective]
        losses = [
            objective(*q.discriminate(self.num_adversary_particles))
            for q in implicit_distributions(guide_trace)
        ]
        if self.needs_adversary:
            with torch.no_grad(), poutine.block(hide_types=["param"]):
                terms = self.terms(model, guide, *args, **kwargs)
            losses.append(self.own_adversary(terms))
        if not losses:
            raise ValueError(
                f"{type(self).__name__}.adversary found no guide site with a learned density: "
                f"found the sites {list(guide_trace.stochastic_nodes)}; a guide with a density "
                "needs no adversary, Implicit and AutoImplicit do"
            )
        return sum(losses[1:], losses[0])

    @property
    def needs_adversary(self) -> bool:
        """Whether the loss itself has an adversary to train, whatever the guide."""
        return False

    def own_adversary(self, terms: Terms) -> Tensor:
        """Return the loss of the loss's own adversary, if it ``needs_adversary``."""
        raise NotImplementedError

    def _evaluate(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict, *, advance: bool
    ) -> tuple[Tensor, Terms]:
        terms = self.terms(model, guide, *args, **kwargs)
        # Observed sites outside the data plates have weight 1 in every objective.
        loss = self.formula(terms) - terms.shared.mean()
        if advance and self.training and torch.is_grad_enabled():
            self.advance(terms)
        return loss, terms

    def _get_trace(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> TracePair:
        return get_trace_pair(model, guide, args, kwargs, self.max_plate_nesting)

    def _get_traces(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict
    ) -> Iterator[TracePair]:
        if self.num_particles == 1:  # no plate, whose dimension would have to be guessed
            yield self._get_trace(model, guide, args, kwargs)
        else:
            yield from super()._get_traces(model, guide, args, kwargs)

    def _guess_max_plate_nesting(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict
    ) -> None:
        # A run that is not a step: training that is resumed would draw other numbers after it.
        with torch.random.fork_rng(_cuda_devices()), poutine.block():
            pair = get_trace_pair(model, guide, args, kwargs, float("inf"))
        sites = [site for trace in pair for site in trace.nodes.values()]
        frames = [frame for site in sites for frame in site.get("cond_indep_stack", ())]
        depths = [-frame.dim for frame in frames if frame.vectorized]
        self.max_plate_nesting = max(depths, default=0) + 1  # and the particles' own


def _cuda_devices() -> list[int]:
    return [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
