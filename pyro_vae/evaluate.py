"""How good is a trained model and its guide: likelihoods, gaps, the aggregate posterior, samples.

All functions take a model, a guide and examples x; any device, any dtype. Random numbers come from
torch's global generator. What grows with the number of particles, chains or examples is cut into
chunks of at most ``chunk_size``. Call them under ``model.eval()`` or not: they see to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from pyro.distributions import MultivariateNormal, Normal
from torch import Tensor, nn

from .ais import AIS, BDMC, ais, bdmc
from .divergences import MMD
from .joint import (
    Estimate,
    Joint,
    check_least,
    chunks,
    evaluation_mode,
    has_exact_density,
    log_mean_weight,
    posterior,
)
from .nn import MLP
from .terms import _kl_divergence
from .unconstrained import _no_validation

__all__ = [
    "AIS",
    "BDMC",
    "ELBO",
    "IWSVI",
    "ClassDistribution",
    "Estimate",
    "Joint",
    "MarginalKL",
    "active_units",
    "aggregate_mmd",
    "ais",
    "bdmc",
    "class_distribution",
    "elbo",
    "iw_svi",
    "iwae",
    "latents",
    "log_det_cov",
    "marginal_kl",
    "svm_error",
]

ACTIVE_VARIANCE = 0.01  # Burda, Grosse, Salakhutdinov (2016)
NUM_MOMENT_DRAWS = 256  # for the mean of a guide that has none in closed form
NUM_RESAMPLES = 200  # of the bootstrap
PAIRS = 1 << 20  # how many pairs of examples and latents are looked at together


# --- likelihoods ---------------------------------------------------------------------------------


class ELBO(NamedTuple):
    """The parts of the evidence lower bound, each a mean over examples.

    Attributes:
        elbo: E_q log p(x|z) − KL(q(z|x) ‖ p(z)), in nats.
        log_likelihood: E_q log p(x|z).
        kl: KL(q(z|x) ‖ p(z)), in closed form where torch knows one.
        reconstruction_error: E_q of the mean square over elements of x − E[x|z]. None where the
            observation has no mean, or the decoder is autoregressive: given x itself, its mean
            reconstructs nothing.
        claimed: Whether the guide's density is learned: then ``kl`` and ``elbo`` are what the
            discriminator claims, and no bound.
    """

    elbo: Estimate
    log_likelihood: Estimate
    kl: Estimate
    reconstruction_error: Estimate | None
    claimed: bool


@torch.no_grad()
def elbo(
    model: Callable, guide: Callable, x: Tensor, num_particles: int = 100, *, chunk_size: int = 4096
) -> ELBO:
    r"""Estimate the ELBO and its parts, for each example and on average.

    .. math:: \mathbb{E}_q \log p(x|z) - \mathrm{KL}(q(z|x) \| p(z))

    Args:
        model: A :class:`~pyro_vae.models.VAE`, or a Pyro model with one plate of data, one latent
            and one observed site. See :class:`Joint`.
        guide: An amortised guide, or any Pyro guide with the same latent site alone.
        x: Examples [N, \*event].
        num_particles: Draws from q(z|x) for each, at least 2, which a standard error needs.
        chunk_size: How many latents are decoded at once.

    Raises:
        ValueError: For numbers out of range, or what :class:`Joint` refuses.

    Example:
        >>> from pyro_vae.guides import Gaussian
        >>> from pyro_vae.models import VAE, Bernoulli
        >>> model = VAE(MLP(2, 16), Bernoulli(), latent_dim=2, event_shape=(16,))
        >>> found = elbo(model, Gaussian(MLP(16, 8), latent_dim=2), torch.ones(5, 16))
        >>> found.elbo.per_example.shape
        torch.Size([5])
        >>> abs(found.log_likelihood.value - found.kl.value - found.elbo.value) < 1e-4
        True
    """
    check_least(num_particles=(num_particles, 2))
    joint = Joint(model, x)
    parts: list[Tensor] = []
    claimed = False
    with evaluation_mode(model, guide):
        for rows in chunks(len(x), chunk_size):
            q, prior = posterior(guide, x[rows], joint), joint.prior(len(x[rows]))
            if not has_exact_density(q):
                _check_density(q)
                claimed = True
            kl = None if claimed else _kl_divergence(q, prior)
            if kl is not None:
                kl = kl.reshape(len(x[rows]), -1).sum(-1)
            sums = _Moments()
            for z, log_q in _particles(q, num_particles, chunk_size):
                log_likelihood, error = _score(joint, z, x[rows])
                estimate = log_q - joint.log_prior(z) if kl is None else kl.expand_as(log_q)
                sums.add(torch.stack([log_likelihood - estimate, log_likelihood, estimate, error]))
            parts.append(torch.stack(sums.mean_and_error()))
    (means, errors) = torch.cat(parts, -1)
    bound, likelihood, divergence, square = map(Estimate.mean, means, errors)
    has_square = not torch.isnan(means[3]).any()
    return ELBO(bound, likelihood, divergence, square if has_square else None, claimed)


@torch.no_grad()
def iwae(
    model: Callable,
    guide: Callable,
    x: Tensor,
    num_particles: int = 5000,
    *,
    chunk_size: int = 4096,
) -> Estimate:
    r"""Estimate log p(x) of each example by importance sampling, and average.

    .. math:: \log \tfrac{1}{k} \sum_{s=1}^k \frac{p(x, z_s)}{q(z_s|x)}, \qquad z_s \sim q(z|x)

    A lower bound in expectation, too low by about half the squared standard error of each example,
    if there are many ``effective`` particles; below 2 the standard error is not to be trusted.

    Args:
        model: As in :func:`elbo`.
        guide: As in :func:`elbo`, with an exact density.
        x: Examples [N, \*event].
        num_particles: k.
        chunk_size: How many latents are decoded at once; memory does not grow with k.

    Raises:
        ValueError: For a guide whose density is learned, numbers out of range, or what
            :class:`Joint` refuses.

    References:
        | Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov, 2016), equation 8
        | https://arxiv.org/abs/1509.00519

    Example:
        >>> from pyro_vae.guides import Gaussian
        >>> from pyro_vae.models import VAE, Bernoulli
        >>> model = VAE(MLP(2, 16), Bernoulli(), latent_dim=2, event_shape=(16,))
        >>> guide = Gaussian(MLP(16, 8), latent_dim=2)
        >>> bool(iwae(model, guide, torch.ones(5, 16), 500).value < 0)
        True
    """
    check_least(num_particles=(num_particles, 1))
    joint = Joint(model, x)
    sums = []
    with evaluation_mode(model, guide):
        for rows in chunks(len(x), chunk_size):
            q = posterior(guide, x[rows], joint)
            _check_density(q, exact="iwae")
            sums.append(_weigh(joint, q, x[rows], num_particles, chunk_size))
    return _joined(sums).log_evidence(num_particles)


class IWSVI(NamedTuple):
    """What importance-weighted stochastic variational inference found, means over examples.

    Attributes:
        log_evidence: log p(x), IWAE-k with the improved q*, a lower bound in expectation. Where
            its ``effective`` particles are fewer than 2, its standard error, and that of the gaps,
            is not to be trusted.
        elbo: With the guide; None without one, or if its density is learned.
        best_elbo: With the q* that was improved on the ELBO.
        inference_gap: log p(x) − the guide's ELBO; None where there is none.
        approximation_gap: log p(x) − the best ELBO of the family.
        amortization_gap: The inference gap less the approximation gap.
    """

    log_evidence: Estimate
    elbo: Estimate | None
    best_elbo: Estimate
    inference_gap: Estimate | None
    approximation_gap: Estimate
    amortization_gap: Estimate | None


def iw_svi(
    model: Callable,
    guide: Callable | None,
    x: Tensor,
    num_particles: int = 5000,
    *,
    num_steps: int = 200,
    train_particles: int = 8,
    learning_rate: float = 0.1,
    covariance: Literal["diagonal", "full"] = "diagonal",
    chunk_size: int = 4096,
) -> IWSVI:
    r"""Estimate log p(x) with a Gaussian of its own for each example, and the gaps of inference.

    Each q* starts with the guide's mean and standard deviations (and covariances, if it is to have
    any), with those of draws where the guide has none in closed form, or with the prior's.
    ``num_steps`` of Adam improve it on the ELBO, whose best value the approximation gap asks for,
    and as many on IWAE-k′; the evidence is IWAE-k of the last. Gradients are the doubly
    reparameterised ones, which vanish where q* is exact.

    .. math:: \underbrace{\log p(x) - L_q}_{\text{inference}} =
        \underbrace{\log p(x) - L_{q^*}}_{\text{approximation}} +
        \underbrace{L_{q^*} - L_q}_{\text{amortisation}}

    Args:
        model: As in :func:`elbo`.
        guide: As in :func:`elbo`, or None to start at the prior. With a learned density it serves
            as the start alone.
        x: Examples [N, \*event].
        num_particles: k.
        num_steps: Gradient steps of each of the two.
        train_particles: k′, and the draws of each step on the ELBO.
        learning_rate: Of Adam, in units of the starting standard deviations of each example; it
            falls to zero along a cosine, and begins at a quarter for IWAE-k′.
        covariance: Of q*.
        chunk_size: How many latents are decoded at once.

    Raises:
        ValueError: For numbers out of range, an unknown covariance, or what :class:`Joint` refuses.

    References:
        | Amortized Inference Regularization (Shu, Bui, Zhao, Kochenderfer, Ermon, 2018), appendix C
        | https://arxiv.org/abs/1805.08913

        | Inference Suboptimality in Variational Autoencoders (Cremer, Li, Duvenaud, 2018)
        | https://arxiv.org/abs/1801.03558

        | Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives (Tucker, Lawson, Gu,
        | Maddison, 2019)
        | https://arxiv.org/abs/1810.04152

    Example:
        >>> from pyro_vae.models import VAE, Bernoulli
        >>> model = VAE(MLP(2, 16), Bernoulli(), latent_dim=2, event_shape=(16,))
        >>> found = iw_svi(model, None, torch.ones(5, 16), 100, num_steps=20)
        >>> found.elbo is None, bool(found.best_elbo.value < 0)
        (True, True)
    """
    check_least(
        num_particles=(num_particles, 2),
        num_steps=(num_steps, 1),
        train_particles=(train_particles, 1),
        chunk_size=(chunk_size, train_particles),  # those of one example are decoded together
    )
    if covariance not in ("diagonal", "full"):
        raise ValueError(f"covariance must be 'diagonal' or 'full', found {covariance!r}")
    joint = Joint(model, x)
    evidence: list[_Weights] = []
    best: list[_Weights] = []
    own: list[_Weights] = []
    exact = guide is not None
    with evaluation_mode(model, guide):
        for rows in chunks(len(x), chunk_size // train_particles):
            part = x[rows]
            with torch.no_grad():
                q = joint.prior(len(part)) if guide is None else posterior(guide, part, joint)
                exact = exact and has_exact_density(q)
                if exact:
                    own.append(_weigh(joint, q, part, num_particles, chunk_size))
                gaussian = _Gaussians(q, covariance == "full")
            for importance, rate, sums in (
                (False, learning_rate, best),
                (True, learning_rate / 4, evidence),
            ):
                gaussian.improve(
                    joint, part, train_particles, num_steps, rate, importance=importance
                )
                with torch.no_grad():
                    q = gaussian.distribution()
                    sums.append(_weigh(joint, q, part, num_particles, chunk_size))
    log_evidence = _joined(evidence).log_evidence(num_particles)
    best_elbo = _joined(best).elbo(num_particles)
    guide_elbo = _joined(own).elbo(num_particles) if exact else None
    return IWSVI(
        log_evidence,
        guide_elbo,
        best_elbo,
        None if guide_elbo is None else _difference(log_evidence, guide_elbo),
        _difference(log_evidence, best_elbo),
        None if guide_elbo is None else _difference(best_elbo, guide_elbo),
    )


class _Gaussians:
    """A Gaussian for each example, in coordinates where the one that it starts at is N(0, I).

    Args:
        q: Where they start: its moments, with its covariances if the family has any.
        full: Whether the family has covariances.
    """

    def __init__(self, q: Any, full: bool) -> None:
        self.loc, scale = _moments(q)
        self.full = full
        self.start = scale
        if full:
            tril = getattr(q, "scale_tril", None)
            self.start = torch.diag_embed(scale) if tril is None else tril.clone()
        self.shift = torch.zeros_like(self.loc, requires_grad=True)
        self.log_scale = torch.zeros_like(self.loc, requires_grad=True)
        self.below = torch.zeros_like(self.start, requires_grad=True)
        self.parameters = [self.shift, self.log_scale, *([self.below] if full else [])]

    def distribution(self) -> Any:
        scale = self.log_scale.exp()
        if not self.full:
            loc = self.loc + self.start * self.shift
            return Normal(loc, self.start * scale, validate_args=False).to_event(1)
        loc = self.loc + (self.start @ self.shift.unsqueeze(-1)).squeeze(-1)
        tril = self.start @ (self.below.tril(-1) + torch.diag_embed(scale))
        return MultivariateNormal(loc, scale_tril=tril, validate_args=False)

    def improve(
        self,
        joint: Joint,
        x: Tensor,
        num_particles: int,
        num_steps: int,
        learning_rate: float,
        *,
        importance: bool,
    ) -> None:
        """Take steps of Adam on the ELBO or on IWAE-k′; examples do not touch each other."""
        adam = torch.optim.Adam(self.parameters, learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, num_steps)
        with torch.enable_grad():
            for _ in range(num_steps):
                z = self.distribution().rsample((num_particles,))
                with torch.no_grad():
                    fixed = self.distribution()  # no gradient to its parameters
                log_w = joint.log_likelihood(z, x) + joint.log_prior(z) - fixed.log_prob(z)
                if importance:
                    loss = -(log_w.detach().softmax(0).square() * log_w).sum()
                else:
                    loss = -log_w.mean(0).sum()
                gradients = torch.autograd.grad(loss, self.parameters)
                for parameter, gradient in zip(self.parameters, gradients, strict=True):
                    # An example whose gradient is not finite stays where it is.
                    parameter.grad = gradient.nan_to_num(0.0, 0.0, 0.0)
                adam.step()
                schedule.step()


class _Moments:
    """Running sums of values and their squares, over the first dimension."""

    def __init__(self) -> None:
        self.num = 0
        self.mean: Tensor | None = None
        self.squares: Tensor | None = None  # of differences from the mean

    def add(self, values: Tensor) -> None:
        """Take values [parts, S, N] in."""
        values = values.double()
        num, mean = values.shape[1], values.mean(1)
        squares = (values - mean.unsqueeze(1)).square().sum(1)
        if self.mean is None or self.squares is None:
            self.num, self.mean, self.squares = num, mean, squares
            return
        both, change = self.num + num, mean - self.mean
        self.squares = self.squares + squares + change.square() * (self.num * num / both)
        self.mean = self.mean + change * (num / both)
        self.num = both

    def mean_and_error(self) -> tuple[Tensor, Tensor]:
        """Return the means [parts, N] and their standard errors, NaN of a single value."""
        assert self.mean is not None
        assert self.squares is not None
        degrees = self.num - 1 if self.num > 1 else math.nan
        return self.mean, (self.squares / (self.num * degrees)).sqrt()


class _Weights(NamedTuple):
    """Sums over the importance weights of each example [N]."""

    log_sum: Tensor
    log_sum_squares: Tensor
    mean_log: Tensor
    mean_log_error: Tensor

    def log_evidence(self, num: int) -> Estimate:
        return log_mean_weight(self.log_sum, self.log_sum_squares, num)

    def elbo(self, num: int) -> Estimate:
        return Estimate.mean(self.mean_log, self.mean_log_error)


def _joined(parts: list[_Weights]) -> _Weights:
    return _Weights(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _weigh(joint: Joint, q: Any, x: Tensor, num: int, chunk_size: int) -> _Weights:
    """Draw ``num`` latents of each example and sum their importance weights."""
    log_sum = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
    log_sum_squares = log_sum.clone()
    logs = _Moments()
    for z, log_q in _particles(q, num, chunk_size):
        log_w = (joint.log_likelihood(z, x) + joint.log_prior(z) - log_q).double()
        log_sum = torch.logaddexp(log_sum, log_w.logsumexp(0))
        log_sum_squares = torch.logaddexp(log_sum_squares, (2 * log_w).logsumexp(0))
        logs.add(log_w.unsqueeze(0))
    mean, error = logs.mean_and_error()
    return _Weights(log_sum, log_sum_squares, mean[0], error[0])


def _particles(q: Any, num: int, chunk_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield draws z [S, N, d] from q(z|x) and their log densities [S, N], ``num`` in all."""
    (rows,) = q.batch_shape
    for part in chunks(num, max(1, chunk_size // rows)):
        fresh = q.expand(q.batch_shape)  # a flow holds all that was drawn from it
        z = fresh.sample((part.stop - part.start,))
        yield z, fresh.log_prob(z)


def _score(joint: Joint, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p(x|z) and the reconstruction error [S, N], NaN where there is no such thing."""
    with _no_validation():
        likelihood = joint.likelihood(z, x)
        log_likelihood = likelihood.log_prob(x)
    none = torch.full_like(log_likelihood, torch.nan)
    if getattr(joint.model, "autoregressive", False):
        return log_likelihood, none
    try:
        error = (likelihood.mean - x).square()
    except NotImplementedError:
        return log_likelihood, none
    return log_likelihood, error.flatten(2).mean(-1)


def _moments(q: Any) -> tuple[Tensor, Tensor]:
    """Return q's mean and standard deviations [N, d], of draws where it has no others."""
    try:
        loc, scale = q.mean, q.stddev
    except (NotImplementedError, AttributeError):
        draws = q.expand(q.batch_shape).sample((NUM_MOMENT_DRAWS,))
        loc, scale = draws.mean(0), draws.std(0)
    return loc.clone(), scale.clamp(min=1e-4)


def _difference(one: Estimate, other: Estimate) -> Estimate:
    """Subtract estimates of the same examples from independent draws."""
    assert one.per_example is not None
    assert one.per_example_error is not None
    assert other.per_example is not None
    assert other.per_example_error is not None
    error = torch.hypot(one.per_example_error, other.per_example_error)
    return Estimate.mean(one.per_example - other.per_example, error)


def _check_density(q: Any, exact: str | None = None) -> None:
    if has_exact_density(q):
        return
    if getattr(_innermost(q), "learned_density", False):
        if exact is None:
            return
        raise ValueError(
            f"{exact} needs a guide with an exact density: found one whose density is learned, so "
            "that the bound would be the discriminator's claim; iw_svi and ais need none"
        )
    raise ValueError("the guide's posterior must have a density, found a point (Delta)")


def _innermost(q: Any) -> Any:
    while hasattr(q, "base_dist"):
        q = q.base_dist
    return q


# --- the aggregate posterior ---------------------------------------------------------------------


@torch.no_grad()
def latents(
    model: Callable,
    guide: Callable,
    x: Tensor,
    *,
    mean: bool = False,
    num_draws: int = 1,
    chunk_size: int = 4096,
) -> Tensor:
    r"""Return the latents of each example: draws from q(z|x), or the mean.

    Args:
        model: As in :func:`elbo`.
        guide: As in :func:`elbo`.
        x: Examples [N, \*event].
        mean: Whether to return E_q z, that of 256 draws where the guide has no other.
        num_draws: S, how many draws.
        chunk_size: How many examples are encoded at once.

    Returns:
        Means [N, d], or draws [S, N, d].

    Example:
        >>> from pyro_vae.guides import Gaussian
        >>> from pyro_vae.models import VAE, Bernoulli
        >>> model = VAE(MLP(2, 16), Bernoulli(), latent_dim=2, event_shape=(16,))
        >>> guide = Gaussian(MLP(16, 8), latent_dim=2)
        >>> latents(model, guide, torch.ones(5, 16), num_draws=3).shape
        torch.Size([3, 5, 2])
    """
    joint = Joint(model, x)
    found = []
    with evaluation_mode(model, guide):
        for rows in chunks(len(x), chunk_size):
            q = posterior(guide, x[rows], joint)
            found.append(_moments(q)[0] if mean else q.sample((num_draws,)))
    return torch.cat(found, 0 if mean else 1)


class MarginalKL(NamedTuple):
    """How far the aggregate posterior is from the prior, and what z tells of x.

    Attributes:
        marginal_kl: KL(q(z) ‖ p(z)), q(z) the mixture over all examples, in nats.
        mutual_information: I_q(x; z) = E KL(q(z|x) ‖ p(z)) − KL(q(z) ‖ p(z)), at most log N.
    """

    marginal_kl: Estimate
    mutual_information: Estimate


@torch.no_grad()
def marginal_kl(
    model: Callable,
    guide: Callable,
    x: Tensor,
    num_samples: int = 2000,
    *,
    chunk_size: int = PAIRS,
) -> MarginalKL:
    r"""Estimate KL(q(z) ‖ p(z)) and the mutual information, q(z) the mixture over all examples.

    .. math:: q(z) = \tfrac{1}{N} \sum_j q(z|x_j), \qquad
        \mathrm{KL} = \mathbb{E}_{q(z)} [\log q(z) - \log p(z)], \qquad
        I = \mathbb{E}_{q(z, x)} [\log q(z|x) - \log q(z)]

    Both expectations over the same draws, q(z) exactly at each.

    Args:
        model: As in :func:`elbo`.
        guide: As in :func:`elbo`, with an exact density.
        x: All examples of the mixture [N, \*event].
        num_samples: Draws from q(z), at least 2, of as many different examples as there are.
        chunk_size: How many pairs of a draw and an example are looked at together.

    Raises:
        ValueError: For a guide whose density is learned, numbers out of range, or what
            :class:`Joint` refuses.

    References:
        | ELBO surgery: yet another way to carve up the variational evidence lower bound (Hoffman,
        | Johnson, 2016)
        | http://approximateinference.org/accepted/HoffmanJohnson2016.pdf

        | Taming VAEs (Rezende, Viola, 2018), section 5.2
        | https://arxiv.org/abs/1810.00597

    Example:
        >>> from pyro_vae.guides import Gaussian
        >>> from pyro_vae.models import VAE, Bernoulli
        >>> model = VAE(MLP(2, 16), Bernoulli(), latent_dim=2, event_shape=(16,))
        >>> found = marginal_kl(model, Gaussian(MLP(16, 8), latent_dim=2), torch.ones(5, 16))
        >>> found.mutual_information  # equal examples: z cannot tell them apart
        0 ± 0
    """
    check_least(num_samples=(num_samples, 2), chunk_size=(chunk_size, 1))
    joint = Joint(model, x)
    num = len(x)
    rounds = math.ceil(num_samples / num)
    index = torch.cat([torch.randperm(num, device=x.device) for _ in range(rounds)])[:num_samples]
    width = min(num, max(1, math.isqrt(chunk_size)))
    draws, conditional = [], []
    with evaluation_mode(model, guide):
        for part in chunks(num_samples, width):
            q = posterior(guide, x[index[part]], joint)
            _check_density(q, exact="marginal_kl")
            draws.append(q.sample())
            conditional.append(q.log_prob(draws[-1]))
        z, log_conditional = torch.cat(draws), torch.cat(conditional).double()
        log_q = torch.full_like(log_conditional, -math.inf)
        for columns in chunks(num, width):
            q = posterior(guide, x[columns], joint)
            for part in chunks(num_samples, max(1, chunk_size // width)):
                points = z[part].unsqueeze(1).expand(-1, len(x[columns]), -1)
                log_prob = q.expand(q.batch_shape).log_prob(points).double()
                log_q[part] = torch.logaddexp(log_q[part], log_prob.logsumexp(1))
        log_q -= math.log(num)
        log_prior = joint.log_prior(z).double()
    return MarginalKL(_sample_mean(log_q - log_prior), _sample_mean(log_conditional - log_q))


@torch.no_grad()
def aggregate_mmd(
    model: Callable,
    guide: Callable,
    x: Tensor,
    *,
    mmd: MMD | None = None,
    chunk_size: int = PAIRS,
) -> Estimate:
    r"""Estimate MMD² between q(z) and p(z), with all examples on one side and as many prior draws.

    The unbiased estimate, in tiles: pairs of N examples are N², memory is not. The standard error
    is that of a U-statistic's first-order terms; under q(z) = p(z), where these vanish, it is too
    large rather than too small.

    Args:
        model: As in :func:`elbo`.
        guide: As in :func:`elbo`; no density is needed.
        x: Examples [N, \*event], at least 2.
        mmd: Whose kernel; by default :class:`~pyro_vae.divergences.MMD`'s.
        chunk_size: How many pairs are looked at together.

    Raises:
        ValueError: For numbers out of range, or what :class:`Joint` refuses.

    References:
        | A Kernel Two-Sample Test (Gretton et al., 2012), equation 3 and section 4.1
        | https://jmlr.org/papers/v13/gretton12a.html

    Example:
        >>> from pyro_vae.guides import Gaussian
        >>> from pyro_vae.models import VAE, Bernoulli
        >>> model = VAE(MLP(2, 16), Bernoulli(), latent_dim=2, event_shape=(16,))
        >>> guide = Gaussian(MLP(16, 8), latent_dim=2)
        >>> bool(abs(aggregate_mmd(model, guide, torch.rand(50, 16)).value) < 0.5)
        True
    """
    check_least(chunk_size=(chunk_size, 1))
    if len(x) < 2:
        raise ValueError(f"x must hold at least 2 examples, found {len(x)}")
    mmd = MMD() if mmd is None else mmd
    joint = Joint(model, x)
    side = max(1, math.isqrt(chunk_size))
    z = latents(model, guide, x, chunk_size=side)[0]
    draws = joint.prior(len(z)).sample()
    num = len(z)

    def row_means(a: Tensor, b: Tensor, *, same: bool) -> Tensor:
        """Return the mean over b of k(a, b), without the pairs of a row with itself."""
        sums = torch.zeros(len(a), dtype=torch.float64, device=a.device)
        for rows in chunks(len(a), side):
            for columns in chunks(len(b), side):
                kernel = mmd.kernel_matrix(a[rows], b[columns])
                if same and rows == columns:
                    kernel.fill_diagonal_(0.0)
                sums[rows] += kernel.sum(1, dtype=torch.float64)
        return sums / (len(b) - same)

    in_z = row_means(z, z, same=True)
    in_draws = row_means(draws, draws, same=True)
    across, back = row_means(z, draws, same=False), row_means(draws, z, same=False)
    value = float(in_z.mean() - across.mean() - back.mean() + in_draws.mean())
    variance = 4 * (in_z - across).var() / num + 4 * (in_draws - back).var() / num
    return Estimate(value, float(variance.sqrt()))


@torch.no_grad()
def log_det_cov(
    model: Callable, guide: Callable, x: Tensor, num_draws: int = 10, *, chunk_size: int = 4096
) -> Estimate:
    r"""Estimate log det Cov q(z) over the dimensions of z: 0 for a standard normal.

    .. math:: \tfrac{1}{d} \log \det \mathrm{Cov}_{q(z)}[z]

    The standard error is that of the bootstrap over examples.

    Args:
        model: As in :func:`elbo`.
        guide: As in :func:`elbo`; no density is needed.
        x: Examples [N, \*event], more than d.
        num_draws: Draws of z for each.
        chunk_size: How many examples are encoded at once.

    Raises:
        ValueError: For fewer examples than d + 1, or what :class:`Joint` refuses.

    References:
        | InfoVAE: Balancing Learning and Inference in Variational Autoencoders (Zhao, Song, Ermon,
        | 2017), section 5.3
        | https://arxiv.org/abs/1706.02262

    Example:
        >>> from pyro_vae.guides import Gaussian
        >>> from pyro_vae.models import VAE, Bernoulli
        >>> model = VAE(MLP(2, 16), Bernoulli(), latent_dim=2, event_shape=(16,))
        >>> guide = Gaussian(MLP(16, 8), latent_dim=2)
        >>> bool(abs(log_det_cov(model, guide, torch.rand(50, 16)).value) < 2)
        True
    """
    z = latents(model, guide, x, num_draws=num_draws, chunk_size=chunk_size).double()
    num, d = z.shape[1:]
    if num <= d:
        raise ValueError(f"x must hold more examples than z has dimensions: found {num} and {d}")
    mean = z.mean(0)
    first = mean
    second = torch.einsum("sni,snj->nij", z, z) / len(z)

    def statistic(rows: Tensor) -> Tensor:
        loc = first[rows].mean(0)
        covariance = second[rows].mean(0) - torch.outer(loc, loc)
        return torch.linalg.slogdet(covariance * (num / (num - 1)))[1] / d

    return _bootstrap(statistic, num, x.device)


@torch.no_grad()
def active_units(
    model: Callable,
    guide: Callable,
    x: Tensor,
    *,
    threshold: float = ACTIVE_VARIANCE,
    chunk_size: int = 4096,
) -> Estimate:
    r"""Count the dimensions of z that depend on x: those with Var_x E_q[z_i|x] > 0.01.

    The standard error is that of the bootstrap over examples: 0 where no variance is near the
    threshold. ``per_example`` holds the variances of the dimensions [d].

    Args:
        model: As in :func:`elbo`.
        guide: As in :func:`elbo`; no density is needed. A guide without a mean in closed form has
            that of 256 draws, whose own variance is taken off.
        x: Examples [N, \*event], at least 2.
        threshold: Of the variance.
        chunk_size: How many examples are encoded at once.

    Raises:
        ValueError: For a single example, or what :class:`Joint` refuses.

    References:
        | Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov, 2016), section 5.2
        | https://arxiv.org/abs/1509.00519

    Example:
        >>> from pyro_vae.guides import Gaussian
        >>> from pyro_vae.models import VAE, Bernoulli
        >>> model = VAE(MLP(2, 16), Bernoulli(), latent_dim=2, event_shape=(16,))
        >>> active_units(model, Gaussian(MLP(16, 8), latent_dim=2), torch.ones(5, 16)).value
        0.0
    """
    if len(x) < 2:
        raise ValueError(f"x must hold at least 2 examples, found {len(x)}")
    joint = Joint(model, x)
    means, noise = [], []
    with evaluation_mode(model, guide):
        for rows in chunks(len(x), chunk_size):
            q = posterior(guide, x[rows], joint)
            try:
                means.append(q.mean)
                noise.append(torch.zeros_like(means[-1]))
            except (NotImplementedError, AttributeError):
                draws = q.sample((NUM_MOMENT_DRAWS,))
                means.append(draws.mean(0))
                noise.append(draws.var(0) / NUM_MOMENT_DRAWS)
    mean, own = torch.cat(means).double(), torch.cat(noise).double()

    def variances(rows: Tensor) -> Tensor:
        return mean[rows].var(0) - own[rows].mean(0)

    everything = torch.arange(len(x), device=x.device)
    found = _bootstrap(lambda rows: (variances(rows) > threshold).sum(), len(x), x.device)
    return found._replace(per_example=variances(everything))


def _sample_mean(values: Tensor) -> Estimate:
    """Return the mean of independent draws [S] and its standard error."""
    return Estimate(float(values.mean()), float(values.std() / len(values) ** 0.5))


def _bootstrap(statistic: Callable[[Tensor], Tensor], num: int, device: torch.device) -> Estimate:
    """Return a statistic of ``num`` rows and its spread over resampled ones."""
    value = float(statistic(torch.arange(num, device=device)))
    resampled = [
        statistic(torch.randint(num, (num,), device=device)).double() for _ in range(NUM_RESAMPLES)
    ]
    return Estimate(value, float(torch.stack(resampled).std()))


# --- labels --------------------------------------------------------------------------------------


class ClassDistribution(NamedTuple):
    """How the classes of samples are distributed.

    Attributes:
        cross_entropy: l_ce = Σ_k c_k (log c_k − log ĉ_k), 0 where the samples have the classes of
            the data.
        of_test: The same of test images in the place of samples, what there is to reach.
        classifier_error: Of the classifier, on the test images.
        true: c, of the training labels [K].
        sampled: ĉ, of the samples [K].
    """

    cross_entropy: Estimate
    of_test: Estimate
    classifier_error: Estimate
    true: Tensor
    sampled: Tensor


def class_distribution(
    model: Callable,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    num_samples: int = 2000,
    *,
    hidden_dims: tuple[int, ...] = (256,),
    num_steps: int = 500,
    batch_size: int = 128,
    chunk_size: int = 4096,
) -> ClassDistribution:
    r"""Hold the classes of the model's samples against those of the data.

    .. math:: l_{ce}(c, \hat c) = -c^\top (\log \hat c - \log c)

    c is the distribution of the training labels, ĉ the mean of a classifier's probabilities over
    mean images of prior draws (samples, where the decoder is autoregressive). The classifier, a
    small network, is trained here. Even with the right classes l_ce is positive: about
    (K − 1)/(2 ``num_samples``), and what the classifier's errors add, which ``of_test`` shows.

    Args:
        model: As in :func:`elbo`.
        train: Images [N, \*event] and labels [N], from 0.
        test: The same, which the classifier does not see.
        num_samples: Draws from the model.
        hidden_dims: Of the classifier.
        num_steps: Of Adam, to train it.
        batch_size: Of these steps.
        chunk_size: How many latents are decoded at once.

    Raises:
        ValueError: For missing or unfitting labels, labels of a single class, none of the test's
            classes in the training split, numbers out of range, or what :class:`Joint` refuses.

    References:
        | InfoVAE: Balancing Learning and Inference in Variational Autoencoders (Zhao, Song, Ermon,
        | 2017), section 5.3
        | https://arxiv.org/abs/1706.02262

    Example:
        >>> from pyro_vae.models import VAE, Bernoulli
        >>> model = VAE(MLP(2, 16), Bernoulli(), latent_dim=2, event_shape=(16,))
        >>> y = torch.arange(40) % 2
        >>> x = y[:, None] * torch.ones(16)
        >>> found = class_distribution(model, (x, y), (x, y), 100, num_steps=50)
        >>> found.classifier_error.value, found.sampled.shape
        (0.0, torch.Size([2]))
    """
    check_least(num_samples=(num_samples, 2), num_steps=(num_steps, 1), batch_size=(batch_size, 1))
    (x, y), (test_x, test_y) = _labelled("train", train), _labelled("test", test)
    joint = Joint(model, x)
    _check_classes(y, test_y)
    for name, labels in (("train", y), ("test", test_y)):
        if labels.is_floating_point() or bool((labels < 0).any()):
            raise ValueError(
                f"{name}: expected labels that are whole numbers from 0, found {labels.dtype} from "
                f"{labels.min().item()}"
            )
    num_classes = int(max(y.max(), test_y.max())) + 1
    classifier = _classifier(x, y, num_classes, hidden_dims, num_steps, batch_size)
    with torch.no_grad(), evaluation_mode(model):
        true = torch.bincount(y, minlength=num_classes).to(x.dtype) / len(y)
        samples = [
            classifier(joint.reconstruct(joint.prior(part.stop - part.start).sample()))
            for part in chunks(num_samples, chunk_size)
        ]
        probs = torch.cat(samples).softmax(-1)
        on_test = torch.cat([classifier(test_x[part]) for part in chunks(len(test_x), chunk_size)])
    return ClassDistribution(
        _class_cross_entropy(true, probs),
        _class_cross_entropy(true, on_test.softmax(-1)),
        _share(on_test.argmax(-1) != test_y),
        true,
        probs.mean(0),
    )


def _classifier(
    x: Tensor,
    y: Tensor,
    num_classes: int,
    hidden_dims: tuple[int, ...],
    num_steps: int,
    batch_size: int,
) -> nn.Module:
    network = nn.Sequential(nn.Flatten(1), MLP(x[0].numel(), num_classes, hidden_dims, nn.ReLU))
    network = network.to(x)
    adam = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, num_steps)
    with torch.enable_grad():
        for _ in range(num_steps):
            rows = torch.randint(len(x), (min(batch_size, len(x)),), device=x.device)
            loss = nn.functional.cross_entropy(network(x[rows]), y[rows])
            adam.zero_grad()
            loss.backward()
            adam.step()
            schedule.step()
    return network


def _class_cross_entropy(true: Tensor, probs: Tensor) -> Estimate:
    """Return l_ce of the true classes [K] and a classifier's probabilities [S, K]."""
    mean = probs.mean(0)
    there = true > 0
    share = true[there] / mean[there]
    value = (true[there] * share.log()).sum()
    error = (probs[:, there] * share).sum(-1).std() / len(probs) ** 0.5  # delta method
    return Estimate(float(value), float(error))


@torch.no_grad()
def svm_error(
    model: Callable,
    guide: Callable,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    num_labels: int = 1000,
    *,
    chunk_size: int = 4096,
) -> Estimate:
    r"""Return the test error of a support vector machine on a few labelled latents.

    scikit-learn's ``SVC`` with its default RBF kernel, on E_q[z|x] of ``num_labels`` training
    examples drawn at random; all if there are fewer.

    Args:
        model: As in :func:`elbo`.
        guide: As in :func:`elbo`; no density is needed.
        train: Examples [N, \*event] and labels [N].
        test: The same, on which the error is measured.
        num_labels: How many labels.
        chunk_size: How many examples are encoded at once.

    Returns:
        The share of wrong labels, with its binomial standard error.

    Raises:
        ValueError: For missing or unfitting labels, labels of a single class, none of the test's
            classes among these, or what :class:`Joint` refuses.

    References:
        | InfoVAE: Balancing Learning and Inference in Variational Autoencoders (Zhao, Song, Ermon,
        | 2017), section 5.3
        | https://arxiv.org/abs/1706.02262

    Example:
        >>> from pyro_vae.guides import Gaussian
        >>> from pyro_vae.models import VAE, Bernoulli
        >>> model = VAE(MLP(2, 16), Bernoulli(), latent_dim=2, event_shape=(16,))
        >>> y = torch.arange(40) % 2
        >>> x = y[:, None] * torch.ones(16)
        >>> svm_error(model, Gaussian(MLP(16, 8), latent_dim=2), (x, y), (x, y)).value
        0.0
    """
    from sklearn.svm import SVC

    check_least(num_labels=(num_labels, 2))
    (x, y), (test_x, test_y) = _labelled("train", train), _labelled("test", test)
    rows = torch.randperm(len(x), device=x.device)[:num_labels]
    _check_classes(y[rows], test_y)
    codes = latents(model, guide, x[rows], mean=True, chunk_size=chunk_size)
    test_codes = latents(model, guide, test_x, mean=True, chunk_size=chunk_size)
    # Which draws from NumPy's global generator unless told otherwise.
    machine = SVC(random_state=int(torch.randint(1 << 31, ()))).fit(
        codes.cpu().numpy(), y[rows].cpu().numpy()
    )
    found = torch.as_tensor(machine.predict(test_codes.cpu().numpy()))
    return _share(found != test_y.cpu())


def _share(wrong: Tensor) -> Estimate:
    """Return a share of independent trials, with its binomial standard error."""
    share = float(wrong.double().mean())
    return Estimate(share, (share * (1 - share) / len(wrong)) ** 0.5, wrong.double())


def _labelled(name: str, split: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
    x, y = split
    if y is None:
        raise ValueError(f"{name} must have labels, found none")
    if y.shape != x.shape[:1]:
        raise ValueError(
            f"{name} must have a label for each example: found {list(y.shape)}, expected {len(x)}"
        )
    return x, y


def _check_classes(y: Tensor, test_y: Tensor) -> None:
    if len(y.unique()) < 2:
        raise ValueError("train: expected labels of at least two classes, found one")
    if not torch.isin(test_y, y).any():
        raise ValueError(
            f"test: expected labels of the classes in train, found {test_y.unique().tolist()} and "
            f"in train {y.unique().tolist()}"
        )
