"""Diagnostics on draws with a known answer, and with a planted defect each must notice."""

import math

import pytest
import torch

from pyro_vae.mcmc import effective_sample_size, nested_r_hat, split_r_hat


def draws(num_chains=64, num_samples=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_chains, num_samples, generator=generator, dtype=torch.float64)


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


def test_a_chain_stuck_in_another_mode_is_flagged():
    x = draws(num_chains=4)
    assert float(split_r_hat(x)) < 1.01
    x[3] += 5.0
    assert float(split_r_hat(x)) > 1.5
    assert float(nested_r_hat(x, 4)) > 1.5
    assert float(effective_sample_size(x)) < 20


def test_superchains_that_remember_their_start_are_flagged():
    x = draws()
    starts = 0.5 * draws(num_chains=8, num_samples=1, seed=1).repeat_interleave(8, dim=0)
    assert float(nested_r_hat(x, 8)) < 1.01
    assert float(nested_r_hat(x + starts, 8)) > 1.05


def test_slow_chains_are_worth_few_draws():
    # An AR(1) process of coefficient 0.9 has ESS n (1 - 0.9) / (1 + 0.9) = 0.0526 n.
    noise = draws(num_chains=16, num_samples=4000)
    x = torch.zeros_like(noise)
    x[:, 0] = noise[:, 0]
    for i in range(1, noise.shape[1]):
        x[:, i] = 0.9 * x[:, i - 1] + math.sqrt(1 - 0.81) * noise[:, i]
    assert float(effective_sample_size(x)) == pytest.approx(0.0526 * x.numel(), rel=0.15)


def test_shapes_and_constants():
    x = draws().reshape(8, 200, 2, 4)
    for value in (nested_r_hat(x, 4), split_r_hat(x), effective_sample_size(x)):
        assert value.shape == (2, 4)
    assert float(nested_r_hat(torch.ones(8, 10), 4)) == 1.0


@pytest.mark.parametrize("num_superchains", [0, 1, 3])
def test_bad_superchains(num_superchains):
    with pytest.raises(ValueError, match="num_superchains: found"):
        nested_r_hat(draws(), num_superchains)
