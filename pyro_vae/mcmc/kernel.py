"""One transition of Hamiltonian Monte Carlo for many chains at once.

The integrator knows the density, the metric knows the scales, the kernel composes the two, and none
knows how step size, metric and number of steps were chosen: that is
:mod:`pyro_vae.mcmc.adaptation`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "DIVERGENCE_THRESHOLD",
    "HMCInfo",
    "HMCKernel",
    "HMCState",
    "Leapfrog",
    "Metric",
    "begin",
    "by_chain",
    "end",
    "hmc_step",
    "kinetic_energy",
    "make_leapfrog",
    "normal_like",
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
        step_size: Their step sizes [num_chains, 1].
        proposal: Where the trajectories ended [num_chains, dim].
        momentum: The momenta there [num_chains, dim].
    """

    accept_prob: Tensor
    accepted: Tensor
    diverging: Tensor
    energy: Tensor
    num_steps: int
    step_size: Tensor
    proposal: Tensor
    momentum: Tensor


class Metric(NamedTuple):
    r"""The mass matrix M of the momenta, by its inverse: the (co)variance of the positions.

    Attributes:
        inverse_mass: :math:`M^{-1}`, [dim] where it is diagonal, [dim, dim] where it is dense.
        root: With :math:`M^{-1} = L L^\top`, the matrix :math:`L^{-1}`, [dim] or [dim, dim].
            Noise e as a row vector gives momenta :math:`e L^{-1} \sim N(0, M)`, and positions z
            are white as :math:`z L^{-\top}`.
    """

    inverse_mass: Tensor
    root: Tensor

    @classmethod
    def unit(cls, like: Tensor, dense: bool) -> "Metric":
        """Return the identity; ``like`` is a vector [dim]."""
        one = torch.ones_like(like)
        return cls(torch.diag(one), torch.diag(one)) if dense else cls(one, one)

    @classmethod
    def from_covariance(cls, covariance: Tensor) -> "Metric":
        """Return the metric of positions with these variances [dim] or covariances [dim, dim].

        Raises:
            ValueError: If the covariance is not positive definite.
        """
        if covariance.dim() == 1:
            if not bool((covariance > 0).all()):
                raise ValueError("covariance: found variances that are not positive")
            return cls(covariance, covariance.rsqrt())
        chol, info = torch.linalg.cholesky_ex(covariance.to(torch.float64))
        if int(info) != 0:
            raise ValueError("covariance: found a matrix that is not positive definite")
        identity = torch.eye(len(covariance), dtype=chol.dtype, device=chol.device)
        root = torch.linalg.solve_triangular(chol, identity, upper=False)
        # Compiled programs want the strides that they were made with.
        return cls(covariance, root.to(covariance.dtype).contiguous())

    @property
    def dense(self) -> bool:
        """Whether it is a matrix."""
        return self.inverse_mass.dim() == 2

    def whiten(self, position: Tensor) -> Tensor:
        """Return positions [n, dim] in coordinates where the metric is the identity."""
        return position @ self.root.mT if self.dense else position * self.root

    def whiten_velocity(self, momentum: Tensor) -> Tensor:
        """Return the velocities of those coordinates, of momenta [n, dim]."""
        return self.whiten(_velocity(momentum, self.inverse_mass))


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


def by_chain(matrix: Tensor) -> Tensor:
    """Return a matrix [n, dim] laid out in memory by columns: chain beside chain."""
    return matrix.mT.contiguous().mT


def normal_like(matrix: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return standard normal noise in the layout of a matrix."""
    noise = torch.empty_like(matrix)
    # Filled in the order of the memory, which is far faster.
    (noise if noise.is_contiguous() else noise.mT).normal_(generator=generator)
    return noise


def _velocity(momentum: Tensor, inverse_mass: Tensor) -> Tensor:
    """Return M⁻¹p for the rows p of [n, dim]."""
    return momentum @ inverse_mass if inverse_mass.dim() == 2 else momentum * inverse_mass


def kinetic_energy(momentum: Tensor, inverse_mass: Tensor) -> Tensor:
    """Return ½ pᵀM⁻¹p for momenta [n, dim] and M⁻¹ [dim] or [dim, dim]: [n]."""
    return (momentum * _velocity(momentum, inverse_mass)).sum(-1) / 2


def make_leapfrog(
    potential: Callable[[Tensor], tuple[Tensor, Tensor]], num_steps: int = 1
) -> Leapfrog:
    r"""Return some steps of the leapfrog integrator, for all chains.

    .. math::
        p \leftarrow p - \tfrac{ε}{2} ∇U(z), \quad
        z \leftarrow z + ε M^{-1} p, \quad
        p \leftarrow p - \tfrac{ε}{2} ∇U(z)

    Args:
        potential: The function z → U(z), ∇U(z), as `potential_and_gradient` makes it.
        num_steps: How many steps a call makes.

    Returns:
        The function (position [n, dim], momentum [n, dim], gradient [n, dim], step size [n, 1],
        inverse mass [dim] or [dim, dim]) → (position, momentum, potential [n], gradient).

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
        for _ in range(num_steps):
            momentum = momentum - step_size / 2 * gradient
            position = position + step_size * _velocity(momentum, inverse_mass)
            energy, gradient = potential(position)
            momentum = momentum - step_size / 2 * gradient
        return position, momentum, energy, gradient

    return leapfrog


def begin(
    potential: Tensor, noise: Tensor, inverse_mass: Tensor, root: Tensor
) -> tuple[Tensor, Tensor]:
    """Return momenta [n, dim] made of standard normal noise, and the energies [n] with them."""
    momentum = noise @ root if root.dim() == 2 else noise * root
    return momentum, potential + kinetic_energy(momentum, inverse_mass)


def end(
    position: Tensor,
    potential: Tensor,
    gradient: Tensor,
    new_position: Tensor,
    new_potential: Tensor,
    new_gradient: Tensor,
    momentum: Tensor,
    before: Tensor,
    uniform: Tensor,
    inverse_mass: Tensor,
) -> tuple[Tensor, ...]:
    """Accept or reject; return the new state's three and the first four of `HMCInfo`."""
    after = new_potential + kinetic_energy(momentum, inverse_mass)
    error = after - before
    finite = torch.isfinite(error) & torch.isfinite(new_gradient).all(-1)
    diverging = ~(finite & (error <= DIVERGENCE_THRESHOLD))
    accept_prob = torch.where(diverging, 0.0, torch.exp(-error.clamp(min=0.0)))
    accepted = uniform < accept_prob
    row = accepted.unsqueeze(-1)
    return (
        torch.where(row, new_position, position),
        torch.where(accepted, new_potential, potential),
        torch.where(row, new_gradient, gradient),
        accept_prob,
        accepted,
        diverging,
        torch.where(accepted, after, before),
    )


class HMCKernel(NamedTuple):
    """The programs that make a transition; each may have been compiled.

    Attributes:
        leapfrogs: Integrators, as `make_leapfrog` makes them, by the number of steps that a call
            makes, the largest first; the last makes one.
        begin: Draws the momenta: the function `begin`.
        end: Accepts or rejects: the function `end`.
    """

    leapfrogs: tuple[tuple[int, Leapfrog], ...]
    begin: Callable[..., tuple[Tensor, Tensor]] = begin
    end: Callable[..., tuple[Tensor, ...]] = end

    def integrate(
        self, state: HMCState, momentum: Tensor, step_size: Tensor, metric: Metric, num_steps: int
    ) -> tuple[HMCState, Tensor]:
        """Follow trajectories for a number of steps; return where they end, and the momenta."""
        position, potential, gradient = state
        for length, leapfrog in self.leapfrogs:
            for _ in range(num_steps // length):
                position, momentum, potential, gradient = leapfrog(
                    position, momentum, gradient, step_size, metric.inverse_mass
                )
            num_steps %= length
        return HMCState(position, potential, gradient), momentum


def hmc_step(
    kernel: HMCKernel,
    state: HMCState,
    step_size: Tensor,
    metric: Metric,
    num_steps: int,
    generator: torch.Generator | None = None,
) -> tuple[HMCState, HMCInfo]:
    """Make one Metropolis-corrected transition of every chain, with a fixed number of steps.

    A chain whose energy is not finite stays where it is and touches no other chain.

    Args:
        kernel: The integrator and its companions.
        state: Where the chains are.
        step_size: Step sizes [num_chains, 1].
        metric: The metric.
        num_steps: Number of leapfrog steps, at least 1.
        generator: Source of randomness; by default torch's global one.

    Returns:
        The new state, and what happened.

    References:
        | MCMC using Hamiltonian dynamics (Neal, 2011), section 3.2
        | https://arxiv.org/abs/1206.1901
    """
    noise = normal_like(state.position, generator)
    uniform = torch.empty_like(state.potential).uniform_(generator=generator)
    momentum, before = kernel.begin(state.potential, noise, *metric)
    proposal, momentum = kernel.integrate(state, momentum, step_size, metric, num_steps)
    *new, accept_prob, accepted, diverging, energy = kernel.end(
        *state, *proposal, momentum, before, uniform, metric.inverse_mass
    )
    info = HMCInfo(
        accept_prob,
        accepted,
        diverging,
        energy,
        num_steps,
        step_size,
        proposal.position,
        momentum,
    )
    return HMCState(*new), info
