"""HMC beside its peers on Eight Schools: effective draws a second, each sampler in turn.

    python tests/benchmarks/hmc.py

Prints Markdown: for the two-mode posterior of the AVB paper and for Gelman's non-centred one, the
smallest bulk ESS over all parameters and their squares (arviz, all chains), divided by the seconds
after compilation with the warm-up counted, of our HMC (256 chains), of NumPyro's NUTS (64
vectorised chains) and of Pyro's NUTS (one chain, jit on). Each runs 500 warm-up steps and 2000
draws a chain, Pyro's 100 and 200; the more chains, the less the warm-up weighs.
"""

from __future__ import annotations

import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as ndist
import numpyro.infer
import pyro.infer
import torch

from pyro_vae.mcmc import HMC
from pyro_vae.models import eight_schools as es

ROUNDS = 3


def numpyro_avb(y: jnp.ndarray, sigma: jnp.ndarray) -> None:
    mu = numpyro.sample("mu", ndist.Normal(0, 1))
    tau = numpyro.sample("tau", ndist.Normal(0, 1))
    with numpyro.plate("schools", len(y)):
        eta = numpyro.sample("eta", ndist.Normal(0, 1))
        numpyro.sample("y", ndist.Normal(mu + tau * eta, sigma), obs=y)


def numpyro_noncentered(y: jnp.ndarray, sigma: jnp.ndarray) -> None:
    mu = numpyro.sample("mu", ndist.Normal(0, 5))
    tau = numpyro.sample("tau", ndist.HalfCauchy(5))
    with numpyro.plate("schools", len(y)):
        theta = numpyro.sample("theta_trans", ndist.Normal(0, 1))
        numpyro.sample("y", ndist.Normal(mu + tau * theta, sigma), obs=y)


POSTERIORS = {
    "eight_schools_avb": (es.eight_schools_avb, numpyro_avb, es.Y_AVB, es.SIGMA_AVB),
    "eight_schools_noncentered": (
        es.eight_schools_noncentered,
        numpyro_noncentered,
        es.Y_GELMAN,
        es.SIGMA_GELMAN,
    ),
}


def min_ess(draws: dict[str, np.ndarray]) -> float:
    """Return the smallest bulk ESS of draws [chains, n, *site] and of their squares."""
    smallest = []
    for x in draws.values():
        x = np.asarray(x, dtype=np.float64).reshape(*x.shape[:2], -1)
        for k in range(x.shape[2]):
            smallest += [float(az.ess(x[:, :, k])), float(az.ess(x[:, :, k] ** 2))]
    return min(smallest)


def ours(model: Callable, _: Callable, y: torch.Tensor, sigma: torch.Tensor) -> Callable:
    mcmc = HMC(model, num_chains=256, num_samples=2000, warmup_steps=500, progress=False)

    def run(seed: int) -> dict[str, np.ndarray]:
        mcmc.seed = seed
        mcmc.run(y, sigma)
        return {name: x.numpy() for name, x in mcmc.get_samples(group_by_chain=True).items()}

    return run


def numpyro_nuts(_: Callable, model: Callable, y: torch.Tensor, sigma: torch.Tensor) -> Callable:
    mcmc = numpyro.infer.MCMC(
        numpyro.infer.NUTS(model),
        num_warmup=500,
        num_samples=2000,
        num_chains=64,
        chain_method="vectorized",
        progress_bar=False,
    )
    data = jnp.asarray(y.numpy()), jnp.asarray(sigma.numpy())

    def run(seed: int) -> dict[str, np.ndarray]:
        mcmc.run(jax.random.key(seed), *data)
        return {name: np.asarray(x) for name, x in mcmc.get_samples(group_by_chain=True).items()}

    return run


def pyro_nuts(model: Callable, _: Callable, y: torch.Tensor, sigma: torch.Tensor) -> Callable:
    def run(seed: int) -> dict[str, np.ndarray]:
        torch.manual_seed(seed)
        kernel = pyro.infer.NUTS(model, jit_compile=True, ignore_jit_warnings=True)
        mcmc = pyro.infer.MCMC(kernel, num_samples=200, warmup_steps=100, disable_progbar=True)
        mcmc.run(y, sigma)
        return {name: x.numpy() for name, x in mcmc.get_samples(group_by_chain=True).items()}

    return run


SAMPLERS = {"pyro_vae HMC": ours, "NumPyro NUTS": numpyro_nuts, "Pyro NUTS": pyro_nuts}


def main() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("arviz").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print("| posterior | sampler | ESS / s, median | seconds, median | ours is faster by |")
    print("|---|---|---|---|---|")
    for name, posterior in POSTERIORS.items():
        runs = {label: make(*posterior) for label, make in SAMPLERS.items()}
        for label in ("pyro_vae HMC", "NumPyro NUTS"):
            runs[label](0)  # compiles
        rates: dict[str, list[float]] = {label: [] for label in runs}
        seconds: dict[str, list[float]] = {label: [] for label in runs}
        for seed in range(1, ROUNDS + 1):
            for label, run in runs.items():
                started = time.perf_counter()
                draws = run(seed)
                seconds[label].append(time.perf_counter() - started)
                rates[label].append(min_ess(draws) / seconds[label][-1])
        for label in runs:
            ratios = [a / b for a, b in zip(rates["pyro_vae HMC"], rates[label], strict=True)]
            print(
                f"| {name} | {label} | {statistics.median(rates[label]):,.0f} "
                f"| {statistics.median(seconds[label]):.1f} | {statistics.median(ratios):.1f}× |",
                flush=True,
            )


if __name__ == "__main__":
    main()
