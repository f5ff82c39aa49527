"""The loop around model, guide, loss, optimisers and, where there is one, the adversary."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import pyro.poutine as poutine
import torch
from pyro.infer import ELBO
from pyro.optim import PyroOptim
from torch import Tensor
from tqdm import tqdm

from .checkpoint import Checkpoint
from .player import Player, ScaleObserved
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

#: Takes the fraction of the steps done, in [0, 1], to a factor.
Schedule = Callable[[float], float]

# β₁ = 0.5 as in the Eight Schools notebook of the AVB paper's authors: the players chase each
# other, and momentum lags.
ADVERSARIAL_BETAS = (0.5, 0.999)

# A compiler takes five to twenty seconds, a minute for a flow: as long as thousands of steps.
COMPILE_FROM = 5000

# Steps from one look at the losses to the next, on a GPU from one synchronisation to the next.
CHUNK = 50
SMOOTH = 50  # losses in the mean that is shown, and that is compared for the best


class FitResult(NamedTuple):
    """What :func:`fit` reports.

    Attributes:
        losses: The loss at each step taken [num_steps], as the loss reports it, in nats.
        adversary_losses: The adversary's loss at the last of its steps in each step [num_steps];
            NaN where there is no adversary.
        seconds: Time spent, without the callback's.
        converged: Whether the loss had stopped falling, by ``stop_window``, before ``num_steps``.
    """

    losses: Tensor
    adversary_losses: Tensor
    seconds: float
    converged: bool = False


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
    optim: Any = None,
    adversary_optim: Any = None,
    num_adversary_steps: int = 2,
    schedule: Schedule | None = None,
    adversary_schedule: Schedule | None = None,
    likelihood_weight: Schedule | None = None,
    clip_norm: float | None = None,
    average: float = 0.0,
    train_model: bool = True,
    stop_window: int | None = None,
    keep_best: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1000,
    compile: bool | None = None,
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
    work. Args and kwargs are the model's and the guide's. Steps are compiled as those of
    :class:`pyro_vae.SVI`.

    Args:
        model: A Pyro model.
        guide: A Pyro guide.
        loss: An :class:`pyro.infer.ELBO` with ``differentiable_loss``.
        *args: Passed to model and guide.
        num_steps: Steps of the guide and model.
        optim: An optimiser of :mod:`pyro.optim`, of torch, or a function from parameters to one.
            Adam at 1e-2 by default, or, beside an adversary, at 1e-3 with β₁ = 0.5.
            :func:`adversarial_recipe` holds what was found to be reliable there.
        adversary_optim: The same for the adversary. Adam at 2e-3 with β₁ = 0.5 by default.
        num_adversary_steps: Steps of the adversary for each step of the guide.
        schedule: Factor of the learning rate over the steps; :func:`cosine` by default.
        adversary_schedule: The same for the adversary; like ``schedule`` by default.
        likelihood_weight: Factor of the log density of observed sites over the steps, to start
            near the prior: with ``linear(0.1, until=0.4)`` a guide finds all modes before it has
            to fit each. 1 throughout by default.
        clip_norm: Bound on the norm of all gradients together, of guide and model.
        average: Decay of an exponential moving average of the parameters, which takes their place
            at the end; 0 keeps the last iterate. After k steps the decay is at most
            (1 + k)/(10 + k), so that the average forgets the start.
        train_model: Whether the model's parameters are fitted too, or only the guide's.
        stop_window: Stop once the mean loss over this many steps is no lower than over as many
            before, by a standard error of the difference. A learning rate that falls to the end
            of ``num_steps`` has not fallen then: see :func:`constant`. The loss of an implicit
            guide is the discriminator's claim, and a GECO loss moves with its multipliers: neither
            falls steadily.
        keep_best: Whether to end with the parameters (averaged ones, with ``average``) of the step
            after which the mean of the last 50 losses was lowest, rather than of the last step.
        checkpoint: A file that holds the state of the training: parameters, averages, optimisers,
            the loss's own state, random number generators. If it is there at the start, training
            goes on from it as if it had not been interrupted.
        checkpoint_every: How often it is written, in steps; it is also at the end.
        compile: Whether to compile the steps; by default for 5000 steps or more, since a compiler
            takes five to twenty seconds, and a minute for a flow.
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
        ValueError: If a number of steps is not positive, ``average`` not in [0, 1), there is
            nothing to fit, the guide's density is learned and the loss has no adversary, or the
            checkpoint is of another training.

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
        ("checkpoint_every", checkpoint_every),
        ("stop_window", stop_window),
    ):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, found {count}")
    if not 0 <= average < 1:
        raise ValueError(f"average must be in [0, 1), found {average}")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive, found {clip_norm}")
    needs_adversary = getattr(loss, "needs_adversary", False)
    if needs_adversary or has_learned_density(guide, *args, **kwargs):
        adversary = getattr(loss, "adversary", None)
        if adversary is None:
            raise ValueError(
                f"the guide's density is learned, and {type(loss).__name__} has no adversary that "
                "would train it; expected a loss that has one, such as AVB_ELBO"
            )
    else:
        adversary = None
    if optim is None:
        adversarial = partial(torch.optim.Adam, lr=1e-3, betas=ADVERSARIAL_BETAS)
        optim = partial(torch.optim.Adam, lr=1e-2) if adversary is None else adversarial
    if adversary_optim is None:
        adversary_optim = partial(torch.optim.Adam, lr=2e-3, betas=ADVERSARIAL_BETAS)
    _check_schedulers(optim=optim, adversary_optim=adversary_optim)

    schedule = schedule or cosine()
    adversary_schedule = adversary_schedule or schedule
    compile = num_steps >= COMPILE_FROM if compile is None else compile
    tempered = ScaleObserved()
    trained = tempered(model) if likelihood_weight else model
    hidden = set() if train_model else _param_names(model, guide, args, kwargs)
    player = Player(
        trained,
        guide,
        loss,
        optim,
        compile=compile,
        average=average,
        clip_norm=clip_norm,
        hidden=hidden,
    )
    player.observed = tempered if likelihood_weight else None
    players = {"optim": player}
    if adversary is not None:
        opponent = players["adversary_optim"] = Player(
            trained, guide, adversary, adversary_optim, compile=compile, name="adversary_optim"
        )
    record = _Record(num_steps)
    best = _Best(player) if keep_best else None
    saved = None if checkpoint is None else Checkpoint(checkpoint, players, loss)
    if saved is not None and saved.exists():
        extra = saved.load(args, kwargs, record)
        if best is not None:
            best.load(extra)
    if callback is not None and record.step == 0:
        callback(0, math.nan)
    bar = tqdm(
        total=num_steps, initial=record.step, desc=description, disable=not progress, leave=False
    )
    try:
        with bar:
            while record.step < num_steps and not record.converged:
                started = time.perf_counter()
                chunk = 1 if adversary is not None else CHUNK
                stops = [callback_every] if callback is not None else []
                stops += [checkpoint_every] if saved is not None else []
                stops += [SMOOTH] if best is not None else []
                stops += [stop_window] if stop_window is not None else []
                chunk = min(chunk, num_steps - record.step, *(n - record.step % n for n in stops))
                done = [(record.step + i) / num_steps for i in range(chunk)]
                weights = None if likelihood_weight is None else list(map(likelihood_weight, done))
                if adversary is not None:
                    factors = [adversary_schedule(done[0])] * num_adversary_steps
                    both = None if weights is None else weights * num_adversary_steps
                    claims = opponent.run(args, kwargs, num_adversary_steps, factors, both)
                    record.adversary_losses[record.step] = claims[-1]
                values = player.run(args, kwargs, chunk, list(map(schedule, done)), weights)
                record.add(values, time.perf_counter() - started)
                if best is not None:
                    best.look(record)
                if stop_window is not None:
                    record.converged = record.has_converged(stop_window)
                last = record.step == num_steps or record.converged
                if bar.update(chunk):
                    bar.set_postfix_str(f"loss {record.smoothed():.3f}")
                if saved is not None and (record.step % checkpoint_every == 0 or last):
                    saved.save(record, {} if best is None else best.state())
                if callback is not None and (record.step % callback_every == 0 or last):
                    with averaged(player):
                        callback(record.step, float(values[-1]))
    finally:
        keep_average(player)
    if best is not None:
        best.restore()
    return record.result()


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


def _check_schedulers(**optimizers: Any) -> None:
    """Raise a ValueError for an optimiser that sets its own learning rates."""
    for name, optim in optimizers.items():
        arguments = getattr(optim, "pt_optim_args", {})
        if isinstance(arguments, dict) and arguments.get("lrd", 1.0) != 1.0:
            raise ValueError(f"{name}: found a decay lrd={arguments['lrd']}, expected schedule=")
        if isinstance(optim, PyroOptim) and hasattr(optim, "pt_scheduler_constructor"):
            raise ValueError(
                f"{name}: found a Pyro optimiser with a scheduler, expected a plain one, or "
                "functools.partial(torch.optim.Adam, lr=…), with schedule="
            )


class _Record:
    """How far a training has come, and what it has reported."""

    def __init__(self, num_steps: int) -> None:
        self.step = 0
        self.seconds = 0.0
        self.converged = False
        self.losses = torch.full((num_steps,), math.nan, dtype=torch.float64, device="cpu")
        self.adversary_losses = self.losses.clone()

    def add(self, losses: Tensor, seconds: float) -> None:
        self.losses[self.step : self.step + len(losses)] = losses
        self.step += len(losses)
        self.seconds += seconds

    def smoothed(self) -> float:
        """Return the mean of the last losses."""
        return float(self.losses[max(0, self.step - SMOOTH) : self.step].mean())

    def has_converged(self, window: int) -> bool:
        """Whether the loss has fallen by less than a standard error from one window to the next."""
        if self.step % window or self.step < 2 * window or window < 2:
            return False
        before, after = self.losses[self.step - 2 * window : self.step].reshape(2, window)
        error = ((before.var() + after.var()) / window).sqrt()
        return bool(before.mean() - after.mean() <= error)

    def result(self) -> FitResult:
        losses, adversary_losses = self.losses[: self.step], self.adversary_losses[: self.step]
        return FitResult(losses, adversary_losses, self.seconds, self.converged)


class _Best:
    """The parameters at which the smoothed loss was lowest."""

    def __init__(self, player: Player) -> None:
        self.player = player
        self.loss = math.inf
        self.values: dict[Tensor, Tensor] = {}

    def look(self, record: _Record) -> None:
        if record.step % SMOOTH == 0 and record.smoothed() < self.loss:
            self.loss = record.smoothed()
            self.values = {p: mean.detach().clone() for p, mean in self.player.params.items()}

    def state(self) -> dict[str, Any]:
        return {"loss": self.loss, "values": list(self.values.values())}

    def load(self, state: dict[str, Any]) -> None:
        self.loss = state.get("loss", math.inf)
        params = list(self.player.params)
        values = state.get("values", [])
        self.values = {p: v.to(p.device) for p, v in zip(params, values, strict=False)}

    @torch.no_grad()
    def restore(self) -> None:
        for param, value in self.values.items():
            param.copy_(value)


@contextmanager
def averaged(player: Player) -> Iterator[None]:
    """Put the moving averages in the parameters' place for a while."""
    if not player.average:
        yield
        return
    last = {param: param.detach().clone() for param in player.params}
    keep_average(player)
    try:
        yield
    finally:
        with torch.no_grad():
            for param, value in last.items():
                param.copy_(value)


@torch.no_grad()
def keep_average(player: Player) -> None:
    """Put the moving averages in the parameters' place for good."""
    if player.average:
        for param, mean in player.params.items():
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


def _param_names(model: Callable, guide: Callable, args: tuple, kwargs: dict) -> set[str]:
    """Name the parameters of the model alone."""
    with poutine.block(), torch.no_grad():
        of_guide = poutine.trace(guide).get_trace(*args, **kwargs)
        replayed = poutine.replay(model, trace=of_guide)
        of_model = poutine.trace(replayed).get_trace(*args, **kwargs)
    return set(of_model.param_nodes) - set(of_guide.param_nodes)
