"""Checks on runs that are right, and on runs with a planted defect that each must catch."""

import math

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from scipy.signal import lfilter

from pyro_vae.mcmc import HMC
from pyro_vae.mcmc.checks import (
    Check,
    ConvergenceError,
    Verdict,
    check_bfmi,
    check_chains,
    check_divergences,
    check_ess,
    check_mcmc,
    check_nested_r_hat,
    check_r_hat,
)


def chains(num_chains=64, num_samples=200, coefficient=0.5, seed=0, entries=3):
    """Stationary AR(1) chains: converged by construction, ESS n (1 − φ) / (1 + φ) each."""
    noise = np.random.default_rng(seed).standard_normal((num_chains, num_samples, entries))
    noise[:, 1:] *= math.sqrt(1 - coefficient**2)
    return torch.from_numpy(lfilter([1.0], [1.0, -coefficient], noise, axis=1))


def sampled(x, energy=None, diverging=None):
    """The draws as an ``InferenceData`` with a sampler's statistics."""
    shape = x.shape[:2]
    stats = {
        "energy": chains(*shape, seed=99, entries=1)[..., 0] if energy is None else energy,
        "diverging": torch.zeros(shape, dtype=torch.bool) if diverging is None else diverging,
    }
    return az.from_dict(
        posterior={"x": x.numpy()},
        sample_stats={name: value.numpy() for name, value in stats.items()},
        posterior_attrs={"num_superchains": num_superchains(len(x))},
    )


def num_superchains(num_chains):
    return 16 if num_chains >= 64 else num_chains


def failed(verdict):
    return [check.name for check in verdict.failed]


# -- runs that are right --------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:More chains")
@pytest.mark.parametrize("num_chains", [4, 64, 256])
def test_a_good_run_passes_every_check(num_chains):
    num_samples = 1500 if num_chains == 4 else 200
    verdict = check_mcmc(sampled(chains(num_chains, num_samples)))
    assert verdict.passed
    assert verdict
    assert all(check.passed for check in verdict.checks)
    kind = "R̂" if num_chains == 4 else "nested R̂"
    names = [check.name for check in verdict.checks]
    assert names == [kind, "ESS", "chains", "E-BFMI", "divergences"]
    verdict.raise_if_failed()
    lines = str(verdict).splitlines()
    assert lines[0].startswith(f"passed: {num_chains} chains of {num_samples} draws")
    assert [line.split(" passed: ")[0].strip() for line in lines[1:]] == names


@pytest.mark.parametrize(
    ("num_chains", "num_samples", "coefficient", "runs"),
    [(4, 2000, 0.5, 100), (64, 300, 0.7, 60), (256, 100, 0.7, 25)],
)
def test_good_runs_fail_less_than_one_time_in_a_hundred(num_chains, num_samples, coefficient, runs):
    """None of these runs fails; with a rate of 2% the 185 of them would pass one time in 42."""
    for seed in range(runs):
        x = chains(num_chains, num_samples, coefficient, seed, entries=2)
        verdict = check_mcmc({"x": x}, num_superchains=num_superchains(num_chains))
        assert verdict.passed, (seed, str(verdict))


@pytest.mark.parametrize(
    ("num_chains", "num_samples", "coefficient"),
    # 200 independent draws; 53, 15 and 5 effective draws a chain, which R̂ lets pass no more.
    [(4, 200, 0.0), (64, 1000, 0.9), (64, 1000, 0.97), (256, 1000, 0.99)],
)
def test_slow_chains_are_not_taken_for_stuck_ones(num_chains, num_samples, coefficient):
    for seed in range(10):
        check = check_chains({"x": chains(num_chains, num_samples, coefficient, seed, entries=1)})
        assert check.passed, (seed, check.message)


def test_chains_that_go_between_modes_are_not_taken_for_stuck_ones():
    """Two modes, ten standard deviations apart, left twice in a hundred draws; one is rare."""
    for weight in (0.5, 0.02):
        generator = np.random.default_rng(1)
        leave = np.where([True, False], 0.02 * weight / (1 - weight), 0.02)  # of modes 0 and 1
        mode = np.empty((128, 1000), dtype=np.int64)
        mode[:, 0] = generator.random(128) < weight
        for i in range(1, 1000):
            mode[:, i] = mode[:, i - 1] ^ (generator.random(128) < leave[mode[:, i - 1]])
        x = torch.from_numpy(generator.standard_normal(mode.shape) + 10 * mode)
        assert check_chains({"x": x}).passed


def test_heavy_tails_and_any_monotone_map_pass():
    x = chains(64, 200, coefficient=0.0)
    cauchy = torch.tan(math.pi * (torch.special.ndtr(x) - 0.5))
    for value in (cauchy, x.exp(), x.float()):
        assert check_mcmc({"x": value}, num_superchains=16).passed


# -- planted defects ------------------------------------------------------------------------


@pytest.mark.parametrize("num_chains", [4, 64, 256])
def test_one_chain_in_another_mode(num_chains):
    x = chains(num_chains, 200)
    x[2, :, 1] += 8.0
    check = check_chains({"x": x})
    assert check.passed is False
    assert check.value == 1
    assert check.where == "chain 2"
    assert "chain 2 stayed away from the others" in check.message
    assert "at x[1]" in check.message
    verdict = check_mcmc({"x": x}, num_superchains=num_superchains(num_chains))
    assert "chains" in failed(verdict)
    if num_chains == 256:  # what the check is for
        assert failed(verdict) == ["chains"]
        assert check_nested_r_hat({"x": x}, num_superchains=16).value < 1.002


@pytest.mark.parametrize("num_apart", [2, 12, 40])
def test_chains_in_another_mode_do_not_hide_each_other(num_apart):
    x = chains(256, 200)
    apart = torch.randperm(256, generator=torch.Generator().manual_seed(0))[:num_apart]
    x[apart] += 8.0
    check = check_chains({"x": x})
    assert check.value == num_apart
    more = f" and {num_apart - 5} more" if num_apart > 5 else ""
    first = ", ".join(str(int(i)) for i in apart.sort().values[:5])
    assert f"chains {first}{more} stayed away" in check.message


def test_a_chain_on_another_scale():
    """In the neck of a funnel: the mean is right, the scale is not."""
    x = chains(256, 200)
    x[100] *= 0.05
    check = check_chains({"x": x})
    assert check.where == "chain 100"
    assert check_nested_r_hat({"x": x}, num_superchains=16).passed


@pytest.mark.parametrize("num_chains", [2, 4, 256])
def test_a_chain_that_never_moves(num_chains):
    x = chains(num_chains, 200)
    x[1] = 0.1  # right in the middle: no mean and no R̂ says much
    check = check_chains({"x": x})
    assert check.passed is False
    assert check.where == "chain 1"
    assert "chain 1 moved 0 times in 199 iterations" in check.message


def test_a_chain_that_hardly_moves():
    x = chains(64, 400)
    x[5] = x[5, ::80].repeat_interleave(80, dim=0)
    assert "chain 5 moved 4 times" in check_chains({"x": x}).message
    # All chains reject most proposals: slow, which ESS tells, but none is stuck.
    repeated = chains(64, 100).repeat_interleave(6, dim=1)
    assert check_chains({"x": repeated}).passed


def test_no_chain_moves():
    for x in (torch.zeros(4, 100), chains(4, 1).repeat(1, 100, 1)):
        assert "chains" in failed(check_mcmc({"x": x}))


@pytest.mark.parametrize("num_chains", [4, 64])
def test_slow_mixing(num_chains):
    x = chains(num_chains, 400, coefficient=0.999)
    check = check_ess({"x": x})
    assert check.passed is False
    assert check.value < 400
    assert "draw " in check.message
    agreement = check_r_hat({"x": x})
    assert agreement.passed is False
    assert agreement.value > 1.1


def test_tails_that_are_visited_rarely():
    x = chains(4, 500, coefficient=0.0, entries=1)
    for chain in range(4):
        stretch = slice(100 * chain, 100 * chain + 40)
        x[chain, stretch] = 3.0 + x[chain, stretch].abs()
    check = check_ess({"x": x}, min_ess=100)
    assert check.passed is False
    assert "in the tails" in check.message


def test_a_difference_of_scale_that_only_folded_draws_show():
    x = chains(4, 1000, coefficient=0.0, entries=1)
    x[0] *= 4.0
    assert float(az.rhat(x[..., 0].numpy(), method="z_scale")) < 1.01
    check = check_r_hat({"x": x})
    assert check.passed is False
    many = chains(64, 200, coefficient=0.0, entries=1)
    many[:4] *= 4.0  # one start of 16
    assert check_nested_r_hat({"x": many}, num_superchains=16).passed is False


def test_starts_that_are_remembered():
    x = chains(64, 200)
    x[..., 2] += torch.linspace(-1, 1, 16).repeat_interleave(4)[:, None]
    check = check_nested_r_hat({"x": x}, num_superchains=16)
    assert check.passed is False
    assert check.where == "x[2]"
    assert "chains from different starts disagree" in check.message


def test_a_drift_that_all_chains_share():
    """All starts on one side: no two superchains differ, and the variance within is large."""
    x = chains(64, 200) + torch.linspace(0, 2, 200)[:, None]
    assert check_nested_r_hat({"x": x}, num_superchains=16).passed is False


def test_nested_r_hat_says_when_it_is_draws_that_lack():
    x = chains(64, 20, coefficient=0.0)
    check = check_nested_r_hat({"x": x}, num_superchains=32)
    assert check.passed is False
    assert "draw more, or start from fewer points" in check.message


def test_energy_that_moves_slowly():
    x = chains(64, 400)
    for coefficient, passes in [(0.5, True), (0.8, True), (0.9, False), (0.95, False)]:
        energy = chains(64, 400, coefficient, seed=1, entries=1)[..., 0]
        check = check_bfmi(sampled(x, energy))
        assert check.passed is passes
        assert check.value == pytest.approx(2 * (1 - coefficient), rel=0.15)


def test_one_chain_whose_energy_moves_slowly():
    energy = chains(256, 1000, coefficient=0.5, seed=1, entries=1)[..., 0]
    energy[7] = chains(1, 1000, coefficient=0.97, seed=2, entries=1)[0, :, 0]
    check = check_bfmi(sampled(chains(256, 1000, entries=1), energy))
    assert check.passed is False
    assert check.where == "chain 7"


def test_the_smallest_of_many_noisy_energies_is_not_held_against_a_run():
    """E-BFMI 0.4, above the threshold; the smallest of 256 estimates lies below it."""
    energy = chains(256, 300, coefficient=0.8, seed=1, entries=1)[..., 0]
    check = check_bfmi(sampled(chains(256, 300, entries=1), energy))
    assert az.bfmi(energy.numpy()).min() < 0.3
    assert check.passed


def test_divergences():
    x = chains(64, 1000, entries=2)
    for count, passes in [(0, True), (1, True), (64, True), (65, False)]:
        diverging = torch.zeros(64, 1000, dtype=torch.bool)
        diverging.view(-1)[torch.arange(count) * 900] = True
        check = check_divergences(sampled(x, diverging=diverging))
        assert check.passed is passes
        assert check.value == count / 64_000
        assert f"{count} of 64000 draws; expected at most 64" in check.message
    one = sampled(x, diverging=diverging)
    assert check_divergences(one, max_proportion=0.002).passed
    assert not check_mcmc(one, max_divergent=0.0)  # Stan's rule


def test_divergences_that_gather_say_where():
    x = chains(64, 1000, entries=2)
    check = check_divergences(sampled(x, diverging=x[..., 1] < -2.5))
    assert check.passed is False
    assert "quantile of x[1]" in check.message
    anywhere = torch.rand(64, 1000, generator=torch.Generator().manual_seed(0)) < 0.002
    assert "quantile" not in check_divergences(sampled(x, diverging=anywhere)).message


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_draws_that_are_not_finite_name_their_site(bad):
    x, y = chains(64, 200), chains(64, 200, seed=1)
    y[3, 50, 2] = bad
    verdict = check_mcmc({"x": x, "y": y}, num_superchains=16)
    assert failed(verdict) == ["nested R̂", "ESS", "chains"]
    for check in verdict.failed:
        assert "site 'y' has NaN or infinite draws in chain 3" in check.message
        assert math.isnan(check.value)
    assert verdict.checks[0].where == "y[2]"
    assert "site 'y'" in check_r_hat({"y": y}).message


def test_energies_that_are_not_finite():
    energy = chains(64, 200, entries=1)[..., 0]
    energy[9, 4] = math.nan
    check = check_bfmi(sampled(chains(64, 200), energy))
    assert check.passed is False
    assert check.where == "chain 9"
    constant = check_bfmi(sampled(chains(64, 200), torch.ones(64, 200)))
    assert constant.passed is False


# -- what there is to check -----------------------------------------------------------------


def test_entries_with_one_value_are_left_out():
    """The zeros of a Cholesky factor, and a correlation matrix's ones up to rounding."""
    factor = dist.LKJCholesky(3, 2.0).sample((64, 200))
    matrix = factor @ factor.mT
    assert check_mcmc({"factor": factor, "matrix": matrix}, num_superchains=16).passed
    unmoved = check_r_hat({"x": torch.ones(4, 100)})
    assert unmoved.passed is None
    assert "no site varies" in unmoved.message


def test_integers_and_booleans():
    generator = torch.Generator().manual_seed(0)
    k = torch.randint(0, 4, (64, 200), generator=generator)
    assert check_mcmc({"k": k, "b": k > 1}, num_superchains=16).passed


def test_few_draws_are_too_few_to_judge():
    verdict = check_mcmc({"x": chains(4, 5)})
    assert failed(verdict) == ["R̂", "ESS"]
    assert "expected at least 10 draws a chain" in verdict.checks[0].message
    for num_samples in (1, 2, 3):
        assert not check_mcmc({"x": chains(64, num_samples)}, num_superchains=16)


def test_one_chain_is_held_against_itself():
    x = chains(1, 4000, entries=1)
    assert check_mcmc({"x": x}).passed
    x[:, 2000:] += 1.0
    assert "R̂" in failed(check_mcmc({"x": x}))


def test_what_was_not_recorded_is_said():
    verdict = check_mcmc({"x": chains(4, 1000)})
    assert verdict.passed
    assert verdict.headline.endswith("not checked: E-BFMI, divergences")
    assert [check.passed for check in verdict.checks[3:]] == [None, None]
    assert "E-BFMI not checked: the run has no record of energies" in str(verdict)


def test_superchains_choose_the_kind_of_r_hat():
    x = chains(64, 200)
    kinds = {1: "R̂", 16: "nested R̂", 64: "R̂"}
    for number, kind in kinds.items():
        assert check_mcmc({"x": x}, num_superchains=number).checks[0].name == kind
    assert check_mcmc({"x": x}).checks[0].name == "R̂"


def test_thresholds_are_arguments():
    x = chains(64, 200)
    assert failed(check_mcmc({"x": x}, num_superchains=16, min_ess=1e6)) == ["ESS"]
    assert failed(check_mcmc({"x": x}, num_superchains=16, max_r_hat=1.0)) == ["nested R̂"]
    assert failed(check_mcmc(sampled(x), min_bfmi=1.9)) == ["E-BFMI"]


def test_the_verdict_reads_and_raises():
    x = chains(256, 100)
    x[17] += 8.0
    verdict = check_mcmc({"x": x}, num_superchains=16)
    assert isinstance(verdict, Verdict)
    assert not verdict
    assert verdict.headline == "FAILED (chains): 256 chains of 100 draws from 16 starts"
    lines = str(verdict).splitlines()
    assert lines[0] == verdict.headline
    assert len(lines) == 6
    assert lines[3].startswith("  chains FAILED: chain 17 stayed away")
    with pytest.raises(ConvergenceError, match=r"FAILED \(chains\)") as caught:
        verdict.raise_if_failed()
    assert caught.value.verdict is verdict
    assert isinstance(caught.value, ValueError)
    assert all(isinstance(check, Check) for check in verdict.checks)


# -- who drew them --------------------------------------------------------------------------


def normal():
    pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def test_our_hmc():
    mcmc = HMC(normal, 64, 100, 100, progress=False, compile=False, seed=0)
    mcmc.run()
    verdict = check_mcmc(mcmc)
    assert verdict.checks[0].name == "nested R̂"
    assert all(check.passed for check in verdict.checks)
    assert check_r_hat(mcmc).value == pytest.approx(
        max(float(value) for value in mcmc.diagnostics()["x"]["r_hat"])
    )


def test_pyro_mcmc():
    mcmc = MCMC(NUTS(normal), num_samples=30, warmup_steps=100, disable_progbar=True)
    mcmc.run()
    checks = {check.name: check for check in check_mcmc(mcmc).checks}
    assert checks["divergences"].passed
    assert checks["E-BFMI"].passed is None
    assert checks["ESS"].passed is False


def test_divergences_of_pyro_mcmc():
    class Recorded:
        """What Pyro's MCMC shows."""

        def get_samples(self, group_by_chain):
            assert group_by_chain
            return {"x": chains(2, 50)}

        def diagnostics(self):
            return {"divergences": {"chain 0": [], "chain 1": [3, 7, 8]}}

    check = check_divergences(Recorded())
    assert check.passed is False
    assert check.value == 0.03
    assert check.where == "chain 1"


@pytest.mark.filterwarnings("ignore:More chains")
def test_inference_data_in_any_order_of_dimensions():
    data = sampled(chains(16, 50))
    expected = check_mcmc(data)
    data.posterior = data.posterior.transpose("draw", "x_dim_0", "chain")
    data.sample_stats = data.sample_stats.transpose()
    assert str(check_mcmc(data)) == str(expected)
    del data.sample_stats
    assert [check.passed for check in check_mcmc(data).checks[3:]] == [None, None]


@pytest.mark.parametrize(
    ("mcmc", "message"),
    [
        (3, "mcmc: found int; expected a run HMC or MCMC"),
        ({}, "there are no draws to check"),
        ({"x": torch.zeros(7)}, r"\{'x': \[7\]\}; expected \[num_chains, num_samples\]"),
        ({"x": torch.zeros(4, 7), "y": torch.zeros(4, 8)}, "expected .* the same for all sites"),
        ({"x": torch.zeros(4, 0)}, "found 4 chains of 0 draws"),
    ],
)
def test_bad_runs(mcmc, message):
    with pytest.raises(ValueError, match=message):
        check_mcmc(mcmc)


def test_bad_superchains():
    x = {"x": chains(4, 50)}
    with pytest.raises(ValueError, match="num_superchains: found 3; expected a divisor"):
        check_mcmc(x, num_superchains=3)
    for number in (1, 4):
        with pytest.raises(ValueError, match=f"found {number} for 4 chains; expected at least 2"):
            check_nested_r_hat(x, num_superchains=number)
