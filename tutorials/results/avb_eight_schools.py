"""Eight Schools with and without adaptive contrast: how far the guide is from HMC, seed by seed.

    python tutorials/results/avb_eight_schools.py                 # seeds 0 to 2
    python tutorials/results/avb_eight_schools.py --resume        # go on after the rows in the file
    python tutorials/results/avb_eight_schools.py --fast --out /tmp/schools.csv

`pyro_vae.compare` does it all: both guides get the same noise, networks and recipe. Rows go to
avb_eight_schools.csv as they come.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from avb_pixels import read, write

from pyro_vae import compare
from pyro_vae.guides import AutoImplicit
from pyro_vae.models import eight_schools_avb

COLUMNS = ["guide", "knn_kl", "knn_kl_se", "elbo", "steps", "seconds"]


def run(seed: int, fast: bool = False) -> list[dict]:
    """Return a row for HMC and for each guide; the share of draws with τ > 0 is ½ in truth."""
    guides = {
        "AVB": AutoImplicit(eight_schools_avb, contrast="prior"),
        "AVB + AC": AutoImplicit(eight_schools_avb, contrast="adaptive"),
    }
    small = {"num_chains": 128, "num_samples": 400, "num_draws": 500} if fast else {}
    num_steps = 20 if fast else None
    comparison = compare(
        eight_schools_avb, guides, seed=seed, num_steps=num_steps, progress=False, **small
    )
    rows = comparison.table[COLUMNS].assign(seed=seed).to_dict("records")
    for row in rows:
        row["tau_positive"] = float((comparison.draws[row["guide"]]["tau"] > 0).mean())
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--resume", action="store_true", help="go on after the rows in the file")
    parser.add_argument("--fast", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = read(args.out, args.resume)
    done = {int(row["seed"]) for row in rows}
    for seed in args.seeds:
        if seed not in done:
            rows += run(seed, args.fast)
            write(args.out, rows)
            print(rows[-3:], flush=True)


if __name__ == "__main__":
    main()
