"""Drive a loss: the loop around model, guide, optimisers and, where there is one, the adversary."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import pyro.poutine as poutine
import torch
from pyro.infer import ELBO
from pyro.optim import PyroOptim
from pyro.poutine.messenger import Messenger
from torch import Tensor
from tqdm import tqdm

from .ratios import implicit_distributions
from .terms import NonFiniteError

__all__ = [
    "FitResult",
    "NonFiniteError",
    "Schedule",
    "adversarial_recipe",
    "constant",
    "cosine",
    "fit",
    "linear",
]

Optimizer = Callable[[list[Tensor]], torch.optim.Optimizer]

#: Takes the fraction of the steps done, in [0, 1], to a factor.
Schedule = Callable[[float], float]

# β₁ = 0.5 as in the Eight Schools notebook of the AVB paper's authors: the players chase each
# other, and momentum lags.
ADVERSARIAL_BETAS = (0.5, 0.999)


class FitResult(NamedTuple):
    """What :func:`fit` reports.

    Attributes:
        losses: The loss at each step [num_steps], as the loss reports it, in nats.
        adversary_losses: The adversary's loss at the last of its steps in each step [num_steps];
            NaN where there is no adversary.
        seconds: Time spent, without the callback's.
    """

    losses: Tensor
    adversary_losses: Tensor
    seconds: float


def constant() -> Schedule:
    """Make a schedule that stays at 1.

    Example:
        >>> constant()(0.5)
        1.0
    """
    return lambda progress: 1.0


def cosine(end: float = 0.0) -> Schedule:
    """Make a schedule that falls from 1 to ``end`` along half a cosine.

    Args:
        end: The factor at the last step.

    Example:
        >>> schedule = cosine()
        >>> schedule(0.0), schedule(1.0)
        (1.0, 0.0)
    """
    return lambda progress: end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress))


def linear(start: float, until: float) -> Schedule:
    """Make a schedule that rises from ``start`` to 1 on a line, and stays there.

    Args:
        start: The factor at the first step.
        until: Fraction of the steps at which 1 is reached.

    Example:
        >>> schedule = linear(0.1, until=0.4)
        >>> schedule(0.0), round(schedule(0.2), 2), schedule(0.7)
        (0.1, 0.55, 1.0)
    """
    return lambda progress: start + (1 - start) * min(1.0, progress / until)


def fit(
    model: Callable,
    guide: Callable,
    loss: ELBO,
    *args: Any,
    num_steps: int,
    optim: Optimizer | PyroOptim | None = None,
    adversary_optim: Optimizer | PyroOptim | None = None,
    num_adversary_steps: int = 2,
    schedule: Schedule | None = None,
    adversary_schedule: Schedule | None = None,
    likelihood_weight: Schedule | None = None,
    average: float = 0.0,
    train_model: bool = True,
    callback: Callable[[int, float], None] | None = None,
    callback_every: int = 100,
    progress: bool = True,
    description: str = "fit",
    **kwargs: Any,
) -> FitResult:
    """Fit a guide, and a model's parameters, by minimising a loss.

    Any loss with ``differentiable_loss`` will do, Pyro's and this library's. If it has an
    ``adversary`` and the guide has something for it to learn, the adversary takes
    ``num_adversary_steps`` steps with its own optimiser before each step of the guide.

    Parameters are found as :class:`pyro.infer.SVI` finds them, by the ``pyro.param`` and
    ``pyro.module`` statements that run, so that plain functions, PyroModules and AutoGuides all
    work. Args and kwargs are the model's and the guide's.

    Args:
        model: A Pyro model.
        guide: A Pyro guide.
        loss: An :class:`pyro.infer.ELBO` with ``differentiable_loss``.
        *args: Passed to model and guide.
        num_steps: Steps of the guide and model.
        optim: Takes parameters to a torch optimiser, or one of :mod:`pyro.optim`. Adam at 1e-2 by
            default, or, beside an adversary, at 1e-3 with β₁ = 0.5. :func:`adversarial_recipe`
            holds what was found to be reliable there.
        adversary_optim: The same for the adversary. Adam at 2e-3 with β₁ = 0.5 by default.
        num_adversary_steps: Steps of the adversary for each step of the guide.
        schedule: Factor of the learning rate over the steps; :func:`cosine` by default.
        adversary_schedule: The same for the adversary; like ``schedule`` by default.
        likelihood_weight: Factor of the log density of observed sites over the steps, to start
            near the prior: with ``linear(0.1, until=0.4)`` a guide finds all modes before it has
            to fit each. 1 throughout by default.
        average: Decay of an exponential moving average of the parameters, which takes their place
            at the end; 0 keeps the last iterate. After k steps the decay is at most
            (1 + k)/(10 + k), so that the average forgets the start.
        train_model: Whether the model's parameters are fitted too, or only the guide's.
        callback: Called as ``callback(step, loss)`` before the first step, after every
            ``callback_every`` steps and after the last, with averaged parameters in place.
        callback_every: How often, in steps.
        progress: Whether to show a progress bar.
        description: The progress bar's label.
        **kwargs: Passed to model and guide.

    Raises:
        NonFiniteError: If a loss or gradient is not finite, with the names of the sites that are
            to blame. The parameters are left as they were after the last good step, averaged if
            ``average`` is given.
        ValueError: If ``num_steps``, ``num_adversary_steps`` or ``callback_every`` is not
            positive, ``average`` not in [0, 1), there is nothing to fit, or the guide's density
            is learned and the loss has no adversary.

    Example:
        >>> from pyro.infer import Trace_ELBO
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from pyro_vae.models import gauss
        >>> guide = AutoNormal(gauss)
        >>> result = fit(gauss, guide, Trace_ELBO(), num_steps=200, progress=False)
        >>> result.losses.shape
        torch.Size([200])
    """
    for name, count in (
        ("num_steps", num_steps),
        ("num_adversary_steps", num_adversary_steps),
        ("callback_every", callback_every),
    ):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, found {count}")
    if not 0 <= average < 1:
        raise ValueError(f"average must be in [0, 1), found {average}")
    adversary = None
    learned = has_learned_density(guide, *args, **kwargs)
    if learned or getattr(loss, "needs_adversary", False):
        adversary = getattr(loss, "adversary", None)
        if adversary is None:
            raise ValueError(
                f"the guide's density is learned, and {type(loss).__name__} has no adversary that "
                "would train it; expected a loss that has one, such as AVB_ELBO"
            )
    optim = _optimizer(optim, "optim")
    adversary_optim = _optimizer(adversary_optim, "adversary_optim")
    if optim is None:
        adversarial = partial(torch.optim.Adam, lr=1e-3, betas=ADVERSARIAL_BETAS)
        optim = partial(torch.optim.Adam, lr=1e-2) if adversary is None else adversarial
    if adversary_optim is None:
        adversary_optim = partial(torch.optim.Adam, lr=2e-3, betas=ADVERSARIAL_BETAS)

    schedule = schedule or cosine()
    adversary_schedule = adversary_schedule or schedule
    tempered = _ScaleObserved()
    call = (tempered(model) if likelihood_weight else model, guide, args, kwargs)
    hidden = set() if train_model else _param_names(model, guide, args, kwargs)
    player = _Player(loss.differentiable_loss, optim, average, hidden)
    opponent = _Player(adversary, adversary_optim) if adversary else None
    losses = torch.full((num_steps,), math.nan, dtype=torch.float64, device="cpu")
    adversary_losses = losses.clone()
    seconds, value = 0.0, math.nan
    if callback is not None:
        callback(0, value)
    bar = tqdm(total=num_steps, desc=description, disable=not progress, leave=False)
    try:
        with bar:
            for step in range(num_steps):
                started = time.perf_counter()
                done = step / num_steps
                if likelihood_weight is not None:
                    tempered.weight = likelihood_weight(done)
                if opponent is not None:
                    for _ in range(num_adversary_steps):
                        adversary_losses[step] = opponent.step(*call, adversary_schedule(done))
                losses[step] = value = player.step(*call, schedule(done))
                seconds += time.perf_counter() - started
                if bar.update():
                    bar.set_postfix_str(f"loss {losses[max(0, step - 50) : step + 1].mean():.3f}")
                last = step + 1 == num_steps
                if callback is not None and ((step + 1) % callback_every == 0 or last):
                    with player.averaged():
                        callback(step + 1, value)
    finally:
        player.keep_average()
    return FitResult(losses, adversary_losses, seconds)


def adversarial_recipe() -> dict[str, Any]:
    """Return the arguments of :func:`fit` that make an implicit guide reliable.

    Found by a study on the AVB paper's Eight Schools posterior, ``tests/benchmarks/avb_study.py``:
    a likelihood let in slowly keeps both modes, three steps of a discriminator that is quicker
    than the guide keep its density honest, falling learning rates and averaged weights settle it.
    It takes some 6000 steps, with three times as many samples for the adversary as for the guide.

    Example:
        >>> from pyro_vae.guides import AutoImplicit
        >>> from pyro_vae.losses import AVB_ELBO
        >>> from pyro_vae.models import gauss
        >>> recipe = {**adversarial_recipe(), "num_steps": 2, "progress": False}
        >>> result = fit(gauss, AutoImplicit(gauss), AVB_ELBO(8), **recipe)
    """
    adam = partial(torch.optim.Adam, betas=ADVERSARIAL_BETAS, fused=True)
    return {
        "num_steps": 6000,
        "optim": partial(adam, lr=5e-4),
        "adversary_optim": partial(adam, lr=3e-3),
        "num_adversary_steps": 3,
        "adversary_schedule": cosine(end=0.1),
        "likelihood_weight": linear(0.1, until=0.4),
        "average": 0.99,
    }


def _optimizer(optim: Any, name: str) -> Optimizer | None:
    """Take Pyro's way to name an optimiser as well as torch's."""
    if not isinstance(optim, PyroOptim):
        return optim
    if not isinstance(optim.pt_optim_args, dict) or hasattr(optim, "pt_scheduler_constructor"):
        raise ValueError(
            f"{name}: found a Pyro optimiser with a scheduler or arguments by parameter, expected "
            "a plain one, or functools.partial(torch.optim.Adam, lr=…) with schedule="
        )
    return partial(optim.pt_optim_constructor, **optim.pt_optim_args)


class _ScaleObserved(Messenger):
    """Scale the log density of observed sites, ``pyro.factor`` included, by ``weight``."""

    weight = 1.0

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"]:
            msg["scale"] = msg["scale"] * self.weight


class _Player:
    """One of the players: a loss, its parameters as they appear, and their optimiser."""

    def __init__(
        self,
        loss: Callable[..., Tensor],
        optim: Optimizer,
        average: float = 0.0,
        hidden: set[str] | frozenset[str] = frozenset(),
    ) -> None:
        self.loss = loss
        self.make_optimizer = optim
        self.average = average
        self.hidden = hidden
        self.optimizer: torch.optim.Optimizer | None = None
        self.rates: list[float] = []
        self.num_steps = 0
        self.params: dict[Tensor, Tensor] = {}  # parameter → its moving average

    def step(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict, factor: float
    ) -> float:
        """Take one step; change nothing if the loss or a gradient is not finite."""
        with poutine.trace(param_only=True) as capture:
            loss = self.loss(model, guide, *args, **kwargs)
        self._meet(capture.trace)
        if not self.params or not loss.requires_grad:
            raise ValueError("the loss depends on no parameter: there is nothing to fit")
        for param in self.params:
            param.grad = None
        value = loss.item()
        if math.isfinite(value):
            loss.backward(inputs=list(self.params))  # and none left in a model held fixed
        grads = [param.grad for param in self.params if param.grad is not None]
        # One number that is not finite if any entry is not.
        total = sum(grad.sum() for grad in grads) if math.isfinite(value) else value
        if not math.isfinite(total):
            for param in self.params:
                param.grad = None
            raise NonFiniteError(_describe_nonfinite(value, model, guide, args, kwargs))
        assert self.optimizer is not None
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step()
        for param in self.params:
            param.grad = None
        self.num_steps += 1
        if self.average:
            decay = min(self.average, (1 + self.num_steps) / (10 + self.num_steps))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.params.values()), list(self.params), 1 - decay)
        return value

    def _meet(self, trace: poutine.Trace) -> None:
        """Take in the parameters that this run shows for the first time."""
        found = {
            _unconstrained(site["value"]): None
            for name, site in trace.nodes.items()
            if name not in self.hidden
        }
        new = [param for param in found if param not in self.params and param.requires_grad]
        if not new:
            return
        if self.optimizer is None:
            self.optimizer = self.make_optimizer(new)
        else:
            self.optimizer.add_param_group({"params": new})
        self.rates += [g["lr"] for g in self.optimizer.param_groups[len(self.rates) :]]
        self.params |= {param: param.detach().clone() for param in new}

    def _swap(self) -> None:
        with torch.no_grad():
            for param, mean in self.params.items():
                param.data, mean.data = mean.data, param.data

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the moving averages in the parameters' place for a while."""
        if not self.average:
            yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def keep_average(self) -> None:
        """Put the moving averages in the parameters' place for good."""
        if self.average:
            with torch.no_grad():
                for param, mean in self.params.items():
                    param.copy_(mean)


def has_learned_density(guide: Callable, *args: Any, **kwargs: Any) -> bool:
    """Say whether a guide has a site whose ``log_prob`` is learned rather than exact.

    Args:
        guide: A Pyro guide.
        *args: Passed to it.
        **kwargs: Passed to it.

    Example:
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from pyro_vae.models import gauss
        >>> has_learned_density(AutoNormal(gauss))
        False
    """
    with poutine.block(), torch.no_grad():
        trace = poutine.trace(guide).get_trace(*args, **kwargs)
    return any(True for _ in implicit_distributions(trace))


def _unconstrained(value: Tensor) -> Tensor:
    return value.unconstrained() if hasattr(value, "unconstrained") else value


def _param_names(model: Callable, guide: Callable, args: tuple, kwargs: dict) -> set[str]:
    """Name the parameters of the model alone."""
    with poutine.block(), torch.no_grad():
        of_guide = poutine.trace(guide).get_trace(*args, **kwargs)
        replayed = poutine.replay(model, trace=of_guide)
        of_model = poutine.trace(replayed).get_trace(*args, **kwargs)
    return set(of_model.param_nodes) - set(of_guide.param_nodes)


def _describe_nonfinite(
    value: float, model: Callable, guide: Callable, args: tuple, kwargs: dict
) -> str:
    with poutine.block(), torch.no_grad():
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        replayed = poutine.replay(model, trace=guide_trace)
        traces = {"guide": guide_trace, "model": poutine.trace(replayed).get_trace(*args, **kwargs)}
    culprits = []
    for owner, trace in traces.items():
        for name, site in trace.nodes.items():
            if site["type"] == "param" and not site["value"].isfinite().all():
                culprits.append(f"parameter {name!r} of the {owner}")
            if site["type"] != "sample" or name in ("_INPUT", "_RETURN"):
                continue
            if not torch.as_tensor(site["value"]).isfinite().all():
                culprits.append(f"the value of {owner} site {name!r}")
            elif not site["fn"].log_prob(site["value"]).isfinite().all():
                culprits.append(f"log_prob of {owner} site {name!r}")
    what = "the loss" if not math.isfinite(value) else "a gradient"
    found = ", ".join(culprits) or "no site in a fresh run; a smaller learning rate may do"
    return f"{what} is not finite ({value}); found not finite: {found}"
