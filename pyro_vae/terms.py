"""What one run of model and guide yields: the terms that every loss is a formula in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial, reduce
from itertools import zip_longest
from math import prod
from operator import and_
from typing import Any, NamedTuple

import pyro.poutine as poutine
import torch
from pyro.distributions import ContinuousBernoulli, Delta, MaskedDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import prune_subsample_sites, site_is_factor, site_is_subsample
from pyro.util import check_site_shape
from torch import Tensor
from torch.distributions import (
    Categorical,
    Cauchy,
    Independent,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
    biject_to,
    kl_divergence,
)

from .tracing import settled

__all__ = ["NonFiniteError", "Terms", "TracePair", "get_trace_pair", "is_standard_normal"]

PARTICLES = "num_particles_vectorized"  # Pyro's name of the plate over particles


class NonFiniteError(ArithmeticError, ValueError):
    """A loss or gradient was not finite; the parameters are those of the last good step."""


class TracePair(NamedTuple):
    """One run of the guide, and of the model at the guide's latents.

    Attributes:
        model: The model's trace, without its subsample sites.
        guide: The guide's.
    """

    model: poutine.Trace
    guide: poutine.Trace


def get_trace_pair(
    model: Callable, guide: Callable, args: tuple, kwargs: dict, max_plate_nesting: float
) -> TracePair:
    """Run the guide, then the model at its latents, and check that they fit each other.

    Args:
        model: A Pyro model.
        guide: A Pyro guide, or one of Pyro's guide messengers.
        args: Positional arguments of both.
        kwargs: Keyword arguments of both.
        max_plate_nesting: Number of batch dimensions that plates may claim.

    Raises:
        ValueError: If a latent site is in one of them only, cannot be reparameterised, has
            another shape in the one than in the other, or a batch dimension that no plate
            declares; if a plate of the guide alone draws a subsample.

    Example:
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from pyro_vae.models import gauss
        >>> pair = get_trace_pair(gauss, AutoNormal(gauss), (), {}, float("inf"))
        >>> list(pair.model.stochastic_nodes)
        ['x']
    """
    unwrapped = poutine.unwrap(guide)
    if isinstance(unwrapped, poutine.messenger.Messenger):
        guide(*args, **kwargs)
        model_trace, guide_trace = unwrapped.get_traces()
    else:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        replayed = poutine.replay(model, trace=guide_trace)
        model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
    _check_subsamples(model_trace, guide_trace)
    pair = TracePair(prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace))
    _check_match(pair)
    for site in _samples(pair.guide):
        if isinstance(_base(site["fn"]), TransformedDistribution):
            # Now: a flow remembers how it came by its last sample, and may have no inverse.
            site["unscaled_log_prob"] = _unmasked_log_prob(site)
    if is_validation_enabled():
        for trace in pair:
            for site in _samples(trace):
                check_site_shape({**site, "log_prob": _like_log_prob(site)}, max_plate_nesting)
    return pair


class Terms:
    r"""The terms of an objective, per particle and data point.

    S is the number of particles, N that of data points: the batch of the *data plates*, the plates
    that hold every latent site, of model and guide (1 where no plate does). What lies in further
    plates within is summed. All log densities are in nats.

    Each data point stands for ``scale`` of them: for full size over batch size under a subsampled
    plate, times what ``poutine.scale`` says of all sites alike. ``total`` applies it, once; nothing
    else here is scaled by it. Scales of single sites (``poutine.scale`` around one, a subsampled
    plate within the data plates) are in the terms.

    Observed sites outside the data plates (a ``pyro.factor`` on the weights, say) belong to no data
    point. They are in ``shared``.

    What is masked has log density 0 and KL 0. A data point whose every site is masked, in model
    and guide (padding), is not there at all: see ``present``.

    Args:
        pairs: One pair of traces with all particles in a plate, or one for each particle.
        run_model: Runs the model alone, for draws from the prior of several latent sites.
        analytic_kl: Whether ``kl`` is in closed form where torch knows one.

    Attributes:
        num_particles: S.
        num_points: N.
        scale: How many data points each stands for, a number or [N].
        plates: The data plates, outermost first.
        latents: Names of the model's latent sites, in its order.

    Raises:
        ValueError: If the model has no latent site, or a data plate no size or another one in the
            guide.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(torch.ones(2), 1.0).to_event(1))
        >>> pair = get_trace_pair(model, guide, (torch.zeros(5),), {}, float("inf"))
        >>> terms = Terms([pair])
        >>> terms.log_likelihood.shape, terms.z.shape
        (torch.Size([1, 5]), torch.Size([1, 5, 2]))
        >>> terms.kl  # ½‖(1, 1)‖² for each data point
        tensor([[1., 1., 1., 1., 1.]])
        >>> terms.total(terms.kl)
        tensor(5.)
    """

    def __init__(
        self,
        pairs: list[TracePair],
        run_model: Callable[[], list[poutine.Trace]] | None = None,
        *,
        analytic_kl: bool = True,
    ) -> None:
        self.pairs = pairs
        self.run_model = run_model
        self.analytic_kl = analytic_kl
        model, guide = pairs[0]
        self.latents = tuple(model.stochastic_nodes)
        if not self.latents:
            raise ValueError("the model has no latent site: found observed sites only")
        latent_sites = [model.nodes[name] for name in self.latents]
        guide_sites = [guide.nodes[name] for name in guide.stochastic_nodes]
        particles = [f for f in latent_sites[0]["cond_indep_stack"] if f.name == PARTICLES]
        self._particle_dim = particles[0].dim if particles else None
        self.num_particles = particles[0].size if particles else len(pairs)
        self.plates = _data_plates(latent_sites, guide_sites)
        self.num_points = prod(int(plate.size) for plate in self.plates)
        self._plate_scale = prod(_subsampling(plate) for plate in self.plates)
        self.scale = self._plate_scale * self._common_factor

    # --- the terms -------------------------------------------------------------------------------

    @cached_property
    def log_likelihood(self) -> Tensor:
        """Log p(x|z) [S, N], over all observed sites in the data plates."""
        return self._log_density(lambda pair: filter(self._is_data, _samples(pair.model)))

    @cached_property
    def shared(self) -> Tensor:
        """Log density of the observed sites outside the data plates [S], minus the guide's."""

        def one(pair: TracePair) -> Tensor:
            total = self._zeros()[:, 0]
            for sign, site in self._outside(pair):
                # In no data plate: all of the scale is the site's own.
                total = total + sign * self._to_particles(_log_prob(site) * site["scale"])
            return total

        return torch.cat([one(pair) for pair in self.pairs])

    @cached_property
    def log_prior(self) -> Tensor:
        """Log p(z) [S, N], over all latent sites."""
        return self._log_density(lambda pair: (pair.model.nodes[name] for name in self.latents))

    @cached_property
    def log_guide(self) -> Tensor:
        """Log q(z|x) [S, N], over all sites of the guide: auxiliary ones and factors included."""
        return self._log_density(lambda pair: filter(self._in_data_dims, _samples(pair.guide)))

    @cached_property
    def kl(self) -> Tensor:
        r"""KL(q(z|x) ‖ p(z)) [S, N]: site by site in closed form, else log q − log p at z.

        A closed form is that of a site given the ones before it, which needs an order common to
        model and guide; without one all are estimated at z.
        """
        return self.kl_by_dim.sum(-1)

    @cached_property
    def kl_by_dim(self) -> Tensor:
        """The parts of ``kl`` [S, N, K]: by coordinate where a closed form splits so, else by site.

        What is estimated at z is the last part, of all its sites together.
        """
        closed, rest = self._kl_parts
        return torch.cat([*closed.values(), *([] if rest is None else [rest.unsqueeze(-1)])], -1)

    @cached_property
    def log_weight(self) -> Tensor:
        """Log p(x, z) − log q(z|x) [S, N], the importance weights."""
        return self.log_likelihood + self.log_prior - self.log_guide

    @cached_property
    def z(self) -> Tensor:
        """All latents of each data point, in unconstrained space and in one vector [S, N, d]."""
        return torch.cat([self._latent_vector(pair.model) for pair in self.pairs])

    def sample_prior(self) -> Tensor:
        """Draw as many latents from p(z), in unconstrained space [S, N, d].

        A single latent site is drawn from its distribution. Several may depend on one another:
        the model is run.
        """
        if len(self.latents) == 1:
            (name,) = self.latents
            sites = [dict(pair.model.nodes[name]) for pair in self.pairs]
            for site in sites:
                site["value"] = site["fn"]()
            return torch.cat([self._unconstrained_vector(site) for site in sites])
        if self.run_model is None:
            raise ValueError(
                f"several latent sites {list(self.latents)} are drawn by running the model: "
                "expected run_model, found None"
            )
        return torch.cat([self._latent_vector(trace) for trace in self.run_model()])

    def observed_site(self, name: str | None = None) -> str:
        """Return the name of the observed site in the data plates, or ``name`` if it is one.

        Raises:
            ValueError: If there is no such site, or several to choose from, factors aside.
        """
        found = [s["name"] for s in _observed(self.pairs[0].model) if not site_is_factor(s)]
        names = [n for n in found if self._is_data(self.pairs[0].model.nodes[n])]
        names = [n for n in names if n == name or name is None]
        if len(names) != 1:
            expected = "one in the data plates, or a name" if name is None else repr(name)
            raise ValueError(f"observed site: expected {expected}, found {found}")
        return names[0]

    def reconstruction(self, site: str | None = None) -> tuple[Tensor, Tensor]:
        r"""Return an observed site's value x and the mean x̂ of its distribution.

        Args:
            site: Its name; may be left out where the data plates hold one observed site, factors
                aside.

        Returns:
            ``(x, x_hat)``, each [S, N, \*shape].

        Raises:
            ValueError: If there is no such site, or its distribution has no mean.
        """
        name = self.observed_site(site)
        x, x_hat = [], []
        for pair in self.pairs:
            observed = pair.model.nodes[name]
            value, mean = torch.broadcast_tensors(observed["value"], _mean(observed))
            event_dim = observed["fn"].event_dim
            x.append(self._to_points(value, observed, event_dim))
            x_hat.append(self._to_points(mean, observed, event_dim))
        return torch.cat(x), torch.cat(x_hat)

    def unmasked(self, site: str) -> Tensor:
        """Return which data points of an observed site no mask hides [S, N].

        Raises:
            ValueError: If a mask hides a part of some data points.
        """
        masks = []
        for pair in self.pairs:
            observed = pair.model.nodes[site]
            mask = _mask(observed)
            if mask is None:
                mask = torch.ones((), dtype=torch.bool, device=observed["value"].device)
            points = self._to_points(mask, observed, 0)
            points = points.reshape(*points.shape[:2], -1)
            whole = points.shape[-1] == 1 or settled((points == points[..., :1]).all)
            if not whole or _is_masked(getattr(observed["fn"], "base_dist", None)):
                raise ValueError(
                    f"observed site {site!r}: expected a mask of whole data points, found one "
                    "that hides parts of them"
                )
            masks.append(points[..., 0])
        return torch.cat(masks)

    def log_likelihood_without(self, site: str) -> Tensor:
        """Log density [S, N] of the observed sites in the data plates, but for one."""
        return self._log_density(
            lambda pair: (s for s in _samples(pair.model) if self._is_data(s) and s["name"] != site)
        )

    def aggregate(self) -> tuple[Tensor, Tensor]:
        """Return samples of q(z) = E_x q(z|x), and as many of p(z), in independent groups.

        A group is z of all points ``present``, for one particle: particles of one point are no
        independent samples of q(z). Where there is one data point they are, and all in one group.

        Returns:
            ``(z, draws)``, each [S, M, d], M = N without a mask; [1, S, d] for one data point.
        """
        z, draws = self.z, self.sample_prior()
        if self.present is not None:
            z, draws = z[:, self.present], draws[:, self.present]
        if self.num_points == 1:
            z, draws = z.transpose(0, 1), draws.transpose(0, 1)
        return z, draws

    @cached_property
    def present(self) -> Tensor | None:
        """Which data points have a site that no mask hides [N]; None if nothing masks all sites.

        A mask of the latents alone, of one observed site or in the model alone hides no data
        point.
        """
        sites = self._sites_of_points(self.pairs[0])
        masks = [(mask, site) for site in sites if (mask := _mask(site)) is not None]
        if len(masks) < len(sites):
            return None
        present = [self._to_points(mask, site, 0) for mask, site in masks]
        return torch.stack([p.transpose(0, 1).flatten(1).any(-1) for p in present]).any(0)

    def mean(self, values: Tensor) -> Tensor:
        """Average over particles and the data points at hand: values [S, N, *] → [*]."""
        values = values.mean(0)
        if self.present is None:
            return values.mean(0)
        return self._blank(values).sum(0) / self.present.sum().clamp(min=1)

    def total(self, values: Tensor) -> Tensor:
        """Average over particles and sum over the data set: values [S, N], or one for all.

        The sum is over the whole data set, of which a minibatch is scaled up, as in Pyro's ELBOs.
        """
        values = values.expand(self.num_particles, self.num_points).mean(0)
        return (self.scale * self._blank(values)).sum()

    # --- what a loss may ask for -----------------------------------------------------------------

    def check_standard_normal(self, who: str) -> None:
        """Raise a ValueError, in the name of ``who``, unless p(z) is a standard normal."""
        for name in self.latents:
            fn = self.pairs[0].model.nodes[name]["fn"]
            if not is_standard_normal(fn):
                raise ValueError(
                    f"{who} needs a standard normal prior at site {name!r}, found {describe(fn)}"
                )

    def check_decomposes(self, who: str) -> None:
        """Raise a ValueError, in the name of ``who``, unless log p(x, z) is a sum over points.

        So that a logarithm may be taken of each point's average over particles. Three things stand
        against it: a subsampled plate that does not hold all sites, whose scale would stand inside
        the logarithm; an observed site outside the data plates that depends on the latents; and
        particles that are run one by one and draw different subsamples of the data.
        """
        names = [site["name"] for _, site in self._outside(self.pairs[0])]
        shared = self.shared
        if names and not settled(lambda: torch.allclose(shared, shared[:1], equal_nan=True)):
            raise ValueError(
                f"{who}: the observed sites {names} lie outside the plates that hold all latent "
                "sites and depend on them; expected observations of single data points there"
            )
        data = {plate.name for plate in self.plates}
        for site in self._sites_of_points(self.pairs[0]):
            for frame in site["cond_indep_stack"]:
                within = frame.name not in data and not _is_one(self._factor(site))
                if _subsampling(frame) != 1 and within:
                    raise ValueError(
                        f"{who}: site {site['name']!r} lies in the subsampled plate "
                        f"{frame.name!r} ({frame.size} of {frame.full_size}), which does not hold "
                        "all latent sites; its scale would stand inside the logarithm. Expected "
                        f"subsampling of {sorted(data) or 'no plate'} only"
                    )
        others = self.pairs[1:] if self._plate_scale != 1 else []
        for site in filter(self._is_data, _samples(self.pairs[0].model)):
            for pair in others:
                value = pair.model.nodes[site["name"]]["value"]
                if not settled(partial(torch.equal, value, site["value"])):
                    raise ValueError(
                        f"{who}: each particle draws its own subsample of the plates "
                        f"{sorted(data)}, so that site {site['name']!r} has other data in each; "
                        "expected vectorize_particles=True"
                    )

    def nonfinite(self) -> list[str]:
        """Name what is not finite: parameters, values and log densities of sites."""
        return list(dict.fromkeys(found for pair in self.pairs for found in _nonfinite(pair)))

    # --- shapes ----------------------------------------------------------------------------------

    def _is_data(self, site: dict) -> bool:
        """Say whether a site of the model is observed and lies in all data plates."""
        return site["is_observed"] and set(site["cond_indep_stack"]) >= set(self.plates)

    def _in_data_dims(self, site: dict) -> bool:
        """Say whether a site of the guide, which may name its plates otherwise, does so."""
        dims = {frame.dim for frame in site["cond_indep_stack"]}
        return dims >= {plate.dim for plate in self.plates}

    def _sites_of_points(self, pair: TracePair) -> list[dict]:
        """Return the sites in all data plates, the model's latent ones first."""
        return [
            *(pair.model.nodes[name] for name in self.latents),
            *filter(self._is_data, _samples(pair.model)),
            *filter(self._in_data_dims, _samples(pair.guide)),
        ]

    def _outside(self, pair: TracePair) -> list[tuple[int, dict]]:
        """Return the observed sites outside the data plates, the guide's with the sign −1."""
        model = [(1, site) for site in _observed(pair.model) if not self._is_data(site)]
        return model + [(-1, s) for s in _observed(pair.guide) if not self._in_data_dims(s)]

    def _blank(self, values: Tensor) -> Tensor:
        """Put 0 where a data point is not present: [N, *]."""
        if self.present is None:
            return values
        present = self.present.reshape(-1, *(1,) * (values.dim() - 1))
        return values.where(present, values.new_zeros(()))

    @cached_property
    def _common_factor(self) -> float | Tensor:
        """What ``poutine.scale`` says of all sites alike: a number or [N]; 1 if they differ."""
        sites = self._sites_of_points(self.pairs[0])
        factors = [site["scale"] / self._plate_scale for site in sites]
        if not all(_same(factor, factors[0]) for factor in factors[1:]):
            return 1.0
        factor = factors[0]
        if not isinstance(factor, Tensor) or factor.dim() == 0:
            return factor
        points = self._to_points(factor, sites[0], 0)
        if points[0].numel() != self.num_points:
            return 1.0
        return points[0].reshape(-1)

    def _factor(self, site: dict) -> float | Tensor:
        """Return the part of a site's scale that is its own."""
        common = self._common_factor
        if isinstance(common, Tensor) or not _is_one(common):
            return 1.0  # all of it is in `scale`
        return site["scale"] / self._plate_scale

    def _zeros(self) -> Tensor:
        value = self.pairs[0].model.nodes[self.latents[0]]["value"]
        count = self.num_particles if len(self.pairs) == 1 else 1
        return value.new_zeros(count, self.num_points)

    def _to_points(self, value: Tensor, site: dict, event_dim: int) -> Tensor:
        """Bring the batch dimensions to [S, N, *plates within, *event]."""
        batch = list(value.shape[: value.dim() - event_dim])
        event = list(value.shape[value.dim() - event_dim :])
        front = {plate.dim: int(plate.size) for plate in self.plates}
        if self._particle_dim is not None:
            front = {self._particle_dim: self.num_particles, **front}
        depth = max([len(batch), *(-dim for dim in front)])
        batch = [1] * (depth - len(batch)) + batch
        claimed = {frame.dim for frame in site["cond_indep_stack"]}
        # What neither a plate claims nor is larger than 1 vanishes.
        within = [
            dim
            for dim in range(-depth, 0)
            if dim not in front and (dim in claimed or batch[dim] > 1)
        ]
        order = [dim + depth for dim in (*front, *within)]
        value = value.reshape(batch + event).movedim(order, list(range(len(order))))
        rest = [batch[dim] for dim in within] + event
        value = value.reshape([batch[dim] for dim in front] + rest)
        value = value.expand([*front.values(), *rest])
        count = 1 if self._particle_dim is None else self.num_particles
        return value.reshape([count, self.num_points, *rest])

    def _to_particles(self, log_prob: Tensor) -> Tensor:
        """Sum a log density over all but particles: [S]."""
        dim = self._particle_dim
        if dim is None or log_prob.dim() < -dim:
            count = self.num_particles if dim is not None else 1
            return log_prob.sum().expand(count)
        return log_prob.transpose(0, dim).reshape(log_prob.shape[dim], -1).sum(-1)

    def _density(self, site: dict) -> Tensor:
        """Return a site's log density [S, N], with the scale that is its own."""
        log_prob = _log_prob(site) * self._factor(site)
        points = self._to_points(log_prob, site, 0)
        return points.reshape(*points.shape[:2], -1).sum(-1)

    def _log_density(self, sites: Callable[[TracePair], Iterable[dict]]) -> Tensor:
        parts = [sum(map(self._density, sites(pair)), self._zeros()) for pair in self.pairs]
        return torch.cat(parts)

    def _unconstrained_vector(self, site: dict) -> Tensor:
        transform = biject_to(site["fn"].support)
        value = transform.inv(site["value"])
        gain = transform.codomain.event_dim - transform.domain.event_dim  # a matrix from a vector
        points = self._to_points(value, site, site["fn"].event_dim - gain)
        return points.reshape(*points.shape[:2], -1)

    def _latent_vector(self, trace: poutine.Trace) -> Tensor:
        return torch.cat([self._unconstrained_vector(trace.nodes[n]) for n in self.latents], -1)

    @cached_property
    def _kl_parts(self) -> tuple[dict[str, Tensor], Tensor | None]:
        """KL by site [S, N, k] where in closed form, and log q − log p [S, N] of the rest."""
        closed: dict[str, list[Tensor]] = {}
        rest: list[Tensor] = []
        for pair in self.pairs:
            in_guide = [n for n in pair.guide.stochastic_nodes if n in self.latents]
            analytic = self.analytic_kl and in_guide == list(self.latents)
            estimates = []
            for q in filter(self._in_data_dims, _samples(pair.guide)):
                p = pair.model.nodes[q["name"]] if q["name"] in self.latents else None
                kl = self._closed_form(q, p) if analytic and p is not None else None
                if kl is not None:
                    closed.setdefault(q["name"], []).append(kl)
                else:
                    log_p = 0.0 if p is None else self._density(p)
                    estimates.append(self._density(q) - log_p)
            if estimates:
                rest.append(sum(estimates, self._zeros()))
        parts = {name: torch.cat(values) for name, values in closed.items()}
        return parts, torch.cat(rest) if rest else None

    def _closed_form(self, q: dict, p: dict) -> Tensor | None:
        """Return KL(q ‖ p) of one site [S, N, k], or None where torch knows no closed form."""
        if not (_same(q["scale"], p["scale"]) and q["mask"] is p["mask"]):
            return None
        kl = _kl_divergence(q["fn"], p["fn"])
        if kl is None:
            return None
        event_dim = kl.dim() - max(len(q["fn"].batch_shape), len(p["fn"].batch_shape))
        trailing = (1,) * event_dim
        if q["mask"] is not None:
            mask = torch.as_tensor(q["mask"], device=kl.device)
            kl = kl.where(mask.reshape(mask.shape + trailing), kl.new_zeros(()))
        factor = self._factor(q)
        if isinstance(factor, Tensor):
            factor = factor.reshape(factor.shape + trailing)
        points = self._to_points(kl * factor, q, event_dim)
        return points.reshape(*points.shape[:2], -1)


# --- sites ---------------------------------------------------------------------------------------


def is_standard_normal(fn: Any) -> bool:
    """Say whether a distribution is N(0, I), under whatever expands or masks it.

    Example:
        >>> import pyro.distributions as dist
        >>> is_standard_normal(dist.Normal(torch.zeros(3), 1.0).to_event(1))
        True
        >>> is_standard_normal(dist.LogNormal(0.0, 1.0))
        False
    """
    fn = _base(fn)
    if isinstance(fn, Normal):
        return settled(lambda: (fn.loc == 0).all() and (fn.scale == 1).all())
    if isinstance(fn, MultivariateNormal):
        eye = torch.eye(fn.event_shape[0], dtype=fn.loc.dtype, device=fn.loc.device)
        return settled(lambda: (fn.loc == 0).all() and (fn.scale_tril == eye).all())
    return False


def describe(fn: Any) -> str:
    """Name a distribution, with the parameters of a normal."""
    base = _base(fn)
    if isinstance(base, Normal):
        return f"Normal with loc {_range(base.loc)} and scale {_range(base.scale)}"
    return type(base).__name__


def _range(value: Tensor) -> str:
    low, high = float(value.detach().min()), float(value.detach().max())
    return f"{low:g}" if low == high else f"{low:g} … {high:g}"


def _base(fn: Any) -> Any:
    while isinstance(fn, Independent | MaskedDistribution | ExpandedDistribution):
        fn = fn.base_dist
    return fn


def _kl_divergence(q: Any, p: Any) -> Tensor | None:
    """Return KL by coordinate [*batch, *event] where it splits so, else [*batch]; or None."""
    # A Delta's registered KL leaves out the log density it carries; a ContinuousBernoulli's from
    # a Uniform is infinite in torch.
    if isinstance(_base(q), Delta | ContinuousBernoulli):
        return None
    if _is_masked(q) or _is_masked(p):  # the two masks may differ
        return None
    if (
        isinstance(q, Independent)
        and isinstance(p, Independent)
        and q.reinterpreted_batch_ndims == p.reinterpreted_batch_ndims
    ):
        q, p = q.base_dist, p.base_dist
    if (
        isinstance(q, MultivariateNormal)
        and isinstance(p, Independent)
        and isinstance(normal := p.base_dist, Normal)
        and p.reinterpreted_batch_ndims == 1
    ):  # torch knows it for two multivariate normals only
        scale_tril = normal.scale.diag_embed()
        p = MultivariateNormal(normal.loc, scale_tril=scale_tril, validate_args=False)
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        return None


def _is_masked(fn: Any) -> bool:
    return isinstance(fn, MaskedDistribution) or (
        hasattr(fn, "base_dist") and _is_masked(fn.base_dist)
    )


def _mask(site: dict) -> Tensor | None:
    """Return the mask around a site and of its distribution, None if there is none."""
    masks = (site["mask"], getattr(site["fn"], "_mask", None))
    found = [
        torch.as_tensor(m, device=site["value"].device)
        for m in masks
        if m is not None and m is not True
    ]
    return reduce(and_, found) if found else None


def _mean(site: dict) -> Tensor:
    fn = site["fn"]
    try:
        if not isinstance(_base(fn), Categorical | Cauchy):  # theirs is NaN
            return fn.mean
    except (NotImplementedError, AttributeError):
        pass
    raise ValueError(
        f"observed site {site['name']!r} must have a mean, found {type(_base(fn)).__name__}"
    )


def _samples(trace: poutine.Trace) -> Iterator[dict]:
    """Yield the sites with a density: not those of ``pyro.deterministic``."""
    for site in trace.nodes.values():
        if site["type"] == "sample" and not site["infer"].get("_deterministic"):
            yield site


def _observed(trace: poutine.Trace) -> Iterator[dict]:
    return (site for site in _samples(trace) if site["is_observed"])


def _log_prob(site: dict) -> Tensor:
    """Return a site's log density, masked but not scaled."""
    log_prob = site.get("unscaled_log_prob")  # Pyro's name of it in a trace
    log_prob = _unmasked_log_prob(site) if log_prob is None else log_prob
    return scale_and_mask(log_prob, 1.0, site["mask"])


def _unmasked_log_prob(site: dict) -> Tensor:
    try:
        return site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    except ValueError as error:
        raise ValueError(f"log density of site {site['name']!r}: {error}") from error


def _like_log_prob(site: dict) -> Tensor:
    """Return something of the shape of a site's log density, at no cost."""
    fn, value = site["fn"], torch.as_tensor(site["value"])
    batch = value.shape[: value.dim() - fn.event_dim]
    try:
        return torch.empty(()).expand(torch.broadcast_shapes(fn.batch_shape, batch))
    except RuntimeError as error:
        raise ValueError(
            f"site {site['name']!r}: found a value of shape {list(value.shape)}, expected "
            f"{list(fn.batch_shape + fn.event_shape)}, that of its distribution"
        ) from error


def _subsampling(frame: Any) -> float:
    return 1.0 if frame.full_size is None else frame.full_size / frame.size


def _is_one(value: float | Tensor) -> bool:
    return not isinstance(value, Tensor) and value == 1


def _same(a: float | Tensor, b: float | Tensor) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or settled(lambda: torch.equal(a, b))
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and abs(a - b) <= 1e-12 * abs(a)


def _data_plates(latents: list[dict], guide_sites: list[dict]) -> list[Any]:
    """Return the plates that hold every latent site, of model and guide, outermost first."""
    plates = []
    for frame in latents[0]["cond_indep_stack"]:
        if not frame.vectorized or frame.name == PARTICLES:
            continue
        if not all(frame in site["cond_indep_stack"] for site in latents):
            continue
        if frame.size < 0:
            raise ValueError(f"plate {frame.name!r} must have a size, found none")
        others = [[f for f in s["cond_indep_stack"] if f.dim == frame.dim] for s in guide_sites]
        if not all(others):
            continue
        for site, (other, *_) in zip(guide_sites, others, strict=True):
            if (other.size, _subsampling(other)) != (frame.size, _subsampling(frame)):
                raise ValueError(
                    f"guide site {site['name']!r}: plate {other.name!r} is {other.size} of "
                    f"{other.full_size}; expected {frame.size} of {frame.full_size}, as the "
                    f"model's plate {frame.name!r}"
                )
        plates.append(frame)
    return sorted(plates, key=lambda frame: frame.dim)


def _check_match(pair: TracePair) -> None:
    model, guide = set(pair.model.stochastic_nodes), set(pair.guide.stochastic_nodes)
    if missing := sorted(model - guide):
        raise ValueError(
            f"the guide must sample the model's latent sites {missing}: found {sorted(guide)}"
        )
    for site in _samples(pair.guide):
        name, fn = site["name"], site["fn"]
        if name not in model and not site["infer"].get("is_auxiliary"):
            raise ValueError(
                f"guide site {name!r} is no latent site of the model, which has {sorted(model)}; "
                "expected infer={'is_auxiliary': True} if this is meant"
            )
        if not fn.has_rsample:
            raise ValueError(
                f"guide site {name!r} must be reparameterisable (have rsample), "
                f"found {type(_base(fn)).__name__}"
            )
        if name in model:
            p = pair.model.nodes[name]["fn"]
            found, expected = site["value"].shape, p.batch_shape + p.event_shape
            sizes = zip_longest(reversed(found), reversed(expected), fillvalue=1)
            if any(a != b for a, b in sizes) or fn.event_dim != p.event_dim:
                raise ValueError(
                    f"guide site {name!r}: found shape {list(found)} with {fn.event_dim} event "
                    f"dimensions, expected {list(expected)} with {p.event_dim}, as in the model"
                )


def _check_subsamples(model: poutine.Trace, guide: poutine.Trace) -> None:
    """Raise a ValueError if the guide draws data points that the model knows nothing of."""
    for name, site in guide.nodes.items():
        if not site_is_subsample(site):
            continue
        size, count = site["fn"].size, site["fn"].subsample_size
        if count is None or count == size:
            continue
        if name not in model.nodes:
            raise ValueError(
                f"guide plate {name!r} draws a subsample, {count} of {size}, but the model has "
                "no plate of this name; expected the same name in both, so that the model "
                "sees the same data points"
            )
        if model.nodes[name]["fn"].subsample_size != count:
            raise ValueError(
                f"guide plate {name!r} draws a subsample, {count} of {size}, but the model's plate "
                f"does not: expected pyro.plate({name!r}, {size}, subsample_size={count}) there, "
                "or a guide that takes its data whole (subsample_size = None)"
            )


def _nonfinite(pair: TracePair) -> Iterator[str]:
    for owner, trace in (("guide", pair.guide), ("model", pair.model)):
        for name, site in trace.nodes.items():
            if site["type"] == "param" and not site["value"].isfinite().all():
                yield f"parameter {name!r} of the {owner}"
        for site in _samples(trace):
            name = site["name"]
            if not torch.as_tensor(site["value"]).isfinite().all():
                yield f"the value of {owner} site {name!r}"
            elif not _log_prob(site).isfinite().all():
                yield f"log_prob of {owner} site {name!r}"
