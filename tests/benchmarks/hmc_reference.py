"""The true mean and standard deviation of every site of the ten posteriors, for the tests of HMC.

    python tests/benchmarks/hmc_reference.py

Writes tests/mcmc/references.json. Where `pyro_vae.models.posteriors` has a closed form or a
quadrature, that is written, marked "exact". Elsewhere Pyro's own NUTS runs (jit, float64, chains
one after another, each from a start of its own) until the effective sample size of every parameter
and of its square is 4000 or more, and the Monte Carlo standard errors of both are written too.
"""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import arviz as az
import numpy as np
import torch
from hmc import min_ess
from pyro.infer import MCMC, NUTS

from pyro_vae.models.posteriors import POSTERIORS, Posterior

PATH = Path(__file__).resolve().parent.parent / "mcmc" / "references.json"
LEAST_ESS = 4000
LEAST_CHAINS, MOST_CHAINS = 4, 40
WARMUP_STEPS, NUM_DRAWS = 500, 1000


def rounded(values: torch.Tensor | np.ndarray, digits: int = 6) -> list | float:
    """Return nested lists of numbers with so many significant digits."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim == 0:
        value = float(f"{float(values):.{digits}g}")
        return value if abs(value) > 1e-12 else 0.0  # what rounding has left of a zero
    return [rounded(value, digits) for value in values]


def exact(posterior: Posterior) -> dict[str, dict]:
    assert posterior.mean_sd is not None
    found = posterior.mean_sd(*posterior.data(torch.float64, 0))
    return {
        site: {"mean": rounded(mean), "sd": rounded(sd), "exact": True}
        for site, (mean, sd) in found.items()
    }


def by_nuts(posterior: Posterior) -> dict[str, dict]:
    args = posterior.data(torch.float64, 0)
    chains: list[dict[str, np.ndarray]] = []
    while True:
        torch.manual_seed(len(chains))
        kernel = NUTS(posterior.model, jit_compile=True, ignore_jit_warnings=True)
        mcmc = MCMC(kernel, NUM_DRAWS, WARMUP_STEPS, disable_progbar=True)
        mcmc.run(*args)
        chains.append({site: x.numpy() for site, x in mcmc.get_samples().items()})
        if len(chains) < LEAST_CHAINS:
            continue
        draws = {site: np.stack([chain[site] for chain in chains]) for site in chains[0]}
        ess = min_ess(draws)
        print(f"{len(chains)} chains of {NUM_DRAWS} draws: smallest ESS {ess:,.0f}", flush=True)
        if ess >= LEAST_ESS:
            break
        if len(chains) == MOST_CHAINS:
            raise SystemExit(f"found an ESS of {ess:,.0f}; expected {LEAST_ESS:,}")
    result = {}
    for site, x in draws.items():
        mean, sd = x.mean((0, 1)), x.std((0, 1))
        # By the delta method the error of a standard deviation is that of the variance over 2 sd.
        errors = {"mean_se": standard_error(x), "sd_se": standard_error((x - mean) ** 2)}
        errors["sd_se"] /= 2 * sd
        result[site] = {"mean": rounded(mean), "sd": rounded(sd)}
        result[site] |= {name: rounded(error, 2) for name, error in errors.items()}
    return result


def standard_error(x: np.ndarray) -> np.ndarray:
    """Return the Monte Carlo standard errors of the means of draws [chains, n, *site]."""
    columns = x.reshape(*x.shape[:2], -1)
    ess = [az.ess(columns[:, :, k], method="mean") for k in range(columns.shape[2])]
    return x.std((0, 1)) / np.sqrt(np.reshape(ess, x.shape[2:]))


def main() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("arviz").setLevel(logging.ERROR)
    references = {}
    for name, posterior in POSTERIORS.items():
        print(name, flush=True)
        references[name] = exact(posterior) if posterior.mean_sd else by_nuts(posterior)
    lines = [
        f'  "{name}": {{\n'
        + ",\n".join(f'    "{site}": {json.dumps(found)}' for site, found in sites.items())
        + "\n  }"
        for name, sites in references.items()
    ]
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"written to {PATH}")


if __name__ == "__main__":
    main()
