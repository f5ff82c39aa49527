"""Five ways to regularise the latents of a VAE with a PixelCNN decoder (Figure 6, Table 1).

    python tutorials/results/infovae_pixelcnn.py [--scale strong] [--seeds 0 1 2] [--fast]

MNIST without its margin, averaged down, black where the mean is above ½. Two scales: ``weak``, a
small PixelCNN on 8×8 pixels, and ``strong``, a larger one on 6×6. Writes a row for each seed and
loss, and a second file, MMD² over the steps.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
#: Each takes d and λ. ``alpha=1`` leaves out the KL of each image: D(q(z), p(z)) alone regularises.
LOSSES: dict[str, Callable[[int, float], TermsELBO]] = {
    "ELBO": lambda d, weight: BetaVAE_ELBO(),
    "MMD": lambda d, weight: InfoVAE_ELBO(alpha=1.0, lambda_=weight),
    "Stein": lambda d, weight: InfoVAE_ELBO(alpha=1.0, lambda_=weight, divergence=Stein()),
    "Adversarial": lambda d, weight: InfoVAE_ELBO(
        alpha=1.0, lambda_=weight, divergence=Adversarial(ResidualDiscriminator(d))
    ),
    "Unregularised": lambda d, weight: InfoVAE_ELBO(alpha=1.0, lambda_=weight),
}


class Scale(NamedTuple):
    """Images of ``side``² pixels, a decoder for them, and how both are trained."""

    side: int
    decoder: dict[str, int]
    weights: dict[str, float]
    num_steps: int


SCALES = {
    "weak": Scale(
        8,
        {"hidden_dim": 8, "num_layers": 2, "kernel_size": 7, "condition_dim": 4},
        {"ELBO": 1.0, "MMD": 100.0, "Stein": 100.0, "Adversarial": 10.0, "Unregularised": 1e-9},
        1000,
    ),
    "strong": Scale(
        6,
        {"hidden_dim": 24, "num_layers": 3, "kernel_size": 5, "condition_dim": 1},
        {"ELBO": 1.0, "MMD": 20.0, "Stein": 20.0, "Adversarial": 10.0, "Unregularised": 1e-9},
        800,
    ),
}


def load_small(side: int = 8) -> Data:
    """Load MNIST in black and white, 8×8 or 6×6; scikit-learn's digits where it is not there."""
    try:
        grey = load("mnist", root=ROOT)
    except FileNotFoundError:
        return load("digits", binarize="threshold")
    splits = {}
    for part, (x, y) in grey.splits.items():
        small = avg_pool2d(x[:, :, 2:26, 2:26], 24 // side)  # the margin is empty
        splits[part] = Split((small > 0.5).to(x.dtype), y)
    return Data(name=f"mnist {side}×{side}", kind="binary", source=grey.source, **splits)


def networks(
    shape: tuple[int, ...], latent_dim: int, decoder: dict[str, int]
) -> tuple[VAE, Gaussian]:
    """Make a VAE with a PixelCNN, and its guide."""
    model = VAE(PixelCNN(latent_dim, shape, **decoder), Bernoulli(), latent_dim, shape)
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
    scale: str = "strong",
    weight: float | None = None,
    num_images: int = 200,
    num_particles: int = 150,
    num_samples: int = 500,
    trace: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Train one model and measure it."""
    side, decoder, weights, _ = SCALES[scale]
    weight = weights[name] if weight is None else weight
    data = load_small(side)
    torch.manual_seed(seed)
    model, guide = networks(tuple(data.event_shape), latent_dim, decoder)
    test = data.test.x[:2000]
    started = time.perf_counter()

    def follow(step: int, _: float) -> None:
        value = evaluate.aggregate_mmd(model, guide, test[:1000]).value
        if trace is not None:
            trace.append({"seed": seed, "loss": name, "step": step, "mmd": f"{value:.4g}"})

    loss = LOSSES[name](latent_dim, weight)
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
    row |= {"weight": weight, "num_steps": num_steps, "seconds": round(seconds, 1)}
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
    parser.add_argument("--scale", default="strong", choices=list(SCALES))
    parser.add_argument("--weight", type=float, help="λ, for all losses that are named")
    parser.add_argument("--latent-dim", type=int, default=5)
    parser.add_argument("--num-steps", type=int, help="by default the scale's")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--fast", action="store_true", help="a few steps, to show that it runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    num_steps = 8 if args.fast else args.num_steps or SCALES[args.scale].num_steps
    out = args.out or HERE / f"infovae_pixelcnn_{args.scale}.csv"
    few = {"num_images": 10, "num_particles": 10, "num_samples": 50} if args.fast else {}
    settings = {"scale": args.scale, "weight": args.weight, **few}
    trace: list[dict[str, Any]] = []

    def rows() -> Iterator[dict[str, Any]]:
        for seed in args.seeds:
            for name in args.losses:
                try:
                    yield run(seed, name, args.latent_dim, num_steps, trace=trace, **settings)
                except ValueError as error:  # unregularised, a standard deviation may fall to 0
                    print(f"{name}, seed {seed}, no row: {error}")

    seeds, losses = (" ".join(map(str, x)) for x in (args.seeds, args.losses))
    command = (
        f"python tutorials/results/infovae_pixelcnn.py --scale {args.scale} --seeds {seeds} "
        f"--losses {losses} --latent-dim {args.latent_dim} --num-steps {num_steps}"
    )
    command += "" if args.weight is None else f" --weight {args.weight:g}"
    write(out, rows(), command, started)
    write(out.with_name(f"{out.stem}_mmd.csv"), trace, command, started)


if __name__ == "__main__":
    main()
