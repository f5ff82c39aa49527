"""Are the peers' models ours? Their log densities must differ from ours by a constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import torch

from pyro_vae.capture import UnconstrainedModel
from pyro_vae.models.posteriors import POSTERIORS

POINTS = 20


def pyro_log_density(posterior: str, args: tuple) -> Callable[[dict[str, np.ndarray]], float]:
    def log_density(values: dict[str, np.ndarray]) -> float:
        at = {site: torch.as_tensor(value) for site, value in values.items()}
        conditioned = pyro.condition(POSTERIORS[posterior].model, at)
        return float(pyro.poutine.trace(conditioned).get_trace(*args).log_prob_sum())

    return log_density


def numpyro_log_density(posterior: str, args: tuple) -> Callable[[dict[str, np.ndarray]], float]:
    import jax.numpy as jnp
    import numpyro
    from hmc_numpyro import MODELS
    from numpyro.infer.util import log_density as log_density_of

    numpyro.enable_x64()
    arrays = [jnp.asarray(a.numpy()) if isinstance(a, torch.Tensor) else a for a in args]
    return lambda values: float(log_density_of(MODELS[posterior], arrays, {}, values)[0])


def pymc_log_density(posterior: str, args: tuple) -> Callable[[dict[str, np.ndarray]], float]:
    import pymc as pm
    from hmc_pymc import MODELS

    arrays: list[Any] = [a.numpy() if isinstance(a, torch.Tensor) else a for a in args]
    with pm.Model() as model:
        MODELS[posterior](*arrays)
    log_density_of = model.compile_fn(model.logp(jacobian=False))

    def log_density(values: dict[str, np.ndarray]) -> float:
        point = {}
        for variable in model.free_RVs:
            value, transform = values[variable.name], model.rvs_to_transforms[variable]
            if transform is not None:
                value = transform.forward(value, *variable.owner.inputs).eval()
            point[model.rvs_to_values[variable].name] = value
        return float(log_density_of(point))

    return log_density


PEERS = {"NumPyro": numpyro_log_density, "PyMC": pymc_log_density}


def check(posteriors: list[str]) -> None:
    """Print by how much the differences of log densities vary; exit with 1 if they do.

    The points are draws around the origin of unconstrained space, in float64.
    """
    print("\nLog density minus ours, at 20 points: by how much it varies")
    print("\n| posterior | " + " | ".join(PEERS) + " |\n|---|" + "---|" * len(PEERS))
    worst = 0.0
    for posterior in posteriors:
        model, data, _ = POSTERIORS[posterior]
        args = data(torch.float64, 0)
        density = UnconstrainedModel(model, args)
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(POINTS, density.dim, generator=generator, dtype=torch.float64)
        values = [{k: v.numpy() for k, v in density.constrain(row).items()} for row in z]
        ours = np.array([pyro_log_density(posterior, args)(value) for value in values])
        spreads = []
        for make in PEERS.values():
            log_density = make(posterior, args)
            difference = np.array([log_density(value) for value in values]) - ours
            spreads.append(float(np.ptp(difference)))
        worst = max(worst, *spreads)
        print(f"| {posterior} | " + " | ".join(f"{x:.1e}" for x in spreads) + " |", flush=True)
    if not worst < 1e-6:
        raise SystemExit(f"the posteriors differ: found a spread of {worst:.1e}; expected none")
