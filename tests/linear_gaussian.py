"""The linear-Gaussian model, in which everything is known, as a VAE and as a Pyro model."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.guides.amortized import Amortized
from pyro_vae.models import VAE, Gaussian

D = 8


class LinearGaussian:
    """z ~ N(0, I_d), x|z ~ N(Wz + b, s²I)."""

    def __init__(self, d: int = D, x_dim: int = 12, scale: float = 1.0, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        kwargs = {"dtype": torch.float64, "generator": generator}
        self.weight = torch.randn(x_dim, d, **kwargs) / 2
        self.bias = torch.randn(x_dim, **kwargs)
        self.scale, self.d, self.x_dim = scale, d, x_dim
        eye = torch.eye(d, dtype=torch.float64)
        self.precision = eye + self.weight.T @ self.weight / scale**2
        self.covariance = self.precision.inverse()

    def vae(self) -> VAE:
        decoder = nn.Linear(self.d, self.x_dim).double()
        with torch.no_grad():
            decoder.weight.copy_(self.weight)
            decoder.bias.copy_(self.bias)
        model = VAE(decoder, Gaussian(self.scale), self.d, (self.x_dim,))
        return model.double()

    def pyro_model(self, x: Tensor) -> Tensor:
        zeros = torch.zeros(self.d, dtype=torch.float64)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(zeros, 1.0).to_event(1))
            loc = z @ self.weight.T + self.bias
            return pyro.sample("x", dist.Normal(loc, self.scale).to_event(1), obs=x)

    def draw(self, num: int) -> Tensor:
        z = torch.randn(num, self.d, dtype=torch.float64)
        noise = torch.randn(num, self.x_dim, dtype=torch.float64)
        return z @ self.weight.T + self.bias + self.scale * noise

    def evidence(self, x: Tensor) -> Tensor:
        eye = torch.eye(self.x_dim, dtype=torch.float64)
        covariance = self.weight @ self.weight.T + self.scale**2 * eye
        return dist.MultivariateNormal(self.bias, covariance).log_prob(x)

    def posterior_mean(self, x: Tensor) -> Tensor:
        return (x - self.bias) @ self.weight @ self.covariance / self.scale**2


class Exact(Amortized):
    """The exact posterior, or one that is wrong by a factor in its standard deviations.

    ``diagonal`` is the best factorised Gaussian: the posterior's mean, one over its precisions.
    """

    def __init__(
        self, truth: LinearGaussian, width: float = 1.0, diagonal: bool = False, shift: float = 0.0
    ) -> None:
        super().__init__(nn.Linear(truth.x_dim, 1).double(), truth.d)
        self.truth, self.width, self.diagonal, self.shift = truth, width, diagonal, shift

    def get_posterior(self, x: Tensor, *args: object, **kwargs: object) -> dist.Distribution:
        loc = self.truth.posterior_mean(x) + self.shift
        if self.diagonal:
            scale = self.truth.precision.diagonal().rsqrt() * self.width
            return dist.Normal(loc, scale.expand_as(loc)).to_event(1)
        tril = torch.linalg.cholesky(self.truth.covariance) * self.width
        return dist.MultivariateNormal(loc, scale_tril=tril.expand(len(x), -1, -1))


def diagonal_gap(truth: LinearGaussian) -> float:
    """KL of the best factorised Gaussian from the posterior."""
    precision = truth.precision
    return float((precision.diagonal().log().sum() - torch.logdet(precision)) / 2)


def width_gap(d: int, width: float) -> float:
    """KL of N(μ, w²Σ) from N(μ, Σ)."""
    return d * (width**2 - 1 - 2 * math.log(width)) / 2
