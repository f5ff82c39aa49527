"""Marginal KL of a VAE with a conditional real NVP as its guide, under the ELBO and under GECO.

    python tutorials/results/geco_marginal.py --seeds 0 1 2

One row a run in geco_marginal.csv; with --resume those that are there stay, and what is missing is
added. GECO once at κ = 0.1, and once at the error that the ELBO of the same seed reached.
Color-MNIST made smaller, to 3×14×14; 10000 images to train, all of which are the mixture q(z).
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from geco_plane import find_data, geco, small
from torch import Tensor, nn

from pyro_vae import evaluate, fit
from pyro_vae.guides import Flow
from pyro_vae.losses import BetaVAE_ELBO
from pyro_vae.nn import MLP

LATENT_DIM, HIDDEN, BATCH, LEARNING_RATE, NUM_STEPS = 16, 256, 64, 3e-3, 1500
TRAIN_SIZE, NUM_DRAWS = 10000, 300
OUT = Path(__file__).with_suffix(".csv")
COLUMNS = (
    "setting", "tolerance", "seed", "rms_error", "kl", "marginal_kl", "marginal_kl_error",
    "mutual_information", "log_det_cov", "seconds",
)  # fmt: skip
#: κ, of which the ELBO has none, and the loss; None is the error that the ELBO reached.
SETTINGS: dict[str, tuple[float | None, Callable]] = {
    "ELBO": (math.nan, BetaVAE_ELBO),
    "GECO": (0.1, partial(geco, rate=0.01)),
    "GECO at the ELBO's error": (None, geco),
}


def train(loss: Any, x: Tensor, seed: int, num_steps: int) -> tuple[Callable, Flow, nn.Module]:
    """Train a VAE on x [N, D] whose guide is a flow; the observation's scale is learned."""
    pyro.clear_param_store()
    torch.manual_seed(seed)
    decoder = nn.Sequential(MLP(LATENT_DIM, x.shape[1], (HIDDEN,), nn.ReLU), nn.Sigmoid())
    log_scale = nn.Parameter(torch.tensor(math.log(0.3)))
    decoder.register_parameter("log_scale", log_scale)

    def make_model(batch: int | None) -> Callable:
        def model(x: Tensor) -> None:
            pyro.module("decoder", decoder)
            with pyro.plate("data", len(x), subsample_size=batch) as i:
                z = pyro.sample("z", dist.Normal(torch.zeros(LATENT_DIM), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(decoder(z), log_scale.exp()).to_event(1), obs=x[i])

        return model

    encoder = MLP(x.shape[1], 32, (HIDDEN,), nn.ReLU)
    guide = Flow(encoder, LATENT_DIM, transforms=3, subsample_size=BATCH)
    adam = partial(torch.optim.Adam, lr=LEARNING_RATE)
    settings: dict[str, Any] = {"num_steps": num_steps, "optim": adam, "progress": False}
    fit(make_model(BATCH), guide, loss, x, **settings)
    guide.subsample_size = None
    return make_model(None), guide, decoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fast", action="store_true", help="a few steps and images only")
    parser.add_argument("--resume", action="store_true", help="keep the rows of an earlier run")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    num_steps, size = (20, 300) if args.fast else (NUM_STEPS, TRAIN_SIZE)
    data = find_data("color_mnist", train_size=size)
    x = small(data.train.x)
    started = time.perf_counter()
    lines = args.out.read_text().splitlines() if args.resume and args.out.exists() else []
    done = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    errors = {int(row["seed"]): float(row["rms_error"]) for row in done if row["setting"] == "ELBO"}
    present = {(row["setting"], int(row["seed"])) for row in done}
    with args.out.open("a" if lines else "w", newline="") as file:
        seeds = " ".join(map(str, args.seeds)) + (" --fast" if args.fast else "")
        seeds += " --resume" if lines else ""
        print(f"# python tutorials/results/geco_marginal.py --seeds {seeds}", file=file)
        print(f"# two x86-64 cores, one thread a run, torch {torch.__version__}", file=file)
        print(f"# {data}", file=file)
        writer = csv.writer(file)
        if not lines:
            writer.writerow(COLUMNS)
        file.flush()
        for seed in args.seeds:
            for setting, (tolerance, make) in SETTINGS.items():
                if (setting, seed) in present:
                    continue
                begun = time.perf_counter()
                if tolerance is None:
                    tolerance = errors[seed]
                loss = make() if math.isnan(tolerance) else make(tolerance)
                model, guide, _ = train(loss, x, seed, num_steps)
                seconds = time.perf_counter() - begun
                torch.manual_seed(1000)
                parts = evaluate.elbo(model, guide, x[:2000], 10)
                assert parts.reconstruction_error is not None
                error = math.sqrt(parts.reconstruction_error.value)
                if setting == "ELBO":
                    errors[seed] = error
                marginal, information = evaluate.marginal_kl(model, guide, x, NUM_DRAWS)
                spread = evaluate.log_det_cov(model, guide, x, 1)
                row = (
                    error, parts.kl.value,
                    marginal.value, marginal.std_error, information.value, spread.value, seconds,
                )  # fmt: skip
                writer.writerow([setting, tolerance, seed, *(f"{v:.5g}" for v in row)])
                file.flush()
        print(f"# {time.perf_counter() - started:.0f} s, other work beside", file=file)


if __name__ == "__main__":
    main()
