"""Optimisers as formulas, which a graph can hold.

A torch optimiser keeps numbers in Python (the bias corrections of Adam, a learning rate) that a
graph would take for constants. Here the update of each is written in tensors, on the very state
that the optimiser itself would have: one may take over from the other at any step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor

__all__ = ["RULES", "Rule", "rule_of"]

State = dict[str, Tensor]
Group = Mapping[str, Any]


class Rule(NamedTuple):
    """How an optimiser updates a parameter.

    Attributes:
        init: Takes a parameter and the optimiser's group to the state before the first step.
        update: Takes parameter, gradient, state, group and learning rate, a scalar tensor, to the
            new parameter and the new state. Nothing is changed in place.
    """

    init: Callable[[Tensor, Group], State]
    update: Callable[[Tensor, Tensor, State, Group, Tensor], tuple[Tensor, State]]


def _zeros(param: Tensor) -> Tensor:
    return torch.zeros_like(param, memory_format=torch.preserve_format)


def _count(param: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.float32, device=param.device)


def _signed(grad: Tensor, group: Group) -> Tensor:
    return -grad if group.get("maximize") else grad


def _like(value: Any, param: Tensor) -> Tensor:
    """Bring a number computed in double precision to the parameter's type, once for all entries."""
    return torch.as_tensor(value, device=param.device).to(param.dtype)


def _debiased(step: Tensor, group: Group, lr: Tensor, param: Tensor) -> tuple[Tensor, Tensor]:
    """Return Adam's lr / (1 − β₁ᵗ) and √(1 − β₂ᵗ), in the parameter's type.

    Written so that inductor computes them once: it puts a number that it thinks cheap, a power too,
    into the loop over a parameter's entries, where the powers took longer than all the rest. An
    exponential with two readers, here both numbers, it keeps.
    """
    step = step.double()
    first, second = (
        1 - (step * (math.log(beta) if beta else -math.inf)).exp() for beta in group["betas"]
    )
    numbers = torch.stack((_like(lr / first, param), _like(second.sqrt(), param)))
    return numbers[0], numbers[1]


def _init_adam(param: Tensor, group: Group) -> State:
    state = {"step": _count(param), "exp_avg": _zeros(param), "exp_avg_sq": _zeros(param)}
    if group["amsgrad"]:
        state["max_exp_avg_sq"] = _zeros(param)
    return state


def _adam(
    param: Tensor,
    grad: Tensor,
    state: State,
    group: Group,
    lr: Tensor,
    decoupled: bool = False,
) -> tuple[Tensor, State]:
    grad = _signed(grad, group)
    (beta1, beta2), eps = group["betas"], group["eps"]
    if group["weight_decay"]:
        if decoupled or group.get("decoupled_weight_decay"):
            param = param * _like(1 - lr * group["weight_decay"], param)
        else:
            grad = grad + group["weight_decay"] * param
    new = {
        "step": state["step"] + 1,
        "exp_avg": state["exp_avg"].lerp(grad, 1 - beta1),
        "exp_avg_sq": beta2 * state["exp_avg_sq"] + (1 - beta2) * grad * grad,
    }
    second = new["exp_avg_sq"]
    if group["amsgrad"]:
        second = new["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], second)
    step_size, correction = _debiased(new["step"], group, lr, param)
    return param - step_size * new["exp_avg"] / (second.sqrt() / correction + eps), new


def _init_sgd(param: Tensor, group: Group) -> State:
    # torch's first buffer is the first gradient: what a buffer of zeros becomes in one step, but
    # for dampening.
    return {"momentum_buffer": _zeros(param)} if group["momentum"] else {}


def _sgd(
    param: Tensor, grad: Tensor, state: State, group: Group, lr: Tensor
) -> tuple[Tensor, State]:
    grad = _signed(grad, group)
    if group["weight_decay"]:
        grad = grad + group["weight_decay"] * param
    new = {}
    if group["momentum"]:
        buffer = group["momentum"] * state["momentum_buffer"] + grad
        new["momentum_buffer"] = buffer
        grad = grad + group["momentum"] * buffer if group["nesterov"] else buffer
    return param - _like(lr, param) * grad, new


def _init_rmsprop(param: Tensor, group: Group) -> State:
    state = {"step": _count(param), "square_avg": _zeros(param)}
    if group["momentum"]:
        state["momentum_buffer"] = _zeros(param)
    if group["centered"]:
        state["grad_avg"] = _zeros(param)
    return state


def _rmsprop(
    param: Tensor, grad: Tensor, state: State, group: Group, lr: Tensor
) -> tuple[Tensor, State]:
    grad = _signed(grad, group)
    if group["weight_decay"]:
        grad = grad + group["weight_decay"] * param
    alpha = group["alpha"]
    new = {
        "step": state["step"] + 1,
        "square_avg": alpha * state["square_avg"] + (1 - alpha) * grad * grad,
    }
    second = new["square_avg"]
    if group["centered"]:
        new["grad_avg"] = state["grad_avg"].lerp(grad, 1 - alpha)
        second = second - new["grad_avg"].square()
    direction = grad / (second.sqrt() + group["eps"])
    if group["momentum"]:
        direction = group["momentum"] * state["momentum_buffer"] + direction
        new["momentum_buffer"] = direction
    return param - _like(lr, param) * direction, new


def _init_clipped_adam(param: Tensor, group: Group) -> State:
    # Pyro counts in Python, and reads a tensor as well.
    step = torch.zeros((), dtype=torch.float64, device=param.device)
    return {"step": step, "exp_avg": _zeros(param), "exp_avg_sq": _zeros(param)}


def _clipped_adam(
    param: Tensor, grad: Tensor, state: State, group: Group, lr: Tensor
) -> tuple[Tensor, State]:
    (beta1, beta2), bound = group["betas"], group["clip_norm"]
    grad = grad.clamp(-bound, bound)
    if group["weight_decay"]:
        grad = grad + group["weight_decay"] * param
    exp_avg = beta1 * state["exp_avg"] + (1 - beta1) * grad
    spread = grad - exp_avg if group.get("centered_variance") else grad
    new = {
        "step": state["step"] + 1,
        "exp_avg": exp_avg,
        "exp_avg_sq": beta2 * state["exp_avg_sq"] + (1 - beta2) * spread * spread,
    }
    step_size, correction = _debiased(new["step"], group, lr, param)
    return param - step_size * correction * exp_avg / (new["exp_avg_sq"].sqrt() + group["eps"]), new


#: By the optimiser's exact class: a subclass may do something else.
RULES: dict[type, Rule] = {
    torch.optim.Adam: Rule(_init_adam, _adam),
    torch.optim.AdamW: Rule(_init_adam, partial(_adam, decoupled=True)),
    torch.optim.SGD: Rule(_init_sgd, _sgd),
    torch.optim.RMSprop: Rule(_init_rmsprop, _rmsprop),
    ClippedAdam: Rule(_init_clipped_adam, _clipped_adam),
}


def rule_of(optimizer: torch.optim.Optimizer) -> Rule | None:
    """Return the rule of an optimiser, or None if it has to take its steps itself.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> rule_of(torch.optim.Adam([weight])) is RULES[torch.optim.Adam]
        True
        >>> rule_of(torch.optim.LBFGS([weight])) is None
        True
    """
    hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    differentiable = any(group.get("differentiable") for group in optimizer.param_groups)
    sgd = type(optimizer) is torch.optim.SGD
    # Its first step with momentum is unlike the others, if dampened.
    dampened = sgd and any(g["momentum"] and g["dampening"] for g in optimizer.param_groups)
    if hooks or differentiable or dampened:
        return None
    return RULES.get(type(optimizer))
