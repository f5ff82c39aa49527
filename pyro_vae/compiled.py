"""From the graph of a loss to a compiled program: its value, its gradients, or a whole step."""

from __future__ import annotations

import ctypes
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from .dataflow import changed_inputs
from .optimizers import Entry
from .programs import LossGraph, compile_graph, describe, difference, run_on_copies, trace
from .updates import Rule

__all__ = ["Program", "RandomState", "Update", "assemble", "compile_checked"]


class RandomState:
    """torch's random number generators, to be set back."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def restore(self) -> None:
        """Set them back."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state_all(self.cuda)


@dataclass(frozen=True)
class Update:
    """What a step does with its gradients.

    Attributes:
        entries: The parameters that have one, with their optimisers.
        rules: How each is updated.
        states: What its optimiser keeps for each.
        healthy: Whether all steps were finite; after one that was not, nothing changes.
        count: How many steps were taken.
        means: Moving averages of the parameters, or none.
        average: Their decay, after the first steps.
        clip_norm: Bound on the norm of all gradients together.
        clip: Pyro's bounds on each gradient, ``clip_norm`` and ``clip_value``.
    """

    entries: list[Entry]
    rules: list[Rule]
    states: list[dict[str, Tensor]]
    healthy: Tensor
    count: Tensor
    means: list[Tensor]
    average: float
    clip_norm: float | None
    clip: list[Mapping[str, Any]]

    def own(self) -> list[Tensor]:
        """Return all tensors that a step changes beside the parameters."""
        return [
            self.healthy,
            self.count,
            *self.means,
            *(slot for state in self.states for slot in state.values()),
        ]

    def groups(self) -> list[int]:
        """Return the ids of the groups of parameters that share a learning rate."""
        return list({id(entry.group): None for entry in self.entries})

    def changes(
        self, params: list[Tensor], grads: list[Tensor], own: list[Tensor], rates: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each tensor with its new value, given what stands for the tensors in a trace."""
        count = own[1]
        yield count, count + 1
        decay = ((2 + count) / (11 + count)).clamp(max=self.average)
        groups = self.groups()
        means = own[2 : 2 + len(self.means)]
        slots = iter(own[2 + len(self.means) :])
        for i, grad in enumerate(self.clipped(grads)):
            entry = self.entries[i]
            state = {name: next(slots) for name in self.states[i]}
            rate = rates[groups.index(id(entry.group))]
            value, new_state = self.rules[i].update(params[i], grad, state, entry.group, rate)
            yield params[i], value
            for name, new in new_state.items():
                yield state[name], new
            if means:
                yield means[i], means[i].lerp(value, (1 - decay).to(value))

    def clipped(self, grads: list[Tensor]) -> list[Tensor]:
        """Clip gradients as torch's ``clip_grad_norm_`` and ``clip_grad_value_`` do."""
        if self.clip_norm is not None:
            norm = torch.stack([grad.norm() for grad in grads]).norm()
            grads = [g * (self.clip_norm / (norm + 1e-6)).clamp(max=1) for g in grads]
        clipped = []
        for grad, bounds in zip(grads, self.clip, strict=True):
            if (bound := bounds.get("clip_norm")) is not None:
                grad = grad * (bound / (grad.norm() + 1e-6)).clamp(max=1)
            if (bound := bounds.get("clip_value")) is not None:
                grad = grad.clamp(-bound, bound)
            clipped.append(grad)
        return clipped


def assemble(
    graph: LossGraph, update: Update | None, inputs: list[Tensor], changes_state: bool
) -> tuple[Callable[..., list[Tensor]], list[Tensor]]:
    """Return the whole program as a function of tensors, and an example of its inputs.

    Its inputs are the tensors that the loss holds, what the update changes, the learning rates [G]
    of the groups, and the tensors among the arguments.

    Args:
        graph: The loss, with its gradients.
        update: The update, if the program makes one.
        inputs: The tensors among the arguments.
        changes_state: Whether buffers change even where the loss is not finite, as in plain Pyro.
    """
    own, rates = [], []
    if update is not None:
        own = update.own()
        num_groups = len(update.groups())
        rates = [torch.zeros(num_groups, dtype=torch.float64, device=update.count.device)]
    sizes = [len(graph.held), len(own), len(rates), len(inputs)]
    changing = changed_inputs(graph.graph)
    where = {id(x): i for i, x in enumerate(graph.held)}

    def run(*tensors: Tensor) -> list[Tensor]:
        rest = iter(tensors)
        held, owned, row, given = ([next(rest) for _ in range(n)] for n in sizes)
        # A buffer is changed for good after a good step only.
        private = [x.clone() if i in changing else x for i, x in enumerate(held)]
        loss, *outputs = graph.graph(*private, *given)
        grads, rebound = outputs[: len(graph.reached)], outputs[len(graph.reached) :]
        new = {i: private[i] for i in changing if i < len(held)}
        new |= {where[id(x)]: value for x, value in zip(graph.rebound, rebound, strict=True)}
        changes = [(held[i], value) for i, value in new.items()]
        good = loss.isfinite()
        if grads:
            good = good & sum(g.sum() for g in grads).isfinite()
        if update is not None:
            good = good & owned[0]
            params = [held[where[id(entry.param)]] for entry in update.entries]
            changes += update.changes(params, grads, owned, row[0])
        for old, value in changes:
            value = value.to(old.dtype)
            old.copy_(value if changes_state else torch.where(good, value, old))
        if update is None:
            return [loss, *grads]
        owned[0].copy_(good)
        return [loss]

    return run, [*graph.held, *own, *rates, *inputs]


class Program:
    """A compiled run of a loss for one kind of arguments: its value, gradients or a whole step.

    Attributes:
        call: From all input tensors, in the order of :func:`assemble`, to the loss and, where the
            program does not update the parameters itself, the gradients.
        params: The parameters with a gradient.
        entries: The same, with their optimisers; none where nothing is updated.
    """

    def __init__(
        self,
        call: Callable[..., Sequence[Tensor]],
        loss_graph: LossGraph,
        update: Update | None,
        store: Any,
    ) -> None:
        self.call = call
        self.params = loss_graph.reached
        self.entries = entries = [] if update is None else update.entries
        self.own = [] if update is None else update.own()
        states = [] if update is None else update.states
        self.held = list(loss_graph.held)
        # What a user may replace from one step to the next, and where it then is found.
        self.watched = [
            (index, home.owner, home.key)
            for index, home in enumerate(loss_graph.homes)
            if home is not None
        ]
        differentiated = {id(param) for param in loss_graph.params}
        self.differentiated = {i for i, x in enumerate(self.held) if id(x) in differentiated}
        self.described = [
            (x.shape, x.stride(), x.dtype, x.device, x.requires_grad) for x in self.held
        ]
        self.baked = loss_graph.baked
        self.store = store
        self.slots = [
            (entry.optimizer, entry.param, name, slot)
            for entry, state in zip(entries, states, strict=True)
            for name, slot in state.items()
        ]
        self.groups = list({id(e.group): e.group for e in entries}.values())
        self.settings = [dict(group) for group in self.groups]
        self.decays = [group.get("lrd", 1.0) for group in self.groups]  # of Pyro's ClippedAdam

    def is_current(self) -> bool:
        """Whether what was captured is what is there now; take in tensors that were replaced."""
        held = self.held
        for index, owner, key in self.watched:
            found = owner.get(key)
            if found is held[index]:
                continue
            if index in self.differentiated or not isinstance(found, Tensor):
                return False
            held[index] = found
        for x, (shape, stride, dtype, device, flag) in zip(held, self.described, strict=True):
            if x.dtype is not dtype or x.requires_grad is not flag or x.shape != shape:
                return False
            if x.device != device or x.stride() != stride:
                return False
        for home, x, version in self.baked:
            if x._version != version or (home is not None and home.get() is not x):
                return False
        if pyro.get_param_store()._params is not self.store:  # cleared
            return False
        return all(
            optimizer.state.get(param, {}).get(name) is slot
            for optimizer, param, name, slot in self.slots
        )

    def settings_changed(self) -> bool:
        """Whether something of an optimiser but its rate was changed."""
        for group, known in zip(self.groups, self.settings, strict=True):
            if group != known:
                known["lr"] = group["lr"]
                if group != known:
                    return True
        return False


def compile_checked(
    run: Callable[..., list[Tensor]],
    example: list[Tensor],
    known: dict[Any, Callable[..., Sequence[Tensor]]],
) -> Callable[..., Sequence[Tensor]]:
    """Compile a program and hold it against its own graph; take a known one if it is the same.

    Args:
        run: The program as a function of tensors.
        example: Its inputs.
        known: The programs so far, by graph and inputs; the new one is added.
    """
    random = RandomState()
    # No operation runs, and no intermediate result takes memory: the loss was traced before.
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad(), fake:
        traced = trace(run, [fake.from_tensor(x) for x in example])
    random.restore()
    inputs = [*traced.held, *example]
    key = traced.graph.code, *map(describe, inputs)
    if key not in known:
        call, compiled = compile_graph(traced.graph, inputs)
        if compiled:
            # Inductor's program against the graph's operations, one by one.
            both, changing = [], changed_inputs(traced.graph)
            for function in (call, traced.graph):
                outputs, after = run_on_copies(function, inputs, changing)
                both.append([*outputs, *after])
                random.restore()
            if difference(*both) is not None:
                warnings.warn(
                    "the compiled program does not agree with its own graph, which runs "
                    "operation by operation instead",
                    stacklevel=7,
                )
                call = traced.graph
        known[key] = call
    _give_back_memory()
    return partial(known[key], *traced.held) if traced.held else known[key]


def _give_back_memory() -> None:
    """Give what is free back to the system: checks hold copies of the state, compilers much else.

    glibc keeps it, all the more in small pieces; of a VAE with 5 MB of weights it was 40 MB.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
