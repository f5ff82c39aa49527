"""Optimisers of Pyro and of torch behind one face."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pyro
import torch
from pyro.optim import PyroOptim
from pyro.optim.optim import _load_state_dict
from torch import Tensor, nn

from .updates import Rule

__all__ = ["Entry", "Optimizers", "slots"]


class Entry(NamedTuple):
    """One parameter in its optimiser."""

    param: Tensor
    optimizer: torch.optim.Optimizer
    group: dict[str, Any]


class Optimizers:
    """A Pyro optimiser, a torch optimiser, or a function that makes one of parameters.

    Args:
        optim: One of the three.
        name: The argument's name, for errors.

    Raises:
        ValueError: For anything else.
    """

    def __init__(self, optim: Any, name: str = "optim") -> None:
        self.pyro = optim if isinstance(optim, PyroOptim) else None
        self.torch = optim if isinstance(optim, torch.optim.Optimizer) else None
        self.make = None
        if self.pyro is None and self.torch is None:
            if not callable(optim) or isinstance(optim, nn.Module):
                raise ValueError(
                    f"{name} must be a pyro.optim optimiser, a torch.optim one, or a function from "
                    f"parameters to the latter, found {type(optim).__name__}"
                )
            self.make = optim
        self.met: dict[Tensor, None] = {}  # as a set, in order

    def choose(self, params: list[Tensor]) -> list[Tensor]:
        """Return those of some parameters that are ours to train."""
        if self.make is None and self.torch is not None:
            mine = {param for group in self.torch.param_groups for param in group["params"]}
            return [param for param in params if param in mine]
        return params

    def meet(self, params: list[Tensor]) -> None:
        """Take in parameters that appear for the first time."""
        new = [param for param in params if param not in self.met]
        if not new:
            return
        self.met |= dict.fromkeys(new)
        if self.pyro is not None:
            self._meet_by_pyro(new)
        elif self.torch is None:
            assert self.make is not None
            self.torch = self.make(new)
        elif self.make is not None:
            self.torch.add_param_group({"params": new})

    def _meet_by_pyro(self, new: list[Tensor]) -> None:
        assert self.pyro is not None
        waiting = self.pyro._state_waiting_to_be_consumed
        for param in new:
            if param in self.pyro.optim_objs:
                continue
            # As a step of Pyro's optimiser does, but without the step.
            optimizer = self.pyro.optim_objs[param] = self.pyro._get_optim(param)
            self.pyro.grad_clip[param] = self.pyro._get_grad_clip(param)
            state = waiting.pop(pyro.get_param_store().param_name(param), None)
            if state is not None:
                _load_state_dict(optimizer, state)

    def entries(self, params: Sequence[Tensor]) -> list[Entry]:
        """Return each parameter with its optimiser and group."""
        if self.pyro is not None:
            found = []
            for param in params:
                optimizer = self.pyro.optim_objs[param]
                optimizer = getattr(optimizer, "optimizer", optimizer)  # of a scheduler
                found.append(Entry(param, optimizer, optimizer.param_groups[0]))
            return found
        assert self.torch is not None
        groups = {p: group for group in self.torch.param_groups for p in group["params"]}
        return [Entry(param, self.torch, groups[param]) for param in params]

    def groups(self) -> list[dict[str, Any]]:
        """Return all parameter groups there are by now."""
        if self.pyro is not None:
            return [entry.group for entry in self.entries(list(self.pyro.optim_objs))]
        return [] if self.torch is None else self.torch.param_groups

    def clip(self, param: Tensor) -> dict[str, float]:
        """Return how Pyro clips a parameter's gradient: ``clip_norm`` and ``clip_value``."""
        return {} if self.pyro is None else dict(self.pyro._get_grad_clip_args(param) or {})

    def step(self, params: list[Tensor]) -> None:
        """Let the optimiser itself take a step, on the gradients of the parameters."""
        if self.pyro is not None:
            self.pyro(params)
        else:
            assert self.torch is not None
            self.torch.step()

    def follow(self, params: list[Tensor]) -> None:
        """Bring the state of parameters that were moved or converted along."""
        for param, optimizer, _ in self.entries(params):
            state = optimizer.state.get(param, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and key != "step":
                    state[key] = value.to(param)


def slots(entry: Entry, rule: Rule) -> dict[str, Tensor]:
    """Return the optimiser's state of a parameter, made and converted to tensors where it is not.

    The tensors are those in the optimiser's own state: what changes them in place changes it.
    """
    state = entry.optimizer.state[entry.param]
    initial = rule.init(entry.param, entry.group)
    for name, value in initial.items():
        found = state.get(name)
        if found is None:
            state[name] = value
        elif not isinstance(found, Tensor):
            state[name] = torch.full_like(value, found)
        elif found.device != value.device:
            state[name] = found.to(value.device)
    return {name: state[name] for name in initial}
