"""The small pieces that adapt HMC, each against what it estimates."""

import math

import pytest
import torch

from pyro_vae.mcmc.adaptation import (
    DualAveraging,
    PooledVariance,
    halton,
    harmonic_mean_acceptance,
    num_leapfrog_steps,
    warmup_windows,
)


@pytest.mark.parametrize("start", [1e-3, 1.0, 30.0])
def test_dual_averaging_finds_the_target(start):
    averaging = DualAveraging.start(start, target=0.8)
    for _ in range(500):
        averaging = averaging.update(math.exp(-averaging.step_size))
    # exp(-ε) = 0.8 at ε = 0.2231
    assert averaging.averaged_step_size == pytest.approx(0.2231, rel=0.05)


def test_pooled_variance_is_that_of_all_draws():
    torch.manual_seed(0)
    batches = torch.randn(7, 16, 3, dtype=torch.float64) * 1e-3 + 1e3  # far from 0: no cancellation
    pooled = PooledVariance.start(batches[0, 0])
    for batch in batches:
        pooled = pooled.update(batch)
    torch.testing.assert_close(pooled.mean, batches.reshape(-1, 3).mean(0))
    torch.testing.assert_close(
        pooled.sum_squares / (pooled.num_seen - 1), batches.reshape(-1, 3).var(0)
    )


def test_pooled_variance_falls_back_where_nothing_moved():
    fallback = torch.full((2,), 7.0)
    pooled = PooledVariance.start(fallback)
    assert torch.equal(pooled.variance(fallback), fallback)
    positions = torch.tensor([[1.0, 5.0], [3.0, 5.0], [2.0, 5.0]])
    variance = pooled.update(positions).variance(fallback)
    assert variance[1] == 7.0
    assert 0.0 < float(variance[0]) < 1.0


def test_harmonic_mean_masks_divergent_chains():
    accept = torch.tensor([0.5, 1.0, 0.0, 0.0])
    none = torch.zeros(4, dtype=torch.bool)
    some = torch.tensor([False, False, True, True])
    assert harmonic_mean_acceptance(accept, some) == pytest.approx(0.5 * 2 / 3)
    assert harmonic_mean_acceptance(accept, none) == pytest.approx(4 / (2 + 1 + 200))
    assert harmonic_mean_acceptance(accept, ~none) == 0.0


def test_jitter_covers_the_interval_evenly():
    points = torch.tensor([halton(i) for i in range(1, 256)])
    assert torch.equal(points.sort().values, torch.arange(1, 256) / 256)
    steps = [num_leapfrog_steps(1.5, 0.1, halton(i), 1000) for i in range(1, 256)]
    assert min(steps) == 1
    assert max(steps) == 30
    assert sum(steps) / len(steps) == pytest.approx(15.5, abs=0.1)  # mean length plus half a step
    assert num_leapfrog_steps(1.0, 1e-300, 0.5, 64) == 64


@pytest.mark.parametrize("warmup_steps", [0, 10, 20, 50, 200, 500, 5000])
def test_windows_grow_and_leave_room_to_settle(warmup_steps):
    windows = warmup_windows(warmup_steps)
    assert windows == sorted(set(windows))
    if warmup_steps >= 20:
        assert windows[-1] == warmup_steps - warmup_steps // 10
        lengths = [b - a for a, b in zip([warmup_steps // 10, *windows], windows, strict=False)]
        assert lengths == sorted(lengths)
