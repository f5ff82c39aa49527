"""Which loss, which guide, on digits: variational autoencoders beside each other.

    python tests/benchmarks/digits.py [--pairs a,b] [--epochs N] [--seeds 0-2] [--out DIRECTORY]

Trains each pair of a loss and a guide on scikit-learn's digits by `pyro_vae.train.train`, everything
else its default: an MLP 8-256-256-64, a Gaussian observation with one learned scale, 150 epochs, the
weights of the best validation. Prints Markdown. `--out` keeps the runs; about ten minutes on a core.

The columns, log densities in nats an image:

*ELBO*: of the 300 test images, with the guide, whatever was trained; of an implicit guide what its
discriminator claims, which is no bound.

*log p(x)*: of the same images. The judge of all rows is the same and asks nothing of the guide but
where to start: IW-SVI-1000, which fits a Gaussian with covariances to each image, so that a guide
without a density is judged as one with it is.

*beside the first*: log p(x) less that of the first row, image by image.

*RMS error*: of an element of the test images, reconstructed from draws of the guide.

*MMD²*: between q(z), over the training images, and p(z); an RBF kernel, ℓ² = d.

*active units*: of the 8, those with Var E[z|x] > 0.01.

*SVM error*: share of wrong labels on the test images, of an SVM on E[z|x] of 1000 labelled images.

*seconds*: of training, validation included.

Errors are Monte Carlo standard errors, *beside the first*'s and *SVM error*'s those over images. Of
several seeds, figures are means and errors are over the seeds.

Two losses leave a part of the model or the guide untrained, which is set by their theory. GECO does
not train the observation's scale: it is the tolerance, which is what maximises the likelihood where
the constraint is just met. GRAE does not train the guide's covariance: q(z|x) is the Gaussian about
the guide's mean with the covariance that is best there, `GRAE_ELBO.posterior`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from markdown_tables import row, table
from torch import Tensor

from pyro_vae.evaluate import (
    Estimate,
    active_units,
    aggregate_mmd,
    elbo,
    iw_svi,
    svm_error,
)
from pyro_vae.losses import GRAE_ELBO
from pyro_vae.runs import Config, GuideConfig, LossConfig, ModelConfig, Run, TrainingConfig
from pyro_vae.train import train

TOLERANCE = 0.12  # GECO's, of an element; 
SVI_PARTICLES, SVI_STEPS = 1000, 150


class Pair(NamedTuple):
    """A loss and a guide, as the table names them, and what makes them."""

    loss: str
    guide: str
    config: Config


def pair(
    label: str,
    name: str = "BetaVAE_ELBO",
    options: dict[str, Any] | None = None,
    *,
    guide: GuideConfig | None = None,
    model: ModelConfig | None = None,
) -> Pair:
    guide = guide or GuideConfig()
    covariance = f", {guide.covariance}" if guide.kind == "gaussian" else ""
    config = Config(model or ModelConfig(), guide, LossConfig(name, options or {}))
    return Pair(label, guide.kind + covariance, config)
