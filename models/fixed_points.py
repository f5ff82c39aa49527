"""Where the reconstructions of a β-VAE settle if neither encoder nor decoder limits them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["FixedPoints", "fixed_points"]


class FixedPoints(NamedTuple):
    r"""What the iteration ended at.

    Attributes:
        points: The reconstruction vectors ψ [A, 2], one a tile, in units of x.
        error: u(β) = E ‖x − g(z)‖², the squared error *summed* over the two dimensions.
        kl: E KL(q(z|x) ‖ p(z)), in nats.
        num_steps: Steps taken.
        trajectory: ψ at the start and after each step [num_steps + 1, A, 2]; None unless asked for.
    """

    points: Tensor
    error: float
    kl: float
    num_steps: int
    trajectory: Tensor | None = None


@torch.no_grad()
def fixed_points(
    x: Tensor,
    beta: float,
    *,
    num_tiles: int = 32,
    smoothing: float = 0.9,
    max_steps: int = 400,
    min_step: float = 1e-3,
    noise: float = 0.1,
    lipschitz: float = 0.0,
    radius: float = math.inf,
    keep_trajectory: bool = False,
    generator: torch.Generator | None = None,
) -> FixedPoints:
    r"""Iterate the fixed-point equations of a β-VAE of unlimited capacity, for points in the plane.

    The latent space :math:`[-\frac12, \frac12]^2` is cut into A equal tiles, of prior mass
    :math:`\pi_a = 1/A`. Encoder and decoder are tables: :math:`q(z|x_i) = p(z)\, m_{ia}` and
    :math:`g(z) = \psi_a` for z in tile a. In turn

    .. math:: m_{ia} = \frac{e^{-H_{ia}/\beta}}{\sum_b \pi_b e^{-H_{ib}/\beta}}, \quad
        H_{ia} = \tfrac12 \|x_i - \psi_a\|^2, \qquad
        \psi_a \leftarrow s\,\psi_a + (1 - s) \frac{\sum_i m_{ia} x_i}{\sum_i m_{ia}}

    from the tiles' centres plus uniform noise. They minimise
    :math:`\mathbb{E} H + \beta\, \mathrm{KL}`. Above
    :math:`\beta_c`, the largest eigenvalue of the covariance of x, all ψ collapse to its mean.

    With ``lipschitz`` ω the objective has the mean squared slope of g besides, over the pairs of
    tiles at most a radius apart,

    .. math:: \tfrac{\omega}{2} \, \mathbb{E}_{a \ne b,\ |z_a - z_b| \le r}
        \frac{\|\psi_a - \psi_b\|^2}{\mathbb{E} \|z - z'\|^2}

    with z and z′ uniform in the tiles a and b: the paper's penalty with one multiplier for all
    pairs. Each right-hand side is then followed by a linear projection,
    :math:`(D + 2 L)^{-1} D`, of D the masses of the tiles under q(z) and L the pairs' Laplacian.

    Args:
        x: Data [N, 2].
        beta: β, in squared units of x.
        num_tiles: Tiles a side, so that A is its square.
        smoothing: s.
        max_steps: When to stop at the latest.
        min_step: When to stop otherwise: the Euclidean length of a step of all ψ together.
        noise: Half the width of the noise at the start.
        lipschitz: ω; each step then solves A linear equations.
        radius: r, in the latent space: small for a local constraint, from √2 on for all pairs.
        keep_trajectory: Whether to return all ψ on the way.
        generator: Where the noise comes from; by default torch's global generator.

    Raises:
        ValueError: For x of another shape or not finite, and numbers out of range.

    References:
        | Taming VAEs (Rezende, Viola, 2018), proposition 4, appendices A and B
        | https://arxiv.org/abs/1810.00597

    Example:
        >>> x = torch.tensor([[-0.3, 0.0], [0.3, 0.0]])
        >>> found = fixed_points(x, beta=1e-3, num_tiles=8, noise=0.0)
        >>> round(found.kl, 3), round(math.log(2), 3)  # a half of the latent space for each
        (0.693, 0.693)
        >>> found = fixed_points(x, beta=0.1, num_tiles=8, noise=0.0)
        >>> round(found.error, 3)  # above 0.09, where the two merge: all of the variance
        0.09
    """
    _check(x, beta, num_tiles, smoothing, max_steps, min_step, noise, lipschitz, radius)
    centres = (torch.arange(num_tiles, dtype=x.dtype, device=x.device) + 0.5) / num_tiles - 0.5
    centres = torch.cartesian_prod(centres, centres)
    prior = 1 / len(centres)
    draws = torch.rand(centres.shape, dtype=x.dtype, device=x.device, generator=generator)
    psi = centres + noise * (2 * draws - 1)
    laplacian = _laplacian(centres, 1 / num_tiles, radius, lipschitz) if lipschitz else None
    trajectory = [psi]
    num_steps = 0
    while num_steps < max_steps:
        log_m = _log_m(x, psi, beta)
        target = log_m.softmax(0).T @ x
        if laplacian is not None:
            mass = prior * log_m.exp().mean(0)
            system = torch.linalg.cholesky(2 * laplacian + torch.diag(mass))
            target = torch.cholesky_solve(mass[:, None] * target, system)
        step = (1 - smoothing) * (target - psi)
        psi = psi + step
        num_steps += 1
        if keep_trajectory:
            trajectory.append(psi)
        if float(torch.linalg.vector_norm(step)) < min_step:
            break
    log_m = _log_m(x, psi, beta)
    weights = prior * log_m.exp() / len(x)
    error = float((weights * torch.cdist(x, psi).square()).sum())
    kl = float((weights * log_m).sum())
    kept = torch.stack(trajectory) if keep_trajectory else None
    return FixedPoints(psi, error, kl, num_steps, kept)


def _log_m(x: Tensor, psi: Tensor, beta: float) -> Tensor:
    """Return log m [N, A]: of mean 1 over the tiles."""
    energy = -torch.cdist(x, psi).square() / (2 * beta)
    return energy.log_softmax(1) + math.log(len(psi))


def _laplacian(centres: Tensor, width: float, radius: float, strength: float) -> Tensor:
    """Return L [A, A], with ΣΣ_ab W_ab ‖ψ_a − ψ_b‖² / 2 = tr ψᵀLψ, of the pairs' weights W."""
    squares = torch.cdist(centres, centres).square()
    near = squares <= (radius * (1 + 1e-6)) ** 2
    near.fill_diagonal_(False)
    slopes = near / (squares + width**2 / 3)  # a uniform z has variance width²/12 a dimension
    weights = strength * slopes / near.sum()
    return torch.diag(weights.sum(1)) - weights


def _check(
    x: Tensor,
    beta: float,
    num_tiles: int,
    smoothing: float,
    max_steps: int,
    min_step: float,
    noise: float,
    lipschitz: float,
    radius: float,
) -> None:
    if x.dim() != 2 or x.shape[1] != 2 or not len(x) or not x.is_floating_point():
        raise ValueError(f"x must be points [N, 2], found {x.dtype} {list(x.shape)}")
    if not bool(x.isfinite().all()):
        raise ValueError("x must be finite")
    if not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"beta must be positive and finite, found {beta}")
    for name, count in (("num_tiles", num_tiles), ("max_steps", max_steps)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, found {count}")
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must be in [0, 1), found {smoothing}")
    for name, value in (("min_step", min_step), ("noise", noise), ("lipschitz", lipschitz)):
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} must not be negative, and finite, found {value}")
    if lipschitz and not radius * num_tiles >= 1:
        raise ValueError(
            f"radius must reach the next tile, at 1/{num_tiles}: found {radius}, a constraint on "
            "no pair of tiles"
        )
