"""Figures 1, 3 and 4 of adversarial variational Bayes: guides beside HMC on three posteriors.

    python tutorials/results/avb_posteriors.py             # seeds 0 to 2
    python tutorials/results/avb_posteriors.py --fast --out /tmp/posteriors.csv

Rows go to avb_posteriors.csv as they come. `mass` is the guide's share of the half space that has
one half by symmetry; `curve` the kNN KL to HMC at some steps of the fit, on fewer draws.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from avb_pixels import write

from pyro_vae import compare
from pyro_vae.compare import Comparison
from pyro_vae.guides import AutoImplicit
from pyro_vae.models import eight_schools_avb, rosenbrock, torus

#: Model, and the site (and its element) whose sign is arbitrary.
MODELS = {
    "eight_schools": (eight_schools_avb, "tau", ()),
    "torus": (torus, "x", (0,)),
    "rosenbrock": (rosenbrock, "x", (1,)),
}
SMALL = {"num_steps": 40, "num_chains": 128, "num_samples": 400, "num_draws": 500}


def run(name: str, seed: int = 0, **kwargs) -> tuple[Comparison, list[dict]]:
    """Compare guides on one posterior; return the comparison and its rows."""
    model, site, element = MODELS[name]
    guides: dict = {guide: guide for guide in ("mean_field", "full_rank", "implicit")}
    options = {"implicit": {"num_steps": 2000}}
    if name == "eight_schools":
        guides["flow"] = "flow"
        # Algorithm 1; the other two posteriors have no prior to contrast with
        guides["implicit, prior contrast"] = AutoImplicit(model, contrast="prior")
        options = {label: {"num_steps": 4000} for label in guides if "implicit" in label}
    kwargs.setdefault("options", options)
    comparison = compare(model, guides, seed=seed, progress=False, **kwargs)
    rows = []
    for row in comparison.table.to_dict("records"):
        draws = comparison.draws[row["guide"]][site]
        curve = comparison.curves.get(row["guide"], [])
        row["mass"] = float((draws[(slice(None), *element)] > 0).mean())
        row["curve"] = " ".join(f"{step}:{kl:.4g}" for step, kl in curve)
        rows.append({"model": name, "seed": seed, **row})
    return comparison, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--fast", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, started = [], time.perf_counter()
    for seed in args.seeds:
        for name in args.models:
            rows += run(name, seed, **(SMALL | {"options": {}} if args.fast else {}))[1]
            write(args.out, rows, "python tutorials/results/avb_posteriors.py", started)
            print(*[f"{r['guide']} {r['knn_kl']:.3f}" for r in rows[-6:]], flush=True)


if __name__ == "__main__":
    main()
