"""p(z), p(x|z) and q(z|x) of single data points, and estimates over them.

What :mod:`pyro_vae.evaluate` and :mod:`pyro_vae.ais` stand on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from numbers import Integral
from typing import Any, NamedTuple

import pyro
import pyro.poutine as poutine
import torch
from pyro.distributions import Delta
from pyro.poutine.util import prune_subsample_sites, site_is_factor, site_is_subsample
from torch import Size, Tensor, nn
from torch.distributions import constraints

from .guides.amortized import Amortized
from .terms import PARTICLES
from .unconstrained import _no_validation

__all__ = [
    "Estimate",
    "Joint",
    "check_least",
    "chunks",
    "evaluation_mode",
    "has_exact_density",
    "log_mean_weight",
    "posterior",
]

_REAL = (constraints.real, constraints.real_vector)


class Estimate(NamedTuple):
    r"""A mean over examples, and how far it may be from its limit.

    Attributes:
        value: The estimate.
        std_error: Its standard error. Of a mean over examples or over draws of z, Monte Carlo's:
            from what infinitely many draws would give *for these examples*. Where the function that
            returns it says so (MMD², log det Cov, active units, shares of wrong labels, BDMC's
            upper bound and gap), that over examples.
        per_example: The examples' own estimates [N], where it is a mean of such.
        per_example_error: Their standard errors [N].
        effective: How many equal importance weights those of each example are worth [N], where
            it is the log of their mean: :math:`(\sum w)^2 / \sum w^2`. Below 2 a single weight
            dominates: the estimate is a lower bound in expectation still, but its standard error,
            which cannot exceed 1 nat an example, is not to be trusted.

    Example:
        >>> estimate = Estimate.mean(torch.tensor([1.0, 3.0]), torch.tensor([0.3, 0.4]))
        >>> estimate
        2 ± 0.25
        >>> estimate.data_std_error
        1.0
    """

    value: float
    std_error: float
    per_example: Tensor | None = None
    per_example_error: Tensor | None = None
    effective: Tensor | None = None

    @classmethod
    def mean(cls, per_example: Tensor, per_example_error: Tensor) -> Estimate:
        """Average independent estimates of single examples [N], with their errors [N]."""
        error = per_example_error.double().square().sum().sqrt() / len(per_example)
        return cls(float(per_example.double().mean()), float(error), per_example, per_example_error)

    @property
    def data_std_error(self) -> float | None:
        """The standard error as an estimate for the population that the examples are drawn from.

        The spread over examples, Monte Carlo error included, over √N; None where there are no
        examples' own estimates, or fewer than two.
        """
        if self.per_example is None or len(self.per_example) < 2:
            return None
        return float(self.per_example.double().std() / len(self.per_example) ** 0.5)

    def __repr__(self) -> str:
        return f"{self.value:.6g} ± {self.std_error:.2g}"


def log_mean_weight(log_sum: Tensor, log_sum_squares: Tensor, num: int) -> Estimate:
    r"""Return the log of the mean of ``num`` importance weights of each example.

    .. math:: \log \tfrac{1}{k} \sum_s w_s, \qquad
        \mathrm{se}^2 = \frac{k}{k-1} \left[ \frac{\sum_s w_s^2}{(\sum_s w_s)^2}
        - \frac{1}{k} \right]

    The error is that of the delta method, and at most 1 however degenerate the weights: see
    ``effective`` of :class:`Estimate`. A single weight says nothing about it: NaN.

    Args:
        log_sum: log Σ w [N].
        log_sum_squares: log Σ w² [N].
        num: k.

    Example:
        >>> log_w = torch.zeros(10, 3)
        >>> log_mean_weight(log_w.logsumexp(0), (2 * log_w).logsumexp(0), 10)
        0 ± 0
    """
    share = (log_sum_squares - 2 * log_sum).exp()  # one over the effective sample size
    if num > 1:
        error = ((share - 1 / num).clamp(min=0) * (num / (num - 1))).sqrt()
        error = error.where(share - 1 / num > 1e-12, error.new_zeros(()))
    else:
        error = torch.full_like(share, torch.nan)
    effective = share.reciprocal().nan_to_num(0.0)  # where all weights are 0
    return Estimate.mean(log_sum - math.log(num), error)._replace(effective=effective)


class Joint:
    r"""The densities p(z) and p(x|z) of each data point, of a VAE or of another Pyro model.

    The model has one latent vector z and one observed value x a data point, in one plate. A
    :class:`~pyro_vae.models.VAE` is asked directly; any other model is run, with z in the place of
    its latent site. Scales of plates and handlers are left out: every data point counts once.

    Log densities are in nats, summed over the dimensions of an event.

    Args:
        model: A :class:`~pyro_vae.models.VAE`, or a Pyro model whose only argument is x.
        x: Data [N, \*event], for their shape.

    Attributes:
        site: Name of the latent site.
        observed: Name of the observed site.
        latent_dim: d.
        event_shape: The event of x.

    Raises:
        ValueError: If x is empty or not what the model takes, or the model has several latent or
            observed sites, a latent that is no real vector, or draws a subsample of x.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 0.1).to_event(1), obs=x)
        >>> x = torch.zeros(5, 2)
        >>> joint = Joint(model, x)
        >>> joint.log_likelihood(torch.zeros(3, 5, 2), x).shape
        torch.Size([3, 5])
    """

    def __init__(self, model: Callable, x: Tensor) -> None:
        if not isinstance(x, Tensor) or x.dim() == 0 or len(x) == 0:
            found = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must be a tensor of at least one row, found {found}")
        self.model = model
        self.is_vae = all(hasattr(model, name) for name in ("prior", "likelihood", "latent_dim"))
        self._x = x[:1]
        if self.is_vae:
            self._look_at_vae(x)
        else:
            self._look_at_trace(x)

    def _look_at_vae(self, x: Tensor) -> None:
        model: Any = self.model
        self.site, self.observed = getattr(model, "site", "z"), getattr(model, "observed", "x")
        self.latent_dim, self.event_shape = int(model.latent_dim), Size(model.event_shape)
        if x.shape[1:] != self.event_shape:
            raise ValueError(
                f"x has rows of shape {tuple(x.shape[1:])}, expected {tuple(self.event_shape)}, "
                "as the model's"
            )
        check = getattr(getattr(model, "observation", None), "check", None)
        if check is not None:
            check(x)

    def _look_at_trace(self, x: Tensor) -> None:
        devices = [x.device] if x.device.type == "cuda" else []
        with poutine.block(), torch.no_grad(), torch.random.fork_rng(devices=devices):
            trace = poutine.trace(self.model).get_trace(x)
        for site in trace.nodes.values():
            if site_is_subsample(site) and site["fn"].subsample_size not in (None, len(x)):
                raise ValueError(
                    f"the model's plate {site['name']!r} draws a subsample, "
                    f"{site['fn'].subsample_size} of {len(x)}; expected a model that takes x whole"
                )
        trace = prune_subsample_sites(trace)
        latent = trace.stochastic_nodes
        observed = [
            name
            for name in trace.observation_nodes
            if not site_is_factor(trace.nodes[name])
            and not trace.nodes[name]["infer"].get("_deterministic")
        ]
        for what, names in (("latent", latent), ("observed", observed)):
            if len(names) != 1:
                raise ValueError(f"the model must have one {what} site, found {sorted(names)}")
        (self.site,), (self.observed,) = latent, observed
        fn = trace.nodes[self.site]["fn"]
        support = fn.support
        while isinstance(support, constraints.independent):
            support = support.base_constraint
        shape = tuple(fn.batch_shape) + tuple(fn.event_shape)
        if fn.event_dim != 1 or shape[:-1] != (len(x),) or support not in _REAL:
            raise ValueError(
                f"latent site {self.site!r} must be one real vector a data point, [{len(x)}, d] "
                f"with one event dimension: found {list(shape)} with {fn.event_dim}, on {support}"
            )
        self.latent_dim = int(shape[-1])
        self._zero = torch.zeros_like(trace.nodes[self.site]["value"][0])
        self.event_shape = trace.nodes[self.observed]["fn"].event_shape
        found = trace.nodes[self.observed]["value"].shape
        if found != (len(x), *self.event_shape):
            raise ValueError(
                f"observed site {self.observed!r} must have one event a data point: found "
                f"{list(found)}, expected {[len(x), *self.event_shape]}"
            )

    def _sites(self, z: Tensor, x: Tensor) -> tuple[Any, Any]:
        r"""Run the model at z [\*, N, d]; return the latent and the observed site."""
        flat = z.reshape(-1, *z.shape[-2:]) if z.dim() > 2 else z
        plate: AbstractContextManager = nullcontext()
        if flat.dim() > 2:
            plate = pyro.plate(PARTICLES, len(flat), dim=-2)
        conditioned = poutine.condition(self.model, data={self.site: flat})
        with poutine.block(), poutine.trace() as tracer, plate:
            conditioned(x)
        nodes = tracer.trace.nodes
        return nodes[self.site], nodes[self.observed]

    def prior(self, num: int) -> Any:
        """Return p(z) with the batch shape [num]."""
        if self.is_vae:
            return self.model.prior().expand((num,))  # type: ignore[attr-defined]
        x = self._x.expand(num, *self._x.shape[1:])
        return self._sites(self._zero.expand(num, -1), x)[0]["fn"]

    def likelihood(self, z: Tensor, x: Tensor) -> Any:
        """Return p(x|z), z [*, N, d]; an autoregressive decoder is given x itself."""
        if self.is_vae:
            x = x.expand(*z.shape[:-1], *self.event_shape)
            return self.model.likelihood(z, x)  # type: ignore[attr-defined]
        return self._sites(z, x)[1]["fn"]

    def log_prior(self, z: Tensor) -> Tensor:
        """Return log p(z), [*, N, d] → [*, N]."""
        with _no_validation():
            return self.prior(z.shape[-2]).log_prob(z)

    def log_likelihood(self, z: Tensor, x: Tensor) -> Tensor:
        r"""Return log p(x|z), z [*, N, d] and x [N, \*event] → [*, N]."""
        with _no_validation():
            return self.likelihood(z, x).log_prob(x).reshape(z.shape[:-1])

    def sample(self, num: int) -> tuple[Tensor, Tensor]:
        r"""Draw from the model itself: z [num, d] and x [num, \*event]."""
        if self.is_vae:
            model: Any = self.model
            z = model.prior().sample((num,))
            return z, model.sample(num, z=z)
        x = self._x.expand(num, *self._x.shape[1:])
        with poutine.block():
            nodes = poutine.trace(poutine.uncondition(self.model)).get_trace(x).nodes
        return nodes[self.site]["value"], nodes[self.observed]["value"]

    def reconstruct(self, z: Tensor) -> Tensor:
        r"""Return the mean of x given z [num, d]: [num, \*event]; a sample if autoregressive."""
        if self.is_vae:
            return self.model.reconstruct(z)  # type: ignore[attr-defined]
        x = self._x.expand(len(z), *self._x.shape[1:])
        return self.likelihood(z, x).mean


def posterior(guide: Callable, x: Tensor, joint: Joint) -> Any:
    """Return q(z|x), with batch shape [N] and event shape [d].

    Args:
        guide: A guide of this library, or any Pyro guide with the model's latent site alone.
        x: Data [N, *event].
        joint: The model's densities.

    Raises:
        ValueError: If the guide has other sites, or its site another shape.
    """
    if isinstance(guide, Amortized):
        name, q = guide.site, guide.get_posterior(x)
        found = [name]
    else:
        with poutine.block():
            trace = prune_subsample_sites(poutine.trace(guide).get_trace(x))
        found = list(trace.stochastic_nodes)
        q = trace.nodes[joint.site]["fn"] if found == [joint.site] else None
    if found != [joint.site]:
        raise ValueError(f"the guide must have the site {joint.site!r} alone, found {found}")
    expected = ((len(x),), (joint.latent_dim,))
    if (tuple(q.batch_shape), tuple(q.event_shape)) != expected:
        raise ValueError(
            f"guide site {joint.site!r}: found batch shape {list(q.batch_shape)} and event shape "
            f"{list(q.event_shape)}, expected {list(expected[0])} and {list(expected[1])}"
        )
    return q


def has_exact_density(q: Any) -> bool:
    """Say whether a distribution's ``log_prob`` may stand in an importance weight.

    A learned density is what a discriminator claims, and a point has none.

    Example:
        >>> import pyro.distributions as dist
        >>> has_exact_density(dist.Normal(torch.zeros(2), 1.0).to_event(1))
        True
        >>> has_exact_density(dist.Delta(torch.zeros(2), event_dim=1))
        False
    """
    while not isinstance(q, Delta) and hasattr(q, "base_dist"):
        q = q.base_dist
    return not isinstance(q, Delta) and not getattr(q, "learned_density", False)


@contextmanager
def evaluation_mode(*modules: object) -> Iterator[None]:
    """Put modules into evaluation mode, and back: dropout and batch statistics are for training.

    Args:
        modules: Models and guides; what is no module is left alone.

    Example:
        >>> layer = torch.nn.Dropout()
        >>> with evaluation_mode(layer):
        ...     layer.training
        False
        >>> layer.training
        True
    """
    parts = [
        part for module in modules if isinstance(module, nn.Module) for part in module.modules()
    ]
    before = [part.training for part in parts]
    for part in parts:
        part.training = False
    try:
        yield
    finally:
        for part, training in zip(parts, before, strict=True):
            part.training = training


def check_least(**values: tuple[object, int]) -> None:
    """Raise a ValueError for the first argument that is no whole number, or less than its least."""
    for name, (value, least) in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise ValueError(f"{name} must be a whole number, found {value!r}")
        if int(value) < least:
            raise ValueError(f"{name} must be at least {least}, found {value}")


def chunks(num: int, size: int) -> Iterator[slice]:
    """Cut ``range(num)`` into slices of at most ``size``.

    Raises:
        ValueError: If ``size`` is not positive.
    """
    check_least(chunk_size=(size, 1))
    for start in range(0, num, size):
        yield slice(start, min(start + size, num))
