"""Stochastic variational inference whose steps are compiled: Pyro's handlers at no cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.infer import ELBO
from pyro.infer.elbo import ELBOModule
from pyro.optim import PyroOptim
from torch import Tensor

from .player import MAX_CAPTURES, Player

__all__ = ["SVI", "compile"]


class SVI(pyro.infer.SVI):
    r"""Take the place of :class:`pyro.infer.SVI`, with steps that are one compiled program each.

    Pyro's effect handlers are plain Python: of a *static* model and guide, only tensor operations
    are left once they have run. At the first step they are captured, with the loss, its gradients,
    the optimiser's update and what the loss itself remembers, and compiled. What is captured is
    held against a plain run, on the same random numbers, before it is trusted: the loss, every
    gradient, every buffer; and what is compiled against what was captured.

    Arguments are inputs of the program: new data of the same shape costs nothing, another shape a
    new program. Parameters, buffers and tensors in modules, in Pyro's parameter store and in the
    globals of a function are looked up at each step, so that loading, moving, freezing and clearing
    them, or another learning rate, mean what they mean in Pyro. The optimiser's state is where it
    would be.

    A program that cannot be captured (its course depends on values, its sites change from run to
    run, a gradient has a score-function term) runs as plain Pyro, with one warning that says why.
    Without a C++ compiler the graph runs operation by operation, with a warning.

    Random numbers are torch's, in the same order as in a plain run. A step whose loss or gradient
    is not finite raises, where Pyro goes on with what is left, and changes nothing.

    What nothing above names (a tensor that only an object of another library holds, a number in a
    list) is as it was when the program was captured.

    Args:
        model: A Pyro model.
        guide: A Pyro guide.
        optim: One of :mod:`pyro.optim`, a torch optimiser, or a function from parameters to one.
            Adam, AdamW, SGD, RMSprop and Pyro's ClippedAdam are part of the compiled program, any
            other updates the parameters after it.
        loss: An :class:`pyro.infer.ELBO`, Pyro's or this library's, or a function of model, guide
            and arguments to a scalar, such as a loss's ``adversary``.
        loss_and_grads: As in Pyro; what takes its own gradients is not compiled.
        compile: Whether to compile; without, this is Pyro's ``SVI`` with torch's optimisers and an
            error for what is not finite.
        steps_per_call: Steps that :meth:`step` takes, all on the same arguments (plates subsample
            anew in each). They share the costs of a call.
        max_captures: For how many kinds of arguments to compile a program. Further ones run as
            plain Pyro, with one warning that names the argument whose shape changes.

    Attributes:
        losses: The losses of the last call's steps [steps_per_call], in nats.

    Raises:
        ValueError: For an optimiser that is none, and counts below one.
        NonFiniteError: By ``step``, if a loss or gradient is not finite, with the names of the
            sites to blame.

    Example:
        >>> from pyro.infer import Trace_ELBO
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from pyro_vae.models import gauss
        >>> optim = pyro.optim.Adam({"lr": 0.01})
        >>> svi = SVI(gauss, AutoNormal(gauss), optim, Trace_ELBO(), compile=False)
        >>> losses = [svi.step() for _ in range(3)]
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        optim: Any,
        loss: Any,
        loss_and_grads: Callable | None = None,
        *,
        compile: bool = True,
        steps_per_call: int = 1,
        max_captures: int = MAX_CAPTURES,
    ) -> None:
        for name, count in (("steps_per_call", steps_per_call), ("max_captures", max_captures)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, found {count}")
        self._player = Player(
            model,
            guide,
            loss,
            optim,
            loss_and_grads=loss_and_grads,
            compile=compile,
            max_captures=max_captures,
        )
        stand_in = optim if isinstance(optim, PyroOptim) else pyro.optim.Adam({})
        super().__init__(model, guide, stand_in, loss, loss_and_grads)
        self.optim = optim
        self.steps_per_call = steps_per_call
        self.losses = torch.zeros(0, dtype=torch.float64, device="cpu")

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take ``steps_per_call`` steps; return the loss, averaged over them, in nats."""
        self.losses = self._player.run(args, kwargs, self.steps_per_call)
        return self.losses.item() if self.steps_per_call == 1 else self.losses.mean().item()

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """Return the value of the loss, in nats, and change nothing."""
        value = self._player.evaluate(args, kwargs)
        if value is None:
            return super().evaluate_loss(*args, **kwargs)
        return value.item()


class CompiledELBOModule(ELBOModule):
    """What :func:`compile` returns: ``elbo(model, guide)``, captured and compiled."""

    def __init__(self, model: Callable, guide: Callable, elbo: ELBO, max_captures: int) -> None:
        super().__init__(model, guide, elbo)
        no_step = torch.optim.SGD
        self._player = Player(model, guide, elbo, no_step, compile=True, max_captures=max_captures)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss, a scalar, differentiable in the parameters of model and guide."""
        if not torch.is_grad_enabled():
            value = self._player.evaluate(args, kwargs)
            return super().forward(*args, **kwargs) if value is None else value
        found = self._player.gradients(args, kwargs)
        if found is None:
            return super().forward(*args, **kwargs)
        loss, grads = found
        return _WithGradients.apply(loss, list(grads.values()), *grads)


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients came with it."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, grads: list[Tensor], *params: Tensor) -> Tensor:
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(grad_output * grad for grad in ctx.grads)


def compile(elbo_module: ELBOModule, *, max_captures: int = MAX_CAPTURES) -> CompiledELBOModule:
    """Compile ``elbo(model, guide)``, for torch training loops and Lightning.

    The module returned has the parameters and the ``state_dict`` of the one given. Its loss and
    gradients are one compiled program, captured at the first call, checked, and looked after as
    :class:`SVI` does; :meth:`~torch.Tensor.backward` hands the gradients out. The gradient is that
    by the parameters, not by the arguments, and cannot be differentiated again.

    Args:
        elbo_module: What an :class:`pyro.infer.ELBO` returns for a model and a guide.
        max_captures: For how many kinds of arguments to compile.

    Raises:
        ValueError: If it is no such module.

    Example:
        >>> from pyro_vae.losses import BetaVAE_ELBO
        >>> from pyro_vae.guides import AutoFlow
        >>> from pyro_vae.models import gauss
        >>> guide = AutoFlow(gauss)
        >>> guide.setup()
        >>> loss_fn = compile(BetaVAE_ELBO()(gauss, guide))
        >>> optim = torch.optim.Adam(loss_fn.parameters())
    """
    if not isinstance(elbo_module, ELBOModule):
        raise ValueError(
            f"compile takes elbo(model, guide), found {type(elbo_module).__name__}; for steps of "
            "an optimiser see pyro_vae.SVI"
        )
    return CompiledELBOModule(
        elbo_module.model, elbo_module.guide, elbo_module.elbo, max_captures=max_captures
    )
