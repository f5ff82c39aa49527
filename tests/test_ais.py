"""AIS and BDMC against the closed forms of the linear-Gaussian model."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vae import ais as ais_module
from pyro_vae.ais import ais, bdmc, sigmoid_schedule
from pyro_vae.joint import Estimate, Joint, log_mean_weight

sys.path.insert(0, str(Path(__file__).parent))
from linear_gaussian import LinearGaussian

TRUTH = LinearGaussian()


def test_schedule_rises_from_zero_to_one_and_is_symmetric() -> None:
    betas = sigmoid_schedule(1000)
    assert betas[0] == 0
    assert betas[-1] == 1
    assert (betas.diff() > 0).all()
    torch.testing.assert_close(betas + betas.flip(0), torch.ones_like(betas))
    # σ(4(2t/T − 1)) written out at a quarter
    low, quarter = (1 / (1 + math.exp(a)) for a in (4, 2))
    assert float(betas[250]) == pytest.approx((quarter - low) / (1 - 2 * low))


def test_lower_bound_with_few_temperatures_on_a_vae_and_on_its_trace() -> None:
    x = TRUTH.draw(50)
    exact = float(TRUTH.evidence(x).mean())
    for model in (TRUTH.vae(), TRUTH.pyro_model):
        torch.manual_seed(1)
        found = ais(model, x, 80, 4)
        assert found.log_weights.shape == (4, 50)
        assert found.z.shape == (4, 50, TRUTH.d)
        estimate = found.log_evidence
        assert -1 < estimate.value - exact < 3 * estimate.std_error
        assert 0.5 < found.accept_prob.mean() < 0.9


def test_vae_and_trace_agree_to_the_last_digits() -> None:
    x = TRUTH.draw(10)
    found = []
    for model in (TRUTH.vae(), TRUTH.pyro_model):
        torch.manual_seed(1)
        found.append(ais(model, x, 20, 2).log_weights)
    torch.testing.assert_close(*found)


def test_chunks_that_do_not_divide_the_examples_are_padded_and_cut() -> None:
    x = TRUTH.draw(11)
    found = ais(TRUTH.vae(), x, 50, 3, chunk_size=16)  # four examples a chunk
    exact = TRUTH.evidence(x)
    assert found.log_weights.shape == (3, 11)
    per_example = found.log_evidence.per_example
    assert per_example is not None
    # Each in its place: examples differ by far more than the estimate's error.
    assert exact.std() > 1
    assert torch.corrcoef(torch.stack([per_example, exact]))[0, 1] > 0.9


def test_float32_stays_float32() -> None:
    model = TRUTH.vae().float()
    found = ais(model, TRUTH.draw(5).float(), 50, 2)
    assert found.z.dtype == torch.float32
    assert found.log_weights.dtype == torch.float64


def test_chains_end_in_the_posterior() -> None:
    """Weighted draws have the posterior's mean and variance, at each example."""
    truth = LinearGaussian(d=2, x_dim=3)
    x = truth.draw(4)
    found = ais(truth.vae(), x, 150, 500)
    share = found.log_weights.softmax(0).unsqueeze(-1)
    mean = (share * found.z).sum(0)
    variance = (share * (found.z - mean).square()).sum(0)
    ess = 1 / share.square().sum(0)  # [N, 1]
    assert ess.min() > 100
    true = truth.covariance.diagonal()
    assert ((mean - truth.posterior_mean(x)).abs() < 4 * (true / ess).sqrt()).all()
    assert ((variance / true - 1).abs() < 4 * (2 / ess).sqrt()).all()


def test_two_sides_hold_the_truth_between_them_on_simulated_data() -> None:
    torch.manual_seed(3)
    found = bdmc(TRUTH.vae(), torch.zeros(60, TRUTH.x_dim, dtype=torch.float64), 80, 4)
    exact = float(TRUTH.evidence(found.x).mean())
    assert found.lower.value - exact < 3 * found.lower.std_error
    assert found.upper.value - exact > -3 * found.upper.std_error
    assert 0 < found.gap.value < 2
    assert found.gap.value == pytest.approx(found.upper.value - found.lower.value)


def test_simulated_data_are_the_models() -> None:
    truth = LinearGaussian(d=2, x_dim=3)
    for model in (truth.vae(), truth.pyro_model):
        z, x = Joint(model, torch.zeros(1, 3, dtype=torch.float64)).sample(20_000)
        residual = x - z @ truth.weight.T - truth.bias
        assert abs(float(residual.std()) - truth.scale) < 4 * truth.scale / (2 * 60_000) ** 0.5
        assert (z.mean(0).abs() < 4 / 20_000**0.5).all()


@pytest.mark.parametrize("defect", ["transposed", "not annealed"])
def test_a_wrong_schedule_is_found(monkeypatch: pytest.MonkeyPatch, defect: str) -> None:
    """Planted: temperatures in the wrong order break the sandwich; a jump opens it."""
    if defect == "transposed":

        def schedule(num: int) -> torch.Tensor:  # increments belong to other temperatures
            return sigmoid_schedule(num).square().flip(0)
    else:

        def schedule(num: int) -> torch.Tensor:
            return torch.tensor([0.0, 1.0], dtype=torch.float64)

    monkeypatch.setattr(ais_module, "sigmoid_schedule", schedule)
    x = TRUTH.draw(30)
    estimate = ais(TRUTH.vae(), x, 60, 4).log_evidence
    error = estimate.value - float(TRUTH.evidence(x).mean())
    assert abs(error) > 1


def test_step_sizes_are_the_scouts_alone() -> None:
    """Step sizes that depended on a chain with a weight would break the bound."""
    x = TRUTH.draw(3)
    settings = ais_module._Settings(30, 2, 10, 0.65, 100, False, len(x))
    annealer = settings.annealer(Joint(TRUTH.vae(), x), x)
    z = torch.randn(3, 3, TRUTH.d, dtype=torch.float64)

    def step_sizes(moved: slice) -> torch.Tensor:
        start = z.clone()
        start[moved] += 1
        torch.manual_seed(0)
        with torch.no_grad():
            return torch.stack(ais_module._forward(annealer, x, start, settings.betas)[1])

    assert torch.equal(step_sizes(slice(0, 0)), step_sizes(slice(0, 2)))
    assert not torch.equal(step_sizes(slice(0, 0)), step_sizes(slice(2, 3)))


def test_log_mean_weight_against_many_repetitions() -> None:
    """The delta method's error is the spread of the estimate over repetitions."""
    k, repetitions = 400, 4000
    log_w = 0.5 * torch.randn(k, repetitions, dtype=torch.float64)
    estimate = log_mean_weight(log_w.logsumexp(0), (2 * log_w).logsumexp(0), k)
    assert estimate.per_example is not None
    assert estimate.per_example_error is not None
    spread = float(estimate.per_example.std())
    assert float(estimate.per_example_error.mean()) == pytest.approx(spread, rel=0.06)
    assert abs(estimate.value - 0.125) < 4 * spread / repetitions**0.5 + spread**2
    assert estimate.data_std_error == pytest.approx(spread / repetitions**0.5)


def test_effective_weights_are_counted() -> None:
    log_w = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, -800.0, -torch.inf]]).double()
    found = log_mean_weight(log_w.logsumexp(0), (2 * log_w).logsumexp(0), 2)
    assert found.effective is not None
    assert found.effective.tolist() == [2, 1, 0]
    assert ais(TRUTH.vae(), TRUTH.draw(3), 10, 4).log_evidence.effective.shape == (3,)


def test_one_chain_has_no_error() -> None:
    assert math.isnan(ais(TRUTH.vae(), TRUTH.draw(3), 10, 1).log_evidence.std_error)
    assert Estimate(1.0, 0.1).data_std_error is None


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_temperatures": 0}, "num_temperatures must be at least 1, found 0"),
        ({"num_temperatures": 2.5}, "num_temperatures must be a whole number, found 2.5"),
        ({"num_chains": 0}, "num_chains must be at least 1, found 0"),
        ({"num_leapfrog_steps": 0}, "num_leapfrog_steps must be at least 1, found 0"),
        ({"chunk_size": 5}, "chunk_size must be at least 6, found 5"),
        ({"target_accept": 1.0}, "target_accept must be between 0 and 1, found 1.0"),
    ],
)
def test_bad_numbers(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ais(TRUTH.vae(), TRUTH.draw(2), **kwargs)


def test_bad_models() -> None:
    x = torch.zeros(4, 2, dtype=torch.float64)

    def two_latents(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(x, 1.0).to_event(1), obs=x)

    def scalar(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(x, 1.0).to_event(1), obs=x)

    def positive(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(x, 1.0).to_event(1), obs=x)

    def subsampled(x):
        with pyro.plate("data", len(x), subsample_size=2) as i:
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(x[i], 1.0).to_event(1), obs=x[i])

    for model, message in [
        (two_latents, r"one latent site, found \['a', 'b'\]"),
        (scalar, "latent site 'z' must be one real vector a data point"),
        (positive, "latent site 'z' must be one real vector a data point"),
        (subsampled, "plate 'data' draws a subsample, 2 of 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            ais(model, x, 10)
    with pytest.raises(ValueError, match=r"rows of shape \(2,\), expected \(12,\)"):
        ais(TRUTH.vae(), x, 10)
    with pytest.raises(ValueError, match="at least one row"):
        ais(TRUTH.vae(), TRUTH.draw(1)[:0], 10)


@pytest.mark.slow
def test_figures_of_the_linear_gaussian_model() -> None:
    """1000 temperatures, 5 chains, d = 8: within 0.05 nats and 3 standard errors; the sandwich."""
    x = TRUTH.draw(100)
    exact = float(TRUTH.evidence(x).mean())
    estimate = ais(TRUTH.vae(), x).log_evidence
    assert abs(estimate.value - exact) < 0.05
    assert abs(estimate.value - exact) < 3 * estimate.std_error
    found = bdmc(TRUTH.vae(), x)
    exact = float(TRUTH.evidence(found.x).mean())
    assert found.lower.value < exact + 3 * found.lower.std_error
    assert found.upper.value > exact - 3 * found.upper.std_error
    assert found.gap.value < 0.1


@pytest.mark.slow
def test_the_bound_holds_where_mixing_is_poor() -> None:
    """With step sizes from each chain's own past this estimate lies 0.2 nats above the truth."""
    truth = LinearGaussian(x_dim=20, scale=0.35)
    x = truth.draw(200)
    estimate = ais(truth.vae(), x, 500).log_evidence
    assert estimate.value < float(truth.evidence(x).mean()) + 2 * estimate.std_error


@pytest.mark.slow
@pytest.mark.compiled
def test_compiled_and_not_agree() -> None:
    x = TRUTH.draw(10)
    found = []
    for compile in (True, False):
        torch.manual_seed(1)
        found.append(ais(TRUTH.vae(), x, 20, 2, compile=compile).log_weights)
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
