"""GECO at the error that the ELBO reached, and at two tight tolerances, trained for longer.

    python tutorials/results/geco_matched.py --seeds 0 1 2

Two rows a run in geco_matched.csv, on the 10000 training images and on 10000 test images. Data and
networks are those of geco_plane.py. Of each seed:

* from scratch: the ELBO, its scale learned, and GECO with κ = the error that this ELBO reached;
* GECO at κ = 0.06 and at 0.08, from scratch;
* on from the ELBO's networks: the ELBO again; and GECO, its multiplier started at the ELBO's own,
  D/2 nats an e-fold of the squared error, with κ = the error that the ELBO reached from there;
* on from GECO's networks: the ELBO.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from geco_plane import BATCH, TRAIN_SIZE, Decoder, find_data, geco, make_model, small, train
from torch import Tensor

from pyro_vae import evaluate, fit
from pyro_vae.guides import Gaussian
from pyro_vae.losses import GECO_ELBO, BetaVAE_ELBO

NUM_STEPS, MORE_STEPS, MORE_LEARNING_RATE, RATE = 8000, 5000, 1e-3, 0.01
TIGHT = (0.06, 0.08)
OUT = Path(__file__).with_suffix(".csv")
COLUMNS = (
    "setting", "tolerance", "seed", "split", "rms_error", "kl", "multiplier", "steps", "seconds",
)  # fmt: skip

Fitted = tuple[Callable, Gaussian, Decoder]


def proceed(start: Fitted, loss: Any, x: Tensor, seed: int, num_steps: int) -> Fitted:
    """Train copies of networks that are trained already; the learning rate falls again."""
    pyro.clear_param_store()
    torch.manual_seed(seed)
    _, guide, decoder = copy.deepcopy(start)
    guide.subsample_size = BATCH
    adam = partial(torch.optim.Adam, lr=MORE_LEARNING_RATE)
    fit(make_model(decoder, BATCH), guide, loss, x, num_steps=num_steps, optim=adam, progress=False)
    guide.subsample_size = None
    return make_model(decoder), guide, decoder


def judge(model: Callable, guide: Callable, x: Tensor) -> tuple[float, float]:
    """Return the RMS error of reconstructions from draws of q(z|x), and the KL, of all images."""
    torch.manual_seed(1000)
    found = evaluate.elbo(model, guide, x, 4)
    assert found.reconstruction_error is not None
    return math.sqrt(found.reconstruction_error.value), found.kl.value


def rows(x: dict[str, Tensor], seed: int, num_steps: int, more: int) -> Iterator[dict[str, Any]]:
    """Train all of one seed and yield what each run reached on each split of x."""
    dim = x["train"].shape[1]

    def run(setting: str, loss: Any, start: Fitted | None = None) -> tuple[Fitted, list[dict]]:
        begun = time.perf_counter()
        if start is None:
            steps, fitted = num_steps, train(loss, x["train"], seed, num_steps)
        else:
            steps, fitted = more, proceed(start, loss, x["train"], seed, more)
        seconds = time.perf_counter() - begun
        is_geco = isinstance(loss, GECO_ELBO)
        tolerance = loss.constraints["constraint"].tolerance if is_geco else math.nan
        multiplier = loss.multipliers.item() if is_geco else math.nan
        results = []
        for split, images in x.items():
            error, kl = judge(*fitted[:2], images)
            row = (setting, tolerance, seed, split, error, kl, multiplier, steps, seconds)
            results.append(dict(zip(COLUMNS, row, strict=True)))
        return fitted, results

    by_elbo, reached = run("ELBO", BetaVAE_ELBO())
    yield from reached
    same = geco(reached[0]["rms_error"], RATE)
    by_geco, reached = run("GECO at the ELBO's error", same)
    yield from reached
    for tolerance in TIGHT:
        yield from run("GECO", geco(tolerance, RATE))[1]
    _, reached = run("ELBO, then ELBO", BetaVAE_ELBO(), by_elbo)
    yield from reached
    same = geco(reached[0]["rms_error"], RATE)
    same.multipliers.fill_(dim / 2)
    yield from run("ELBO, then GECO at its error", same, by_elbo)[1]
    yield from run("GECO, then ELBO", BetaVAE_ELBO(), by_geco)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument("--more-steps", type=int, default=MORE_STEPS)
    parser.add_argument("--fast", action="store_true", help="a few steps only")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    num_steps, more = (20, 20) if args.fast else (args.steps, args.more_steps)
    data = find_data("mnist", train_size=TRAIN_SIZE)
    x = {"train": small(data.train.x), "test": small(data.test.x)}
    started = time.perf_counter()
    with args.out.open("w", newline="") as file:
        seeds = " ".join(map(str, args.seeds))
        command = f"--seeds {seeds} --steps {num_steps} --more-steps {more}"
        print(f"# python tutorials/results/geco_matched.py {command}", file=file)
        print(f"# one thread, torch {torch.__version__}; {data}", file=file)
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for seed in args.seeds:
            for row in rows(x, seed, num_steps, more):
                writer.writerow({k: f"{v:.6g}" if type(v) is float else v for k, v in row.items()})
                file.flush()
        print(f"# {time.perf_counter() - started:.0f} s, other work beside", file=file)


if __name__ == "__main__":
    main()
