"""Regularise amortised inference on three data sets: two rows of a CSV for each trained model.

    python tutorials/results/air_runs.py --data caltech101_silhouettes --methods VAE DVAE:0.2 WNI:4

Every model of a data set has the same decoder; only the encoder, or what it sees, differs. Each
training gives two models: that of the best validation bound ("early") and that of the last step
("last"). The first method of each seed is the baseline, against which the others' log p(x) is
compared on the same test images, early with early and last with last. Of several strengths, as in
DVAE:0.1,0.2, only that of the best validation bound is judged on test images; the others' rows end
with that bound.
"""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
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

LATENT_DIM, BATCH, VALIDATIONS = 32, 100, 16
# Hidden layers of encoder and decoder, as many as in the paper; training images; steps.
SETTINGS = {
    "caltech101_silhouettes": {"hidden": (200,), "train_size": 4100, "num_steps": 5000},
    "omniglot28": {"hidden": (200, 200), "train_size": 1000, "num_steps": 3000},
    "binarized_mnist": {"hidden": (200, 200), "train_size": 1000, "num_steps": 3000},
    "digits": {"hidden": (100,), "train_size": 1200, "num_steps": 1000},
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
    if method == "large encoder":  # a layer more, and wider
        hidden = (int(strength),) * (len(hidden) + 1)
    guide = Gaussian(make_encoder(x_dim, hidden), LATENT_DIM)
    return weight_norm_cap(guide, H=strength) if method == "WNI" else guide


def make_loss(method, strength, k):
    """Return the ELBO or IWAE-k; denoising around it for DVAE, half of it for the partial one."""
    inner = BetaVAE_ELBO() if k == 1 else IWAE_ELBO(num_particles=k, max_plate_nesting=1)
    if method in ("DVAE", "partial DVAE"):
        return DVAE_ELBO(strength, mix=0.5 if method == "partial DVAE" else 0.0, elbo=inner)
    return inner


def largest_norm(guide):
    """Return the largest norm of a unit's weights in the guide."""
    layers = [layer for layer in guide.modules() if isinstance(layer, nn.Linear)]
    return max(layer.weight.norm(dim=1).max().item() for layer in layers)


class Trained:
    """A model and its guide, with the parameters of the best validation and of the last step."""

    def __init__(self, model, guide):
        self.model, self.guide = model, guide
        self.history = []  # (step, validation bound)
        self.states = {}

    def validate(self, step, valid, num_particles):
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the same draws each time
            value = iwae(self.model, self.guide, valid, num_particles).value
        best = max((v for _, v in self.history), default=-math.inf)
        self.history.append((step, value))
        state = copy.deepcopy((self.model.state_dict(), self.guide.state_dict()))
        for stop in ["last", "early"] if value > best else ["last"]:
            self.states[stop] = {"step": step, "valid_iwae": value, "state": state}

    def load(self, stop):
        """Take the parameters of "early" or "last"; return model and guide."""
        for module, state in zip((self.model, self.guide), self.states[stop]["state"], strict=True):
            module.load_state_dict(state)
        return self.model, self.guide


def train_one(
    x,
    valid,
    guide,
    loss,
    *,
    hidden,
    num_steps,
    batch_size=BATCH,
    lr=2e-3,
    compile=True,
    num_valid=300,
):
    """Train; 16 times on the way take the IWAE-50 of 300 validation images."""
    decoder = MLP(LATENT_DIM, x.shape[1], hidden[::-1])
    model = VAE(decoder, Bernoulli(), LATENT_DIM, x.shape[1:])
    loss_fn = loss(model, guide)
    loss_fn = pyro_vae.compile(loss_fn) if compile else loss_fn
    adam = torch.optim.Adam([*model.parameters(), *guide.parameters()], lr, fused=True)
    decay = torch.optim.lr_scheduler.ExponentialLR(adam, 0.05 ** (1 / num_steps))
    trained, step, every = Trained(model, guide), 0, max(num_steps // VALIDATIONS, 1)
    while step < num_steps:
        for rows in torch.randperm(len(x)).split(batch_size)[: len(x) // batch_size]:
            adam.zero_grad()
            (loss_fn(x[rows]) / batch_size).backward()
            adam.step()
            decay.step()
            step += 1
            if step % every == 0 or step == num_steps:
                trained.validate(step, valid[:num_valid], 50)
            if step == num_steps:
                break
    return trained


def judge(model, guide, x, effort=1):
    """Return log p(x), ELBO and gaps of images, by IW-SVI, always on the same noise."""
    torch.manual_seed(0)
    return iw_svi(model, guide, x, 300 * effort, num_steps=50 * effort, train_particles=4)


def run(
    name,
    methods,
    k,
    seed,
    *,
    num_steps=None,
    num_test=300,
    train_size=None,
    batch_size=BATCH,
    stops=("early", "last"),
    efforts=(1,),
    compile=True,
):
    """Train and judge each method of one seed; yield a row for each model, of two a training."""
    x, valid, test, _ = load_flat(name, train_size)
    hidden = SETTINGS[name]["hidden"]
    num_steps = num_steps or SETTINGS[name]["num_steps"]
    baseline = {}

    def train(method, strength):
        started = time.process_time()
        torch.manual_seed(seed)
        guide = make_guide(method, strength, x.shape[1], hidden)
        loss = make_loss(method, strength, k)
        trained = train_one(
            x,
            valid,
            guide,
            loss,
            hidden=hidden,
            num_steps=num_steps,
            batch_size=batch_size,
            compile=compile,
        )
        of_run = {
            "data": name,
            "train_size": len(x),
            "method": method,
            "strength": strength,
            "k": k,
            "seed": seed,
            "num_steps": num_steps,
            "batch_size": batch_size,
            "largest_norm": largest_norm(guide),  # WNI: below H, the cap was not reached
            "train_seconds": time.process_time() - started,
        }
        return trained, of_run

    for method, strengths in methods:
        runs = [train(method, strength) for strength in strengths]
        best = max(runs, key=lambda run: run[0].states["early"]["valid_iwae"])
        for (trained, of_run), stop, effort in itertools.product(runs, stops, efforts):
            state = trained.states[stop]
            row = {**of_run, "stop": stop, "step": state["step"]}
            row |= {"valid_iwae": state["valid_iwae"], "effort": effort, "num_test": num_test}
            if trained is best[0]:
                model, guide = trained.load(stop)
                found = judge(model, guide, test[:num_test], effort)
                row |= judgement(model, guide, x, found, baseline, (stop, effort))
            yield row


def judgement(model, guide, x, found, baseline, key):
    """Return the judged part of a row, with paired differences from the baseline."""
    log_p, elbo = found.log_evidence.per_example, found.elbo.per_example
    values = torch.stack([log_p, elbo, log_p - elbo])
    difference = values - baseline.setdefault(key, values)
    diff, diff_se = difference.mean(1), difference.std(1) / len(log_p) ** 0.5
    with torch.no_grad():
        train_elbo = -BetaVAE_ELBO().loss(model, guide, x[:2000]) / len(x[:2000])
    row = {"train_elbo": train_elbo, "log_p": found.log_evidence.value}
    row |= {"log_p_se": found.log_evidence.data_std_error, "elbo": found.elbo.value}
    for gap in ("inference_gap", "approximation_gap", "amortization_gap"):
        row[gap] = getattr(found, gap).value
    for place, key in enumerate(("log_p", "elbo", "gap")):
        row |= {f"{key}_diff": diff[place].item(), f"{key}_diff_se": diff_se[place].item()}
    return row | {"effective": found.log_evidence.effective.median().item()}


def parse(text):
    """Turn "DVAE:0.1,0.2" into ("DVAE", [0.1, 0.2])."""
    method, _, strengths = text.partition(":")
    if method not in METHODS:
        raise argparse.ArgumentTypeError(f"found {method!r}, expected one of {METHODS}")
    return method, [float(strength) for strength in (strengths or "0").split(",")]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", choices=SETTINGS, default="caltech101_silhouettes")
    parser.add_argument("--k", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--methods", type=parse, nargs="+", default=[("VAE", [0.0])], metavar="NAME[:STRENGTHS]"
    )
    parser.add_argument("--num_steps", type=int)
    parser.add_argument("--train_size", type=int, help="training images, if not the default")
    parser.add_argument("--batch_size", type=int, default=BATCH)
    parser.add_argument("--stops", nargs="+", default=["early", "last"], help="models to judge")
    parser.add_argument("--num_test", type=int, default=300, help="test images")
    parser.add_argument("--efforts", type=int, nargs="+", default=[1], help="of IW-SVI")
    parser.add_argument("--fast", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    options = {key: getattr(args, key) for key in ("train_size", "batch_size", "stops", "efforts")}
    # Steps as small as those on the digits are done before a compiler is.
    options["compile"] = not (args.fast or args.data == "digits")
    options["num_steps"] = 20 if args.fast else args.num_steps
    options["num_test"] = 20 if args.fast else args.num_test
    columns = None
    for seed in args.seeds:
        for row in run(args.data, args.methods, args.k, seed, **options):
            columns = columns or list(row)  # the first is a baseline, and judged
            fresh = not args.out.exists()
            with args.out.open("a", newline="") as file:
                writer = csv.DictWriter(file, columns)
                if fresh:
                    file.write(f"# {platform.machine()}, one thread, torch {torch.__version__}\n")
                    writer.writeheader()
                writer.writerow({k: round(v, 3) if type(v) is float else v for k, v in row.items()})
    with args.out.open("a") as file:  # after the rows: several may write into the file at a time
        file.write(f"# {load_flat(args.data)[-1]}\n")
        file.write(f"# python tutorials/results/air_runs.py {shlex.join(sys.argv[1:])}\n")


if __name__ == "__main__":
    main()
