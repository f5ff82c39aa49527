"""MNIST under the ELBO, under hand-annealed β and under GECO at several tolerances.

The notebook geco.ipynb runs this for three seeds. For more of them, or longer:

    python tutorials/results/geco_plane.py --seeds 0 1 2 3 4 5 --steps 10000

Two rows a run in geco_plane.csv: on training and on test images. MNIST made smaller, to 14×14 by
means of 2×2 pixels; 10000 images to train, 2000 of each split to judge by.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae import evaluate, fit
from pyro_vae.constraints import ReconstructionError
from pyro_vae.data import Data, load
from pyro_vae.guides import Gaussian
from pyro_vae.losses import GECO_ELBO, BetaVAE_ELBO, KLSchedule
from pyro_vae.nn import MLP

TOLERANCES = (0.06, 0.08, 0.1, 0.125, 0.175)  # the paper's
LATENT_DIM, HIDDEN, BATCH, LEARNING_RATE, NUM_STEPS = 32, 256, 64, 3e-3, 2000
TRAIN_SIZE, JUDGED = 10000, 2000
BOUNDS = (1e-3, 1e3)  # of a multiplier that is relative to κ²
OUT = Path(__file__).with_suffix(".csv")
COLUMNS = ("setting", "tolerance", "seed", "split", "rms_error", "kl", "multiplier", "seconds")


def data_root() -> Path | None:
    """Return where the data are, or None for the library's own place."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    places = [os.environ.get("PYRO_VAE_DATA"), beside]
    return next((Path(place) for place in places if place and Path(place).is_dir()), None)


def find_data(name: str, fallback: str | None = None, **kwargs: Any) -> Data:
    """Load a data set, or the fallback where its files are not there."""
    try:
        return load(name, root=data_root(), **kwargs)
    except FileNotFoundError:
        if fallback is None:
            raise
        return load(fallback)


def small(x: Tensor) -> Tensor:
    """Flatten images [N, C, H, W]; those of 28×28 after a mean over 2×2 pixels."""
    return (nn.functional.avg_pool2d(x, 2) if x.shape[-1] == 28 else x).flatten(1)


class Decoder(nn.Module):
    """A perceptron to pixel means in [0, 1], and the one standard deviation of all pixels."""

    def __init__(self, num_pixels: int, scale: float | None = None) -> None:
        super().__init__()
        self.net = MLP(LATENT_DIM, num_pixels, (HIDDEN,), nn.ReLU)
        if scale is None:
            self.log_scale = nn.Parameter(torch.tensor(math.log(0.3)))
        else:
            self.register_buffer("log_scale", torch.tensor(math.log(scale)))

    def forward(self, z: Tensor) -> Tensor:
        return self.net(z).sigmoid()


def make_model(decoder: Decoder, batch: int | None = None) -> Callable:
    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x), subsample_size=batch) as i:
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT_DIM), 1.0).to_event(1))
            scale = decoder.log_scale.exp()
            pyro.sample("x", dist.Normal(decoder(z), scale).to_event(1), obs=x[i])

    return model


def train(
    loss: Any,
    x: Tensor,
    seed: int,
    num_steps: int,
    *,
    scale: float | None = None,
    watch: Callable[[int, Gaussian], None] | None = None,
    **kwargs: Any,
) -> tuple[Callable, Gaussian, Decoder]:
    """Train a VAE on x [N, pixels]; the observation's scale is learned unless it is given."""
    pyro.clear_param_store()
    torch.manual_seed(seed)
    decoder = Decoder(x.shape[1], scale)
    encoder = nn.Sequential(nn.Linear(x.shape[1], HIDDEN), nn.ReLU())
    guide = Gaussian(encoder, LATENT_DIM, subsample_size=BATCH)
    adam = partial(torch.optim.Adam, lr=LEARNING_RATE)
    settings = {"num_steps": num_steps, "optim": adam, "progress": False, **kwargs}
    if watch is not None:
        settings |= {"callback": lambda step, _: watch(step, guide), "callback_every": 20}
    fit(make_model(decoder, BATCH), guide, loss, x, **settings)
    guide.subsample_size = None
    return make_model(decoder), guide, decoder


def geco(tolerance: float, rate: float = 0.02, decay: float = 0.9) -> GECO_ELBO:
    """GECO with its error in units of what is tolerated, so that one rate suits all."""
    constraint = ReconstructionError(tolerance, relative=True)
    return GECO_ELBO(constraint, rate=rate, decay=decay, bounds=BOUNDS)


def runs(num_steps: int) -> Iterator[tuple[str, float, Any, dict[str, Any]]]:
    """Yield the name, the tolerance, the loss and the settings of each run but the matched one."""
    yield "ELBO", math.nan, BetaVAE_ELBO(), {}
    # The scale of the pixels from 2.0/0.7 of its last value down to it, as in GQN: here in β.
    start = (2.0 / 0.7) ** 2
    annealed = KLSchedule(num_steps // 2, min_kl_weight=start, max_kl_weight=1.0)
    yield "annealed β", math.nan, BetaVAE_ELBO(annealed), {"scale": 0.1}
    for tolerance in TOLERANCES:
        yield "GECO", tolerance, geco(tolerance), {}


def rates() -> Iterator[tuple[str, float, Any]]:
    """Yield GECO with the error in squared pixels, as printed in the paper, at two rates."""
    for name, decay, rate in (("a = 0.99, ν = 0.3", 0.99, 0.3), ("a = 0.9, ν = 1", 0.9, 1.0)):
        yield f"GECO, {name}", 0.1, GECO_ELBO(tolerance=0.1, decay=decay, rate=rate)


def judge(model: Callable, guide: Callable, x: Tensor) -> tuple[float, float]:
    """Return the RMS error of reconstructions from draws of q(z|x), and the KL, nats an image."""
    torch.manual_seed(1000)
    found = evaluate.elbo(model, guide, x[:JUDGED], 4)
    return math.sqrt(found.reconstruction_error.value), found.kl.value


def rows(
    x: dict[str, Tensor], seeds: Sequence[int], num_steps: int = NUM_STEPS
) -> Iterator[dict[str, Any]]:
    """Train all and yield what each run reached on each split of x."""

    def run(setting: str, tolerance: float, seed: int, loss: Any, **kwargs: Any) -> list[dict]:
        begun = time.perf_counter()
        model, guide, _ = train(loss, x["train"], seed, num_steps, **kwargs)
        seconds = time.perf_counter() - begun
        multiplier = math.nan
        if isinstance(loss, GECO_ELBO):  # λκ²
            relative = getattr(loss.constraints["constraint"], "relative", False)
            multiplier = loss.multipliers.item() * (1 if relative else tolerance**2)
        results = []
        for split, images in x.items():
            error, kl = judge(model, guide, images)
            row = (setting, tolerance, seed, split, error, kl, multiplier, seconds)
            results.append(dict(zip(COLUMNS, row, strict=True)))
        return results

    for seed in seeds:
        for setting, tolerance, loss, kwargs in runs(num_steps):
            reached = run(setting, tolerance, seed, loss, **kwargs)
            yield from reached
            if setting == "ELBO":
                same = round(reached[0]["rms_error"], 5)
                yield from run("GECO at the ELBO's error", same, seed, geco(same))
    for setting, tolerance, loss in rates():
        yield from run(setting, tolerance, seeds[0], loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument("--fast", action="store_true", help="a few steps only")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    num_steps = 20 if args.fast else args.steps
    data = find_data("mnist", train_size=TRAIN_SIZE)
    x = {"train": small(data.train.x), "test": small(data.test.x)}
    started = time.perf_counter()
    with args.out.open("w", newline="") as file:
        seeds = " ".join(map(str, args.seeds))
        print(f"# geco_plane.py --seeds {seeds} --steps {num_steps}", file=file)
        print(f"# one thread, torch {torch.__version__}; {data}", file=file)
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in rows(x, args.seeds, num_steps):
            writer.writerow(row)
            file.flush()
        print(f"# {time.perf_counter() - started:.0f} s", file=file)


if __name__ == "__main__":
    main()
