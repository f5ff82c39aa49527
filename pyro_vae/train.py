"""Training at scale: ``loss(model, guide)`` as a LightningModule, and a run from a configuration.

A run resumes exactly, from any step: the order of the data is a function of seed and epoch, all
noise of seed, step and process, learning rates of the step.
"""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.infer import ELBO
from torch import Tensor, nn

from .checkpoint import replacing
from .data import Data, dynamic_binarize, import_torchvision
from .distributed import num_processes
from .fit import ADVERSARIAL_BETAS, COMPILE_FROM, Schedule, has_learned_density
from .losses import DVAE_ELBO, GECO_ELBO, GRAE_ELBO, IWAE_ELBO, KLSchedule
from .pictures import picture_run, save_figure
from .player import Player, describe_nonfinite, unconstrained
from .runs import (
    BEST,
    CONFIG,
    LAST,
    LOG,
    Config,
    Run,
    TrainingConfig,
    build,
    check_data,
    check_resumed,
    check_same,
    check_writable,
    find_device,
    load_data,
    open_run,
    read_checkpoint,
    read_config,
    save_weights,
    settle,
    state_of,
    weights_of,
    write_config,
)
from .terms import NonFiniteError
from .threads import one_thread_if_small

import_torchvision()  # which Lightning imports too
from lightning.fabric.utilities.warnings import PossibleUserWarning  # noqa: E402
from lightning.pytorch import LightningDataModule, LightningModule, Trainer  # noqa: E402
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping  # noqa: E402
from lightning.pytorch.loggers import TensorBoardLogger  # noqa: E402
from lightning.pytorch.plugins.io import TorchCheckpointIO  # noqa: E402
from lightning.pytorch.strategies import DDPStrategy  # noqa: E402
from lightning.pytorch.strategies.launchers.multiprocessing import (  # noqa: E402
    _MultiProcessingLauncher,
)

__all__ = ["Batches", "LightningELBO", "exponential", "train"]

LOG_EVERY = 20  # steps
VALIDATION_BATCH = 500
NUM_PICTURED = 1000  # images whose latents are drawn


def exponential(end: float) -> Schedule:
    """Make a schedule that falls from 1 to ``end`` exponentially.

    Args:
        end: The factor at the last step.

    References:
        | Amortized Inference Regularization (Shu, Bui, Zhao, Kochenderfer, Ermon, 2018)
        | https://arxiv.org/abs/1805.08913

    Example:
        >>> schedule = exponential(0.01)
        >>> schedule(0.0), round(schedule(0.5), 6), round(schedule(1.0), 6)
        (1.0, 0.1, 0.01)
    """
    if not end > 0:
        raise ValueError(f"end must be positive, found {end}")
    return partial(pow, end)  # and not a lambda, which cannot go to other processes


class Batches:
    """Minibatches in an order that is a function of seed and epoch, from any step on.

    Each epoch is a new permutation, cut into batches of one size; the rows that are left over wait
    for the next epoch. Several processes get disjoint parts of each joint batch.

    Args:
        x: The data [N, *event_shape].
        batch_size: Rows of a batch, in each process; at most what N allows.
        seed: Of the order.
        step: Says at which step to go on.

    Example:
        >>> batches = Batches(torch.arange(10.0), 4, seed=0)
        >>> len(batches), [len(batch) for batch in batches]
        (2, [4, 4])
    """

    def __init__(
        self,
        x: Tensor,
        batch_size: int,
        *,
        seed: int = 0,
        step: Callable[[], int] = lambda: 0,
    ) -> None:
        self.x, self.seed, self.step = x, seed, step
        self.batch_size = min(batch_size, max(len(x) // num_processes(), 1))

    def __len__(self) -> int:
        return max(len(self.x) // (self.batch_size * num_processes()), 1)

    def __iter__(self) -> Iterator[Tensor]:
        epoch, start = divmod(self.step(), len(self))
        generator = torch.Generator().manual_seed(_seed_of(self.seed, "order", epoch))
        order = torch.randperm(len(self.x), generator=generator)
        joint = self.batch_size * num_processes()
        for k in range(start, len(self)):
            yield self.x[order[k * joint : (k + 1) * joint][_rank() :: num_processes()]]

    # Lightning asks whether a loader can resume; the position is the step's.
    def state_dict(self) -> dict[str, Any]:
        """Return nothing: where to go on is known from the step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take nothing."""


class _Shares:
    """A split in batches, in its order; each process gets as many rows as the others."""

    def __init__(self, x: Tensor, batch_size: int) -> None:
        whole = len(x) // num_processes() * num_processes()
        self.parts = x[:whole][_rank() :: num_processes()].split(batch_size)

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.parts)


def _rank() -> int:
    return torch.distributed.get_rank() if num_processes() > 1 else 0


def _seed_of(*parts: Any) -> int:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


class LightningELBO(LightningModule):
    r"""``loss(model, guide)`` as a LightningModule, adversary and all, for any ``Trainer``.

    What is minimised is the loss of one data point, the average over the minibatch. The steps of
    guide and model are compiled, as those of :func:`pyro_vae.compile`, where asked for. A guide
    whose density is learned, or a loss with an adversary, brings a second player: its parameters
    have an optimiser of their own and take ``num_adversary_steps`` steps before each of the
    guide's. Optimisation is manual, in Lightning's word: clipping is ``clip_norm`` here, and not
    the ``Trainer``'s.

    The loss's multipliers and schedules, all weights and optimisers are in Lightning's
    checkpoints; noise is a function of seed, step and process, so that a run which is resumed goes
    on as if it had not been interrupted, if its data do: see :class:`Batches`.

    Logs ``loss``, ``adversary_loss`` and ``lr``, and on validation ``val_loss`` and, where the
    guide's density is exact, ``val_iwae``; all in nats a data point.

    Args:
        model: A Pyro model, a module.
        guide: A Pyro guide, a module.
        loss: The loss.
        example: Some rows of data: the loss is evaluated once, to find what does not fit before
            the first step, and to tell the players' parameters apart.
        optim: A function from parameters to a torch optimiser; Adam at 1e-3 by default.
        adversary_optim: The same for the adversary; Adam at 1e-3 with β₁ = 0.5 by default.
        num_adversary_steps: Steps of the adversary for each of the guide's.
        schedule: Factor of the learning rates over the steps; constant by default.
        num_steps: How many steps the schedule spans.
        clip_norm: Bound on the norm of all gradients of guide and model together.
        size: How many data points the loss stands for: that of plates of a fixed size; those of
            the minibatch by default.
        num_particles: Particles of ``val_iwae``.
        prepare: What is done to each batch, such as dynamic binarisation.
        compile: Whether to compile.
        seed: Of all noise.

    Raises:
        ValueError: For a model or guide that is no module or has nothing to train, and counts
            below one. In training, for several processes and ``compile``.
        NonFiniteError: In training, if the loss or a gradient is not finite, with the names of the
            sites to blame. The parameters are those of the last good step.

    Example:
        >>> from pyro_vae.data import load
        >>> from pyro_vae.losses import BetaVAE_ELBO
        >>> from pyro_vae.runs import Config, ModelConfig, build
        >>> x = load("digits").train.x
        >>> model, guide, loss = build(Config(ModelConfig(event_shape=[1, 8, 8])))
        >>> module = LightningELBO(model, guide, loss, x[:2])
        >>> trainer = Trainer(  # doctest: +SKIP
        ...     accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False
        ... )
        >>> trainer.fit(module, Batches(x, 100, step=lambda: module.num_steps_done))
        ... # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        guide: nn.Module,
        loss: ELBO,
        example: Tensor,
        *,
        optim: Callable[..., torch.optim.Optimizer] | None = None,
        adversary_optim: Callable[..., torch.optim.Optimizer] | None = None,
        num_adversary_steps: int = 1,
        schedule: Schedule | None = None,
        num_steps: int | None = None,
        clip_norm: float | None = None,
        size: int | None = None,
        num_particles: int = 10,
        prepare: Callable[[Tensor], Tensor] | None = None,
        compile: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        for name, count in (
            ("num_adversary_steps", num_adversary_steps),
            ("num_particles", num_particles),
            ("num_steps", num_steps),
            ("size", size),
        ):
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, found {count}")
        for name, part in (("model", model), ("guide", guide)):
            if not isinstance(part, nn.Module):
                raise ValueError(
                    f"{name} must be a torch module, so that Lightning finds its parameters: "
                    f"found {type(part).__name__}"
                )
        if schedule is not None and num_steps is None:
            raise ValueError("a schedule needs num_steps, found none")
        adam = partial(torch.optim.Adam, lr=1e-3, fused=True)
        self.model, self.guide, self.loss = model, guide, loss
        self.make_optim = optim or adam
        self.make_adversary_optim = adversary_optim or partial(adam, betas=ADVERSARIAL_BETAS)
        self.num_adversary_steps = num_adversary_steps
        self.schedule = schedule or exponential(1.0)
        self.num_steps = num_steps
        self.clip_norm = clip_norm
        self.size = size
        self.num_particles = num_particles
        self.prepare = prepare
        self.seed = seed
        self.num_steps_done = 0
        self.sums = {"loss": 0.0, "adversary_loss": 0.0, "count": 0.0}  # of this epoch
        with _undone(self):
            # Once with Pyro's validation, if it is on; steps go without, which is quicker.
            loss.loss(model, guide, example)
            self.has_exact_density = not has_learned_density(guide, example)
            adversarial = getattr(loss, "needs_adversary", False) or not self.has_exact_density
            theirs = _shown(loss.adversary, model, guide, example) if adversarial else []
        of_both = {id(p): p for part in (model, guide) for p in part.parameters()}
        known = {id(p) for p in theirs}
        ours = [p for i, p in of_both.items() if i not in known and p.requires_grad]
        if not ours:
            raise ValueError("model and guide have no parameter that can be trained")
        # Not registered as modules, whose parameters they would list once more.
        self._players = (
            _Side("the loss", model, guide, _Average(loss, size), ours, compile),
            *(
                [_Side("the adversary", model, guide, _Adversary(loss), theirs, compile)]
                if theirs
                else []
            ),
        )

    @property
    def has_adversary(self) -> bool:
        """Whether there is a second player."""
        return len(self._players) > 1

    # --- Lightning's hooks -----------------------------------------------------------------------

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return one optimiser, or two with an adversary."""
        makers = (self.make_optim, self.make_adversary_optim)
        optimizers = [make(side.params) for make, side in zip(makers, self._players, strict=False)]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]
        return optimizers

    def training_step(self, x: Tensor, batch_idx: int) -> None:
        """Take the adversary's steps, if there is one, and a step of guide and model."""
        self._seed("step", self.num_steps_done)
        if self.prepare is not None:
            x = self.prepare(x)
        found = self.optimizers()
        optimizers = found if isinstance(found, list) else [found]
        factor = 1.0
        if self.num_steps is not None:
            factor = self.schedule(min(self.num_steps_done / self.num_steps, 1.0))
        claim = 0.0
        with pyro.validation_enabled(False):
            if self.has_adversary:
                for _ in range(self.num_adversary_steps):
                    claim = self._step(self._players[1], optimizers[1], x, factor, None)
            value = self._step(self._players[0], optimizers[0], x, factor, self.clip_norm)
        self.num_steps_done += 1
        self.sums["loss"] += value
        self.sums["adversary_loss"] += claim
        self.sums["count"] += 1
        if self._trainer is not None and self.num_steps_done % LOG_EVERY == 0:
            rate = optimizers[0].param_groups[0]["lr"]
            logged = {"loss": value, "lr": rate}
            if len(self._players) > 1:
                logged["adversary_loss"] = claim
            self.log_dict(logged, prog_bar=True)

    def on_train_epoch_end(self) -> None:
        """Advance schedules that count epochs."""
        for module in self.modules():
            if isinstance(module, KLSchedule):
                module.epoch()

    def validation_step(self, x: Tensor, batch_idx: int) -> None:
        """Log the loss and, with an exact density, the importance-weighted bound."""
        # The same noise each time: what changes is the model.
        self._seed("validation", batch_idx)
        if self.prepare is not None:
            x = self.prepare(x)
        share = len(x) if self.size is None else self.size
        logged = {"val_loss": self.loss.loss(self.model, self.guide, x) / share}
        if self.has_exact_density:
            iwae = IWAE_ELBO(self.num_particles)
            logged["val_iwae"] = -iwae.loss(self.model, self.guide, x) / share
        self.log_dict(logged, batch_size=len(x), sync_dist=num_processes() > 1, on_epoch=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the number of steps and the epoch's sums."""
        checkpoint["num_steps_done"] = self.num_steps_done
        checkpoint["sums"] = dict(self.sums)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them up again."""
        self.num_steps_done = checkpoint["num_steps_done"]
        self.sums = dict(checkpoint["sums"])

    # --- a step ----------------------------------------------------------------------------------

    def _step(
        self,
        side: _Side,
        optimizer: Any,
        x: Tensor,
        factor: float,
        clip_norm: float | None,
    ) -> float:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        optimizer.zero_grad()
        found = side.gradients(x)
        if found is None:
            loss = side.elbo.differentiable_loss(self.model, self.guide, x)
            if loss.requires_grad:
                self.manual_backward(loss)
        else:
            loss, by_param = found
            for param, grad in by_param.items():
                param.grad = grad
        grads = [param.grad for param in side.params if param.grad is not None]
        norm = torch.stack(torch._foreach_norm(grads)).norm() if grads else loss.detach()
        value = loss.item()
        if not (math.isfinite(value) and bool(norm.isfinite())):
            optimizer.zero_grad()
            with torch.no_grad(), poutine.block():
                what = describe_nonfinite(value, self.model, self.guide, (x,), {})
            raise NonFiniteError(f"step {self.num_steps_done} of {side.name}: {what}")
        if clip_norm is not None and norm > clip_norm:
            torch._foreach_mul_(grads, clip_norm / norm)
        optimizer.step()
        return value

    def _seed(self, *what: Any) -> None:
        """Make noise a function of what it is for."""
        seed = _seed_of(self.seed, *what, _rank())
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)


class _Derived(ELBO, nn.Module):
    """What a loss becomes for one player."""

    def __init__(self, elbo: Any, size: int | None = None) -> None:
        nn.Module.__init__(self)
        ELBO.__init__(self)
        self.elbo = elbo
        self.size = size

    def _get_trace(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> Any:
        return self.elbo._get_trace(model, guide, args, kwargs)

    def differentiable_loss(self, model: Callable, guide: Callable, x: Tensor) -> Tensor:
        raise NotImplementedError


class _Average(_Derived):
    """The loss of one data point."""

    def differentiable_loss(self, model: Callable, guide: Callable, x: Tensor) -> Tensor:
        return self.elbo.differentiable_loss(model, guide, x) / (self.size or len(x))


class _Adversary(_Derived):
    """The adversary's loss."""

    def differentiable_loss(self, model: Callable, guide: Callable, x: Tensor) -> Tensor:
        return self.elbo.adversary(model, guide, x)


class _Side:
    """A player's loss, its parameters, and its compiled program."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        guide: nn.Module,
        elbo: _Derived,
        params: list[nn.Parameter],
        compile: bool,
    ) -> None:
        self.name, self.elbo, self.params = name, elbo, params
        no_step = torch.optim.SGD
        self.player = Player(model, guide, elbo, no_step, compile=True) if compile else None

    def gradients(self, x: Tensor) -> tuple[Tensor, dict[Tensor, Tensor]] | None:
        """Return the loss and the gradients of a compiled run, None if there is none."""
        if self.player is None:
            return None
        if num_processes() > 1:
            raise ValueError("compile is for one process, found True and several processes")
        return self.player.gradients((x,), {})


def _shown(loss: Callable, *args: Any) -> list[Any]:
    """Return the parameters that a loss shows."""
    with poutine.trace(param_only=True) as capture:
        loss(*args)
    shown = [unconstrained(node["value"]) for node in capture.trace.nodes.values()]
    return [p for p in dict.fromkeys(shown) if p.requires_grad]


@contextmanager
def _undone(module: nn.Module) -> Iterator[None]:
    """Undo what a run leaves behind: random numbers drawn, buffers moved."""
    buffers = [
        (owner, name, old, old.clone())
        for owner in module.modules()
        for name, old in owner._buffers.items()
        if old is not None
    ]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        yield
    for owner, name, old, value in buffers:
        owner._buffers[name] = old.copy_(value)


# --- callbacks ------------------------------------------------------------------------------------


class _CheckpointIO(TorchCheckpointIO):
    """Checkpoints that are written whole or not at all, and read as tensors and plain values."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        with replacing(Path(path)) as partial_path:
            torch.save(checkpoint, partial_path)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path))


class _Launcher(_MultiProcessingLauncher):
    """Lightning's, of a class that is found here.

    The first thing that a process is given is this. To find it, it imports this module, and with
    it torchvision, as it has to be imported, before Lightning.
    """


class _Spawned(DDPStrategy):
    """Processes of their own, from wherever training is called."""

    def __init__(self) -> None:
        super().__init__(start_method="spawn", find_unused_parameters=True)

    def _configure_launcher(self) -> None:
        self._launcher = _Launcher(self, start_method="spawn")


class _Keep(Checkpoint):
    """Write the last state every so often, the best weights when they are found, and a log."""

    def __init__(self, out: Path, monitor: str, mode: str, seconds: float) -> None:
        self.out, self.monitor, self.mode, self.seconds = out, monitor, mode, seconds
        self.best = math.inf
        self.rows: list[dict[str, float]] = []
        self.judged: dict[str, float] = {}  # by the validation of this epoch
        self.saved = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.rows = state_dict["best"], state_dict["rows"]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        metrics = trainer.callback_metrics
        self.judged = {k: float(metrics[k]) for k in ("val_loss", "val_iwae") if k in metrics}
        score = -math.inf if self.monitor == "val_last" else self.judged[self.monitor]
        score = -score if self.mode == "max" else score
        if score < self.best or self.monitor == "val_last":
            self.best = score
            self.save_best(trainer, pl_module)

    def save_best(self, trainer: Trainer, module: Any) -> None:
        if trainer.is_global_zero:
            weights = weights_of(module.model, module.guide, module.loss)
            save_weights(weights, self.out / BEST)

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        # After the last batch of an epoch come its validation and its end: see below.
        if not trainer.is_last_batch:
            self.save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        sums = pl_module.sums
        row = {"epoch": trainer.current_epoch + 1, "step": pl_module.num_steps_done}
        row["loss"] = sums["loss"] / max(sums["count"], 1)
        if len(pl_module._players) > 1:
            row["adversary_loss"] = sums["adversary_loss"] / max(sums["count"], 1)
        row |= self.judged
        row["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        self.rows.append(row)
        self.judged = {}
        pl_module.sums = dict.fromkeys(sums, 0.0)
        self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.save(trainer, now=True)
        if self.best == math.inf or self.monitor == "val_last":  # or no validation was finite
            self.save_best(trainer, pl_module)

    def save(self, trainer: Trainer, now: bool = False) -> None:
        due = now or time.monotonic() - self.saved >= self.seconds
        if trainer.world_size > 1:  # all at once
            due = trainer.strategy.reduce_boolean_decision(due, all=False)
        if due:
            trainer.save_checkpoint(self.out / LAST)
            if trainer.is_global_zero:
                self.write_log()
            self.saved = time.monotonic()

    def write_log(self) -> None:
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names)
        writer.writeheader()
        writer.writerows(self.rows)
        with replacing(self.out / LOG) as partial_path:
            partial_path.write_text(text.getvalue(), encoding="utf-8")


class _Pictures(Callback):
    """Draw samples, reconstructions and latents every so often."""

    def __init__(self, out: Path, every: int, x: Tensor, y: Tensor | None) -> None:
        self.out, self.every, self.x, self.y = out, every, x, y

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        epoch = trainer.current_epoch + 1
        last = epoch == trainer.max_epochs or trainer.should_stop
        if not trainer.is_global_zero or (epoch % self.every and not last):
            return
        training = pl_module.training
        pl_module.eval()
        with torch.random.fork_rng(devices=[]):
            pl_module._seed("pictures")
            x = self.x.to(pl_module.device, _dtype(pl_module))
            if pl_module.prepare is not None:
                x = pl_module.prepare(x)
            figures = picture_run(pl_module.model, pl_module.guide, x, self.y)
        pl_module.train(training)
        self.out.mkdir(exist_ok=True)
        for name, figure in figures.items():
            save_figure(figure, self.out / f"epoch_{epoch:04d}_{name}.png")
            if isinstance(trainer.logger, TensorBoardLogger):
                trainer.logger.experiment.add_figure(
                    name, figure, pl_module.num_steps_done, close=False
                )


def _dtype(module: nn.Module) -> torch.dtype:
    return next(p.dtype for p in module.parameters() if p.is_floating_point())


class _Loaders(LightningDataModule):
    """The splits as batches, made where they are used: the number of processes is known there."""

    def __init__(self, data: Data, batch_size: int, seed: int) -> None:
        super().__init__()
        self.train_x, self.validation_x = data.train.x, data.validation.x
        self.batch_size, self.seed = batch_size, seed

    def train_dataloader(self) -> Batches:
        trainer: Any = self.trainer
        module = trainer.lightning_module
        return Batches(
            self.train_x, self.batch_size, seed=self.seed, step=lambda: module.num_steps_done
        )

    def val_dataloader(self) -> _Shares:
        return _Shares(self.validation_x, VALIDATION_BATCH)


# --- a run ----------------------------------------------------------------------------------------


def train(
    config: Config | None = None,
    out: str | Path = "out/run",
    *,
    resume: bool = False,
    device: str = "cpu",
    progress: bool = False,
) -> Run:
    """Train any model × guide × loss on data, in a directory that holds all that there is of it.

    ``config.yaml``, from which the run can be repeated; ``last.ckpt``, from which it can be
    resumed; ``best.safetensors``, the weights of the best validation; ``log.csv``, a line for each
    epoch; ``tensorboard/`` and ``pictures/``. Files are replaced whole: an interruption or a full
    disk leaves the last good ones.

    Args:
        config: What to train; all defaults by default, or what is resumed.
        out: The directory.
        resume: Whether to go on with the run that is there, as if it had not been interrupted.
        device: Where to run, such as cpu or cuda.
        progress: Whether to show a progress bar.

    Returns:
        The run, with its best weights.

    Raises:
        ValueError: Before the first step, for data, model, guide and loss that do not fit, a
            directory that holds a run's weights, or nothing to resume; for a run that is resumed
            with anything changed but ``num_epochs``, ``patience``, ``checkpoint_seconds``,
            ``picture_every``, ``devices`` and ``num_nodes``; a device that is not there; a
            checkpoint that is damaged or of another architecture.
        NonFiniteError: If a loss or gradient is not finite, with the names of the sites to blame.
        OSError: If a file cannot be written.

    Example:
        >>> import tempfile
        >>> from pyro_vae.runs import Config, DataConfig, TrainingConfig
        >>> config = Config(
        ...     data=DataConfig(train_size=256),
        ...     training=TrainingConfig(num_epochs=1, validate_every=1, picture_every=0),
        ... )
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     run = train(config, directory)
        ...     sorted(path.name for path in run.path.iterdir())
        ['best.safetensors', 'config.yaml', 'last.ckpt', 'log.csv', 'tensorboard']
    """
    out = Path(out)
    place = find_device(device)
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"device: training runs on 'cpu' or 'cuda', found {device!r}")
    if resume and config is None:
        config = read_config(out / CONFIG)
    config = config or Config()
    settings = config.training
    owner = "LOCAL_RANK" not in os.environ or int(os.environ.get("RANK", "0")) == 0
    if owner:
        _check_free(out, resume)
    data = load_data(config.data)
    config = settle(config, data)
    if resume:
        check_resumed(config, out / CONFIG)
    cuda = [place.index or 0] if place.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), _quiet():
        torch.default_generator.manual_seed(_seed_of(settings.seed, "weights"))
        model, guide, loss = build(config)
        check_data(model, data)
        module = _module(config, model, guide, loss, data)
        _try(module, data.train.x[: settings.batch_size])
        found = None
        if resume and (out / LAST).exists():
            found = out / LAST
            check_same(state_of(read_checkpoint(found), found), module.state_dict(), found)
        check_writable(out)
        if owner:
            write_config(config, out / CONFIG)
        trainer = _trainer(config, module, data, out, place, progress)
        loaders = _Loaders(data, settings.batch_size, settings.seed)
        with one_thread_if_small(_size_of_step(module, settings.batch_size), place):
            trainer.fit(module, datamodule=loaders, ckpt_path=found, weights_only=True)
    return open_run(out)


def _module(config: Config, model: Any, guide: Any, loss: Any, data: Data) -> LightningELBO:
    settings = config.training
    num_joint = settings.devices * settings.num_nodes
    batch_size = min(settings.batch_size, max(len(data.train.x) // num_joint, 1))
    epoch = max(len(data.train.x) // (batch_size * num_joint), 1)
    num_steps = settings.num_epochs * epoch
    compile = settings.compile
    if compile is None:
        compile = num_steps >= COMPILE_FROM and num_joint == 1
    adam = partial(torch.optim.Adam, fused=True)
    final = 0.1 if settings.final_lr is None else settings.final_lr / settings.lr
    module = LightningELBO(
        model,
        guide,
        loss,
        data.train.x[:2],
        optim=partial(adam, lr=settings.lr),
        adversary_optim=partial(adam, lr=settings.adversary_lr, betas=ADVERSARIAL_BETAS),
        num_adversary_steps=settings.num_adversary_steps,
        schedule=exponential(final),
        num_steps=num_steps,
        clip_norm=settings.clip_norm,
        num_particles=settings.num_particles,
        prepare=dynamic_binarize if config.data.binarize == "dynamic" else None,
        compile=compile,
        seed=settings.seed,
    )
    for name in ("adversary_lr", "num_adversary_steps"):
        value = getattr(settings, name)
        if not module.has_adversary and value != getattr(TrainingConfig(), name):
            raise ValueError(
                f"training.{name} is an option of an adversary, which neither the guide nor the "
                f"loss has: found {value}"
            )
    return module


def _size_of_step(module: nn.Module, batch_size: int) -> int:
    """Return how many numbers a layer yields, if it takes 256 for each, as threads pay there."""
    return batch_size * sum(param.numel() for param in module.parameters()) // 256


def _try(module: LightningELBO, x: Tensor) -> None:
    """Evaluate the loss once: what does not fit is said before anything is written."""
    with _undone(module):
        if module.prepare is not None:
            x = module.prepare(x)
        module.loss.loss(module.model, module.guide, x)


def _trainer(
    config: Config,
    module: LightningELBO,
    data: Data,
    out: Path,
    device: torch.device,
    progress: bool,
) -> Trainer:
    settings = config.training
    monitor = settings.monitor or _default_monitor(module)
    if monitor == "iwae" and not module.has_exact_density:
        raise ValueError(
            "training.monitor 'iwae' needs a guide with an exact density, found "
            f"{type(module.guide).__name__}, whose density is learned; expected 'loss'"
        )
    mode = "max" if monitor == "iwae" else "min"
    callbacks: list[Callback] = []
    if settings.patience is not None and monitor == "last":
        raise ValueError(
            "training.patience stops where what is monitored no longer improves: found "
            "training.monitor 'last', GECO's default; expected 'iwae' or 'loss'"
        )
    if settings.patience is not None:
        callbacks.append(EarlyStopping(f"val_{monitor}", patience=settings.patience, mode=mode))
    if settings.picture_every:
        x, y = data.test.x[:NUM_PICTURED], data.test.y
        labels = None if y is None else y[:NUM_PICTURED]
        callbacks.append(_Pictures(out / "pictures", settings.picture_every, x, labels))
    callbacks.append(_Keep(out, f"val_{monitor}", mode, settings.checkpoint_seconds))
    strategy: Any = "auto"
    if settings.devices * settings.num_nodes > 1:
        launched = "LOCAL_RANK" in os.environ or settings.num_nodes > 1
        strategy = "ddp_find_unused_parameters_true" if launched else _Spawned()
    devices: Any = settings.devices
    if device.type == "cuda" and settings.devices == 1:
        devices = [device.index or 0]
    return Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=devices,
        num_nodes=settings.num_nodes,
        strategy=strategy,
        precision=settings.precision,
        logger=TensorBoardLogger(out, name="", version="tensorboard"),
        callbacks=callbacks,
        plugins=[_CheckpointIO()],
        max_epochs=settings.num_epochs,
        check_val_every_n_epoch=min(settings.validate_every, settings.num_epochs),
        num_sanity_val_steps=0,
        log_every_n_steps=LOG_EVERY,
        inference_mode=False,  # GRAE differentiates in validation too
        enable_progress_bar=progress,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def _default_monitor(module: LightningELBO) -> str:
    """Return what says which weights are best: the IWAE where the guide's density is trained.

    GRAE trains the guide's mean alone. Under GECO no figure will do: the observation's scale is not
    trained, so that log p(x|z) means little, and the loss changes with its multiplier.
    """
    loss: Any = module.loss
    while isinstance(loss, DVAE_ELBO):
        loss = loss.elbo
    if isinstance(loss, GECO_ELBO):
        return "last"
    return "iwae" if module.has_exact_density and not isinstance(loss, GRAE_ELBO) else "loss"


def _check_free(out: Path, resume: bool) -> None:
    if resume and not (out / CONFIG).exists():
        raise ValueError(f"resume: {str(out)!r} holds no run to go on with")
    # A run that ended before it had anything to show is not in the way.
    if not resume and any((out / name).exists() for name in (BEST, LAST)):
        raise ValueError(
            f"out: {str(out)!r} holds a run already; expected another directory, or --resume "
            "(resume=True) to go on with it"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Let Lightning say what matters, and not what there is."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=PossibleUserWarning)
            # of torch's trees, which Lightning 2.6 asks in a way that torch 2.13 gives up
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)
