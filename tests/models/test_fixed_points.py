"""The fixed points of β-VAEs against sums by hand, limits, and the objective that they minimise."""

import math
from itertools import pairwise

import pytest
import torch

from pyro_vae.models.fixed_points import fixed_points

PAIRS = torch.tensor([[-0.4, 0.0], [-0.2, 0.1], [0.3, -0.1], [0.4, 0.1]], dtype=torch.float64)


def points(num=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num, 2, dtype=torch.float64, generator=generator) - 0.5


def slopes(num_tiles, radius):
    """Return the pairs' weights of the mean squared slope, by loops over tiles."""
    centres = [(i + 0.5) / num_tiles - 0.5 for i in range(num_tiles)]
    tiles = [(a, b) for a in centres for b in centres]
    weights = torch.zeros(len(tiles), len(tiles), dtype=torch.float64)
    for i, a in enumerate(tiles):
        for j, b in enumerate(tiles):
            if i != j and math.dist(a, b) <= radius:
                weights[i, j] = 1 / (math.dist(a, b) ** 2 + 4 / (12 * num_tiles**2))
    return weights / (weights > 0).sum()


def objective(psi, x, beta, strength, weights):
    """E H + β KL at the best q, which is −β log of the partition function, and the penalty."""
    energy = (x[:, None] - psi).square().sum(-1) / 2
    free = -beta * (torch.logsumexp(-energy / beta, 1) - math.log(len(psi))).mean()
    return free + strength / 2 * (weights * (psi[:, None] - psi).square().sum(-1)).sum()


def test_five_steps_by_loops():
    x, beta, num_tiles = PAIRS, 0.05, 2
    psi = [[a, b] for a in (-0.25, 0.25) for b in (-0.25, 0.25)]
    for _ in range(5):
        boltzmann = [[math.exp(-(math.dist(i, a) ** 2) / (2 * beta)) for a in psi] for i in x]
        m = [[e / (sum(row) / 4) for e in row] for row in boltzmann]
        for a in range(4):
            total = sum(row[a] for row in m)
            for k in range(2):
                mean = sum(row[a] * float(i[k]) for row, i in zip(m, x, strict=True)) / total
                psi[a][k] = 0.9 * psi[a][k] + 0.1 * mean
    found = fixed_points(x, beta, num_tiles=num_tiles, noise=0.0, max_steps=5, keep_trajectory=True)
    torch.testing.assert_close(found.points, torch.tensor(psi, dtype=torch.float64))
    assert found.trajectory.shape == (6, 4, 2)
    torch.testing.assert_close(found.trajectory[-1], found.points)


@pytest.mark.parametrize(("strength", "radius"), [(0.0, math.inf), (0.02, 0.3), (0.02, math.inf)])
def test_it_ends_where_the_objective_has_no_slope(strength, radius):
    x, beta, num_tiles = points(), 0.02, 6
    weights = slopes(num_tiles, radius)
    found = fixed_points(
        x, beta, num_tiles=num_tiles, max_steps=4000, min_step=1e-9,
        lipschitz=strength, radius=radius, keep_trajectory=True,
    )  # fmt: skip
    psi = found.points.requires_grad_()
    (gradient,) = torch.autograd.grad(objective(psi, x, beta, strength, weights), psi)
    assert gradient.abs().max() < 2e-6  # 1e-2 at the start
    path = [float(objective(p, x, beta, strength, weights)) for p in found.trajectory[::20]]
    assert all(b <= a + 1e-12 for a, b in pairwise(path))


def test_error_and_kl_make_up_the_objective():
    x, beta = points(), 0.02
    found = fixed_points(x, beta, num_tiles=6)
    value = objective(found.points, x, beta, 0.0, torch.zeros(36, 36, dtype=torch.float64))
    assert found.error / 2 + beta * found.kl == pytest.approx(float(value), abs=1e-12)


def test_small_beta_gives_every_point_its_share_of_the_latent_space():
    """Proposition 2: an equiprobable partition, KL = log N, and no error."""
    corners = torch.tensor([[-0.3, -0.3], [-0.3, 0.3], [0.3, -0.3], [0.3, 0.3]])
    found = fixed_points(corners, 1e-4, num_tiles=8, noise=0.0)
    assert found.kl == pytest.approx(math.log(4), abs=1e-4)
    assert found.error < 1e-4
    assert torch.cdist(corners, found.points).min(1).values.max() < 1e-2


def test_all_merge_at_the_largest_eigenvalue_of_the_covariance():
    x = points(200) * torch.tensor([1.0, 0.3], dtype=torch.float64)
    x = x + torch.tensor([0.1, 0.05], dtype=torch.float64)
    variance = float(x.var(0, correction=0).sum())
    critical = float(torch.linalg.eigvalsh(torch.cov(x.T, correction=0))[-1])
    settings = {"num_tiles": 8, "max_steps": 6000, "min_step": 1e-10}
    above = fixed_points(x, 1.05 * critical, **settings)
    below = fixed_points(x, 0.95 * critical, **settings)
    torch.testing.assert_close(above.points, x.mean(0).expand(64, 2), atol=1e-4, rtol=0)
    assert above.error == pytest.approx(variance, rel=1e-4)
    assert above.kl < 1e-6
    assert below.error < 0.97 * variance
    assert below.kl > 1e-3


def test_turning_the_data_turns_the_points():
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    settings = {"num_tiles": 5, "noise": 0.0, "lipschitz": 0.01, "radius": 0.5}
    found, turned = (fixed_points(x, 0.01, **settings) for x in (points(), points() @ turn.T))
    assert found.error == pytest.approx(turned.error)
    square = found.points.reshape(5, 5, 2) @ turn.T
    torch.testing.assert_close(turned.points.reshape(5, 5, 2), square.transpose(0, 1).flip(1))


def test_a_stronger_constraint_makes_a_smoother_decoder():
    def slope(strength):
        found = fixed_points(points(), 0.005, num_tiles=6, lipschitz=strength, radius=0.3)
        squares = (found.points[:, None] - found.points).square().sum(-1)
        return float((slopes(6, 0.3) * squares).sum())

    found = [slope(strength) for strength in (0.0, 0.001, 0.01, 0.1)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.2 * found[0]


def test_the_noise_is_of_the_generator():
    runs = [
        fixed_points(points(), 0.01, num_tiles=4, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(runs[0].points, runs[1].points)
    assert not torch.equal(runs[0].points, runs[2].points)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"x": torch.zeros(3, 3)}, r"x must be points \[N, 2\], .*\[3, 3\]"),
        ({"x": torch.full((3, 2), math.nan)}, "x must be finite"),
        ({"beta": 0.0}, "beta must be positive and finite, found 0.0"),
        ({"num_tiles": 0}, "num_tiles must be at least 1, found 0"),
        ({"max_steps": 0}, "max_steps must be at least 1, found 0"),
        ({"smoothing": 1.0}, r"smoothing must be in \[0, 1\), found 1.0"),
        ({"noise": -1.0}, "noise must not be negative, and finite, found -1.0"),
        ({"lipschitz": 1.0, "radius": 0.1, "num_tiles": 4}, "radius must reach the next tile"),
    ],
)
def test_what_is_wrong_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        fixed_points(**{"x": PAIRS, "beta": 0.1, **settings})
