"""Table 1 of adversarial variational Bayes: four images of 2×2 pixels, one pixel on in each.

    python tutorials/results/avb_pixels.py                 # seeds 0 to 2
    python tutorials/results/avb_pixels.py --resume        # go on after the rows that are there
    python tutorials/results/avb_pixels.py --fast --out /tmp/pixels.csv

Rows go to avb_pixels.csv as they come. log p(x) is by quadrature over z, the ELBO by the guide's
word and, whatever the guide, by nearest neighbours between draws.
"""

from __future__ import annotations

import argparse
import csv
import math
import shlex
import sys
import time
from functools import partial
from pathlib import Path

import pyro
import torch
from torch import Tensor, nn

from pyro_vae import evaluate, fit
from pyro_vae.data import load
from pyro_vae.divergences import knn_kl
from pyro_vae.fit import cosine
from pyro_vae.guides import Flow, Gaussian, Implicit
from pyro_vae.losses import AVB_ELBO
from pyro_vae.models import VAE, Bernoulli
from pyro_vae.nn import MLP, TwoTowerDiscriminator

GUIDES = ("VAE", "AVB")  # and "AVB + AC", "flow"
NUM_STEPS = 25_000  # of AVB; 3000 of the others
X = load("four_pixels").train.x.flatten(1).unique(dim=0)  # [4, 4], one pixel on in each


def make_guide(name: str) -> nn.Module:
    """Make a guide of 128 units a layer, where the paper has 512."""
    if name == "VAE":
        return Gaussian(MLP(4, 128, (128,), nn.LeakyReLU), 2)
    if name == "flow":
        return Flow(MLP(4, 128, (128,), nn.LeakyReLU), 2)
    return Implicit(
        MLP(4 + 8, 128, (128,), nn.LeakyReLU),
        2,
        noise="input",
        noise_dim=8,
        contrast="adaptive" if name == "AVB + AC" else "prior",
        discriminator=TwoTowerDiscriminator(4, 2, (128, 128), 128),
    )


def train(name: str, seed: int = 0, num_steps: int | None = None, loss=None, steps: int = 2):
    """Return the model and the guide after training; ``steps`` are the adversary's to each."""
    torch.manual_seed(seed)
    pyro.clear_param_store()
    model = VAE(MLP(2, 4, (128, 128), nn.LeakyReLU), Bernoulli(), 2, (4,))
    guide = make_guide(name)
    if loss is None:
        loss = AVB_ELBO(64, num_adversary_particles=64, max_plate_nesting=1)
    rate = partial(torch.optim.Adam, lr=1e-3)
    settings = {"optim": rate, "num_steps": num_steps or 3000}
    if name.startswith("AVB"):
        rate = partial(torch.optim.Adam, lr=2e-3, betas=(0.5, 0.999), fused=True)
        settings = {
            "optim": rate,
            "adversary_optim": rate,
            "num_adversary_steps": steps,
            "schedule": cosine(end=0.03),
            "adversary_schedule": cosine(end=0.2),
            "num_steps": num_steps or NUM_STEPS,
        }
    fit(model, guide, loss, X, average=0.99, progress=False, **settings)
    return model, guide


@torch.no_grad()
def log_evidence(model: VAE) -> Tensor:
    """Return log p(x) of each image, by quadrature on a grid of z."""
    axis = torch.linspace(-6, 6, 401)
    z = torch.cartesian_prod(axis, axis)
    weight = model.prior().log_prob(z) + 2 * math.log(float(axis[1] - axis[0]))
    fn = model.likelihood(z)
    return torch.stack([(fn.log_prob(row) + weight).logsumexp(0) for row in X])


@torch.no_grad()
def judge(model: VAE, guide: nn.Module, num_draws: int = 25_000) -> dict[str, float]:
    """Return the rows of the paper's Table 1, and the ELBO by draws alone."""
    parts = evaluate.elbo(model, guide, X, num_draws)
    drawn = guide.get_posterior(X).sample((num_draws,)).transpose(0, 1)  # [4, n, 2]
    of_each = [knn_kl(z, torch.randn_like(z)) for z in drawn]
    kl = sum(found.value for found in of_each) / 4
    marginal = knn_kl(drawn.flatten(0, 1), torch.randn(4 * num_draws, 2))
    return {
        "log_likelihood": log_evidence(model).mean().item(),
        "reconstruction_error": -parts.log_likelihood.value / 4,
        "elbo": parts.elbo.value,
        "elbo_by_draws": parts.log_likelihood.value - kl,
        "elbo_by_draws_se": sum(found.standard_error**2 for found in of_each) ** 0.5 / 4,
        "marginal_kl": marginal.value,
        "marginal_kl_se": marginal.standard_error,
    }


def read(path: Path, resume: bool) -> list[dict]:
    """Return the rows that are there, if a run is to go on after them."""
    if not resume or not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def write(path: Path, rows: list[dict], *remarks: str) -> None:
    """Write all rows, under what made the last of them."""
    seconds = sum(float(row[k]) for row in rows for k in ("seconds", "judge_seconds") if k in row)
    with open(path, "w", newline="", encoding="utf-8") as file:
        command = shlex.join(
            ["python", f"tutorials/results/{Path(sys.argv[0]).name}", *sys.argv[1:]]
        )
        for remark in (command, *remarks):
            file.write(f"# {remark}\n")
        file.write(
            f"# two x86-64 cores shared with other work, one thread, torch {torch.__version__}\n"
        )
        file.write(f"# wall time {seconds:.0f} s\n")
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--guides", nargs="+", default=GUIDES)
    parser.add_argument("--resume", action="store_true", help="go on after the rows in the file")
    parser.add_argument("--fast", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = read(args.out, args.resume)
    done = {(row["guide"], int(row["seed"])) for row in rows}
    for seed in args.seeds:
        for name in args.guides:
            if (name, seed) in done:
                continue
            began = time.perf_counter()
            model, guide = train(name, seed, 20 if args.fast else None)
            seconds = time.perf_counter() - began
            found = judge(model, guide, 500 if args.fast else 25_000)
            judge_seconds = time.perf_counter() - began - seconds
            rows.append({"guide": name, "seed": seed, **found, "seconds": seconds})
            rows[-1]["judge_seconds"] = judge_seconds
            write(args.out, rows)
            print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
