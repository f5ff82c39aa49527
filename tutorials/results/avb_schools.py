"""Eight Schools: adversarial variational Bayes with and without adaptive contrast.

    python tutorials/results/avb_schools.py                # seeds 0 to 2
    python tutorials/results/avb_schools.py --resume       # go on after the rows that are there
    python tutorials/results/avb_schools.py --fast --out /tmp/schools.csv

Rows go to avb_schools.csv as they come. Both guides have the same recipe; of each, the KL
divergence from HMC by nearest neighbours, the discriminator's claim, and the mass of τ > 0.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from avb_pixels import read, write

from pyro_vae import compare
from pyro_vae.guides import AutoImplicit
from pyro_vae.models import eight_schools_avb

CONTRASTS = ("prior", "adaptive")
SMALL = {"num_chains": 128, "num_samples": 400, "num_draws": 500, "num_steps": 20}


def judge(contrast: str, seed: int, fast: bool = False) -> dict[str, float]:
    """Fit one guide and return its row."""
    torch.manual_seed(seed)  # the guide is made here, and fitted under the seed of `compare`
    guide = AutoImplicit(eight_schools_avb, contrast=contrast)
    small = SMALL if fast else {}
    found = compare(eight_schools_avb, {"AVB": guide}, seed=seed, progress=False, **small)
    row = found.table.set_index("guide").loc["AVB"]
    columns = ("knn_kl", "knn_kl_se", "elbo", "max_mean_error", "max_sd_error")
    positive = (found.draws["AVB"]["tau"] > 0).double().mean().item()
    return {name: float(row[name]) for name in columns} | {"positive_tau": positive}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--resume", action="store_true", help="go on after the rows in the file")
    parser.add_argument("--fast", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = read(args.out, args.resume)
    done = {(row["contrast"], int(row["seed"])) for row in rows}
    for seed in args.seeds:
        for contrast in CONTRASTS:
            if (contrast, seed) in done:
                continue
            began = time.perf_counter()
            rows.append({"contrast": contrast, "seed": seed, **judge(contrast, seed, args.fast)})
            rows[-1]["seconds"] = time.perf_counter() - began
            write(args.out, rows, "python tutorials/results/avb_schools.py")
            print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
