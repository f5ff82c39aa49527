"""Diagnostics on draws with a known answer, and with a planted defect each must notice."""

import math

import arviz as az
import numpy as np
import pytest
import torch
from scipy import stats

from pyro_vae.mcmc.diagnostics import (
    bfmi,
    effective_sample_size,
    nested_r_hat,
    rank_normalize,
    running_r_hat,
    split_r_hat,
)


def draws(num_chains=64, num_samples=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_chains, num_samples, generator=generator, dtype=torch.float64)


def autoregressive(coefficient, num_chains=16, num_samples=4000, seed=0):
    noise = draws(num_chains, num_samples, seed)
    x = torch.zeros_like(noise)
    x[:, 0] = noise[:, 0]
    for i in range(1, num_samples):
        x[:, i] = coefficient * x[:, i - 1] + math.sqrt(1 - coefficient**2) * noise[:, i]
    return x


# -- arviz as the oracle --------------------------------------------------------------------


def with_ties():
    """Draws that repeat, as those of rejected proposals do."""
    x = autoregressive(0.8, num_chains=4, num_samples=300)
    x[:, 1::3] = x[:, 0::3]
    return x


KINDS = {
    "independent": draws(4, 500),
    "an odd number": draws(4, 501),
    "slow": autoregressive(0.95, num_chains=4, num_samples=1000),
    "many chains": draws(100, 20),
    "ties": with_ties(),
    "few values": (draws(4, 200) > 1.0).double(),
    "heavy tails": torch.from_numpy(np.random.default_rng(0).standard_cauchy((4, 300))),
    "one apart": draws(8, 100) + torch.tensor([0.0] * 7 + [8.0])[:, None],
    "float32": draws(4, 400).float(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_r_hat_and_ess_are_those_of_arviz(kind):
    x = KINDS[kind]
    array = x.double().numpy()
    assert float(split_r_hat(x)) == pytest.approx(az.rhat(array), rel=1e-10)
    assert float(effective_sample_size(x)) == pytest.approx(az.ess(array), rel=1e-10)
    tail = az.ess(array, method="tail")
    assert float(effective_sample_size(x, "tail")) == pytest.approx(tail, rel=1e-10)


def test_r_hat_of_one_chain_is_that_of_its_halves():
    x = draws(1, 400)
    halves = x.reshape(2, 200)
    scores = rank_normalize(halves).numpy()
    folded = rank_normalize((halves - np.median(halves)).abs()).numpy()
    expected = max(float(az.rhat(z, method="identity")) for z in (scores, folded))
    assert float(split_r_hat(x)) == pytest.approx(expected, rel=1e-10)
    x[:, 200:] += 2.0
    assert float(split_r_hat(x)) > 1.2


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_blom_s(kind):
    x = KINDS[kind]
    ranks = stats.rankdata(x.numpy(), method="average").reshape(x.shape)
    expected = stats.norm.ppf((ranks - 0.375) / (x.numel() + 0.25))
    np.testing.assert_allclose(rank_normalize(x).numpy(), expected, rtol=1e-12, atol=1e-12)


def test_a_monotone_map_changes_no_rank():
    x = draws(4, 100).reshape(4, 50, 2)
    torch.testing.assert_close(rank_normalize(x.exp()), rank_normalize(x), rtol=0, atol=0)


# -- nested R̂ -------------------------------------------------------------------------------


def test_nested_r_hat_by_hand():
    # Two superchains of two chains of two draws: chain means 0, 2 | 4, 6, superchain means 1, 5;
    # B = 8; variances within chains 2, between chains of a superchain 2, so W = 4.
    x = torch.tensor([[-1.0, 1.0], [1.0, 3.0], [3.0, 5.0], [5.0, 7.0]])
    torch.testing.assert_close(
        nested_r_hat(x, 2), torch.tensor(math.sqrt(1 + 8 / 4), dtype=torch.float64)
    )


def test_nested_r_hat_of_independent_draws():
    # B is about 1 / (8 · 200) with 7 degrees of freedom, so that R̂ - 1 is below 3 / 3200 almost
    # surely, and many short chains pass where each has no information of its own.
    assert 1.0 <= float(nested_r_hat(draws(), 8)) < 1.0 + 3 / 3200
    short = draws(num_chains=1024, num_samples=2)
    assert float(nested_r_hat(short, 8)) < 1.01
    assert float(nested_r_hat(short, 8, rank_normalized=True)) < 1.02  # of 64 draws a half each


def test_superchains_that_remember_their_start_are_flagged():
    x = draws()
    starts = 0.5 * draws(num_chains=8, num_samples=1, seed=1).repeat_interleave(8, dim=0)
    for rank_normalized in (False, True):
        assert float(nested_r_hat(x, 8, rank_normalized)) < 1.01
        assert float(nested_r_hat(x + starts, 8, rank_normalized)) > 1.05


def test_scale_is_seen_by_folded_draws_alone():
    x = draws()
    x[:8] *= 3.0
    assert float(nested_r_hat(x, 8)) < 1.01
    assert float(nested_r_hat(x, 8, rank_normalized=True)) > 1.03


def test_drift_that_all_chains_share_is_seen_by_halves_alone():
    x = draws() + torch.linspace(0.0, 2.0, 200)
    assert float(nested_r_hat(x, 8)) < 1.01
    assert float(nested_r_hat(x, 8, rank_normalized=True)) > 1.1


def test_superchains_of_heavy_tails():
    """Without a variance the definition has no meaning; ranks have."""
    x = torch.from_numpy(np.random.default_rng(0).standard_cauchy((64, 200)))
    assert float(nested_r_hat(x, 8, rank_normalized=True)) < 1.01
    x[:8] += 2.0
    assert float(nested_r_hat(x, 8)) < 1.01
    assert float(nested_r_hat(x, 8, rank_normalized=True)) > 1.03


# -- planted defects ------------------------------------------------------------------------


def test_a_chain_stuck_in_another_mode_is_flagged():
    x = draws(num_chains=4)
    assert float(split_r_hat(x)) < 1.01
    x[3] += 5.0
    assert float(split_r_hat(x)) > 1.5
    assert float(nested_r_hat(x, 4)) > 1.5
    assert float(effective_sample_size(x)) < 20
    assert running_r_hat(x, 4) > 1.5


def test_slow_chains_are_worth_few_draws():
    # An AR(1) process of coefficient 0.9 has ESS n (1 - 0.9) / (1 + 0.9) = 0.0526 n.
    x = autoregressive(0.9)
    assert float(effective_sample_size(x)) == pytest.approx(0.0526 * x.numel(), rel=0.15)


def test_tails_that_are_visited_rarely_are_worth_few_draws():
    """Each chain stays in the tail for one long stretch: the bulk mixes, the tail does not."""
    x = draws(4, 1000)
    for chain in range(4):
        x[chain, 200 * chain : 200 * chain + 60] = 3.0 + draws(1, 60, seed=chain)[0].abs()
    assert float(effective_sample_size(x, "tail")) < 0.5 * float(effective_sample_size(x))


def test_bfmi_of_energies_that_walk():
    # E[(E_n − E_{n−1})²] = 2 σ² (1 − φ) of an AR(1) process.
    for coefficient in (0.0, 0.5, 0.95):
        energy = autoregressive(coefficient)
        expected = 2 * (1 - coefficient)
        assert float(bfmi(energy, pooled=True)) == pytest.approx(expected, rel=0.05)
        np.testing.assert_allclose(bfmi(energy).numpy(), expected, rtol=0.35)
        np.testing.assert_allclose(bfmi(energy).numpy(), az.bfmi(energy.numpy()))


def test_bfmi_of_short_chains_together_is_that_of_long_ones():
    """Chains shorter than the energy's walk: each one's own value is far too large."""
    energy = autoregressive(0.99, num_chains=400, num_samples=1020, seed=3)[:, 1000:]
    assert float(bfmi(energy).median()) > 0.1
    assert float(bfmi(energy, pooled=True)) == pytest.approx(0.02, rel=0.2)


def test_the_running_r_hat_follows_the_others():
    x = draws(64, 200).reshape(64, 100, 2)
    assert running_r_hat(x, 8) < 1.01
    starts = torch.linspace(-1, 1, 8).repeat_interleave(8)[:, None]
    x[..., 1] += starts
    assert running_r_hat(x, 8) == pytest.approx(float(nested_r_hat(x, 8)[1]), rel=0.05)
    classical = float(az.rhat(x[..., 1].numpy(), method="split"))
    assert running_r_hat(x, 64) == pytest.approx(classical, rel=0.02)
    drifting = draws(64, 100) + torch.linspace(0, 3, 100)
    assert running_r_hat(drifting, 8) > 1.1
    assert math.isnan(running_r_hat(x[:, :3], 8))
    x[0, 0, 0] = math.nan
    assert math.isnan(running_r_hat(x, 8))


# -- shapes, constants, bad input -----------------------------------------------------------


def test_shapes_and_constants():
    x = draws().reshape(8, 200, 2, 4)
    for value in (
        nested_r_hat(x, 4),
        nested_r_hat(x, 4, rank_normalized=True),
        split_r_hat(x),
        effective_sample_size(x),
        effective_sample_size(x, "tail"),
    ):
        assert value.shape == (2, 4)
        assert value.dtype == torch.float64
    assert rank_normalize(x).shape == x.shape
    for i in range(2):
        torch.testing.assert_close(split_r_hat(x)[i], split_r_hat(x[:, :, i]))
    assert float(nested_r_hat(torch.ones(8, 10), 4)) == 1.0
    assert split_r_hat(draws(4, 20).reshape(4, 20)[..., None][..., :0]).shape == (0,)


def test_draws_of_a_transposed_tensor():
    x = draws(6, 40).reshape(6, 20, 2)
    transposed = x.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(split_r_hat(transposed), split_r_hat(x))
    torch.testing.assert_close(rank_normalize(transposed), rank_normalize(x))


def test_what_is_not_finite_spoils_its_own_entry_alone():
    for bad in (math.nan, math.inf):
        x = draws(8, 100).reshape(8, 50, 2)
        x[3, 7, 1] = bad
        for value in (
            split_r_hat(x),
            nested_r_hat(x, 4, rank_normalized=True),
            effective_sample_size(x),
            effective_sample_size(x, "tail"),
            rank_normalize(x).sum((0, 1)),
        ):
            assert value.isnan().tolist() == [False, True]


@pytest.mark.parametrize("num_samples", [1, 2, 9])
def test_too_few_draws_are_no_number(num_samples):
    """ArviZ would report more effective draws than there are."""
    x = draws(16, num_samples)
    for value in (split_r_hat(x), effective_sample_size(x), effective_sample_size(x, "tail")):
        assert math.isnan(float(value))


def test_chains_that_never_move_have_infinite_r_hat():
    x = draws(4, 1).repeat(1, 50)
    assert float(split_r_hat(x)) == math.inf


@pytest.mark.parametrize("num_superchains", [0, 1, 3])
def test_bad_superchains(num_superchains):
    with pytest.raises(ValueError, match="num_superchains: found"):
        nested_r_hat(draws(), num_superchains)
    if num_superchains != 1:
        with pytest.raises(ValueError, match="num_superchains: found"):
            running_r_hat(draws(), num_superchains)


def test_bad_arguments():
    with pytest.raises(ValueError, match="method: found 'mean'; expected 'bulk' or 'tail'"):
        effective_sample_size(draws(), "mean")
    for shape in [(4,), (4, 1), (4, 10, 2)]:
        with pytest.raises(ValueError, match="energy: found the shape"):
            bfmi(torch.zeros(shape))
