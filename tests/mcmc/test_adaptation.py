"""The small pieces that adapt HMC, each against what it estimates."""

import math

import pytest
import torch

from pyro_vae.mcmc.adaptation import (
    DualAveraging,
    PooledMoments,
    TrajectoryLength,
    back_off,
    harmonic_mean_acceptance,
    jittered,
    num_leapfrog_steps,
    warmup_windows,
)
from pyro_vae.mcmc.kernel import HMCInfo, HMCState, Metric, begin, kinetic_energy


@pytest.mark.parametrize("start", [1e-3, 1.0, 30.0])
def test_dual_averaging_finds_the_target(start):
    averaging = DualAveraging.start(start, target=0.8)
    for _ in range(500):
        averaging = averaging.update(math.exp(-averaging.step_size))
    # exp(-ε) = 0.8 at ε = 0.2231
    assert averaging.averaged_step_size == pytest.approx(0.2231, rel=0.05)


@pytest.mark.parametrize("dense", [False, True])
def test_pooled_moments_are_those_of_all_draws(dense):
    torch.manual_seed(0)
    batches = torch.randn(7, 16, 3, dtype=torch.float64) * 1e-3 + 1e3  # far from 0: no cancellation
    pooled = PooledMoments.start(batches[0, 0], dense)
    for batch in batches:
        pooled = pooled.update(batch)
    rows = batches.reshape(-1, 3)
    torch.testing.assert_close(pooled.mean, rows.mean(0))
    torch.testing.assert_close(
        pooled.sum_squares / (pooled.num_seen - 1), rows.T.cov() if dense else rows.var(0)
    )


def test_metric_falls_back_where_nothing_moved():
    positions = torch.tensor([[1.0, 5.0], [3.0, 5.0], [2.0, 5.0]])
    fallback = Metric.from_covariance(torch.full((2,), 7.0))
    pooled = PooledMoments.start(positions[0], dense=False)
    assert pooled.metric(fallback) is fallback
    variance = pooled.update(positions).metric(fallback).inverse_mass
    assert variance[1] == 7.0
    assert 0.0 < float(variance[0]) < 1.0
    fallback = Metric.unit(positions[0], dense=True)
    pooled = PooledMoments.start(positions[0], dense=True)
    assert pooled.update(positions).metric(fallback) is fallback
    assert pooled.update(positions / 0).metric(fallback) is fallback


@pytest.mark.parametrize("dense", [False, True])
def test_momenta_and_whitened_positions_have_the_metric(dense):
    torch.manual_seed(0)
    factor = torch.tensor([[1.0, 0.0, 0.0], [0.7, 0.5, 0.0], [-2.0, 1.0, 3.0]]).double()
    covariance = factor @ factor.T
    metric = Metric.from_covariance(covariance if dense else covariance.diagonal())
    noise = torch.eye(3, dtype=torch.float64)
    momentum, _ = begin(torch.zeros(3), noise, *metric)
    # With e ~ N(0, I) the momenta e @ A have the covariance AᵀA, which is to be M.
    inverse = covariance.inverse() if dense else torch.diag(1 / covariance.diagonal())
    torch.testing.assert_close(momentum.T @ momentum, inverse)
    # Half the squared noise is the kinetic energy; the whitened velocities have its length too.
    torch.testing.assert_close(kinetic_energy(momentum, metric.inverse_mass), noise.sum(1) / 2)
    torch.testing.assert_close(
        metric.whiten_velocity(momentum).square().sum(-1), noise.square().sum(-1)
    )
    white = metric.whiten(factor.T)  # rows whose outer products sum to the covariance
    if dense:
        torch.testing.assert_close(white.T @ white, noise)
    with pytest.raises(ValueError, match="not positive"):
        Metric.from_covariance(-covariance if dense else -covariance.diagonal())


@pytest.mark.parametrize("start", [0.4, 1.0, 2.4])
def test_trajectory_length_finds_the_quarter_period(start):
    """With exact flow on a standard normal, ChEES is greatest after a quarter of the period."""
    torch.manual_seed(0)
    metric = Metric.unit(torch.zeros(20), dense=False)
    length = TrajectoryLength.start(start)
    nothing = torch.zeros(256, dtype=torch.bool)
    size = torch.ones(256, 1)
    for _ in range(300):
        z, p = torch.randn(2, 256, 20)
        time = length.length
        end = math.cos(time) * z + math.sin(time) * p
        momentum = math.cos(time) * p - math.sin(time) * z
        info = HMCInfo(torch.ones(256), ~nothing, nothing, torch.ones(256), 1, size, end, momentum)
        before = HMCState(z, torch.zeros(256), z)
        times = torch.full((256,), time)
        length = length.update(before, info, metric, times, longest=100.0)
    assert length.averaged_length == pytest.approx(math.pi / 2, rel=0.05)
    # Chains that diverged count for nothing, and all of them together change nothing.
    broken = info._replace(diverging=~nothing, proposal=end * math.nan)
    assert length.update(before, broken, metric, times, 100.0) == length
    some = torch.arange(256) < 40
    spoilt = info._replace(diverging=some, proposal=torch.where(some.unsqueeze(1), math.nan, end))
    assert math.isfinite(length.update(before, spoilt, metric, times, 100.0).log_length)


def test_chains_back_off_alone_and_come_back():
    factor = torch.ones(3, 1)
    flags = torch.tensor([True, False, False])
    info = HMCInfo(torch.tensor([0.9, 0.0, 0.5]), flags, ~flags, flags, 1, factor, factor, factor)
    for _ in range(3):
        factor = back_off(factor, info)
    assert factor.flatten().tolist() == [1.0, 0.125, 1.0]
    factor = back_off(factor, info._replace(accepted=torch.ones(3, dtype=torch.bool)))
    assert factor.flatten().tolist() == [1.0, 0.25, 1.0]


def test_harmonic_mean_masks_divergent_chains():
    accept = torch.tensor([0.5, 1.0, 0.0, 0.0])
    none = torch.zeros(4, dtype=torch.bool)
    some = torch.tensor([False, False, True, True])
    assert harmonic_mean_acceptance(accept, some) == pytest.approx(0.5 * 2 / 3)
    assert harmonic_mean_acceptance(accept, none) == pytest.approx(4 / (2 + 1 + 20))
    assert harmonic_mean_acceptance(accept, ~none) == 0.0


def test_lengths_are_uniform_around_their_mean():
    # Small steps: rounding up adds half of one on average.
    steps = [num_leapfrog_steps(2.0, 1e-4, 0.5, 10**9, index) for index in range(1023)]
    lengths = torch.tensor(steps, dtype=torch.float64) * 0.9e-4
    # Uniform on (1, 3), and evenly: every n-th of them too, as thinning and displays see them.
    for every in (1, 2, 3, 4, 8, 20):
        some = lengths[::every].sort().values
        expected = 1.0 + 2.0 * (torch.arange(len(some), dtype=torch.float64) + 0.5) / len(some)
        torch.testing.assert_close(some, expected, rtol=0, atol=2.0 * 6 / len(some))
    # The jitter outlives the bound on the number of steps.
    bounded = {num_leapfrog_steps(100.0, 0.1, 0.5, 30, index) for index in range(100)}
    assert min(bounded) == 11
    assert max(bounded) == 30
    assert num_leapfrog_steps(1.0, 1e-300, 0.0, 64, 0) == 64
    assert num_leapfrog_steps(1.0, 100.0, 0.5, 64, 0) == 1
    assert [num_leapfrog_steps(1.0, 0.1, 0.0, 64, index) for index in (0, 1, 2)] == [10, 10, 10]


@pytest.mark.parametrize(
    ("jitter", "wide", "least"),
    [(0.5, False, 0.08), (0.1, False, 0.09), (0.5, True, 0.1 * 2**-2.75)],
)
def test_step_sizes_are_spread_between_their_bounds(jitter, wide, least):
    step_size = torch.full((10_000, 1), 0.1, dtype=torch.float64)
    found = jittered(step_size, jitter, torch.Generator().manual_seed(0), wide)
    most = 0.1 * 2**0.25 if wide else 0.1
    assert least <= float(found.min()) < least * 1.01
    assert most * 0.99 < float(found.max()) <= most
    even = found.log() if wide else found
    low, high = (math.log(least), math.log(most)) if wide else (least, most)
    # A uniform distribution's mean, of 10,000 draws, has a standard error of 0.0029 widths.
    assert float(even.mean()) == pytest.approx((low + high) / 2, abs=4 * 0.0029 * (high - low))
    assert jittered(step_size, 0.0) is step_size


@pytest.mark.parametrize("warmup_steps", [0, 10, 20, 50, 200, 500, 5000])
def test_windows_grow_and_leave_room_to_settle(warmup_steps):
    windows = warmup_windows(warmup_steps)
    assert windows == sorted(set(windows))
    if warmup_steps >= 20:
        assert windows[-1] == warmup_steps - warmup_steps // 10
        lengths = [b - a for a, b in zip([warmup_steps // 10, *windows], windows, strict=False)]
        assert lengths == sorted(lengths)
