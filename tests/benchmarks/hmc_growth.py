"""How our time a draw grows with the number of chains and with dimension."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from hmc_samplers import timed_hmc

from pyro_vae.models import posteriors

CHAINS = [16, 64, 256, 1024, 4096]
DIMENSIONS = [10, 32, 100, 316, 1000]
NUM_DRAWS, WARMUP_STEPS, ROUNDS = 50, 150, 3


def seconds_a_draw(model: Callable, args: tuple, num_chains: int) -> float:
    """Return the median seconds of one iteration of all chains, after compilation and warm-up."""
    mcmc = timed_hmc(
        model, num_chains, NUM_DRAWS, WARMUP_STEPS, compile=True, progress=False, seed=0
    )
    mcmc.warmup(*args)
    found = []
    for k in range(ROUNDS + 1):
        mcmc.seed = k
        mcmc.run(*args)
        found.append((time.perf_counter() - mcmc.sampling_started) / NUM_DRAWS)
    return statistics.median(found[1:])  # the first may compile


def growth(path: str) -> list[dict[str, Any]]:
    """Measure, plot and return the times."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    print("\n| posterior | chains | dimension | ms an iteration | µs a draw of one chain |")
    print("|---|---|---|---|---|", flush=True)
    records: list[dict[str, Any]] = []

    def measure(posterior: str, args: tuple, num_chains: int, dim: int) -> None:
        seconds = seconds_a_draw(getattr(posteriors, posterior), args, num_chains)
        records.append({"posterior": posterior, "num_chains": num_chains, "dim": dim})
        records[-1] |= {"seconds": seconds}
        print(
            f"| {posterior} | {num_chains} | {dim} | {1e3 * seconds:.2f} "
            f"| {1e6 * seconds / num_chains:.2f} |",
            flush=True,
        )

    for num_chains in CHAINS:
        args = posteriors.hierarchical_regression_data()
        measure("hierarchical_regression", args, num_chains, 85)
    for dim in DIMENSIONS:
        # A density that costs as much as it has dimensions: what grows is the sampler's share.
        measure("funnel_noncentered", (posteriors.FUNNEL_SCALE, dim), 256, dim)

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    panels = [
        ("num_chains", "chains", "hierarchical_regression", "85 dimensions"),
        ("dim", "dimension", "funnel_noncentered", "256 chains"),
    ]
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
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return records
