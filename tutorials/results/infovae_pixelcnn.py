"""Five ways to regularise the latents of a VAE with a PixelCNN decoder (Figure 6, Table 1).

    python tutorials/results/infovae_pixelcnn.py [--seeds 0 1 2] [--latent-dim 5] [--fast]

MNIST averaged down to 8×8, without its margin, black where the mean is above ½. Writes a row for
each seed and loss, and a second file, MMD² over the steps.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from infovae_sizes import HERE, ROOT, train, write
from torch.nn.functional import avg_pool2d

from pyro_vae import evaluate
from pyro_vae.data import Data, Split, load
from pyro_vae.divergences import Adversarial, Stein
from pyro_vae.guides import Gaussian
from pyro_vae.losses import BetaVAE_ELBO, InfoVAE_ELBO, TermsELBO
from pyro_vae.models import VAE, Bernoulli
from pyro_vae.nn import MLPEncoder, ResidualDiscriminator
from pyro_vae.pixelcnn import PixelCNN

BATCH = 64
#: Each takes d. ``alpha=1`` leaves out the KL of each image: D(q(z), p(z)) alone regularises.
LOSSES: dict[str, Callable[[int], TermsELBO]] = {
    "ELBO": lambda d: BetaVAE_ELBO(),
    "MMD": lambda d: InfoVAE_ELBO(alpha=1.0, lambda_=100.0),
    "Stein": lambda d: InfoVAE_ELBO(alpha=1.0, lambda_=100.0, divergence=Stein()),
    "Adversarial": lambda d: InfoVAE_ELBO(
        alpha=1.0, lambda_=10.0, divergence=Adversarial(ResidualDiscriminator(d))
    ),
    "Unregularised": lambda d: InfoVAE_ELBO(alpha=1.0, lambda_=1e-9),
}


def load_small() -> Data:
    """Load MNIST at 8×8 in black and white; scikit-learn's digits where its files are not there."""
    try:
        grey = load("mnist", root=ROOT)
    except FileNotFoundError:
        return load("digits", binarize="threshold")
    splits = {}
    for part, (x, y) in grey.splits.items():
        small = avg_pool2d(x[:, :, 2:26, 2:26], 3)  # the margin is empty
        splits[part] = Split((small > 0.5).to(x.dtype), y)
    return Data(name="mnist 8×8", kind="binary", source=grey.source, **splits)


def networks(shape: tuple[int, ...], latent_dim: int) -> tuple[VAE, Gaussian]:
    """Make a VAE with a PixelCNN of two layers, and its guide."""
    decoder = PixelCNN(
        latent_dim, shape, hidden_dim=8, num_layers=2, kernel_size=7, condition_dim=4
    )
    model = VAE(decoder, Bernoulli(), latent_dim, shape)
    return model, Gaussian(MLPEncoder(shape, 64, (200, 200)), latent_dim)


def log_evidence(
    model: VAE, guide: Gaussian, data: Data, num_steps: int, num_images: int, num_particles: int
) -> evaluate.Estimate:
    """Estimate log p(x) of test images by importance sampling, with a guide made for it.

    α = 1 lets the guide's standard deviations fall to nothing, and such a guide proposes no other
    z. So a copy of it goes on training under the ELBO first, the decoder held fixed.
    """
    judge = copy.deepcopy(guide)
    judge.head.bias.data[judge.latent_dim :] = -1.0  # log standard deviations
    judge.head.weight.data[judge.latent_dim :] = 0.0
    options = {"batch_size": BATCH, "train_model": False}
    train(model, judge, BetaVAE_ELBO(), data.train.x, num_steps, **options)
    return evaluate.iwae(model, judge, data.test.x[:num_images], num_particles)


def run(
    seed: int,
    name: str,
    latent_dim: int,
    num_steps: int,
    *,
    num_images: int = 200,
    num_particles: int = 150,
    num_samples: int = 500,
    trace: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Train one model and measure it."""
    data = load_small()
    torch.manual_seed(seed)
    model, guide = networks(tuple(data.event_shape), latent_dim)
    test = data.test.x[:2000]
    started = time.perf_counter()

    def follow(step: int, _: float) -> None:
        value = evaluate.aggregate_mmd(model, guide, test[:1000]).value
        if trace is not None:
            trace.append({"seed": seed, "loss": name, "step": step, "mmd": f"{value:.4g}"})

    loss = LOSSES[name](latent_dim)
    options: dict[str, Any] = {
        "batch_size": BATCH,
        "optim": partial(torch.optim.Adam, lr=5e-3, fused=True),
        "num_adversary_steps": 1,
        "callback": follow,
        "callback_every": max(1, num_steps // 12),
    }
    train(model, guide, loss, data.train.x, num_steps, **options)
    seconds = time.perf_counter() - started

    row: dict[str, Any] = {"data": data.name, "seed": seed, "loss": name, "latent_dim": latent_dim}
    row |= {"num_steps": num_steps, "seconds": round(seconds, 1)}
    bound = evaluate.elbo(model, guide, test[:1000], 2)
    row["log_likelihood"], row["kl"] = bound.log_likelihood.value, bound.kl.value
    marginal = evaluate.marginal_kl(model, guide, test)
    row["mutual_information"] = marginal.mutual_information.value
    row["marginal_kl"] = marginal.marginal_kl.value
    row["mmd"] = evaluate.aggregate_mmd(model, guide, test).value
    row["log_det_cov"] = evaluate.log_det_cov(model, guide, test).value
    row["svm_error"] = evaluate.svm_error(
        model, guide, data.train, (test, data.test.y[:2000])
    ).value
    classes = evaluate.class_distribution(model, data.train, data.test, num_samples)
    row["class_ce"], row["class_ce_of_test"] = classes.cross_entropy.value, classes.of_test.value
    evidence = log_evidence(model, guide, data, num_steps // 4, num_images, num_particles)
    row["log_evidence"] = evidence.value
    row["log_evidence_se"] = evidence.std_error
    row["effective"] = float(evidence.effective.median())
    return row


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=list(LOSSES))
    parser.add_argument("--latent-dim", type=int, default=5)
    parser.add_argument("--num-steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=HERE / "infovae_pixelcnn.csv")
    parser.add_argument("--fast", action="store_true", help="a few steps, to show that it runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    num_steps = 8 if args.fast else args.num_steps
    few = {"num_images": 10, "num_particles": 10, "num_samples": 50} if args.fast else {}
    trace: list[dict[str, Any]] = []
    rows = (
        run(seed, name, args.latent_dim, num_steps, trace=trace, **few)
        for seed in args.seeds
        for name in args.losses
    )
    seeds, losses = (" ".join(map(str, x)) for x in (args.seeds, args.losses))
    command = (
        f"python tutorials/results/infovae_pixelcnn.py --seeds {seeds} --losses {losses} "
        f"--latent-dim {args.latent_dim} --num-steps {num_steps}"
    )
    write(args.out, rows, command, started)
    write(args.out.with_name(f"{args.out.stem}_mmd.csv"), trace, command, started)


if __name__ == "__main__":
    main()
