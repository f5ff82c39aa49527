"""One transition of Hamiltonian Monte Carlo for many chains at once.

The integrator knows the density, the kernel knows the integrator, and neither knows how its step
size, metric and number of steps were chosen: that is :mod:`pyro_vae.mcmc.adaptation`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "DIVERGENCE_THRESHOLD",
    "HMCInfo",
    "HMCState",
    "Leapfrog",
    "hmc_step",
    "kinetic_energy",
    "make_leapfrog",
    "potential_and_gradient",
]

# A transition whose energy error is larger is divergent; the value of Stan, Pyro and NumPyro.
DIVERGENCE_THRESHOLD = 1000.0

# position, momentum, gradient, step size, inverse mass -> position, momentum, potential, gradient
Leapfrog = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]


class HMCState(NamedTuple):
    """Where the chains are.

    Attributes:
        position: Unconstrained vectors [num_chains, dim].
        potential: Their negative log densities [num_chains].
        gradient: The gradients of the potential [num_chains, dim].
    """

    position: Tensor
    potential: Tensor
    gradient: Tensor


class HMCInfo(NamedTuple):
    """What happened in a transition.

    Attributes:
        accept_prob: Acceptance probabilities [num_chains], 0 where divergent.
        accepted: Whether the proposal was taken [num_chains].
        diverging: Whether the energy error was not finite, or too large [num_chains].
        energy: Total energy of the state that the chain is in afterwards [num_chains].
        num_steps: Number of leapfrog steps, the same for all chains.
    """

    accept_prob: Tensor
    accepted: Tensor
    diverging: Tensor
    energy: Tensor
    num_steps: int


def potential_and_gradient(
    log_density: Callable[[Tensor], Tensor],
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return the function [n, dim] → potential [n] and its gradient [n, dim].

    Args:
        log_density: A log density [n, dim] → [n] whose rows are independent.
    """

    def total(position: Tensor) -> tuple[Tensor, Tensor]:
        potential = -log_density(position)
        return potential.sum(), potential

    gradient_of_total = torch.func.grad(total, has_aux=True)

    def both(position: Tensor) -> tuple[Tensor, Tensor]:
        gradient, potential = gradient_of_total(position)
        return potential, gradient

    return both


def make_leapfrog(potential: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Leapfrog:
    r"""Return one step of the leapfrog integrator, for all chains.

    .. math::
        p \leftarrow p - \tfrac{ε}{2} ∇U(z), \quad
        z \leftarrow z + ε M^{-1} p, \quad
        p \leftarrow p - \tfrac{ε}{2} ∇U(z)

    Args:
        potential: The function z → U(z), ∇U(z), as `potential_and_gradient` makes it.

    Returns:
        The function (position [n, dim], momentum [n, dim], gradient [n, dim], step size [],
        inverse mass [dim]) → (position, momentum, potential [n], gradient).

    References:
        | MCMC using Hamiltonian dynamics (Neal, 2011), section 2.3
        | https://arxiv.org/abs/1206.1901
    """

    def leapfrog(
        position: Tensor,
        momentum: Tensor,
        gradient: Tensor,
        step_size: Tensor,
        inverse_mass: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        momentum = momentum - step_size / 2 * gradient
        position = position + step_size * inverse_mass * momentum
        energy, gradient = potential(position)
        momentum = momentum - step_size / 2 * gradient
        return position, momentum, energy, gradient

    return leapfrog


def kinetic_energy(momentum: Tensor, inverse_mass: Tensor) -> Tensor:
    """Return ½ pᵀM⁻¹p for momenta [n, dim] and the diagonal [dim] of M⁻¹: [n]."""
    return (momentum.square() * inverse_mass).sum(-1) / 2


def hmc_step(
    leapfrog: Leapfrog,
    state: HMCState,
    step_size: Tensor,
    inverse_mass: Tensor,
    num_steps: int,
) -> tuple[HMCState, HMCInfo]:
    """Make one Metropolis-corrected transition of every chain, with a fixed number of steps.

    A chain whose energy is not finite stays where it is and touches no other chain.

    Args:
        leapfrog: The integrator, as `make_leapfrog` makes it.
        state: Where the chains are.
        step_size: Step size [].
        inverse_mass: Diagonal [dim] of the inverse mass matrix, the variances of the position.
        num_steps: Number of leapfrog steps.

    Returns:
        The new state, and what happened.

    References:
        | MCMC using Hamiltonian dynamics (Neal, 2011), section 3.2
        | https://arxiv.org/abs/1206.1901
    """
    position, potential, gradient = state
    momentum = torch.randn_like(position) * inverse_mass.rsqrt()
    before = potential + kinetic_energy(momentum, inverse_mass)
    for _ in range(num_steps):
        position, momentum, potential, gradient = leapfrog(
            position, momentum, gradient, step_size, inverse_mass
        )
    after = potential + kinetic_energy(momentum, inverse_mass)
    error = after - before
    finite = torch.isfinite(error) & torch.isfinite(gradient).all(-1)
    diverging = ~(finite & (error <= DIVERGENCE_THRESHOLD))
    accept_prob = torch.where(diverging, 0.0, torch.exp(-error.clamp(min=0.0)))
    accepted = torch.rand_like(accept_prob) < accept_prob
    row = accepted.unsqueeze(-1)
    state = HMCState(
        position=torch.where(row, position, state.position),
        potential=torch.where(accepted, potential, state.potential),
        gradient=torch.where(row, gradient, state.gradient),
    )
    energy = torch.where(accepted, after, before)
    return state, HMCInfo(accept_prob, accepted, diverging, energy, num_steps)
