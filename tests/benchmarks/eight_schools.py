"""The main job over ten seeds: how far is each guide from HMC, and is HMC the truth?

    python tests/benchmarks/eight_schools.py                 # seeds 0 to 9
    python tests/benchmarks/eight_schools.py --seeds 0-1

Runs what `pyro-vae compare eight_schools_avb` runs, once a seed, and prints Markdown: the kNN KL of
each guide to HMC (median, worst), the implicit guide's mass of τ > 0, and for HMC the worst nested
R̂, the means of τ and η in Monte Carlo standard errors from their true value 0, divergences, and
the time for 500,000 draws. Rows go to out/benchmarks/eight_schools.csv as they come.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import arviz as az
import numpy as np
import pandas as pd

from pyro_vae import compare
from pyro_vae.compare import GUIDES
from pyro_vae.mcmc import HMC
from pyro_vae.models import eight_schools_avb

OUT = Path("out/benchmarks/eight_schools.csv")


def zero_mean_z_scores(mcmc: HMC) -> list[float]:
    """Return |mean| / Monte Carlo standard error of τ and each η, whose means are 0 exactly."""
    scores = []
    for site in ("tau", "eta"):
        draws = mcmc.get_samples(group_by_chain=True)[site].double().numpy()
        for x in np.moveaxis(draws.reshape(*draws.shape[:2], -1), 2, 0):
            scores.append(abs(float(x.mean())) / float(az.mcse(x, method="mean")))
    return scores


def run(seed: int, num_steps: int | None) -> list[dict]:
    started = time.perf_counter()
    comparison = compare(
        eight_schools_avb, tuple(GUIDES), seed=seed, num_steps=num_steps, progress=False
    )
    total = time.perf_counter() - started
    rows = comparison.table.assign(seed=seed, total_seconds=total).to_dict("records")
    for row in rows:
        draws = comparison.draws.get(row["guide"])
        row["mass_tau_positive"] = math.nan if draws is None else float((draws["tau"] > 0).mean())
    mcmc = comparison.reference
    diagnostics = mcmc.diagnostics()
    started = time.perf_counter()
    again = HMC(eight_schools_avb, 256, mcmc.num_samples, progress=False, seed=seed)
    again.run()
    rows[0] |= {
        "draws": mcmc.num_chains * mcmc.num_samples,
        "worst_r_hat": max(float(diagnostics[s]["r_hat"].max()) for s in ("mu", "tau", "eta")),
        "worst_nested_r_hat": max(
            float(diagnostics[s]["nested_r_hat"].max()) for s in ("mu", "tau", "eta")
        ),
        "worst_mean_z": max(zero_mean_z_scores(mcmc)),
        "divergences": sum(len(chain) for chain in diagnostics["divergences"].values()),
        "seconds_compiled": time.perf_counter() - started,
    }
    return rows


def report(rows: pd.DataFrame) -> str:
    lines = [
        "| guide | kNN KL to HMC, median | worst | claimed or true ELBO, median | k̂, median "
        "| mass of τ > 0 | fit, median s |",
        "|---|---|---|---|---|---|---|",
    ]
    for guide, group in rows.groupby("guide", sort=False):
        mass = group["mass_tau_positive"]
        cells = [
            str(guide),
            f"{group['knn_kl'].median(skipna=False):.3f}",
            f"{group['knn_kl'].max(skipna=False):.3f}",
            f"{group['elbo'].median():.2f}",
            f"{group['khat'].median():.2f}",
            f"{mass.min():.2f} … {mass.max():.2f}",
            f"{group['seconds'].median():.0f}",
        ]
        # A failed fit shows as nan in the first columns; the others may not apply.
        cells[3:] = ["" if "nan" in cell else cell for cell in cells[3:]]
        lines.append("| " + " | ".join(cells) + " |")
    hmc = rows[rows["guide"] == "hmc"]
    lines += [
        "",
        f"HMC over {len(hmc)} seeds: {int(hmc['draws'].min()):,} draws each; worst nested R̂ "
        f"{hmc['worst_nested_r_hat'].max():.4f} (plain R̂ {hmc['worst_r_hat'].max():.4f}); "
        f"|E τ| and |E η| at most {hmc['worst_mean_z'].max():.1f} Monte Carlo standard errors "
        f"from 0; {int(hmc['divergences'].sum())} divergences; "
        f"{hmc['seconds_compiled'].median():.1f} s median, warm-up included, once compiled. "
        f"The whole comparison: median {rows['total_seconds'].median():.0f} s, "
        f"longest {rows['total_seconds'].max():.0f} s.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0-9", help="a range such as 0-9, or one seed")
    parser.add_argument("--steps", type=int, help="optimisation steps of every guide")
    arguments = parser.parse_args()
    first, _, last = arguments.seeds.partition("-")
    rows: list[dict] = []
    OUT.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(int(first), int(last or first) + 1):
        rows += run(seed, arguments.steps)
        pd.DataFrame(rows).to_csv(OUT, index=False)
        kls = ", ".join(f"{r['guide']} {r['knn_kl']:.3f}" for r in rows if r["seed"] == seed)
        print(f"seed {seed}: {kls}", flush=True)
    print("\n" + report(pd.DataFrame(rows)))


if __name__ == "__main__":
    main()
