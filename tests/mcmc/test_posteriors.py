"""HMC on ten posteriors, against closed forms, quadrature and long runs of Pyro's NUTS."""

import json
import warnings
from pathlib import Path

import pytest
import torch

from pyro_vae.mcmc import HMC
from pyro_vae.models.posteriors import POSTERIORS

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    import arviz

# Written by tests/benchmarks/hmc_reference.py: mean and sd by Pyro's NUTS, with standard errors.
REFERENCES = Path(__file__).parent / "references.json"

OPTIONS = {
    # Its neck wants more draws and smaller steps than others.
    "eight_schools_centered": {"num_samples": 4000, "target_accept": 0.95, "warmup_steps": 500},
    "eight_schools_avb": {"num_samples": 2000},
    # Half a millisecond a gradient, on a hundred points.
    "gaussian_process": {"num_chains": 64, "num_samples": 100, "warmup_steps": 150},
}


def truth(name, data):
    """Return mean, sd, and the standard errors of both, by site."""
    if POSTERIORS[name].mean_sd is not None:
        moments = POSTERIORS[name].mean_sd(*data)
        return {site: (mean, sd, 0.0, 0.0) for site, (mean, sd) in moments.items()}
    return {
        site: [torch.tensor(found[key]).double() for key in ("mean", "sd", "mean_se", "sd_se")]
        for site, found in json.loads(REFERENCES.read_text())[name].items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", POSTERIORS)
def test_moments_within_four_standard_errors_and_checks_passed(name):
    data = POSTERIORS[name].data(torch.float32, 0)
    options = {"num_samples": 500, **OPTIONS.get(name, {})}
    mcmc = HMC(POSTERIORS[name].model, progress=False, seed=1, **options)
    mcmc.run(*data)
    verdict = mcmc.check()
    print(f"{name}: {verdict}")
    if name == "eight_schools_centered":  # a funnel, whose energy mixes slowly
        assert {check.name for check in verdict.failed} <= {"E-BFMI", "divergences"}, str(verdict)
    else:
        assert verdict.passed, str(verdict)
    samples = mcmc.get_samples(group_by_chain=True)
    exact = truth(name, data)
    assert set(exact) == set(samples)
    for site, draws in samples.items():
        flat = draws.double().flatten(2) if draws.dim() > 2 else draws.double().unsqueeze(-1)
        for index in range(flat.shape[-1]):
            x = flat[..., index].numpy()
            mean, sd, mean_se, sd_se = (
                float(
                    torch.as_tensor(v)
                    .double()
                    .flatten()[index if torch.as_tensor(v).numel() > 1 else 0]
                )
                for v in exact[site]
            )
            for what, found, wanted, error, own in [
                ("mean", x.mean(), mean, arviz.mcse(x, method="mean"), mean_se),
                ("sd", x.std(), sd, arviz.mcse(x, method="sd"), sd_se),
            ]:
                bound = 4 * (float(error) ** 2 + own**2) ** 0.5
                assert abs(found - wanted) < bound, (name, site, index, what, found, wanted, bound)
