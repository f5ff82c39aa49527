"""One player: a loss, the parameters that it shows, their optimiser, and its compiled steps.

:class:`pyro_vae.SVI` and :func:`pyro_vae.fit` are faces of this. A step is one program where model,
guide and loss can be captured: loss, gradients, clipping, the optimiser's update, the loss's own
state. Otherwise it is Pyro's.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.infer import ELBO
from pyro.infer.util import torch_item
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from .arguments import Arguments
from .compiled import Program, RandomState, Update, assemble, compile_checked
from .dataflow import changed_inputs
from .optimizers import Optimizers, slots
from .programs import (
    CannotCaptureError,
    LossGraph,
    Snapshot,
    Surroundings,
    difference,
    differentiable,
    run_on_copies,
)
from .terms import NonFiniteError
from .updates import rule_of

__all__ = ["MAX_CAPTURES", "Player", "ScaleObserved", "describe_nonfinite", "unconstrained"]

#: Kinds of arguments (shapes, types, numbers) for which one player compiles a program of its own.
MAX_CAPTURES = 8

# Runs before a capture that look for sites that are not in every one of them.
NUM_PROBES = 3


class ScaleObserved(Messenger):
    """Scale the log density of observed sites, ``pyro.factor`` included, by ``weight``.

    The weight is a tensor, so that a compiled program sees it change.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.ones((), dtype=torch.float64, device="cpu")

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"]:
            msg["scale"] = msg["scale"] * self.weight


class _Listen(Messenger):
    """Note the sites and parameters of whatever runs."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: list[tuple] = []
        self.params: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        shape = value.shape if isinstance(value, Tensor) else None
        self.sites.append((msg["name"], msg["is_observed"], shape, type(msg["fn"])))

    def _pyro_post_param(self, msg: Any) -> None:
        self.params[msg["name"]] = msg["value"]


class Player:
    """A loss with its parameters, their optimiser and its programs.

    Args:
        model: A Pyro model.
        guide: A Pyro guide.
        loss: An ELBO, or a function of model, guide and arguments to a scalar.
        optim: See :class:`Optimizers`.
        loss_and_grads: How a loss takes its gradients, where it does so itself.
        compile: Whether to capture and compile.
        average: Decay of an exponential moving average of the parameters; 0 for none.
        clip_norm: Bound on the norm of all gradients together.
        hidden: Names of parameters that are held fixed.
        max_captures: Kinds of arguments that are compiled.
        name: The optimiser argument's name, for errors.
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        loss: Any,
        optim: Any,
        *,
        loss_and_grads: Callable | None = None,
        compile: bool = False,
        average: float = 0.0,
        clip_norm: float | None = None,
        hidden: set[str] | frozenset[str] = frozenset(),
        max_captures: int = MAX_CAPTURES,
        name: str = "optim",
    ) -> None:
        self.model, self.guide, self.loss = model, guide, loss
        self.loss_and_grads = loss_and_grads
        self.optimizers = Optimizers(optim, name)
        self.compile = compile
        self.average = average
        self.clip_norm = clip_norm
        self.hidden = hidden
        self.max_captures = max_captures
        self.observed: ScaleObserved | None = None
        self.params: dict[Tensor, Tensor] = {}  # parameter → its moving average
        self.rates: dict[int, float] = {}  # by the id of a group, as it was when first met
        self.num_steps = 0
        self.reason: str | None = None  # why nothing is compiled
        self.update_in_program = True
        self.num_setting_changes = 0
        self.programs: dict[Any, Program] = {}
        self.compiled: dict[Any, Callable[..., Sequence[Tensor]]] = {}
        self.arguments = Arguments(model)
        self.surroundings: Surroundings | None = None
        self._handlers: list[Any] = []
        self._count = torch.zeros((), dtype=torch.float64, device="cpu")
        self._healthy = torch.ones((), dtype=torch.bool, device="cpu")
        self._rates: tuple[list[float], Tensor] = ([], torch.zeros(0, device="cpu"))

    # --- what a user of this class calls ---------------------------------------------------------

    def run(
        self,
        args: tuple,
        kwargs: dict,
        num_steps: int = 1,
        factors: Sequence[float] | None = None,
        weights: Sequence[float] | None = None,
    ) -> Tensor:
        """Take steps on the same arguments; return the losses [num_steps], in double precision.

        Args:
            args: Positional arguments of model and guide.
            kwargs: Keyword arguments.
            num_steps: How many steps.
            factors: Of the learning rates, by step.
            weights: Of the observed sites, by step.

        Raises:
            NonFiniteError: If a loss or gradient is not finite. The parameters are those before.
        """
        mode = "step" if self.update_in_program else "gradients"
        program, inputs = self._program(mode, args, kwargs)
        if not self.update_in_program and mode == "step":  # as it turned out
            program, inputs = self._program("gradients", args, kwargs)
        if program is not None and program.entries:
            return self._compiled_steps(program, inputs, args, kwargs, num_steps, factors, weights)
        losses = []
        for step in range(num_steps):
            self._weigh(weights, step)
            if program is None:
                value = torch_item(self._plain_gradients(args, kwargs))
            else:
                value = self._compiled_gradients(program, inputs)
            self._scale_rates(factors, step)
            self._update(value, args, kwargs)
            losses.append(value)
        return torch.tensor(losses, dtype=torch.float64, device="cpu")

    def evaluate(self, args: tuple, kwargs: dict) -> Tensor | None:
        """Return the value of the loss, or None if it is not compiled; nothing changes."""
        program, inputs = self._program("value", args, kwargs)
        return None if program is None else self._call(program, inputs)[0]

    def gradients(self, args: tuple, kwargs: dict) -> tuple[Tensor, dict[Tensor, Tensor]] | None:
        """Return the loss and the gradients by parameter, or None if they are not compiled."""
        program, inputs = self._program("gradients", args, kwargs)
        if program is None:
            return None
        loss, *grads = self._call(program, inputs)
        return loss, dict(zip(program.params, grads, strict=True))

    def meet(self, args: tuple, kwargs: dict) -> None:
        """Meet the parameters, by a run that leaves everything else as it was."""
        random = RandomState()
        snapshot = Snapshot(self._look_around(args, kwargs))
        with _Listen() as heard:
            self._differentiable()(self.model, self.guide, *args, **kwargs)
        snapshot.restore()
        self._meet(heard.params)
        random.restore()

    def base_rate(self, group: dict[str, Any]) -> float:
        """Return a group's learning rate before any schedule."""
        return self.rates.setdefault(id(group), float(group["lr"]))

    def set_base_rate(self, group: dict[str, Any], rate: float) -> None:
        """Set a group's learning rate before any schedule."""
        self.rates[id(group)] = group["lr"] = rate

    def set_num_steps(self, num_steps: int) -> None:
        """Say how many steps have been taken, on which the moving average depends."""
        self.num_steps = num_steps
        self._count.fill_(num_steps)

    # --- plain steps -----------------------------------------------------------------------------

    def _scale_rates(self, factors: Sequence[float] | None, step: int) -> None:
        if factors is not None:
            for group in self.optimizers.groups():
                group["lr"] = self.base_rate(group) * factors[step]

    def _weigh(self, weights: Sequence[float] | None, step: int) -> None:
        if weights is not None and self.observed is not None:
            self.observed.weight.fill_(weights[step])

    def _plain_gradients(self, args: tuple, kwargs: dict) -> Any:
        """Run the loss and leave its gradients in the parameters; return its value."""
        function = None if self.loss_and_grads else self._differentiable()
        with _Listen() as heard:
            if function is None:
                take = self.loss_and_grads or self.loss.loss_and_grads
                loss = take(self.model, self.guide, *args, **kwargs)
            else:
                loss = function(self.model, self.guide, *args, **kwargs)
        self._meet(heard.params)
        if function is None:
            if not self.params:
                raise ValueError("the loss shows no parameter: there is nothing to fit")
            if isinstance(loss, tuple):
                raise ValueError(
                    f"found a loss of {len(loss)} values, expected one; pyro.infer.SVI has several"
                )
            return loss
        if not self.params or not isinstance(loss, Tensor) or not loss.requires_grad:
            raise ValueError("the loss depends on no parameter: there is nothing to fit")
        for param in self.params:
            param.grad = None
        trainable = [param for param in self.params if param.requires_grad]
        if loss.isfinite():  # and no gradients left in a model held fixed
            loss.backward(inputs=trainable)
        return loss

    def _differentiable(self) -> Any:
        """Return the loss as a function to a tensor; None if it only takes its own gradients."""
        if isinstance(self.loss, ELBO):
            return getattr(self.loss, "differentiable_loss", None)
        return self.loss

    def _update(self, value: float, args: tuple, kwargs: dict) -> None:
        """Update the parameters by their gradients, or raise."""
        grads = [param.grad for param in self.params if param.grad is not None]
        # One number that is not finite if any entry is not.
        total = sum(grad.sum() for grad in grads) if math.isfinite(value) else value
        if not math.isfinite(total):
            for param in self.params:
                param.grad = None
            raise self._error(value, args, kwargs)
        if self.clip_norm is not None:
            clip_grad_norm_(list(self.params), self.clip_norm)
        self.optimizers.step(list(self.params))
        for param in self.params:
            param.grad = None
        self.set_num_steps(self.num_steps + 1)
        if self.average:
            decay = min(self.average, (1 + self.num_steps) / (10 + self.num_steps))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.params.values()), list(self.params), 1 - decay)

    def _meet(self, params: dict[str, Tensor]) -> bool:
        """Take in the parameters that a run shows for the first time; say if there are any."""
        found = {
            unconstrained(value): None for name, value in params.items() if name not in self.hidden
        }
        new = [param for param in found if param not in self.params and param.requires_grad]
        new = self.optimizers.choose(new)
        if not new:
            return False
        self.optimizers.meet(new)
        self.params |= {param: param.detach().clone() if self.average else param for param in new}
        device = new[0].device
        self._count, self._healthy = self._count.to(device), self._healthy.to(device)
        if self.observed is not None:
            self.observed.weight = self.observed.weight.to(device)
        return True

    def _error(self, value: float, args: tuple, kwargs: dict) -> Exception:
        random, snapshot = RandomState(), Snapshot(self._look_around(args, kwargs))
        try:
            return NonFiniteError(describe_nonfinite(value, self.model, self.guide, args, kwargs))
        finally:
            snapshot.restore()
            random.restore()

    # --- compiled steps --------------------------------------------------------------------------

    def _program(self, mode: str, args: tuple, kwargs: dict) -> tuple[Program | None, list[Tensor]]:
        """Return the program for these arguments and the tensors among them."""
        if not self.compile or self.reason is not None:
            return None, []
        try:
            kind, inputs = self.arguments.kind(args, kwargs)
        except CannotCaptureError as error:
            self._give_up(str(error))
            return None, []
        key = mode, kind, self._fingerprint()
        program = self.programs.get(key)
        if program is not None:
            own = program.own[:2]
            ours = all(a is b for a, b in zip(own, (self._healthy, self._count), strict=False))
            if ours and program.is_current() and not program.settings_changed():
                return program, inputs
            del self.programs[key]
            if program.settings_changed():
                # A schedule of momentum, say, would compile a new program at each step.
                self.num_setting_changes += 1
                if self.num_setting_changes > MAX_SETTING_CHANGES:
                    self.update_in_program = False
                    return None, inputs
        elif sum(other[0] == mode for other in self.programs) >= self.max_captures:
            self._warn_of_too_many_kinds(kind)
            return None, inputs
        try:
            program, key = self._capture(mode, args, kwargs)
        except CannotCaptureError as error:
            self._give_up(str(error))
            return None, inputs
        except _UpdatesItselfError:
            self.update_in_program = False
            return None, inputs
        self.programs[key] = program
        return program, self.arguments.kind(args, kwargs)[1]

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        warnings.warn(
            f"the steps are not compiled and run as plain Pyro, which is slower; the reason: "
            f"{reason}",
            stacklevel=5,
        )

    def _warn_of_too_many_kinds(self, kind: tuple) -> None:
        if self.arguments.warned:
            return
        self.arguments.warned = True
        changing = self.arguments.changing([key[1] for key in self.programs], kind)
        what = changing or "an attribute of the loss, the model or the guide changes"
        warnings.warn(
            f"{self.max_captures} programs are compiled, one for each kind of arguments, and "
            f"further kinds run as plain Pyro: {what}. Batches of one size or a larger "
            "max_captures would help",
            stacklevel=5,
        )

    def _fingerprint(self) -> tuple:
        """Return what the course of a run may depend on besides tensors and arguments."""
        seen = () if self.surroundings is None else self.surroundings.fingerprint()
        autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
        # Handlers around the call are part of the course; they are kept, so that ids are theirs.
        handlers = tuple(map(id, _PYRO_STACK))
        return torch.get_default_dtype(), autocast, handlers, seen

    def _look_around(self, args: tuple, kwargs: dict) -> Surroundings:
        handlers = list(_PYRO_STACK)
        self._handlers += handlers
        self.surroundings = Surroundings(self.model, self.guide, self.loss, args, kwargs, handlers)
        return self.surroundings

    def _capture(self, mode: str, args: tuple, kwargs: dict) -> tuple[Program, tuple]:
        """Capture, check and compile a program for arguments like these."""
        function = None if self.loss_and_grads else differentiable(self.loss)
        if function is None:
            raise CannotCaptureError(
                f"{type(self.loss).__name__} has no loss as a tensor (differentiable_loss)"
            )
        self._check_static(args, kwargs, grads=mode != "value")
        surroundings = self._look_around(args, kwargs)
        key = mode, self.arguments.kind(args, kwargs)[0], self._fingerprint()
        params = [] if mode == "value" else [p for p in self.params if p.requires_grad]
        if mode != "value" and not params:
            raise ValueError("the loss shows no parameter that can be trained: nothing to fit")
        run_args, run_kwargs = self.arguments.with_tensors(args, kwargs)
        graph = self._captured_like_plain(
            function, args, kwargs, run_args, run_kwargs, params, surroundings
        )
        entries = self.optimizers.entries(graph.reached) if mode == "step" else []
        rules = [rule for entry in entries if (rule := rule_of(entry.optimizer)) is not None]
        if len(rules) < len(entries):
            raise _UpdatesItselfError
        self.optimizers.follow([entry.param for entry in entries])
        if self.average:
            self.params = {param: mean.to(param) for param, mean in self.params.items()}
        update = None
        if entries:
            update = Update(
                entries=entries,
                rules=rules,
                states=[slots(entry, rule) for entry, rule in zip(entries, rules, strict=True)],
                healthy=self._healthy,
                count=self._count,
                means=[self.params[entry.param] for entry in entries] if self.average else [],
                average=self.average,
                clip_norm=self.clip_norm,
                clip=[self.optimizers.clip(entry.param) for entry in entries],
            )
        inputs = self.arguments.kind(args, kwargs)[1]
        run, example = assemble(graph, update, inputs, changes_state=mode == "value")
        call = compile_checked(run, example, self.compiled)
        return Program(call, graph, update, surroundings.store), key

    def _check_static(self, args: tuple, kwargs: dict, grads: bool) -> None:
        """Meet all parameters, and compare the sites of a few runs; leave everything as it was."""
        random = RandomState()
        runs: list[list[tuple]] = []
        for probe in range(1 + NUM_PROBES):
            surroundings = self._look_around(args, kwargs)
            snapshot = Snapshot(surroundings)
            before = self._fingerprint()
            with _Listen() as heard, torch.set_grad_enabled(probe == 0 and grads):
                self._differentiable()(self.model, self.guide, *args, **kwargs)
            snapshot.restore()
            runs.append(heard.sites)
            if probe == 0:
                self._meet(heard.params)
                # Parameters made by this run shall not share its random numbers with the first
                # step.
                if any(id(param) not in surroundings.homes for param in self.params):
                    random = RandomState()
            elif self._fingerprint() != before:
                raise CannotCaptureError(
                    "an attribute of the loss, the model or the guide changes from run to run"
                )
        random.restore()
        for other in runs[1:]:
            if other != runs[0]:
                name = next(iter(set(runs[0]) ^ set(other)), runs[0][0])[0]
                raise CannotCaptureError(
                    f"site {name!r} is not the same, or not there, in every run"
                )

    def _captured_like_plain(
        self,
        function: Callable,
        args: tuple,
        kwargs: dict,
        run_args: tuple,
        run_kwargs: dict,
        params: list[Tensor],
        surroundings: Surroundings,
    ) -> LossGraph:
        """Capture the loss, and compare its graph with a plain run on the same random numbers."""
        random = RandomState()
        snapshot = Snapshot(surroundings)
        if params:
            mine = {param: param.grad for param in self.params}
            try:
                value = _in_double(self._plain_gradients(args, kwargs))
                expected = {param: param.grad for param in params}
            finally:
                for param, grad in mine.items():
                    param.grad = grad
            if not value.isfinite():
                snapshot.restore()
                raise self._error(float(value), args, kwargs)
        else:
            loss = self.loss.loss if isinstance(self.loss, ELBO) else self.loss
            with torch.no_grad():
                value = _in_double(loss(self.model, self.guide, *args, **kwargs))
            expected = {}
        changes = snapshot.changes()
        snapshot.restore()
        random.restore()
        try:
            graph = LossGraph(
                function, self.model, self.guide, run_args, run_kwargs, params, surroundings
            )
        finally:
            random.restore()
        inputs = self.arguments.kind(args, kwargs)[1]
        (loss, *outputs), after = run_on_copies(
            graph.graph, [*graph.held, *inputs], changed_inputs(graph.graph)
        )
        random.restore()
        if difference([loss], [value.to(loss)]) is not None:
            raise CannotCaptureError(
                f"the captured loss is not that of a plain run: {float(loss)} and {float(value)}"
            )
        missing = [p for p in params if expected[p] is not None and p not in set(graph.reached)]
        grads = outputs[: len(graph.reached)]
        zeros = [torch.zeros_like(p) if (g := expected[p]) is None else g for p in graph.reached]
        if missing or difference(grads, zeros) is not None:
            raise CannotCaptureError("the captured gradients are not those of a plain run")
        found = dict(zip(map(id, graph.held), after, strict=False))
        found |= dict(zip(map(id, graph.rebound), outputs[len(grads) :], strict=True))
        for old, expected_value in changes.items():
            home = surroundings.homes[old]
            seen = old in found
            if seen and difference([found[old]], [expected_value]) is None:
                continue
            if seen or any(home.owner is module._buffers for module in surroundings.modules):
                raise CannotCaptureError(f"{home.name} does not change as in a plain run")
        return graph

    def _call(self, program: Program, inputs: list[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad():
            return program.call(*program.held, *program.own, *inputs)

    def _compiled_gradients(self, program: Program, inputs: list[Tensor]) -> float:
        """Leave compiled gradients in the parameters; return the loss."""
        loss, *grads = self._call(program, inputs)
        for param in self.params:
            param.grad = None
        for param, grad in zip(program.params, grads, strict=True):
            param.grad = grad
        return loss.item()

    def _compiled_steps(
        self,
        program: Program,
        inputs: list[Tensor],
        args: tuple,
        kwargs: dict,
        num_steps: int,
        factors: Sequence[float] | None,
        weights: Sequence[float] | None,
    ) -> Tensor:
        tensors = [*program.held, *program.own, self._count, *inputs]
        place = len(program.held) + len(program.own)
        losses = []
        with torch.no_grad():
            for step in range(num_steps):
                self._scale_rates(factors, step)
                self._weigh(weights, step)
                tensors[place] = self._row_of_rates(program)
                losses.append(program.call(*tensors)[0])
        values = (losses[0].reshape(1) if num_steps == 1 else torch.stack(losses)).double().cpu()
        if not self._healthy:
            self._healthy.fill_(True)
            undone = num_steps - (int(self._count) - self.num_steps)
            self.num_steps = int(self._count)
            for group, decay in zip(program.groups, program.decays, strict=True):
                if decay != 1.0:
                    group["lr"] /= decay**undone
            bad = values[~values.isfinite()]
            value = float(bad[0]) if len(bad) else float(values[-1])
            raise self._error(value, args, kwargs)
        self.num_steps += num_steps
        return values

    def _row_of_rates(self, program: Program) -> Tensor:
        """Return the learning rates of the groups as a tensor, the last one if none changed."""
        for group, decay in zip(program.groups, program.decays, strict=True):
            if decay != 1.0:
                group["lr"] *= decay
        rates = [float(group["lr"]) for group in program.groups]
        if rates != self._rates[0] or self._rates[1].device != self._count.device:
            row = torch.tensor(rates, dtype=torch.float64, device=self._count.device)
            self._rates = rates, row
        return self._rates[1]


def _in_double(value: Any) -> Tensor:
    """Return a loss, a number or a tensor, as a tensor that loses none of its digits."""
    return torch.tensor(torch_item(value), dtype=torch.float64, device="cpu")


class _UpdatesItselfError(Exception):
    """An optimiser has no rule, and has to take its steps itself."""


#: How often the settings of an optimiser, its rate aside, may change before its updates leave the
#: compiled program.
MAX_SETTING_CHANGES = 2


def unconstrained(value: Tensor) -> Tensor:
    """Return the parameter behind what a ``pyro.param`` statement returns."""
    return value.unconstrained() if hasattr(value, "unconstrained") else value


def describe_nonfinite(
    value: float, model: Callable, guide: Callable, args: tuple, kwargs: dict
) -> str:
    """Name the parameters and sites that are not finite in a fresh run."""
    with poutine.block(), torch.no_grad():
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        replayed = poutine.replay(model, trace=guide_trace)
        traces = {"guide": guide_trace, "model": poutine.trace(replayed).get_trace(*args, **kwargs)}
    culprits = []
    for owner, run in traces.items():
        for name, site in run.nodes.items():
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
