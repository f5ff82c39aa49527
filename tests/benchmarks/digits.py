"""Which loss, which guide, on digits: variational autoencoders beside each other.

    python tests/benchmarks/digits.py [--pairs a,b] [--epochs N] [--seeds 0-2] [--out DIRECTORY]

Trains each pair of a loss and a guide on scikit-learn's digits by `pyro_vae.train.train`, with its
defaults in everything else: networks 8-256-256-64, a Gaussian observation whose scale is learned,
150 epochs, the weights of the best validation. Prints Markdown; `--out` keeps the runs. All pairs
take about ten minutes on one core, without other work on it.

The columns, log densities in nats an image:

*ELBO*: of the test images under model and guide, whichever loss they were trained by. That of an
implicit guide is its discriminator's claim, and no bound.

*log p(x)*: of the test images. The judge is the same for all, IW-SVI-1000: a Gaussian with
covariances is fitted to each image, and the guide is no more than where it starts, so that a guide
without a density is judged as one with it.

*less the first row's*: the difference of log p(x), image by image.

*RMS error*: of an element of a test image, reconstructed from a draw of the guide.

*MMD²*: of q(z), over the training images, and p(z); an RBF kernel, ℓ² = d.

*active units*: of the 8, those with Var E[z|x] > 0.01, over the training images.

*SVM error*: the share of wrong labels, on the test images, of a support vector machine on E[z|x] of
1000 labelled training images.

*training, s*: validation included.

MMD²'s error is of Monte Carlo, the others' are over test images. Of several seeds, figures are
means over the seeds and errors the standard errors of these.

Two losses leave a part untrained. GECO does not train the observation's scale: it is the tolerance,
the most likely scale where the constraint just holds. GRAE does not train the guide's covariance:
q(z|x) is `GRAE_ELBO.posterior`, the best Gaussian about the guide's mean.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from markdown_tables import row, table
from pyro import poutine
from torch import Tensor

from pyro_vae.evaluate import ELBO, active_units, aggregate_mmd, elbo, iw_svi, svm_error
from pyro_vae.losses import GRAE_ELBO
from pyro_vae.runs import Config, GuideConfig, LossConfig, ModelConfig, Run, TrainingConfig
from pyro_vae.train import train

TOLERANCE = 0.12  # GECO's, of an element in [0, 1]
SVI_PARTICLES, SVI_STEPS = 1000, 150

HEADER = [
    "loss",
    "guide",
    "ELBO",
    "log p(x)",
    "less the first row's",
    "RMS error",
    "MMD²",
    "active units",
    "SVM error",
    "training, s",
]


class Pair(NamedTuple):
    """A loss and a guide: as the table calls them, and what makes them."""

    loss: str
    guide: str
    config: Config


def of_loss(label: str, name: str, *, scale: Any = "learned", **options: Any) -> Pair:
    model = ModelConfig(scale=scale)
    return Pair(label, "Gaussian", Config(model, loss=LossConfig(name, options)))


def of_guide(label: str, kind: Any, **settings: Any) -> Pair:
    return Pair("ELBO", label, Config(guide=GuideConfig(kind, **settings)))


PAIRS: dict[str, Pair] = {
    "elbo": of_loss("ELBO", "BetaVAE_ELBO"),
    "beta4": of_loss("β-VAE, β = 4", "BetaVAE_ELBO", beta=4.0),
    "infovae": of_loss("InfoVAE, α = 0, λ = 100, MMD", "InfoVAE_ELBO", alpha=0.0, lambda_=100.0),
    # In 2700 steps: a short memory and a quick multiplier, which else falls too slowly.
    "geco": of_loss(
        f"GECO, κ = {TOLERANCE}",
        "GECO_ELBO",
        scale=TOLERANCE,
        tolerance=TOLERANCE,
        decay=0.9,
        rate=1.0,
    ),
    "iwae": of_loss("IWAE, k = 8", "IWAE_ELBO", num_particles=8),
    "dvae": of_loss("DVAE, σ = 0.1", "DVAE_ELBO", noise_scale=0.1),
    "grae": of_loss("GRAE", "GRAE_ELBO"),
    "full": of_guide("Gaussian, full", "gaussian", covariance="full"),
    "flow": of_guide("flow", "flow"),
    "implicit": of_guide("implicit", "implicit"),
}


class Figure(NamedTuple):
    """A figure, and its standard error where the table shows one."""

    value: float
    error: float | None = None


class Judged(NamedTuple):
    """What there is to say of a run."""

    figures: dict[str, Figure]  # by column
    log_evidence: Tensor  # of each test image
    claimed: bool
    errors: dict[str, float]  # of Monte Carlo
    train_rms: float


def guide_of(run: Run) -> Callable:
    """Return the guide that the loss stands for."""
    loss: Any = run.loss
    if not isinstance(loss, GRAE_ELBO):
        return run.guide

    def guide(x: Tensor) -> None:
        with poutine.block():
            q = loss.posterior(run.model, run.guide, x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", q)

    return guide


def judge(run: Run, seconds: float) -> Judged:
    torch.manual_seed(run.config.training.seed)
    model, guide, data = run.model, guide_of(run), run.data()
    x, train_y, test_y = data.test.x, data.train.y, data.test.y
    assert train_y is not None  # digits have labels
    assert test_y is not None
    labelled, of_test = (data.train.x, train_y), (x, test_y)
    bound = elbo(model, guide, x)
    evidence = iw_svi(
        model, guide, x, SVI_PARTICLES, num_steps=SVI_STEPS, covariance="full"
    ).log_evidence
    mmd = aggregate_mmd(model, guide, data.train.x)
    svm = svm_error(model, guide, labelled, of_test)
    figures = {
        "ELBO": Figure(bound.elbo.value),
        "log p(x)": Figure(evidence.value, evidence.data_std_error),
        "RMS error": Figure(rms_error(bound)),
        "MMD²": Figure(mmd.value, mmd.std_error),
        "active units": Figure(active_units(model, guide, data.train.x).value),
        "SVM error": Figure(svm.value, svm.std_error),
        "training, s": Figure(seconds),
    }
    errors = {"ELBO": bound.elbo.std_error, "log p(x)": evidence.std_error}
    of_each = evidence.per_example
    assert of_each is not None
    train_rms = rms_error(elbo(model, guide, data.train.x))
    return Judged(figures, of_each, bound.claimed, errors, train_rms)


def rms_error(bound: ELBO) -> float:
    assert bound.reconstruction_error is not None  # these observations have a mean
    return bound.reconstruction_error.value**0.5


def over_seeds(figures: list[Figure]) -> Figure:
    """Return the mean over seeds, with its own standard error where there are several."""
    if len(figures) == 1:
        return figures[0]
    values = [figure.value for figure in figures]
    error = None if figures[0].error is None else statistics.stdev(values) / len(values) ** 0.5
    return Figure(statistics.fmean(values), error)


def shown(figure: Figure, digits: int) -> str:
    error = "" if figure.error is None else f" ± {figure.error:.{digits}f}"
    return f"{figure.value:.{digits}f}{error}"


def cells(pair: Pair, found: list[Judged], first: list[Judged]) -> list[str]:
    """Return a row: a pair's runs, one a seed, beside those of the first pair."""
    columns = {name: over_seeds([one.figures[name] for one in found]) for name in found[0].figures}
    ahead = [a.log_evidence - b.log_evidence for a, b in zip(found, first, strict=True)]
    gain = over_seeds([Figure(float(d.mean()), float(d.std() / len(d) ** 0.5)) for d in ahead])
    return [
        pair.loss,
        pair.guide,
        shown(columns["ELBO"], 2) + (" (claimed)" if found[0].claimed else ""),
        shown(columns["log p(x)"], 2),
        "" if found is first else shown(gain, 2),
        shown(columns["RMS error"], 3),
        shown(columns["MMD²"], 4),
        f"{columns['active units'].value:.3g}",
        shown(columns["SVM error"], 3),
        shown(columns["training, s"], 0),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", default=",".join(PAIRS), help="of these, with commas between")
    parser.add_argument("--epochs", type=int, default=TrainingConfig().num_epochs)
    parser.add_argument("--seeds", default="0", help="a range such as 0-2, or one seed")
    parser.add_argument("--out", type=Path, help="a directory, to keep the runs in")
    options = parser.parse_args()
    names = options.pairs.split(",")
    if unknown := [name for name in names if name not in PAIRS]:
        parser.error(f"--pairs: found {', '.join(unknown)}, expected some of {', '.join(PAIRS)}")
    start, _, end = options.seeds.partition("-")
    seeds = range(int(start), int(end or start) + 1)
    torch.set_num_threads(1)
    results: dict[str, list[Judged]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        table(HEADER)
        for name in names:
            results[name] = []
            for seed in seeds:
                training = TrainingConfig(num_epochs=options.epochs, picture_every=0, seed=seed)
                began = time.perf_counter()
                run = train(replace(PAIRS[name].config, training=training), out / f"{name}_{seed}")
                results[name].append(judge(run, time.perf_counter() - began))
            row(*cells(PAIRS[name], results[name], results[names[0]]))
    everything = [one for found in results.values() for one in found]
    worst = {key: max(one.errors[key] for one in everything) for key in everything[0].errors}
    print(
        f"\nMonte Carlo standard errors are at most {worst['ELBO']:.2g} (ELBO) and "
        f"{worst['log p(x)']:.2g} (log p(x))."
    )
    rms = ", ".join(
        f"{name} {statistics.fmean(one.train_rms for one in found):.4f}"
        for name, found in results.items()
    )
    print(f"RMS error of training images: {rms}.")


if __name__ == "__main__":
    main()
