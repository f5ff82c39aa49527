"""log det Cov q(z) against the number of training images, under the ELBO and InfoVAE (Figure 2).

    python tutorials/results/infovae_sizes.py [--seeds 0 1 2] [--latent-dim 10] [--fast]

MNIST, each pixel drawn once from its grey level. Writes a row for each seed, loss and size.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch

from pyro_vae import evaluate, fit
from pyro_vae.data import Data, load
from pyro_vae.guides import Gaussian
from pyro_vae.losses import InfoVAE_ELBO
from pyro_vae.models import VAE, Bernoulli
from pyro_vae.nn import MLPDecoder, MLPEncoder

HERE = Path(__file__).parent
ROOT = os.environ.get("PYRO_VAE_DATA", str(HERE.parents[2] / "shared" / "data"))
SIZES = (500, 5000, 50000)
LOSSES = {
    "ELBO": partial(InfoVAE_ELBO, alpha=0.0, lambda_=1.0),
    "InfoVAE": partial(InfoVAE_ELBO, alpha=0.0, lambda_=1000.0),
}
BATCH = 128


def load_binary(train_size: int | None = None, seed: int = 0) -> Data:
    """Load MNIST in black and white; scikit-learn's digits where MNIST's files are not there."""
    try:
        return load("mnist", root=ROOT, train_size=train_size, binarize="sample", seed=seed)
    except FileNotFoundError:
        size = None if train_size is None else min(train_size, 1200)
        return load("digits", train_size=size, binarize="sample", seed=seed)


def networks(shape: tuple[int, ...], latent_dim: int, width: int = 200) -> tuple[VAE, Gaussian]:
    """Make a VAE and its guide, each with two hidden layers."""
    decoder = MLPDecoder(latent_dim, shape, (width, width))
    model = VAE(decoder, Bernoulli(), latent_dim, shape)
    return model, Gaussian(MLPEncoder(shape, 64, (width, width)), latent_dim)


def in_batches(model: VAE, batch_size: int) -> Callable:
    """Return the same model of a data set of which each step sees a minibatch."""

    def minibatch(x: torch.Tensor) -> None:
        pyro.module("model", model)
        with pyro.plate("data", len(x), subsample_size=batch_size) as i:
            z = pyro.sample("z", model.prior())
            pyro.sample("x", model.likelihood(z, x[i]), obs=x[i])

    return minibatch


def train(
    model: VAE, guide: Gaussian, loss: Any, x: torch.Tensor, num_steps: int, **kwargs: Any
) -> None:
    """Fit both by Adam, whose learning rate falls from 0.002 to zero along a cosine."""
    pyro.clear_param_store()
    batch = min(kwargs.pop("batch_size", BATCH), len(x))
    guide.subsample_size = batch
    options = {"optim": partial(torch.optim.Adam, lr=2e-3, fused=True), "progress": False, **kwargs}
    fit(in_batches(model, batch), guide, loss, x, num_steps=num_steps, **options)
    guide.subsample_size = None  # from now on it takes whole what it is given


def measure(model: VAE, guide: Gaussian, data: Data, num_gaps: int) -> dict[str, float]:
    """Hold q(z) against the prior, on training and on test images, and look at the bounds."""
    row: dict[str, float] = {}
    for name, x in (("train", data.train.x[:5000]), ("test", data.test.x[:5000])):
        row[f"log_det_cov_{name}"], row[f"log_det_cov_{name}_se"], *_ = evaluate.log_det_cov(
            model, guide, x
        )
        row[f"mmd_{name}"] = evaluate.aggregate_mmd(model, guide, x).value
        bound = evaluate.elbo(model, guide, x[:1000], 10)
        row[f"elbo_{name}"], row[f"kl_{name}"] = bound.elbo.value, bound.kl.value
    gaps = evaluate.iw_svi(
        model, guide, data.test.x[:num_gaps], 1000, num_steps=100, train_particles=4
    )
    row["log_evidence_test"] = gaps.log_evidence.value
    row["inference_gap_test"] = gaps.inference_gap.value  # type: ignore[union-attr]
    return row


def run(
    seed: int,
    name: str,
    train_size: int,
    latent_dim: int,
    num_steps: int,
    num_gaps: int = 50,
) -> dict[str, Any]:
    """Train one model and measure it."""
    data = load_binary(train_size, seed)
    torch.manual_seed(seed)
    model, guide = networks(tuple(data.event_shape), latent_dim)
    started = time.perf_counter()
    train(model, guide, LOSSES[name](), data.train.x, num_steps)
    seconds = time.perf_counter() - started
    row = {"data": data.name, "seed": seed, "loss": name, "train_size": len(data.train.x)}
    row |= {"latent_dim": latent_dim, "num_steps": num_steps, "seconds": round(seconds, 1)}
    return row | measure(model, guide, data, num_gaps)


def write(path: Path, rows: Iterable[dict[str, Any]], command: str, started: float) -> None:
    """Write rows as they come, below a comment that says where they are from."""
    with path.open("w", newline="") as file:
        file.write(f"# {command}\n")
        file.write(f"# two x86-64 cores, one thread, torch {torch.__version__}\n")
        writer = None
        for row in rows:
            if writer is None:
                writer = csv.DictWriter(file, list(row))
                writer.writeheader()
            writer.writerow({k: f"{v:.5g}" if type(v) is float else v for k, v in row.items()})
            file.flush()
            print({k: v if type(v) is not float else round(v, 4) for k, v in row.items()})
    head, machine, *body = path.read_text().splitlines(keepends=True)
    seconds = f"# wall time {time.perf_counter() - started:.0f} s\n"
    path.write_text("".join([head, machine, seconds, *body]))


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--latent-dim", type=int, default=10)
    parser.add_argument("--num-steps", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=HERE / "infovae_sizes.csv")
    parser.add_argument("--fast", action="store_true", help="a few steps, to show that it runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    num_steps = 20 if args.fast else args.num_steps
    rows = (
        run(seed, name, size, args.latent_dim, num_steps)
        for seed in args.seeds
        for size in args.sizes
        for name in LOSSES
    )
    seeds, sizes = (" ".join(map(str, x)) for x in (args.seeds, args.sizes))
    command = (
        f"python tutorials/results/infovae_sizes.py --seeds {seeds} --sizes {sizes} "
        f"--latent-dim {args.latent_dim} --num-steps {num_steps}"
    )
    write(args.out, rows, command, started)


if __name__ == "__main__":
    main()
