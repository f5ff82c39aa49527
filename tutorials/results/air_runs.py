"""Regularise amortised inference on three data sets: one row of a CSV for each trained model.

    python tutorials/results/air_runs.py --data caltech101_silhouettes --methods VAE DVAE:0.3 WNI:1

Every model of a data set has the same decoder; only the encoder, or what it sees, differs. The
first method of each seed is the baseline, against which the others' log p(x) is compared on the
same test images.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import platform
import shlex
import sys
import time
from pathlib import Path

import torch
from torch import nn

import pyro_vae
from pyro_vae.data import load
from pyro_vae.evaluate import iw_svi, iwae
from pyro_vae.guides import Gaussian
from pyro_vae.losses import DVAE_ELBO, IWAE_ELBO, BetaVAE_ELBO
from pyro_vae.models import VAE, Bernoulli
from pyro_vae.nn import MLP, weight_norm_cap

LATENT_DIM, BATCH = 32, 100
# Hidden layers of encoder and decoder, as many as in the paper; training images; steps.
SETTINGS = {
    "caltech101_silhouettes": {"hidden": (200,), "train_size": 500, "num_steps": 1500},
    "omniglot28": {"hidden": (200, 200), "train_size": 500, "num_steps": 1000},
    "binarized_mnist": {"hidden": (200, 200), "train_size": 500, "num_steps": 1000},
    "digits": {"hidden": (100,), "train_size": None, "num_steps": 1000},
}
METHODS = ("VAE", "DVAE", "partial DVAE", "WNI", "large encoder")


def load_flat(name, train_size=None):
    """Return training, validation and test images as rows of zeros and ones, and their source."""
    binarize = {"omniglot28": "sample", "digits": "threshold"}.get(name)
    data = load(name, train_size=train_size or SETTINGS[name]["train_size"], binarize=binarize)
    return (*(split.x.flatten(1) for split in data.splits.values()), data.source)


def make_encoder(x_dim, hidden):
    """Return hidden layers alone: the guide's own linear layer comes after them."""
    return nn.Sequential(MLP(x_dim, hidden[-1], hidden[:-1]), nn.ELU())


def make_guide(method, strength, x_dim, hidden):
    """Return the guide: WNI caps the norms of all its weight vectors, the head's too."""
    if method == "large encoder":
        hidden = (int(strength),) * (len(hidden) + 1)
    guide = Gaussian(make_encoder(x_dim, hidden), LATENT_DIM)
    return weight_norm_cap(guide, H=strength) if method == "WNI" else guide


def make_loss(method, strength, k):
    """Return the ELBO or IWAE-k; denoising around it for DVAE, half of it for the partial one."""
    inner = BetaVAE_ELBO() if k == 1 else IWAE_ELBO(num_particles=k, max_plate_nesting=1)
    if method in ("DVAE", "partial DVAE"):
        return DVAE_ELBO(strength, mix=0.5 if method == "partial DVAE" else 0.0, elbo=inner)
    return inner


def train_one(x, valid, guide, loss, *, hidden, num_steps, lr=2e-3, compile=True, every=150):
    """Train; end with the parameters of the highest IWAE-20 of 500 validation images."""
    decoder = MLP(LATENT_DIM, x.shape[1], hidden[::-1])
    model = VAE(decoder, Bernoulli(), LATENT_DIM, x.shape[1:])
    loss_fn = loss(model, guide)
    loss_fn = pyro_vae.compile(loss_fn) if compile else loss_fn
    adam = torch.optim.Adam([*model.parameters(), *guide.parameters()], lr, fused=True)
    decay = torch.optim.lr_scheduler.ExponentialLR(adam, 0.05 ** (1 / num_steps))
    best, history, step = {"iwae": -math.inf}, [], 0
    while step < num_steps:
        for rows in torch.randperm(len(x)).split(BATCH)[: len(x) // BATCH]:
            adam.zero_grad()
            (loss_fn(x[rows]) / BATCH).backward()
            adam.step()
            decay.step()
            step += 1
            if step % every and step < num_steps:
                continue
            with torch.random.fork_rng():
                torch.manual_seed(0)  # the same draws each time
                value = iwae(model, guide, valid[:500], 20).value
            history.append((step, value))
            if value > best["iwae"]:
                states = copy.deepcopy((model.state_dict(), guide.state_dict()))
                best = {"iwae": value, "step": step, "states": states}
            if step == num_steps:
                break
    model.load_state_dict(best["states"][0])
    guide.load_state_dict(best["states"][1])
    return model, guide, {"step": best["step"], "iwae": best["iwae"], "history": history}


def judge(model, guide, x, *, num_particles=300, num_steps=50, train_particles=4):
    """Return log p(x), ELBO and gaps of test images, by IW-SVI, always on the same noise."""
    torch.manual_seed(0)
    steps = {"num_steps": num_steps, "train_particles": train_particles}
    return iw_svi(model, guide, x, num_particles, **steps)


def run(
    name,
    methods,
    k,
    seed,
    *,
    num_steps=None,
    num_test=300,
    train_size=None,
    every=150,
    compile=True,
):
    """Train and judge each (method, strength) of one seed; yield a row for each."""
    x, valid, test, _ = load_flat(name, train_size)
    hidden = SETTINGS[name]["hidden"]
    num_steps = num_steps or SETTINGS[name]["num_steps"]
    first = None
    for method, strength in methods:
        started = time.perf_counter()
        torch.manual_seed(seed)
        guide = make_guide(method, strength, x.shape[1], hidden)
        loss = make_loss(method, strength, k)
        model, guide, best = train_one(
            x, valid, guide, loss, hidden=hidden, num_steps=num_steps, compile=compile, every=every
        )
        seconds = time.perf_counter() - started
        found = judge(model, guide, test[:num_test])
        log_p, elbo = found.log_evidence.per_example, found.elbo.per_example
        values = torch.stack([log_p, elbo, log_p - elbo])
        first = values if first is None else first
        diff, diff_se = (values - first).mean(1), (values - first).std(1) / len(log_p) ** 0.5
        with torch.no_grad():
            train_elbo = -BetaVAE_ELBO().loss(model, guide, x[:2000]) / len(x[:2000])
        yield {
            "data": name,
            "method": method,
            "strength": strength,
            "k": k,
            "seed": seed,
            "num_steps": num_steps,
            "best_step": best["step"],
            "valid_iwae": best["iwae"],
            "train_elbo": train_elbo,
            "log_p": found.log_evidence.value,
            "log_p_se": found.log_evidence.data_std_error,
            "elbo": found.elbo.value,
            "gap": found.inference_gap.value,
            "approximation_gap": found.approximation_gap.value,
            "amortization_gap": found.amortization_gap.value,
            "log_p_diff": diff[0].item(),
            "log_p_diff_se": diff_se[0].item(),
            "elbo_diff": diff[1].item(),
            "elbo_diff_se": diff_se[1].item(),
            "gap_diff": diff[2].item(),
            "gap_diff_se": diff_se[2].item(),
            "effective": found.log_evidence.effective.median().item(),
            "train_seconds": seconds,
            "judge_seconds": time.perf_counter() - started - seconds,
            "train_size": len(x),
        }


def parse(text):
    """Turn "DVAE:0.2" into ("DVAE", 0.2)."""
    method, _, strength = text.partition(":")
    if method not in METHODS:
        raise argparse.ArgumentTypeError(f"found {method!r}, expected one of {METHODS}")
    return method, float(strength or 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", choices=SETTINGS, default="caltech101_silhouettes")
    parser.add_argument("--k", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--methods", type=parse, nargs="+", default=[("VAE", 0.0)], metavar="NAME[:STRENGTH]"
    )
    parser.add_argument("--num_steps", type=int)
    parser.add_argument("--train_size", type=int, help="training images, if not the default")
    parser.add_argument("--every", type=int, default=150, help="steps between validations")
    parser.add_argument("--fast", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    small = {"num_steps": 20, "num_test": 20, "compile": False} if args.fast else {}
    if args.data == "digits":  # steps so small are done before a compiler is
        small["compile"] = False
    if args.num_steps:
        small["num_steps"] = args.num_steps
    small.update(train_size=args.train_size, every=args.every)
    fresh, started = not args.out.exists(), time.perf_counter()
    with args.out.open("a", newline="") as file:
        command = f"# python tutorials/results/air_runs.py {shlex.join(sys.argv[1:])}\n"
        file.write(command + f"# {load_flat(args.data)[-1]}\n")
        if fresh:
            machine = f"two {platform.machine()} cores, one thread a run"
            file.write(f"# {machine}, torch {torch.__version__}\n")
        for seed in args.seeds:
            for row in run(args.data, args.methods, args.k, seed, **small):
                writer = csv.DictWriter(file, row)
                if fresh:
                    writer.writeheader()
                fresh = False
                writer.writerow({k: round(v, 4) if type(v) is float else v for k, v in row.items()})
                file.flush()
        file.write(f"# wall time of these rows: {time.perf_counter() - started:.0f} s\n")


if __name__ == "__main__":
    main()
