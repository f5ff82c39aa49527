"""Table 2 of adversarial variational Bayes, small: what the discriminator claims, and the truth.

    python tutorials/results/avb_mnist.py                  # seeds 0 to 2
    python tutorials/results/avb_mnist.py --resume         # go on after the rows that are there
    python tutorials/results/avb_mnist.py --fast --out /tmp/mnist.csv

Statically binarised MNIST, 8 latents, networks of 2 x 200 units. Rows go to avb_mnist.csv as they
come; each is a mean over the same test images.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyro
import torch
from avb_pixels import read, write
from torch import Tensor, nn

from pyro_vae import evaluate, fit
from pyro_vae.ais import ais
from pyro_vae.data import load
from pyro_vae.divergences import knn_kl
from pyro_vae.fit import cosine
from pyro_vae.guides import Flow, Gaussian, Implicit
from pyro_vae.losses import AVB_ELBO
from pyro_vae.models import VAE, Bernoulli
from pyro_vae.nn import MLP, JointDiscriminator

LATENT_DIM, WIDTH, BATCH, NUM_STEPS = 8, 200, 100, 3000
#: Name: kind of guide, and steps of the adversary for each of the guide's.
METHODS = {
    "VAE": ("gaussian", 0),
    "AVB, 1 step": ("prior", 1),
    "AVB, 3 steps": ("prior", 3),
    "AVB + AC, 1 step": ("adaptive", 1),
    "AVB + AC, 3 steps": ("adaptive", 3),
    "flow": ("flow", 0),
}
NUM_IMAGES, NUM_AIS = 100, 10  # test images, and those of seed 0 that AIS looks at too


def get_data(fallback: bool = True) -> tuple[Tensor, Tensor, str]:
    """Return training and test images in rows, and what was read; perhaps digits for no MNIST."""
    try:
        data = load("binarized_mnist")
    except FileNotFoundError:
        if not fallback:
            raise
        data = load("digits", binarize="threshold")
    return data.train.x.flatten(1), data.test.x.flatten(1), data.source


def make_guide(kind: str, x_dim: int) -> nn.Module:
    """Make a guide that draws minibatches; an implicit one has the paper's basis of noise."""
    encoder = MLP(x_dim, WIDTH, (WIDTH,), nn.ReLU)
    if kind in ("gaussian", "flow"):
        return {"gaussian": Gaussian, "flow": Flow}[kind](encoder, LATENT_DIM, subsample_size=BATCH)
    return Implicit(
        encoder,
        LATENT_DIM,
        noise="basis",
        num_basis=16,
        contrast=kind,
        num_moment_particles=128,
        discriminator=JointDiscriminator(x_dim, LATENT_DIM, (128, 128)),
        subsample_size=BATCH,
    )


def in_minibatches(vae: VAE) -> Callable[[Tensor], None]:
    """Return the model of all data, of which each step sees a minibatch."""

    def model(x: Tensor) -> None:
        pyro.module("decoder", vae.decoder)
        with pyro.plate("data", len(x), subsample_size=BATCH) as i:
            z = pyro.sample("z", vae.prior())
            pyro.sample("x", vae.likelihood(z), obs=x[i])

    return model


def train(
    x: Tensor, method: str, seed: int = 0, num_steps: int = NUM_STEPS, lr=1e-3, t_lr=2e-3, **kwargs
):
    """Return the model and the guide after training."""
    kind, num_adversary_steps = METHODS[method]
    torch.manual_seed(seed)
    pyro.clear_param_store()
    decoder = MLP(LATENT_DIM, x.shape[1], (WIDTH, WIDTH), nn.ReLU)
    vae = VAE(decoder, Bernoulli(), LATENT_DIM, x.shape[1:])
    guide = make_guide(kind, x.shape[1])
    adam = partial(torch.optim.Adam, fused=True)
    settings = {"optim": partial(adam, lr=lr)}
    if num_adversary_steps:
        settings = {
            "optim": partial(adam, lr=lr, betas=(0.5, 0.999)),
            "adversary_optim": partial(adam, lr=t_lr, betas=(0.5, 0.999)),
            "num_adversary_steps": num_adversary_steps,
            "adversary_schedule": cosine(end=0.1),
        }
    settings |= kwargs
    loss = settings.pop("loss", None) or AVB_ELBO(1, num_adversary_particles=1)
    settings |= {
        "num_steps": num_steps,
        "compile": num_steps > 100 and num_adversary_steps > 0,  # elsewhere it costs what it saves
        "progress": False,
    }
    fit(in_minibatches(vae), guide, loss, x, **settings)
    guide.subsample_size = None  # from now on it takes whole what it is given
    return vae, guide


@torch.no_grad()
def kl_by_draws(guide: nn.Module, x: Tensor, num_draws: int = 1000) -> Tensor:
    """Return KL(q(z|x) ‖ p(z)) of each image [N], by nearest neighbours instead of a discriminator.

    Adaptive contrast again: r(z|x) is a Gaussian with the mean and covariance of q's draws.
    KL(q ‖ r) is by nearest neighbours where r is standard, E_q log r − log p an average.
    """
    found = []
    normal = torch.distributions.Normal(0.0, 1.0)
    for z in guide.get_posterior(x).sample((num_draws,)).transpose(0, 1):
        mean, tril = z.mean(0), torch.linalg.cholesky(z.T.cov())
        white = torch.linalg.solve_triangular(tril, (z - mean).T, upper=False).T
        log_r = normal.log_prob(white).sum(-1) - tril.diagonal().log().sum()
        between = knn_kl(white, torch.randn_like(white)).value
        found.append(between + (log_r - normal.log_prob(z).sum(-1)).mean())
    return torch.tensor(found)


def make_judge(vae: VAE, x: Tensor, num_steps: int) -> nn.Module:
    """Fit a Gaussian guide to the frozen decoder: where IW-SVI starts, whatever the guide was."""
    pyro.clear_param_store()
    guide = make_guide("gaussian", x.shape[1])
    loss, adam = AVB_ELBO(1), partial(torch.optim.Adam, lr=2e-3, fused=True)
    settings = {"num_steps": num_steps, "optim": adam, "train_model": False, "progress": False}
    fit(in_minibatches(vae), guide, loss, x, **settings)
    guide.subsample_size = None
    return guide


def judge(
    vae: VAE, guide: nn.Module, train_x: Tensor, x: Tensor, x_ais: Tensor, small: bool = False
) -> dict:
    """Return the claimed ELBO, the ELBO by draws, and log p(x) by IW-SVI and by AIS."""
    start = make_judge(vae, train_x, 5 if small else 500)
    parts = evaluate.elbo(vae, guide, x, 20 if small else 200)
    by_draws = parts.log_likelihood.per_example - kl_by_draws(guide, x, 200 if small else 1000)
    own = evaluate.iw_svi(vae, start, x, 100 if small else 500, num_steps=5 if small else 60)
    values = {"elbo": parts.elbo, "log_p": own.log_evidence, "log_likelihood": parts.log_likelihood}
    row = {}
    for name, found in values.items():
        row |= {name: found.value, f"{name}_se": found.data_std_error}
    row["elbo_by_draws"] = by_draws.mean().item()
    row["elbo_by_draws_se"] = by_draws.std().item() / len(x) ** 0.5
    for name, found in (
        ("claim_less_log_p", parts.elbo.per_example),
        ("draws_less_log_p", by_draws),
    ):
        gap = found - own.log_evidence.per_example
        row |= {name: gap.mean().item(), f"{name}_se": gap.std().item() / len(x) ** 0.5}
    row |= dict.fromkeys(("ais_less_log_p", "ais_less_log_p_se"), math.nan)
    if len(x_ais):
        annealed = ais(vae, x_ais, 20 if small else 300, 2 if small else 5).log_evidence
        gap = annealed.per_example - own.log_evidence.per_example[: len(x_ais)]
        row["ais_less_log_p"] = gap.mean().item()
        row["ais_less_log_p_se"] = gap.std().item() / len(gap) ** 0.5
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument("--images", type=int, default=NUM_IMAGES, help="test images")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--t-lr", type=float, default=2e-3)
    parser.add_argument("--resume", action="store_true", help="go on after the rows in the file")
    parser.add_argument("--fast", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    train_x, test_x, source = get_data(fallback=args.fast)
    print(source, flush=True)
    rows = read(args.out, args.resume)
    steps = 20 if args.fast else args.steps
    done = {(row["method"], int(row["seed"]), int(row["steps"])) for row in rows}
    for seed in args.seeds:
        for method in args.methods:
            if (method, seed, steps) in done:
                continue
            began = time.perf_counter()
            vae, guide = train(train_x, method, seed, steps, args.lr, args.t_lr)
            seconds = time.perf_counter() - began
            torch.manual_seed(seed)
            num, num_ais = (8, 4) if args.fast else (args.images, NUM_AIS)
            x_ais = test_x[: num_ais if seed == 0 else 0]
            found = judge(vae, guide, train_x, test_x[:num], x_ais, args.fast)
            rows.append({"method": method, "seed": seed, "steps": steps, **found})
            rows[-1] |= {"seconds": seconds, "judge_seconds": time.perf_counter() - began - seconds}
            write(args.out, rows, source)
            print(
                {k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()},
                flush=True,
            )


if __name__ == "__main__":
    main()
