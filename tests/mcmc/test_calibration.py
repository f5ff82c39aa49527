"""Simulation-based calibration: ranks of true values among the posterior draws are uniform.

References:
    | Validating Bayesian inference algorithms with simulation-based calibration (Talts, Betancourt,
      Simpson, Vehtari, Gelman, 2018)
    | https://arxiv.org/abs/1804.06788
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from pyro_vae.mcmc import HMC
from pyro_vae.models import eight_schools_noncentered

# One draw of each chain makes ranks from 0 to 63, in eight bins of eight ranks.
NUM_CHAINS, NUM_BINS, NUM_DATA = 63, 8, 128


def eight_schools(y=None):
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    eight_schools_noncentered(y, sigma)


def counts(y=None):
    """Sites on an interval, a half line and a simplex."""
    shares = pyro.sample("shares", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    rate = pyro.sample("rate", dist.Gamma(3.0, 0.1))
    seen = pyro.sample("seen", dist.Uniform(0.2, 0.9))
    with pyro.plate("kinds", 3):
        pyro.sample("y", dist.Poisson(rate * seen * shares), obs=y)


def regression(y=None, noise=1.0):
    x = torch.linspace(-1, 1, 12)
    slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    group = torch.arange(12) % 3
    with pyro.plate("groups", 3):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 12):
        pyro.sample("y", dist.Normal(slope * x + level[group], noise * scale), obs=y)


def smallest_p_value(model, seed, num_data=NUM_DATA, **truth):
    """Return the smallest p-value of uniform ranks over all entries, times their number."""
    mcmc = HMC(model, NUM_CHAINS, 8, 150, compile=True, progress=False)
    ranks = []
    for index in range(num_data):
        pyro.set_rng_seed(seed * num_data + index)
        trace = pyro.poutine.trace(model).get_trace(**truth)
        mcmc.seed = 10_000 + index  # not the truth's: chains start at draws of the prior
        mcmc.run(trace.nodes["y"]["value"])
        below = {
            name: (draws[:, -1] < trace.nodes[name]["value"]).sum(0).flatten()
            for name, draws in mcmc.get_samples(group_by_chain=True).items()
        }
        # The log likelihood sees what single entries do not.
        likelihood = torch.stack(
            [
                x.flatten(1).sum(1)
                for x in mcmc.model_density.log_likelihood(mcmc.unconstrained[:, -1]).values()
            ]
        ).sum(0)
        site = trace.nodes["y"]
        below["log likelihood"] = (
            (likelihood < site["fn"].log_prob(site["value"]).sum()).sum().reshape(1)
        )
        ranks.append(torch.cat(list(below.values())))
    bins = torch.stack(ranks) * NUM_BINS // (NUM_CHAINS + 1)  # [num_data, entries]
    p_values = [
        stats.chisquare(torch.bincount(entry, minlength=NUM_BINS).numpy()).pvalue
        for entry in bins.T
    ]
    return min(p_values) * len(p_values)


@pytest.mark.slow
@pytest.mark.parametrize("model", [eight_schools, counts, regression])
def test_ranks_are_uniform(model):
    """By Bonferroni a calibrated sampler fails here with a probability below 1%."""
    assert smallest_p_value(model, seed=0) > 0.01


@pytest.mark.slow
def test_a_wrong_posterior_is_seen():
    """Data with noise twice the model's: its posterior is too narrow."""
    assert smallest_p_value(regression, seed=0, num_data=32, noise=2.0) < 0.01
