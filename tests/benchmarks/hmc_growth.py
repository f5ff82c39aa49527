"""How our time a draw grows with the number of chains and with dimension."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import matplotlib as mpl

from pyro_vae.mcmc import HMC
from pyro_vae.models import posteriors

CHAINS = [16, 64, 256, 1024, 4096]
DIMENSIONS = [10, 32, 100, 316, 1000]
NUM_DRAWS = 100
ROUNDS = 3


def seconds_a_draw(model: Callable, args: tuple, num_chains: int) -> float:
    """Return the median seconds of one iteration of all chains, after compilation and warm-up."""
    mcmc = HMC(model, num_chains, NUM_DRAWS, 200, progress=False, compile=True, seed=0)
    mcmc.warmup(*args)
    found = []
    for k in range(ROUNDS + 1):
        mcmc.seed = k
        started = time.perf_counter()
        mcmc.run(*args)
        found.append((time.perf_counter() - started) / NUM_DRAWS)
    return statistics.median(found[1:])  # the first may compile


def growth(path: str) -> list[dict[str, Any]]:
    """Measure, plot and return the times."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    records = []
    args = posteriors.hierarchical_regression_data()
    for num_chains in CHAINS:
        seconds = seconds_a_draw(posteriors.hierarchical_regression, args, num_chains)
        records.append({"posterior": "hierarchical_regression", "num_chains": num_chains})
        records[-1] |= {"dim": 85, "seconds": seconds}
    for dim in DIMENSIONS:
        args = posteriors.correlated_gaussian_data(dim, 100.0)
        seconds = seconds_a_draw(posteriors.correlated_gaussian, args, 256)
        records.append({"posterior": "correlated_gaussian", "num_chains": 256})
        records[-1] |= {"dim": dim, "seconds": seconds}

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    panels = [
        ("num_chains", "chains", "hierarchical_regression", "85 dimensions"),
        ("dim", "dimension", "correlated_gaussian", "256 chains, condition number 100"),
    ]
    print("\n| posterior | chains | dimension | ms an iteration | µs a draw of one chain |")
    print("|---|---|---|---|---|")
    for axis, (key, label, posterior, note) in zip(axes, panels, strict=True):
        of_panel = [record for record in records if record["posterior"] == posterior]
        x = [record[key] for record in of_panel]
        axis.loglog(x, [r["seconds"] for r in of_panel], "o-", label="all chains")
        each = [r["seconds"] / r["num_chains"] for r in of_panel]
        axis.loglog(x, each, "s--", label="per chain")
        axis.set(xlabel=label, ylabel="seconds a draw", title=f"{posterior}\n{note}")
        axis.title.set_size(9)
        axis.grid(True, which="major", alpha=0.3)
        axis.legend()
        for record, per_chain in zip(of_panel, each, strict=True):
            print(
                f"| {posterior} | {record['num_chains']} | {record['dim']} "
                f"| {1e3 * record['seconds']:.2f} | {1e6 * per_chain:.2f} |"
            )
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return records
